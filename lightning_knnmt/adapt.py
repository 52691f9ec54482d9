"""Adapting a model by retrieval in a few lines of Python, without a Trainer.

model = load_pretrained("MODEL")
datastore = build_datastore(model, "train.pt", "train.en", "memory")
retrieval = prepare_retrieval(model, datastore, "valid.pt", "valid.en")
translator = Translator(*model, retrieval)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_knnmt.data import LinePolicy, TextPair, encode_corpus
from lightning_knnmt.models import KeyLayer
from lightning_knnmt.pretrained import Pretrained
from lightning_knnmt.retrieval import (
    AutoChoice,
    CombinerChoice,
    Datastore,
    DatastorePlan,
    FlatChoice,
    IndexChoice,
    LearnedCombiner,
    Metric,
    OtherText,
    Retrieval,
    TunedCombiner,
    ensure_datastore,
)
from lightning_knnmt.retrieval.tuned import KINDS


def build_datastore(
    model: Pretrained,
    source: Path | str,
    target: Path | str,
    directory: Path | str,
    *,
    key_layer: KeyLayer = "opl_input",
    other_text: OtherText = "reject",
    max_tokens: int = 4096,
) -> Datastore:
    """Builds a datastore from two aligned text files, or finds that this was done before.

    Args:
        model: What `load_pretrained` returned.
        source: UTF-8 text, a sentence a line.
        target: Its translation, line by line. Pairs with an empty side are left out.
        directory: Where the datastore is, or will be.
        key_layer: Whose inputs the keys are; see `DatastorePlan`.
        other_text: What to do if the folder holds a datastore of other text: "reject" it, "use" it
            as it is, or "rebuild" it.
        max_tokens: Ids in a batch, padding included.

    Raises:
        TextError: If the files do not exist, or do not match.
        DatastoreError: If the folder holds something else, or another model's datastore.
    """
    text = TextPair(Path(source), Path(target))
    corpus = encode_corpus(text, model.tokenizer, policy=LinePolicy(empty_lines="skip"))
    path = Path(directory)
    plan = DatastorePlan(
        path.parent, path, key_layer=key_layer, other_text=other_text, max_tokens=max_tokens
    )
    return ensure_datastore(model.model, model.tokenizer, corpus, plan)


def prepare_retrieval(
    model: Pretrained,
    datastore: Datastore,
    source: Path | str | None = None,
    target: Path | str | None = None,
    *,
    combiner: str = "distance",
    values: Mapping[str, Any] | None = None,
    index: IndexChoice | Literal["auto", "flat"] = "auto",
    metric: Metric = "l2",
    max_tokens: int = 4096,
) -> Retrieval:
    """Chooses an index and a combiner for a datastore, on held-out text.

    What was chosen before for the same text and settings is used again.

    Args:
        model: What `load_pretrained` returned; it must have made the datastore's keys.
        datastore: What `build_datastore` returned, or `Datastore.open`.
        source: Held-out text, a sentence a line; None to search exactly and, unless `values` has
            them, with the combiner's usual values.
        target: Its translation.
        combiner: A kind of `TunedCombiner` or a variant of `LearnedCombiner`.
        values: Settings of the combiner that are not chosen.
        index: "auto" (the fastest that finds 95 % of the exact neighbours), "flat" (exact), or any
            `IndexChoice`.
        metric: "l2" (squared) or "ip".
        max_tokens: Ids in a batch, padding included.

    Raises:
        StaleDatastoreError: If another model or tokenizer made the datastore.
        ValueError: If text is missing where it is needed.
    """
    given = dict(values or {})
    choice: CombinerChoice
    if combiner not in KINDS:
        choice = LearnedCombiner(combiner, **given)
    elif source is None:
        choice = TunedCombiner.of(combiner, tune=False, **given)
    else:
        choice = TunedCombiner.of(combiner, **given)
    if source is None or target is None:
        if choice.needs_tuning or source is not None or target is not None:
            raise ValueError(
                f"combiner={combiner!r} is chosen on held-out text: give source and target, two "
                "files of sentences that are not in the datastore."
            )
        valid, index = None, FlatChoice() if index == "auto" else index
    else:
        text = TextPair(Path(source), Path(target))
        valid = encode_corpus(text, model.tokenizer, policy=LinePolicy(empty_lines="skip"))
    if isinstance(index, str):
        index = AutoChoice() if index == "auto" else FlatChoice()
    return Retrieval.over(
        datastore,
        model.model,
        model.tokenizer,
        valid,
        index,
        choice,
        metric,
        max_tokens=max_tokens,
    )

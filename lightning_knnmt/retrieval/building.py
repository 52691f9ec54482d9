"""Builds a datastore from a model and a corpus, on any number of ranks, or finds the one there."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lightning_knnmt.data import Corpus, Tokenizer
from lightning_knnmt.models import KEY_LAYERS, KeyLayer, Transformer
from lightning_knnmt.retrieval.datastore import (
    FORMAT_VERSION,
    Datastore,
    reject_foreign_datastore,
)
from lightning_knnmt.retrieval.errors import (
    DatastoreBusyError,
    MissingDatastoreError,
    StaleDatastoreError,
)
from lightning_knnmt.retrieval.estimate import IndexKind, reject_if_too_large
from lightning_knnmt.retrieval.ranks import (
    all_or_none,
    gathered,
    rank,
    rank_zero_first,
    world_size,
)
from lightning_knnmt.retrieval.teacher_forcing import (
    Precision,
    batches_of,
    fingerprint,
    teacher_forced,
)
from lightning_knnmt.retrieval.writer import DatastoreWriter, wait_for_build

logger = logging.getLogger(__name__)

OtherText = Literal["reject", "use", "rebuild"]


@dataclass(frozen=True)
class DatastorePlan:
    """Where a datastore is, or will be, and of what.

    Attributes:
        datastores: The folder of all datastores; this one's name in it follows from the text, the
            tokenizer, the weights and the precision.
        directory: One datastore's own folder instead.
        rebuild: Build even if there is one that fits.
        key_layer: Whose inputs the keys are: the output projection's ("opl_input") or the last
            decoder layer's feed-forward network's ("ffn_input"), as in the code of Khandelwal et
            al. (2021).
        other_text: What to do if `directory` holds a datastore of other text than the training
            text: "reject" it, "use" it as it is, or "rebuild" it.
        index: The kind of index that will be made of it, which must fit too.
        max_tokens: Ids in a batch, padding included.
    """

    datastores: Path
    directory: Path | None = None
    rebuild: bool = False
    key_layer: KeyLayer = "opl_input"
    other_text: OtherText = "reject"
    index: IndexKind = "auto"
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        for name, allowed in (("key_layer", KEY_LAYERS), ("other_text", get_args(OtherText))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"knn.{name} is {value!r}; choose one of {', '.join(allowed)}.")

    def place(self, corpus: Corpus | None, tokenizer: Tokenizer, model_fingerprint: str) -> Path:
        """The folder of the datastore of a model's weights and a text.

        Raises:
            MissingDatastoreError: If there is no text, and no directory is given.
        """
        if self.directory is not None:
            return self.directory.resolve()  # what a link points to is replaced, not the link
        if corpus is None:
            raise MissingDatastoreError(
                "There is no training text to build a datastore from: add it, or give the folder "
                "of a datastore, knn.directory=DIR."
            )
        sources = f"{FORMAT_VERSION} {model_fingerprint} {corpus.digest} {tokenizer.digest}"
        key = hashlib.sha256(sources.encode()).hexdigest()
        return self.datastores / f"{corpus.name.replace('/', '_')}-{key[:12]}"


def ensure_datastore(
    model: Transformer,
    tokenizer: Tokenizer,
    corpus: Corpus | None,
    plan: DatastorePlan,
    *,
    precision: Precision = Precision(),  # noqa: B008  # immutable
) -> Datastore:
    """The datastore of a model's present weights, built if there is none that fits.

    Every rank calls this.

    Args:
        model: Makes the keys.
        tokenizer: The one that made the corpus's ids.
        corpus: The text that is stored; None to use the datastore in `plan.directory` alone.
        plan: Where.
        precision: The arithmetic of the pass.

    Raises:
        StaleDatastoreError: If `plan.directory` holds a datastore of another model, tokenizer or
            layer, or, unless `plan.other_text` allows it, of other text.
        ForeignFilesError: If it holds what is not a datastore's.
        DatastoreTooLargeError: If it or its index would not fit.
    """
    ours = fingerprint(model, precision.name, plan.key_layer)
    where = plan.place(corpus, tokenizer, ours)

    def find() -> Datastore | None:
        wait_for_build(where)  # two runs that need the same datastore share it
        return _open_if_there(where)

    while True:
        if not plan.rebuild:
            found = rank_zero_first(find, lambda: _open_if_there(where))
            if found is not None and not _is_to_be_rebuilt(found, corpus, plan):
                found.require(
                    fingerprint=ours,
                    tokenizer_digest=tokenizer.digest,
                    key_layer=plan.key_layer,
                )
                if rank() == 0:
                    entries = f"{len(found):,}"
                    logger.info("Datastore of %s entries, built before: %s", entries, where)
                return found
        if corpus is None:
            raise MissingDatastoreError(
                f"There is no datastore in {where} and no training text to build one from: add the "
                "text, or give the folder of a datastore, knn.directory=DIR."
            )
        try:
            return build(model, tokenizer, corpus, where, plan, precision)
        except DatastoreBusyError:  # its builder began since we looked: wait for it after all
            if plan.rebuild or world_size() > 1:
                raise


def _is_to_be_rebuilt(found: Datastore, corpus: Corpus | None, plan: DatastorePlan) -> bool:
    """Whether a datastore is of other text and `plan` says to replace it."""
    theirs = found.manifest.corpus_digest
    if corpus is None or theirs == corpus.digest:
        return False
    named = f"The datastore in {found.directory} was built from other text"
    if plan.other_text == "reject":
        raise StaleDatastoreError(
            f"{named} ({found.manifest.corpus_name}, digest {theirs[:12]}) than the training text "
            f"({corpus.name}, digest {corpus.digest[:12]}): set knn.other_text=rebuild to replace "
            "it, knn.other_text=use to retrieve from it as it is, or give another knn.directory."
        )
    if rank() == 0:
        what = "it is rebuilt" if plan.other_text == "rebuild" else "it is used as it is"
        logger.warning("%s than the training text; %s (knn.other_text).", named, what)
    return plan.other_text == "rebuild"


def check_buildable(
    model: Transformer,
    tokenizer: Tokenizer,
    corpus: Corpus | None,
    plan: DatastorePlan,
    *,
    precision: Precision = Precision(),  # noqa: B008
    keys_change: bool = False,
    check: Callable[[int, int, bool], None] | None = None,
) -> None:
    """Raises if `ensure_datastore`, with the same arguments, could not succeed; builds nothing.

    Every rank calls this.

    Args:
        keys_change: Whether the model will be trained first, so that its present keys are not those
            that a datastore will hold.
        check: What else must be right with the datastore's shape: given M, D and whether a
            datastore will be built.

    Raises:
        DatastoreError: See `ensure_datastore`.
    """

    def check_all() -> None:
        ours = fingerprint(model, precision.name, plan.key_layer)
        where = plan.place(corpus, tokenizer, ours)
        reject_foreign_datastore(where, rebuild=plan.rebuild)
        found = None if plan.rebuild else _open_if_there(where, verify=False)
        if found is not None and _is_to_be_rebuilt(found, corpus, plan):
            found = None
        if found is not None and not keys_change:
            found.require(
                fingerprint=ours, tokenizer_digest=tokenizer.digest, key_layer=plan.key_layer
            )
        if found is None or keys_change:
            if corpus is None:
                raise MissingDatastoreError(
                    f"There is no datastore in {where} and no training text to build one from: add "
                    "the text, or give the folder of a datastore, knn.directory=DIR."
                )
            rows = EntryRows.of(corpus, tokenizer)
            num_entries, key_dim = rows.num_entries, model.output_projection.in_features
            reject_if_too_large(where, num_entries, key_dim, plan.index)
        else:
            num_entries, key_dim = found.keys.shape
        if check is not None:
            check(num_entries, key_dim, found is None or keys_change)

    rank_zero_first(check_all, lambda: None)


@dataclass(frozen=True)
class EntryRows:
    """Which tokens of a corpus are stored, and in which row each of them.

    Tokens that no output may contain, such as <unk>, are not stored: a neighbour that holds one
    could only take probability away from real words.

    Attributes:
        never: The tokens that are left out, ascending.
        offsets: The first row of each sentence, and the number of all rows, [S + 1].
        num_tokens: How many tokens the corpus has, those left out included.
    """

    never: tuple[int, ...]
    offsets: npt.NDArray[np.int64]
    num_tokens: int

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: Tokenizer) -> "EntryRows":
        """Looks through a corpus; EOS is always stored, so no sentence is without a row."""
        never = tokenizer.vocabulary.never_emitted
        stored = _stored(corpus.target_tokens, never)
        offsets = np.zeros(len(corpus) + 1, dtype=np.int64)
        np.cumsum(
            np.add.reduceat(stored, corpus.target_offsets[:-1], dtype=np.int64), out=offsets[1:]
        )
        return cls(never, offsets, len(stored))

    @property
    def num_entries(self) -> int:
        return int(self.offsets[-1])

    def rows(
        self, sentences: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Where the tokens of whole sentences go.

        Args:
            sentences: Each token's sentence, those of a sentence adjacent, [n].
            labels: The tokens, [n].

        Returns:
            Which of them are stored, [n], and the rows of those, [number stored].
        """
        stored = _stored(labels, self.never)
        # Stored tokens before each, in this batch.
        before: npt.NDArray[np.int64] = np.cumsum(stored) - stored
        starts = np.flatnonzero(np.diff(sentences, prepend=-1))
        lengths = np.diff(starts, append=len(sentences))
        within: npt.NDArray[np.int64] = before - np.repeat(before[starts], lengths)
        return stored, (self.offsets[sentences] + within)[stored]


def _stored(tokens: npt.NDArray[Any], never: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    return np.isin(tokens, never, invert=True)


def build(
    model: Transformer,
    tokenizer: Tokenizer,
    corpus: Corpus,
    directory: Path,
    plan: DatastorePlan,
    precision: Precision,
) -> Datastore:
    """Writes every target token of a text with the key before it, and the text itself.

    Every rank calls this. A row's place follows from its sentence and position alone, and a batch's
    composition does not depend on the ranks, so any number of them writes the same bytes.

    Args:
        directory: Where the datastore will be; the old one, if any, stays until the new is whole.
    """
    key_dim = model.output_projection.in_features
    rows = EntryRows.of(corpus, tokenizer)

    def create() -> DatastoreWriter:
        reject_if_too_large(directory, rows.num_entries, key_dim, plan.index)
        return DatastoreWriter.create(directory, rows.num_entries, key_dim)

    def fill() -> None:
        _write_all(writer, model, tokenizer, corpus, rows, plan, precision)
        writer.flush()

    def commit() -> None:
        if rank() > 0:
            return
        writer.write_text(rows.offsets, corpus.source_lines(), corpus.target_lines())
        writer.commit(
            sum(rows_written),
            model_fingerprint=fingerprint(model, precision.name, plan.key_layer),
            tokenizer_digest=tokenizer.digest,
            corpus_name=corpus.name,
            corpus_digest=corpus.digest,
            key_layer=plan.key_layer,
            num_tokens_left_out=rows.num_tokens - rows.num_entries,
        )
        _report(directory, rows)

    writer = rank_zero_first(
        create, lambda: DatastoreWriter.attach(directory, rows.num_entries, key_dim)
    )
    try:
        all_or_none(fill)
        rows_written = gathered(writer.rows_written)
        all_or_none(commit)
    except BaseException:
        if rank() == 0:
            writer.abort()
        raise
    return Datastore.open(directory, verify=False)  # its digests were computed a moment ago


def _write_all(
    writer: DatastoreWriter,
    model: Transformer,
    tokenizer: Tokenizer,
    corpus: Corpus,
    rows: EntryRows,
    plan: DatastorePlan,
    precision: Precision,
) -> None:
    batches = batches_of(corpus, tokenizer.vocabulary, plan.max_tokens)
    # tqdm, as Lightning may have a rich bar on the screen and rich allows one at a time.
    bar = tqdm(
        total=writer.num_entries,
        desc="Building the datastore",
        unit=" entries",
        unit_scale=True,
        disable=None if rank() == 0 else True,  # None: only at a terminal
    )
    with bar:
        for states, labels, sentences in teacher_forced(model, batches, precision):
            values = labels.cpu().numpy()
            stored, places = rows.rows(sentences.cpu().numpy(), values)
            keys = states.of(plan.key_layer).float().cpu().numpy()
            writer.write(places, keys[stored], values[stored])
            bar.update(len(places) * world_size())


def _report(directory: Path, rows: EntryRows) -> None:
    left_out = rows.num_tokens - rows.num_entries
    skipped = (
        f"; {left_out:,} tokens ({left_out / rows.num_tokens:.2%}) are unknown to the vocabulary "
        "and were left out"
        if left_out
        else ""
    )
    logger.info("Datastore of %s entries: %s%s", f"{rows.num_entries:,}", directory, skipped)


def _open_if_there(directory: Path, verify: bool = True) -> Datastore | None:
    try:
        return Datastore.open(directory, verify)
    except MissingDatastoreError:
        return None

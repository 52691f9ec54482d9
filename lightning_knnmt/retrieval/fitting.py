"""How a run gets its combiner: values given or tuned, or a network trained on held-out text.

A choice is made once and kept beside the datastore, under a digest of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_knnmt.data import Corpus, Tokenizer
from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.files import write_atomically
from lightning_knnmt.models import DecoderStates, KeyLayer, Transformer, digest
from lightning_knnmt.retrieval.choice import IndexChoice, MeasuredIndex
from lightning_knnmt.retrieval.combiner import Combiner
from lightning_knnmt.retrieval.datastore import Datastore
from lightning_knnmt.retrieval.index import Index, Metric
from lightning_knnmt.retrieval.ranks import rank, rank_zero_first
from lightning_knnmt.retrieval.record import Record, Recorder
from lightning_knnmt.retrieval.retriever import LocalSource, Retriever
from lightning_knnmt.retrieval.teacher_forcing import (
    LabelledStates,
    Precision,
    batches_of,
    teacher_forced,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class FittedCombiner:
    """A combiner and what reports say about it.

    Attributes:
        combiner: Weighs the neighbours.
        report: Its values by the names that results.json gives them: k, knn_weight, temperature,
            combiner_parameters, combiner_seconds, ...
        path: Its file, if it was trained.
    """

    combiner: Combiner
    report: Mapping[str, float | int | None] = field(default_factory=dict)
    path: Path | None = None


class CombinerChoice(Protocol):
    """A way to get a combiner for a model and its datastore."""

    @property
    def method(self) -> str:
        """What decoding with it is called in reports."""

    @property
    def needs_tuning(self) -> bool:
        """Whether it is made on held-out text."""

    @property
    def least_entries(self) -> int:
        """How many entries the datastore must have."""

    def check(self, metric: Metric, key_layer: KeyLayer) -> None:
        """Raises if it cannot be made of such distances and keys."""

    def fit(self, text: TuningText) -> FittedCombiner:
        """The combiner of this choice, made and saved unless that has been done.

        Every rank calls this.
        """


class TuningText:
    """Held-out text, and what a model and its datastore say about it.

    One teacher-forced pass over the whole text is made when it is first needed.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        corpus: Corpus | None,
        datastore: Datastore,
        index: IndexChoice,
        metric: Metric,
        *,
        precision: Precision,
        max_tokens: int,
    ) -> None:
        """
        Args:
            model: Whose queries these are.
            tokenizer: Made the corpus's ids.
            corpus: The text; None where nothing will be chosen on it.
            datastore: Of the model's present weights.
            index: How its index is chosen.
            metric: Of that index.
            precision: The arithmetic of all passes.
            max_tokens: Ids in a batch.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.datastore = datastore
        self.base = SoftmaxDistribution(model.output_projection, tokenizer.vocabulary.never_emitted)
        self._corpus = corpus
        self._index, self._metric = index, metric
        self._precision, self._max_tokens = precision, max_tokens

    @property
    def corpus(self) -> Corpus:
        assert self._corpus is not None, "whoever needs the text has made sure of it"
        return self._corpus

    @property
    def num_entries(self) -> int:
        return len(self.datastore)

    @property
    def metric(self) -> Metric:
        return self._metric

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def states(self) -> LabelledStates:
        """Every token of the text with the states before it, on the CPU."""
        batches = batches_of(
            self.corpus, self.tokenizer.vocabulary, self._max_tokens, all_on_this_rank=True
        )
        bar = tqdm(
            total=len(self.corpus.target_tokens),
            desc="Reading the validation text",
            unit=" tokens",
            unit_scale=True,
            disable=None if rank() == 0 else True,  # None: only at a terminal
        )
        key_layer = self.datastore.manifest.key_layer
        parts = []
        with bar:
            for states, labels, sentences in teacher_forced(self.model, batches, self._precision):
                keys = states.of(key_layer)  # hidden itself, unless other keys are wanted
                parts.append([each.cpu() for each in (states.hidden, keys, labels, sentences)])
                bar.update(len(labels))
        hidden, keys, labels, sentences = (torch.cat(column) for column in zip(*parts, strict=True))
        return LabelledStates(DecoderStates(hidden, keys), labels, sentences)

    def queries(self) -> Tensor:
        """The text's queries, [M, D]: held out, as it is not in the datastore."""
        return self.states.states.of(self.datastore.manifest.key_layer)

    def index_for(self, k: int) -> MeasuredIndex:
        """An index for k neighbours; every rank must call this."""
        # Rank zero chooses and saves; the others then find its choice on the disk.
        return rank_zero_first(
            lambda: self._index.ensure(self.datastore, self._metric, k, self.queries)
        )

    def record(self, index: Index, k: int, keep_best: int = 0) -> Record:
        """What model and datastore say about the text's tokens that can be emitted.

        The others, such as <unk>, no setting can get right. Counted, they would only make the model
        look worse than it is, or better than the datastore, which holds none of them.

        Args:
            index: Over the datastore.
            k: Neighbours of each token.
            keep_best: How many of the model's best log-probabilities of each.
        """
        source = LocalSource(index, self.datastore.values)
        retriever = Retriever(source, k, self.datastore.manifest.key_layer)
        recorder = Recorder(retriever, self.base, keep_best=keep_best)
        states, labels, sentences = self.states
        never = torch.tensor(sorted(self.tokenizer.vocabulary.never_emitted))
        counted = torch.isin(labels, never, invert=True)
        recorder.write(states.select(counted), labels[counted], sentences[counted])
        return recorder.finish()

    def sources(self, index: Index, k: int) -> dict[str, Any]:
        """What every choice depends on, besides the datastore that it is kept in."""
        return {
            "corpus": self.corpus.digest,
            "index": index.description,
            "k": k,
            "output_projection": output_digest(self.model),
        }

    def kept(
        self,
        name: str,
        sources: Mapping[str, Any],
        make: Callable[[], Mapping[str, Any]],
        read: Callable[[Any], T],
    ) -> T:
        """What `make` made with these sources, made now unless that has been done.

        Every rank calls this.

        Args:
            name: The folder beside the datastore that it is kept in, as JSON.
            sources: All that it depends on.
            make: Makes it.
            read: Checks it; raises a ValueError, KeyError or TypeError if it is damaged.
        """
        path = self.datastore.directory / name / f"{kept_name(sources)}.json"

        def find_or_make() -> T:
            try:
                return read(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError):
                content = dict(make())
                write_atomically(path, json.dumps(content, indent=2) + "\n")
                logger.info("Kept in %s", path)
                return read(content)

        return rank_zero_first(find_or_make)


def output_digest(model: Transformer) -> str:
    """Digest of the output projection, which p_NMT depends on and a fingerprint leaves out."""
    return digest([], model.output_projection.state_dict())


def kept_name(sources: Mapping[str, Any]) -> str:
    """A file's name without ending, another for other sources."""
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]

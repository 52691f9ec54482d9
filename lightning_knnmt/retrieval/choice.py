"""How a run gets its index: exact, described by the user, or chosen by measuring.

A choice is made once for a datastore and saved in it; the same choice finds the saved index again.
The held-out queries that measuring needs are computed only when something is measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from lightning_knnmt.files import write_atomically
from lightning_knnmt.retrieval.auto import (
    Candidate,
    IndexReport,
    choose_index,
    exact_dtype,
    num_queries,
    spread_sample,
)
from lightning_knnmt.retrieval.checks import check_recall
from lightning_knnmt.retrieval.datastore import Datastore
from lightning_knnmt.retrieval.errors import IndexFactoryError, MissingIndexError
from lightning_knnmt.retrieval.estimate import IndexKind
from lightning_knnmt.retrieval.faiss_index import FaissIndex, check_factory, require_faiss
from lightning_knnmt.retrieval.index import FlatIndex, Index, Metric
from lightning_knnmt.retrieval.recall import Truth, measure_recall

logger = logging.getLogger(__name__)

Queries = Callable[[], Tensor]


@dataclass(frozen=True)
class MeasuredIndex:
    """An index and its recall.

    Attributes:
        index: The index.
        k: Neighbours asked for.
        recall_at_k: Share of the exact k nearest entries of held-out queries that it finds.
    """

    index: Index
    k: int
    recall_at_k: float


def measured(index: Index, k: int, datastore: Datastore, queries: Queries) -> MeasuredIndex:
    """Measures an index's recall at k against exact search."""
    exact = FlatIndex(datastore.keys, index.metric, storage_dtype=exact_dtype(datastore.keys))
    sample = spread_sample(queries(), num_queries(*datastore.keys.shape))
    return MeasuredIndex(index, k, measure_recall(index, Truth.of(exact, sample, k)))


class IndexChoice(Protocol):
    """A way to get an index for a datastore."""

    @property
    def kind(self) -> IndexKind:
        """The kind of index, for estimates of its size."""

    def check(self, num_entries: int, key_dim: int, metric: Metric) -> None:
        """Raises, before there are keys, if it could not be built over M keys of D dimensions."""

    def ensure(
        self, datastore: Datastore, metric: Metric, k: int, queries: Queries
    ) -> MeasuredIndex:
        """The index of this choice; built and saved unless that was done before.

        Args:
            k: Neighbours that will be searched for.
            queries: Computes held-out hidden states, [N, D].
        """


@dataclass(frozen=True)
class FlatChoice:
    """Exact search at any size.

    Attributes:
        device: Where the keys are kept and searched.
    """

    device: str = "cpu"

    kind: ClassVar[IndexKind] = "flat"

    def check(self, num_entries: int, key_dim: int, metric: Metric) -> None:
        """Any keys can be searched exactly."""

    def ensure(
        self, datastore: Datastore, metric: Metric, k: int, queries: Queries
    ) -> MeasuredIndex:
        dtype = exact_dtype(datastore.keys)
        return MeasuredIndex(FlatIndex(datastore.keys, metric, self.device, dtype), k, 1.0)


@dataclass(frozen=True)
class FaissChoice:
    """An index described by the user.

    Attributes:
        factory: As faiss's index_factory takes it.
        parameters: Settings of the search, as "nprobe=16,k_factor_rf=4".
    """

    factory: str
    parameters: str = ""

    kind: ClassVar[IndexKind] = "faiss"

    def __post_init__(self) -> None:
        for name in ("factory", "parameters"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise IndexFactoryError(
                    f"index.{name} is {value}, but it must be text: faiss's description of an "
                    "index, as IVF1024,Flat, or of settings of its search, as nprobe=16."
                )

    def check(self, num_entries: int, key_dim: int, metric: Metric) -> None:
        check_factory(self.factory, self.parameters, num_entries, key_dim, metric)

    def ensure(
        self, datastore: Datastore, metric: Metric, k: int, queries: Queries
    ) -> MeasuredIndex:
        directory = _directory(datastore, "faiss", self.factory, metric)
        digest = datastore.manifest.keys_digest
        try:
            index = FaissIndex.load(directory, keys_digest=digest)
        except MissingIndexError:
            logger.info("Building %s over %d entries.", self.factory, len(datastore))
            index = FaissIndex.build(datastore.keys, self.factory, metric)
            index.save(directory, keys_digest=digest)
        index.set_parameters(self.parameters)
        return measured(index, k, datastore, queries)


@dataclass(frozen=True)
class AutoChoice:
    """The fastest index that reaches a recall, found by measuring.

    One index serves every k and recall; each has its own search settings.

    Attributes:
        recall: Share of the exact k nearest entries that it must find.
    """

    recall: float = 0.95

    kind: ClassVar[IndexKind] = "auto"

    def __post_init__(self) -> None:
        check_recall(self.recall)

    def check(self, num_entries: int, key_dim: int, metric: Metric) -> None:
        """What cannot be built is not tried, but faiss must be there."""
        require_faiss()

    def ensure(
        self, datastore: Datastore, metric: Metric, k: int, queries: Queries
    ) -> MeasuredIndex:
        directory = datastore.index_directory(f"auto-{metric}")
        report_path = directory.with_name(f"auto-{metric}-{self.recall}-at-{k}.json")
        digest = datastore.manifest.keys_digest
        try:
            built = [FaissIndex.load(directory, keys_digest=digest)]
        except MissingIndexError:
            built = []
        choice = _read_choice(report_path)
        if choice is not None:
            if not choice.factory:
                exact = FlatIndex(datastore.keys, metric, storage_dtype=exact_dtype(datastore.keys))
                return MeasuredIndex(exact, k, 1.0)
            if built:
                built[0].set_parameters(choice.parameters)
                return MeasuredIndex(built[0], k, choice.recall)
        logger.info("Choosing an index for %s entries by measuring.", f"{len(datastore):,}")
        index, report = choose_index(
            datastore.keys, queries(), k, recall=self.recall, metric=metric, built=built
        )
        if isinstance(index, FaissIndex) and not built:
            index.save(directory, keys_digest=digest)
        write_atomically(report_path, report.to_json())
        return MeasuredIndex(index, k, report.choice.recall)


def _read_choice(path: Path) -> Candidate | None:
    """What was chosen; None if missing or damaged, and the caller chooses again."""
    try:
        return IndexReport.from_json(path.read_text()).choice
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _directory(datastore: Datastore, kind: str, description: str, metric: Metric) -> Path:
    """The folder of a choice's index, named after the choice."""
    digest = hashlib.sha256(json.dumps([description, metric]).encode()).hexdigest()
    return datastore.index_directory(f"{kind}-{metric}-{digest[:8]}")

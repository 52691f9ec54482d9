"""Chooses an index by measuring: the fastest that reaches a given recall on held-out queries."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_knnmt.retrieval.checks import check_recall
from lightning_knnmt.retrieval.estimate import available_memory
from lightning_knnmt.retrieval.faiss_index import FaissIndex
from lightning_knnmt.retrieval.index import FlatIndex, Index, Metric, check_k
from lightning_knnmt.retrieval.recall import QUERIES_AT_ONCE, Truth, in_batches, recall_at_k

logger = logging.getLogger(__name__)

EXACT_BELOW = 8192  # entries: exact search takes a few milliseconds a batch
MAX_QUERIES = 1024
MIN_QUERIES = 128
EXACT_WORK = 5e11  # multiplications that finding the truth may take
NUM_PROBES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128)
RERANKED = (2, 3, 4, 8, 16)  # candidates that are ranked again exactly, in multiples of k
ROUNDS = 3  # of the race between settings that are good enough
EXACT_BATCHES = 4  # are enough to time exact search


@dataclass(frozen=True)
class Candidate:
    """One setting that was measured."""

    description: str
    factory: str  # empty for exact search
    parameters: str
    recall: float
    milliseconds_per_query: float
    build_seconds: float
    num_bytes: int


@dataclass(frozen=True)
class IndexReport:
    """Everything that was measured, and which candidate was chosen."""

    k: int
    wanted_recall: float
    metric: Metric
    num_entries: int
    key_dim: int
    num_queries: int
    batch_size: int
    num_threads: int
    candidates: tuple[Candidate, ...]
    chosen: int

    @property
    def choice(self) -> Candidate:
        return self.candidates[self.chosen]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> IndexReport:
        content: dict[str, Any] = json.loads(text)
        candidates = tuple(Candidate(**candidate) for candidate in content.pop("candidates"))
        return cls(candidates=candidates, **content)

    def __str__(self) -> str:
        """A table for people, the chosen line marked."""
        lines = [
            f"{self.num_entries:,} entries of {self.key_dim} dimensions; recall at {self.k} of "
            f"{self.num_queries} held-out queries, wanted {self.wanted_recall}; time of batches of "
            f"{self.batch_size} on {self.num_threads} threads, best of {ROUNDS} where recall is "
            "reached",
            "    recall  ms/query  build s       MB  index",
        ]
        for number, each in enumerate(self.candidates):
            lines.append(
                f"{'->' if number == self.chosen else '  '}  {each.recall:6.4f}  "
                f"{each.milliseconds_per_query:8.4f}  {each.build_seconds:7.1f}  "
                f"{each.num_bytes / 1e6:7.1f}  {each.description}"
            )
        return "\n".join(lines)


def choose_index(
    keys: npt.NDArray[Any],
    queries: Tensor,
    k: int,
    *,
    recall: float = 0.95,
    metric: Metric = "l2",
    device: torch.device | str = "cpu",
    batch_size: int = QUERIES_AT_ONCE,
    seed: int = 1,
    built: Sequence[FaissIndex] = (),
) -> tuple[Index, IndexReport]:
    """Measures indexes and returns the fastest that reaches a given recall.

    Probes and re-ranked candidates are settings of the search: each structure is built once, and
    the fewest probes that are enough are found by halving. Structures are tried in order of their
    promise until one is good enough and faster than exact search; if none is, the search is exact.

    Args:
        keys: Of the datastore, [M, D].
        queries: Hidden states that the datastore was not made from, [Q, D].
        k: Neighbours that will be asked for.
        recall: Share of the k nearest that must be found, on average.
        metric: "l2" or "ip".
        device: Where exact search runs.
        batch_size: Rows of a decoding step.
        seed: Draws the training samples.
        built: Existing indexes over the same keys; if there are any, no other is built.

    Returns:
        The index, ready to search, and everything that was measured.
    """
    check_k(k, len(keys))
    check_recall(recall)
    sample = spread_sample(queries, num_queries(len(keys), keys.shape[1]))
    start = time.perf_counter()
    exact = FlatIndex(keys, metric, device, exact_dtype(keys))
    build_seconds = time.perf_counter() - start
    truth = Truth.of(exact, sample, k)
    trial = _Trial(truth, recall, batch_size)
    trial.measure_exact(build_seconds)
    chosen: Index | None = None
    for index, seconds in built_or_building(keys, metric, seed, built):
        chosen = trial.try_settings(index, seconds)
        if chosen is not None:
            break
    report = IndexReport(
        k=k,
        wanted_recall=recall,
        metric=metric,
        num_entries=len(keys),
        key_dim=keys.shape[1],
        num_queries=len(sample),
        batch_size=batch_size,
        num_threads=torch.get_num_threads(),
        candidates=tuple(trial.candidates),
        chosen=trial.chosen,
    )
    logger.info("Chose %s with recall %.4f.", report.choice.description, report.choice.recall)
    return exact if chosen is None else chosen, report


def built_or_building(
    keys: npt.NDArray[Any], metric: Metric, seed: int, built: Sequence[FaissIndex]
) -> Iterator[tuple[FaissIndex, float]]:
    """Yields indexes worth trying, each built when its turn comes, and the seconds that took."""
    if built:
        yield from ((index, 0.0) for index in built)
    elif len(keys) >= EXACT_BELOW:
        for factory in factories(len(keys), keys.shape[1]):
            start = time.perf_counter()
            index = FaissIndex.build(keys, factory, metric, seed=seed)
            yield index, time.perf_counter() - start


class _Trial:
    """Measures settings, and in the end races those that reach the recall."""

    def __init__(self, truth: Truth, wanted: float, batch_size: int) -> None:
        self.truth = truth
        self.wanted = wanted
        self.batches = in_batches(truth.queries, batch_size)
        self.candidates: list[Candidate] = []

    def measure_exact(self, build_seconds: float) -> None:
        exact = self.truth.exact
        seconds = [self.timed(exact, batch)[1] for batch in self.batches[:EXACT_BATCHES]]
        self.add(exact, "", "", 1.0, seconds, build_seconds)

    def measure(self, index: FaissIndex, parameters: str, build_seconds: float) -> Candidate:
        index.set_parameters(parameters)
        entries, seconds = zip(*(self.timed(index, batch) for batch in self.batches), strict=True)
        recall = recall_at_k(self.truth, torch.cat(entries))
        return self.add(index, index.factory, parameters, recall, seconds, build_seconds)

    def try_settings(self, index: FaissIndex, build_seconds: float) -> Index | None:
        """Finds, for each number of re-ranked candidates, the fewest probes that are enough.

        Returns the index, set to the fastest of these settings, or None if that is slower than
        exact search or nothing is good enough.
        """
        good = []
        for reranked in RERANKED if "Refine" in index.factory else (0,):
            few, many = 0, len(NUM_PROBES)  # recall grows with the probes: halve the interval
            while few < many:
                middle = (few + many) // 2
                parameters = f"nprobe={NUM_PROBES[middle]}"
                if reranked:
                    parameters += f",k_factor_rf={reranked}"
                candidate = self.measure(index, parameters, build_seconds)
                if candidate.recall >= self.wanted:
                    many, found = middle, candidate
                else:
                    few = middle + 1
            if many < len(NUM_PROBES):
                good.append(found)
        if not good:
            return None
        self.race(index, good)
        if self.candidates[self.chosen].factory != index.factory:
            return None
        index.set_parameters(self.candidates[self.chosen].parameters)
        return index

    def race(self, index: FaissIndex, good: Sequence[Candidate]) -> None:
        """Times settings in turn, so that a busy moment hits all of them, and keeps the times."""
        seconds = np.full((len(good), ROUNDS, len(self.batches)), np.inf)
        for turn in range(ROUNDS):
            for row, candidate in enumerate(good):
                index.set_parameters(candidate.parameters)
                seconds[row, turn] = [self.timed(index, batch)[1] for batch in self.batches]
        for candidate, times in zip(good, seconds.min(axis=1), strict=True):
            place = self.candidates.index(candidate)
            milliseconds = 1000 * float(np.median(times))
            self.candidates[place] = dataclasses.replace(
                candidate, milliseconds_per_query=milliseconds
            )

    @property
    def chosen(self) -> int:
        """Number of the fastest candidate that reaches the recall; the exact one always does."""
        good = [n for n, each in enumerate(self.candidates) if each.recall >= self.wanted]
        return min(good, key=lambda n: self.candidates[n].milliseconds_per_query)

    def timed(self, index: Index, batch: Tensor) -> tuple[Tensor, float]:
        """Searches and returns the entries and the seconds for each query."""
        start = time.perf_counter()
        entries = index.search(batch, self.truth.k)[1]
        return entries, (time.perf_counter() - start) / len(batch)

    def add(
        self,
        index: Index,
        factory: str,
        parameters: str,
        recall: float,
        seconds: Sequence[float],
        build_seconds: float,
    ) -> Candidate:
        candidate = Candidate(
            description=index.description,
            factory=factory,
            parameters=parameters,
            recall=recall,
            milliseconds_per_query=1000 * float(np.median(seconds)),
            build_seconds=build_seconds,
            num_bytes=index.num_bytes,
        )
        self.candidates.append(candidate)
        return candidate


def factories(num_entries: int, key_dim: int) -> tuple[str, ...]:
    """The structures worth building for a datastore of this size, the most promising first.

    Measured on a decoder's states (208,181 x 256, recall 0.95 at 16, batches of 64, milliseconds of
    one core): pairs of dimensions quantised to 4 bits without residuals ("PQ128x4fs") 6.6; with
    residuals ("x4fsr"), whose tables differ from list to list, 14.8; half as many sub-quantisers
    8.7 to 10; RaBitQ 14.4; float16 in the lists 16 to 25; exact search 81. Re-ranking with float16
    copies is exact, as the keys are float16, and takes half the memory of float32 ones.
    """
    lists = num_lists(num_entries)
    codes = key_dim // 2 if key_dim % 2 == 0 else key_dim
    return (f"IVF{lists},PQ{codes}x4fs,Refine(SQfp16)", f"IVF{lists},SQfp16")


def num_lists(num_entries: int) -> int:
    """Inverted lists: the power of two nearest to 2 √M, each with enough entries to be trained."""
    return int(2 ** np.clip(round(np.log2(2 * num_entries**0.5)), 4, 16))


def num_queries(num_entries: int, key_dim: int) -> int:
    """Queries to measure with: as many as exact search answers within some seconds."""
    return int(np.clip(EXACT_WORK / (num_entries * key_dim), MIN_QUERIES, MAX_QUERIES))


def spread_sample(queries: Tensor, size: int) -> Tensor:
    """Takes rows at even distances, at most size of them."""
    if len(queries) <= size:
        return queries
    return queries[torch.linspace(0, len(queries) - 1, size).long()]


def exact_dtype(keys: npt.NDArray[Any]) -> torch.dtype:
    """float32 where memory allows it twice over, else the keys stay on the disk as they are."""
    return torch.float32 if 8 * keys.size < available_memory() else torch.float16

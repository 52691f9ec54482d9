"""How retrieval depends on the size of the datastore: what it finds, how fast, at what cost.

Nested random parts of a datastore are searched with the queries of one recorded pass. Parts consist
of whole sentences, like a smaller text: if entries were drawn one by one, a phrase of n tokens
would stay whole with probability share^n only. `gold_coverage` can only grow with more entries.
`gold_recall` usually grows, but an added entry can push one with the gold token out of the k
nearest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_knnmt.evaluation.bootstrap import Difference, Resampled, difference, interval
from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import (
    FixedCombiner,
    FlatIndex,
    Index,
    LocalSource,
    Neighbours,
    Record,
    Retriever,
)
from lightning_knnmt.retrieval.recall import in_batches
from lightning_knnmt.retrieval.tuning import (
    KNN_WEIGHTS,
    neighbour_counts,
    score_grid,
    temperatures_for,
)

Keys = npt.NDArray[Any]
Values = npt.NDArray[Any]

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


class ScalingError(ValueError):
    """A datastore, record or share that cannot be measured."""


class Part(NamedTuple):
    """Some entries of a datastore, in its order."""

    keys: Keys  # [m, D]
    values: Values  # [m]
    entries: npt.NDArray[np.int64]  # their rows in the whole datastore, [m]


@dataclass(frozen=True)
class ScalePoint:
    """Measurements of a part of a datastore.

    Attributes:
        share: Of the datastore's sentences; of its entries if these were drawn one by one.
        gold_coverage: Share of the gold tokens that are values of any entry.
        gold_recall: Share of the gold tokens that are values of their K nearest entries.
        setting: The k, λ and T of the grid that make the recorded text most probable.
        log_prob: Mean log p(gold) with that setting, slightly optimistic as it was chosen on this
            text.
        seconds_per_1000_queries: Search and look-up of values, in batches of 64.
        memory_bytes: Index and values.
        bleu: Of `decode`'s translations; None without it.
        bleu_interval: Its 95 % interval; None likewise.
        bleu_gain: The difference to the next smaller part, on the same draws of the test set; None
            likewise and for the smallest part.
    """

    share: float
    num_entries: int
    index: str
    gold_coverage: float
    gold_recall: float
    setting: FixedCombiner
    log_prob: float
    seconds_per_1000_queries: float
    memory_bytes: int
    bleu: float | None
    bleu_interval: tuple[float, float] | None
    bleu_gain: Difference | None


def subset(
    keys: Keys, values: Values, share: float, seed: int = 1, sentence_end: int | None = None
) -> Part:
    """Draws a random part of a datastore; with one seed, smaller parts lie inside larger ones.

    Args:
        keys: [M, D] in the text's order, such as a memory map.
        values: [M].
        share: Of the sentences, rounded to whole ones; 1 gives the whole without a copy.
        seed: Fixes the order in which sentences are taken.
        sentence_end: The last token of each sentence; entries after the last such token are a
            sentence too. None makes every entry a sentence.
    """
    if len(keys) != len(values):
        raise ScalingError(
            f"There are {len(keys):,} keys but {len(values):,} values: give those of one datastore."
        )
    if not 0.0 < share <= 1.0:
        raise ScalingError(f"The share is {share}, but it must be greater than 0 and at most 1.")
    if share == 1.0:
        return Part(keys, values, np.arange(len(keys)))
    lengths = _sentence_lengths(values, sentence_end)
    order = np.random.default_rng(seed).permutation(len(lengths))
    is_taken = np.zeros(len(lengths), dtype=bool)
    is_taken[order[: round(share * len(lengths))]] = True
    # Ascending, so that a memory map is read from start to end.
    entries = np.flatnonzero(np.repeat(is_taken, lengths))
    return Part(np.asarray(keys[entries]), np.asarray(values[entries]), entries)


def measure_scaling(
    keys: Keys,
    values: Values,
    record: Record,
    *,
    shares: Sequence[float] = SHARES,
    num_neighbours: int = 32,
    build_index: Callable[[Keys], Index] = FlatIndex,
    decode: Callable[[Retriever, FixedCombiner], Resampled] | None = None,
    seed: int = 1,
    sentence_end: int | None = None,
) -> tuple[ScalePoint, ...]:
    """Measures retrieval from parts of a datastore, smallest first.

    Args:
        keys: Of the whole datastore, [M, D].
        values: The tokens that followed, [M].
        record: A pass over text of the domain that is not in the datastore, with queries; its
            neighbours are not used.
        shares: Sizes of the parts.
        num_neighbours: K, the most neighbours of a setting.
        build_index: Makes an index over a part's keys; exact by default.
        decode: Translates with a retriever and a setting of the same k, and returns BLEU with its
            bootstrap samples: the same draws of one test set for every part.
        seed: Draws the parts.
        sentence_end: See `subset`.
    """
    queries = record.queries
    if queries is None or record.num_tokens == 0:
        raise ScalingError(
            f"The record has {record.num_tokens} tokens and {'no ' if queries is None else ''}"
            "queries, but both are needed: record the pass with keep_queries=True."
        )
    points: list[ScalePoint] = []
    smaller: Resampled | None = None
    for share in sorted({*shares}):
        part = subset(keys, values, share, seed, sentence_end)
        if len(part.values) < num_neighbours:
            raise ScalingError(
                f"A share of {share:g} leaves {len(part.values)} of {len(values):,} entries, fewer "
                f"than num_neighbours={num_neighbours}: ask for fewer, or leave this share out."
            )
        index = build_index(part.keys)
        source = LocalSource(index, part.values)
        retriever = Retriever(source, num_neighbours)
        neighbours, seconds = _search(retriever, queries)
        setting, log_prob = _best_setting(record, neighbours)
        gold = record.gold.long()
        score: Resampled | None = None
        if decode is not None:
            score = decode(Retriever(source, setting.num_neighbours), setting)
        is_gold = (neighbours.tokens == gold[:, None]) & (neighbours.entries >= 0)
        points.append(
            ScalePoint(
                share=share,
                num_entries=len(part.values),
                index=index.description,
                gold_coverage=float(np.isin(gold.numpy(), part.values).mean()),
                gold_recall=float(is_gold.any(dim=-1).double().mean()),
                setting=setting,
                log_prob=log_prob,
                seconds_per_1000_queries=1000 * seconds / len(queries),
                memory_bytes=index.num_bytes + part.values.nbytes,
                bleu=score.value if score else None,
                bleu_interval=interval(score.samples) if score else None,
                bleu_gain=difference(score, smaller) if score and smaller else None,
            )
        )
        smaller = score
    return tuple(points)


def _sentence_lengths(values: Values, sentence_end: int | None) -> npt.NDArray[np.int64]:
    """The number of entries of each sentence, in the text's order, [sentences]."""
    if sentence_end is None:
        return np.ones(len(values), dtype=np.int64)
    starts = np.flatnonzero(values == sentence_end) + 1  # of the next sentences
    if len(values) and not (len(starts) and starts[-1] == len(values)):
        starts = np.append(starts, len(values))
    return np.diff(starts, prepend=0)


def _search(retriever: Retriever, queries: Tensor) -> tuple[Neighbours, float]:
    """Finds the neighbours of all queries, and measures the seconds."""
    batches = [DecoderStates(batch) for batch in in_batches(queries)]
    retriever(batches[0])  # the first search allocates
    start = time.perf_counter()
    found = [retriever(batch) for batch in batches]
    seconds = time.perf_counter() - start
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True))), seconds


def _best_setting(record: Record, neighbours: Neighbours) -> tuple[FixedCombiner, float]:
    """The setting with the greatest mean log p(gold), and that value."""
    unknown = torch.full_like(neighbours.distances, torch.nan)  # no grid asks the model about them
    searched = dataclasses.replace(
        record,
        tokens=neighbours.tokens,
        distances=neighbours.distances,
        entries=neighbours.entries,
        neighbour_log_probs=unknown,
    )
    grid = score_grid(searched, neighbour_counts(searched), KNN_WEIGHTS, temperatures_for(searched))
    return grid.best, grid.log_prob

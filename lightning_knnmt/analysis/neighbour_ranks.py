"""Where gold tokens stand among the neighbours, by bucket.

Gao et al., 2023 (arXiv:2305.13034), explain by this why retrieval helps the domain's rare words
less than fine-tuning does: their gold labels are often missing from the neighbours, or far down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_knnmt.analysis.retrieved import AnalysisError
from lightning_knnmt.evaluation.bootstrap import mean_interval
from lightning_knnmt.retrieval.record import Record

PAIRS_AT_ONCE = 2**22  # comparisons in [rows, K, K]


class GoldRanks(NamedTuple):
    """Where each gold token comes first among its neighbours, from 1; 0 if it is missing."""

    positions: Tensor  # [M] int64: among the neighbours
    ranks: Tensor  # [M] int64: among their different tokens, ordered by first occurrence


@dataclass(frozen=True)
class FoundWithin:
    """How often the gold token is among the k nearest neighbours.

    Attributes:
        num_neighbours: k.
        num_found: Tokens whose gold token is among them.
        fraction: Their share of the bucket; None if the bucket is empty.
        low: Lower bound of the fraction's 95 % interval, by bootstrap over the sentences with
            tokens of the bucket; None likewise.
        high: Its upper bound.
    """

    num_neighbours: int
    num_found: int
    fraction: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class BucketNeighbours:
    """The neighbours of one bucket's tokens; means and medians of nothing are None.

    Attributes:
        bucket: Its number.
        num_tokens: Tokens of the bucket.
        found: For every k, ascending.
        mean_rank: Mean rank of the gold tokens found within the largest k, among different tokens.
        median_rank: Its median; of two in the middle the lower.
        mean_position: Their mean position among all neighbours.
        median_position: Its median.
        mean_gold_distance: Mean distance of the neighbours within the largest k that hold the gold
            token, in the record's metric: squared L2 or the negated inner product.
        mean_other_distance: The same of all other neighbours.
    """

    bucket: int
    num_tokens: int
    found: tuple[FoundWithin, ...]
    mean_rank: float | None
    median_rank: float | None
    mean_position: float | None
    median_position: float | None
    mean_gold_distance: float | None
    mean_other_distance: float | None

    @property
    def distance_ratio(self) -> float | None:
        """Mean distance of gold tokens over that of others, which does not depend on scale.

        Distances of two representations cannot be compared if one has longer keys. None if either
        mean is missing, and for the inner product, which has no natural zero.
        """
        gold, other = self.mean_gold_distance, self.mean_other_distance
        if gold is None or other is None or gold < 0 or other <= 0:
            return None
        return gold / other


def gold_ranks(record: Record) -> GoldRanks:
    """Ranks every gold token among its recorded neighbours.

    Args:
        record: Of M tokens with K neighbours.
    """
    rows_at_once = max(1, PAIRS_AT_ONCE // record.max_neighbours**2)
    positions, ranks = [], []
    for start in range(0, record.num_tokens, rows_at_once):
        rows = slice(start, start + rows_at_once)
        is_found = record.entries[rows] >= 0
        tokens = record.tokens[rows].long().masked_fill(~is_found, -1)  # [m, K]
        same = tokens.unsqueeze(2) == tokens.unsqueeze(1)  # [m, K, K]
        is_first = ~same.tril(diagonal=-1).any(dim=2)  # no nearer neighbour holds this token
        is_gold = tokens == record.gold[rows, None]
        first = is_gold.long().argmax(dim=1, keepdim=True)  # argmax takes the first of equals
        any_gold = is_gold.any(dim=1)
        positions.append((first.squeeze(1) + 1) * any_gold)
        ranks.append(is_first.long().cumsum(dim=1).gather(1, first).squeeze(1) * any_gold)
    empty = torch.empty(0, dtype=torch.int64)
    return GoldRanks(torch.cat([empty, *positions]), torch.cat([empty, *ranks]))


def neighbours_by_bucket(
    record: Record, buckets: Tensor, num_buckets: int, num_neighbours: Sequence[int]
) -> tuple[BucketNeighbours, ...]:
    """Measures for each bucket how near its gold tokens are.

    Args:
        record: Of M tokens.
        buckets: Each token's bucket, from 0, for example by the frequency of its word, [M].
        num_buckets: Number of buckets; some may be empty.
        num_neighbours: Values of k, each at most the recorded K.
    """
    ks = sorted({*num_neighbours})
    _check(record, buckets, num_buckets, ks)
    buckets = buckets.cpu()
    positions, ranks = gold_ranks(record)
    in_reach = (positions > 0) & (positions <= ks[-1])
    is_found = record.entries[:, : ks[-1]] >= 0
    is_gold = (record.tokens[:, : ks[-1]] == record.gold[:, None]) & is_found  # [M, k]
    distances = record.distances[:, : ks[-1]]
    results = []
    for bucket in range(num_buckets):
        inside = buckets == bucket
        size = int(inside.sum())
        gold_ones, others = is_gold[inside], (is_found & ~is_gold)[inside]
        results.append(
            BucketNeighbours(
                bucket=bucket,
                num_tokens=size,
                found=tuple(
                    _found_within(k, positions[inside], record.sentences[inside]) for k in ks
                ),
                mean_rank=_mean(ranks[inside & in_reach]),
                median_rank=_median(ranks[inside & in_reach]),
                mean_position=_mean(positions[inside & in_reach]),
                median_position=_median(positions[inside & in_reach]),
                mean_gold_distance=_mean(distances[inside][gold_ones]),
                mean_other_distance=_mean(distances[inside][others]),
            )
        )
    return tuple(results)


def _found_within(k: int, positions: Tensor, sentences: Tensor) -> FoundWithin:
    """Counts the tokens, [m] of one bucket, whose gold is among the k nearest."""
    if not len(positions):
        return FoundWithin(k, 0, None, None, None)
    is_found = ((positions > 0) & (positions <= k)).cpu().numpy()
    low, high = mean_interval(is_found, sentences.cpu().numpy())
    count = int(is_found.sum())
    return FoundWithin(k, count, count / len(is_found), low, high)


def _mean(numbers: Tensor) -> float | None:
    return float(numbers.double().mean()) if len(numbers) else None


def _median(numbers: Tensor) -> float | None:
    return float(numbers.median()) if len(numbers) else None


def _check(record: Record, buckets: Tensor, num_buckets: int, ks: Sequence[int]) -> None:
    if buckets.shape != record.gold.shape:
        raise AnalysisError(
            f"The buckets are {list(buckets.shape)}, but the record has {record.num_tokens} "
            "tokens: give one bucket for each token."
        )
    if len(buckets) and not 0 <= int(buckets.min()) <= int(buckets.max()) < num_buckets:
        raise AnalysisError(
            f"The buckets range from {int(buckets.min())} to {int(buckets.max())}, but with "
            f"num_buckets={num_buckets} they must be 0 to {num_buckets - 1}."
        )
    if not ks or not 1 <= ks[0] <= ks[-1] <= record.max_neighbours:
        raise AnalysisError(
            f"The values of k are {ks}, but there must be at least one, and all must be 1 to "
            f"{record.max_neighbours}, the number of recorded neighbours."
        )

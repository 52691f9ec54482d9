"""Where the gold tokens stand among the neighbours, by bucket.

Gao et al., 2023 (arXiv:2305.13034), explain with this why retrieval helps rare words of the domain
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
    """Where each gold token comes first among its neighbours; 0 where it does not, from 1 else."""

    positions: Tensor  # [M] int64: among the neighbours
    ranks: Tensor  # [M] int64: among their different tokens, in the order of their first neighbours


@dataclass(frozen=True)
class FoundWithin:
    """How often the gold token is among the k nearest neighbours.

    Attributes:
        num_neighbours: k.
        num_found: Of how many tokens.
        fraction: Their share of the bucket; None if the bucket is empty.
        low: Lower end of the 95 % confidence interval of the fraction, by bootstrap over the
            sentences that have tokens of the bucket; None likewise.
        high: Its upper end.
    """

    num_neighbours: int
    num_found: int
    fraction: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class BucketNeighbours:
    """The neighbours of one bucket's tokens; None stands where there is nothing to average.

    Attributes:
        bucket: Its label.
        num_tokens: How many tokens it has.
        found: For every k that was asked for, ascending.
        mean_rank: Of the gold tokens that were found within the largest k, among different tokens.
        median_rank: Of the same; of two in the middle the lower one.
        mean_position: Of the same gold tokens, among all neighbours.
        median_position: Of the same.
        mean_gold_distance: Of all neighbours, within the largest k, that hold the gold token, in
            the record's metric: squared L2, or the negated inner product.
        mean_other_distance: Of all others that were found.
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
        """The gold tokens' mean distance as a share of the others': free of the keys' scale.

        Distances of one representation are not comparable with another's, whose keys may all be
        longer. None where either is missing, and for the inner product, which has no zero to
        measure from.
        """
        gold, other = self.mean_gold_distance, self.mean_other_distance
        if gold is None or other is None or gold < 0 or other <= 0:
            return None
        return gold / other


def gold_ranks(record: Record) -> GoldRanks:
    """Ranks every gold token among the neighbours that were recorded.

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
        first = is_gold.long().argmax(dim=1, keepdim=True)  # of equal ones argmax takes the first
        any_gold = is_gold.any(dim=1)
        positions.append((first.squeeze(1) + 1) * any_gold)
        ranks.append(is_first.long().cumsum(dim=1).gather(1, first).squeeze(1) * any_gold)
    empty = torch.empty(0, dtype=torch.int64)
    return GoldRanks(torch.cat([empty, *positions]), torch.cat([empty, *ranks]))


def neighbours_by_bucket(
    record: Record, buckets: Tensor, num_buckets: int, num_neighbours: Sequence[int]
) -> tuple[BucketNeighbours, ...]:
    """Says for each bucket of tokens how near its gold tokens are.

    Args:
        record: Of M tokens.
        buckets: Each token's bucket, for example by how frequent its word is, from 0, [M].
        num_buckets: How many there are; some may be empty.
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
            "tokens: every token needs one bucket."
        )
    if len(buckets) and not 0 <= int(buckets.min()) <= int(buckets.max()) < num_buckets:
        raise AnalysisError(
            f"The buckets go from {int(buckets.min())} to {int(buckets.max())}, but with "
            f"{num_buckets} buckets 0 to {num_buckets - 1} are allowed."
        )
    if not ks or not 1 <= ks[0] <= ks[-1] <= record.max_neighbours:
        raise AnalysisError(
            f"The values of k are {ks}, but at least one is needed, and as "
            f"{record.max_neighbours} neighbours were recorded, 1 to {record.max_neighbours} are "
            "allowed. Record more, or ask for fewer."
        )

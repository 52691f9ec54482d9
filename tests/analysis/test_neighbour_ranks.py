"""Gold tokens among the neighbours, against loops."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_knnmt.analysis import neighbour_ranks
from lightning_knnmt.analysis.neighbour_ranks import (
    BucketNeighbours,
    gold_ranks,
    neighbours_by_bucket,
)
from lightning_knnmt.analysis.retrieved import AnalysisError
from lightning_knnmt.retrieval import Record

M, K, NUM_BUCKETS = 60, 6, 5


@pytest.fixture
def record() -> Record:
    """Some tokens have fewer neighbours, and the first one none; gold 0 is what is missing, too."""
    num_found = torch.randint(2, K + 1, (M,))
    num_found[0] = 0
    missing = torch.arange(K) >= num_found[:, None]
    return Record(
        tokens=torch.randint(0, 6, (M, K)).masked_fill(missing, 0).int(),
        distances=torch.rand(M, K).sort().values.masked_fill(missing, torch.inf),
        entries=torch.randint(0, 100, (M, K)).masked_fill(missing, -1),
        gold=torch.randint(0, 6, (M,)).masked_fill(torch.arange(M) < 5, 0).int(),
        gold_log_probs=torch.zeros(M),
        neighbour_log_probs=torch.zeros(M, K),
        sentences=torch.randint(0, 9, (M,)).sort().values.int(),
        queries=None,
    )


@pytest.fixture
def buckets() -> Tensor:
    """Bucket 3 is empty; bucket 4 has the token without neighbours alone."""
    labels = torch.randint(0, 3, (M,))
    labels[0] = 4
    return labels


def ranks_by_loops(record: Record) -> list[tuple[int, int]]:
    found = []
    for m in range(M):
        seen: list[int] = []
        place = (0, 0)
        for i in range(K):
            if record.entries[m, i] < 0:
                break
            token = int(record.tokens[m, i])
            if token not in seen:
                seen.append(token)
            if token == record.gold[m]:
                place = (i + 1, len(seen))
                break
        found.append(place)
    return found


def interval_by_loops(sentences: list[list[int]]) -> tuple[object, object]:
    """The 95 % interval of the share of ones, when as many sentences are drawn again."""
    if not sentences:
        return None, None
    rng = np.random.default_rng(12345)
    means = []
    for rows in rng.choice(len(sentences), size=(1000, len(sentences))):
        drawn = [sentences[row] for row in rows]
        means.append(statistics.fmean(itertools.chain.from_iterable(drawn)))
    bounds = statistics.quantiles(means, n=40, method="inclusive")
    return pytest.approx(bounds[0]), pytest.approx(bounds[-1])


@pytest.mark.parametrize("at_once", [1, 7 * K * K, 10**6])
def test_ranks(record: Record, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour_ranks, "PAIRS_AT_ONCE", at_once)
    found = gold_ranks(record)
    places = list(zip(found.positions.tolist(), found.ranks.tolist(), strict=True))
    assert places == ranks_by_loops(record)
    assert any(position > rank for position, rank in places)  # labels were repeated


@pytest.mark.parametrize("ks", [[6, 1, 3], [4]])
def test_buckets(record: Record, buckets: Tensor, ks: list[int]) -> None:
    places, largest = ranks_by_loops(record), max(ks)
    results = neighbours_by_bucket(record, buckets, NUM_BUCKETS, ks)
    for bucket, result in enumerate(results):
        members = [m for m in range(M) if buckets[m] == bucket]
        reached = [places[m] for m in members if 1 <= places[m][0] <= largest]
        distances: dict[bool, list[float]] = {True: [], False: []}
        for m in members:
            for i in range(largest):
                if record.entries[m, i] >= 0:
                    same = bool(record.tokens[m, i] == record.gold[m])
                    distances[same].append(float(record.distances[m, i]))

        def mean(numbers: list[float] | list[int]) -> object:
            return pytest.approx(statistics.fmean(numbers)) if numbers else None

        def median(numbers: list[int]) -> float | None:
            return statistics.median_low(numbers) if numbers else None

        assert (result.bucket, result.num_tokens) == (bucket, len(members))
        assert [within.num_neighbours for within in result.found] == sorted(ks)
        for within in result.found:
            count = sum(1 <= places[m][0] <= within.num_neighbours for m in members)
            assert within.num_found == count
            assert within.fraction == (count / len(members) if members else None)
            by_sentence: dict[int, list[int]] = {}
            for m in members:
                is_found = 1 <= places[m][0] <= within.num_neighbours
                by_sentence.setdefault(int(record.sentences[m]), []).append(is_found)
            assert (within.low, within.high) == interval_by_loops([*by_sentence.values()])
        assert result.mean_rank == mean([rank for _, rank in reached])
        assert result.median_rank == median([rank for _, rank in reached])
        assert result.mean_position == mean([position for position, _ in reached])
        assert result.median_position == median([position for position, _ in reached])
        assert result.mean_gold_distance == mean(distances[True])
        assert result.mean_other_distance == mean(distances[False])
        if distances[True] and distances[False]:
            ratio = statistics.fmean(distances[True]) / statistics.fmean(distances[False])
            assert result.distance_ratio == pytest.approx(ratio)
        else:
            assert result.distance_ratio is None
    assert sum(result.distance_ratio is not None for result in results) == 3


def test_intervals_are_wider_than_a_point(record: Record, buckets: Tensor) -> None:
    found = neighbours_by_bucket(record, buckets, NUM_BUCKETS, [1, 6])[0].found
    for within in found:
        assert within.low is not None
        assert within.high is not None
        assert within.fraction is not None
        assert 0 <= within.low < within.fraction < within.high <= 1


def test_the_ratio_is_free_of_scale_and_of_distances_only(record: Record, buckets: Tensor) -> None:
    longer = dataclasses.replace(record, distances=100 * record.distances)
    products = dataclasses.replace(record, distances=-record.distances.flip(1))
    one, other, none = (
        [each.distance_ratio for each in neighbours_by_bucket(what, buckets, NUM_BUCKETS, [6])]
        for what in (record, longer, products)
    )
    assert one == [ratio if ratio is None else pytest.approx(ratio) for ratio in other]
    assert one != none == [None] * NUM_BUCKETS


def test_an_empty_bucket_says_so(record: Record, buckets: Tensor) -> None:
    results = neighbours_by_bucket(record, buckets, NUM_BUCKETS, [2])
    numbers = [value for value in dataclasses.astuple(results[3])[3:] if value is not None]
    assert (results[3].num_tokens, results[3].found[0].fraction, numbers) == (0, None, [])
    assert (results[3].found[0].low, results[3].found[0].high) == (None, None)
    # a token that found nothing: counted, but nothing to average
    assert (results[4].num_tokens, results[4].found[0].fraction) == (1, 0.0)
    assert results[4].mean_other_distance is None


def test_no_tokens_at_all(record: Record) -> None:
    none = Record(**{name: tensor[:0] for name, tensor in record.arrays().items()}, queries=None)
    (result,) = neighbours_by_bucket(none, torch.empty(0).long(), 1, [2])
    assert isinstance(result, BucketNeighbours)
    assert (result.num_tokens, result.mean_rank) == (0, None)


def test_buckets_go_into_json(record: Record, buckets: Tensor) -> None:
    result = dataclasses.asdict(neighbours_by_bucket(record, buckets, NUM_BUCKETS, [2])[0])
    assert json.loads(json.dumps(result))["found"][0]["num_neighbours"] == 2


def test_what_is_not_a_bucket(record: Record, buckets: Tensor) -> None:
    with pytest.raises(AnalysisError, match=r"\[3\].* 60 "):
        neighbours_by_bucket(record, buckets[:3], NUM_BUCKETS, [2])
    with pytest.raises(AnalysisError, match=r"0 to 4.*3.*0 to 2"):
        neighbours_by_bucket(record, buckets, 3, [2])
    for ks in ([], [0, 2], [7]):
        with pytest.raises(AnalysisError, match="1 to 6"):
            neighbours_by_bucket(record, buckets, NUM_BUCKETS, ks)

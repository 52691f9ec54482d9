"""Parts of a datastore against brute force in NumPy, and what must hold as they grow."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from lightning_knnmt.analysis.scaling import (
    ScalingError,
    measure_scaling,
    subset,
)
from lightning_knnmt.evaluation.bootstrap import Resampled
from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import FixedCombiner, FlatIndex, LocalSource, Record, Retriever
from lightning_knnmt.retrieval.faiss_index import FaissIndex
from lightning_knnmt.retrieval.tuning import KNN_WEIGHTS, SPREADS

M, D, QUERIES, VOCABULARY, K = 900, 8, 150, 40, 8
SHARES = (0.03, 0.1, 0.3, 1.0)
END = 0  # about a third of the values, so some sentences are an end alone

RNG = np.random.default_rng(3)
CENTRES = RNG.normal(size=(VOCABULARY, D))
VALUES = (VOCABULARY * RNG.random(M) ** 3).astype(np.int32)  # some tokens are rare
KEYS = (CENTRES[VALUES] + RNG.normal(size=(M, D))).astype(np.float16)
GOLD = (VOCABULARY * RNG.random(QUERIES) ** 2).astype(np.int32)
HIDDEN = (CENTRES[GOLD] + RNG.normal(size=(QUERIES, D))).astype(np.float16).astype(np.float32)


def make_record() -> Record:
    nothing = torch.zeros(QUERIES, 1)  # what the pass found with some datastore: not looked at
    return Record(
        tokens=nothing.int() - 1,
        distances=nothing,
        entries=nothing.long(),
        gold=torch.from_numpy(GOLD),
        gold_log_probs=-5 * torch.rand(QUERIES, generator=torch.Generator().manual_seed(1)),
        neighbour_log_probs=nothing,
        sentences=torch.arange(QUERIES, dtype=torch.int32),
        queries=torch.from_numpy(HIDDEN),
    )


def nearest(keys: np.ndarray, num_neighbours: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows of the nearest keys, [QUERIES, K], in float64."""
    apart = HIDDEN[:, None].astype(np.float64) - keys[None].astype(np.float64)
    distances = (apart**2).sum(axis=-1)
    rows = np.argsort(distances, axis=1, kind="stable")[:, :num_neighbours]
    return np.take_along_axis(distances, rows, axis=1), rows


def test_parts_are_nested_random_and_in_order() -> None:
    parts = [subset(KEYS, VALUES, share, seed=5) for share in SHARES]
    for part, share in zip(parts, SHARES, strict=True):
        assert len(part.keys) == len(part.values) == len({*part.entries}) == round(share * M)
        assert (np.diff(part.entries) > 0).all()
        np.testing.assert_array_equal(part.keys, KEYS[part.entries])
        np.testing.assert_array_equal(part.values, VALUES[part.entries])
    for small, large in itertools.pairwise(parts):
        assert {*small.entries} < {*large.entries}
    again, other = (subset(KEYS, VALUES, 0.1, seed).entries for seed in (5, 6))
    np.testing.assert_array_equal(again, parts[1].entries)
    assert {*other} != {*again}
    assert 300 < subset(KEYS, VALUES, 0.3, seed=5).entries.mean() < 600  # not the text's beginning


def sentences_by_loop(values: np.ndarray, sentence_end: int) -> list[list[int]]:
    """The rows of each sentence's entries."""
    sentences: list[list[int]] = []
    was_end = True
    for row, value in enumerate(values.tolist()):
        if was_end:
            sentences.append([])
        sentences[-1].append(row)
        was_end = value == sentence_end
    return sentences


@pytest.mark.parametrize("kept", [M, M - 3, int(np.flatnonzero(VALUES == END)[-1]) + 1])
def test_parts_are_of_whole_sentences(kept: int) -> None:
    keys, values = KEYS[:kept], VALUES[:kept]
    sentences = sentences_by_loop(values, END)
    assert len({len(rows) for rows in sentences}) > 5
    assert any(len(rows) == 1 for rows in sentences)  # an end directly after an end
    smaller: set[int] = set()
    for share in (0.0001, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0):
        part = subset(keys, values, share, seed=5, sentence_end=END)
        rows = part.entries.tolist()
        whole = [number for number, each in enumerate(sentences) if {*each} & {*rows}]
        assert rows == [row for number in whole for row in sentences[number]]
        assert len(whole) == round(share * len(sentences))
        assert smaller <= {*whole}
        smaller = {*whole}
        np.testing.assert_array_equal(part.keys, [keys[row] for row in rows] or keys[:0])
        np.testing.assert_array_equal(part.values, [values[row] for row in rows])
    half, other = (subset(keys, values, 0.5, seed, END).entries.tolist() for seed in (5, 6))
    assert half != other
    assert max(half) > 0.9 * kept  # not the text's beginning


def test_entries_after_the_last_end_are_a_sentence() -> None:
    values = np.array([3, 0, 7, 8, 0, 5, 6])
    keys = np.arange(7.0)[:, None]
    for ends, sentences in {7: ["30", "780", "56"], 5: ["30", "780"]}.items():
        drawn = {
            "".join(
                map(str, subset(keys[:ends], values[:ends], 1 / len(sentences), seed, 0).values)
            )
            for seed in range(20)
        }
        assert drawn == {*sentences}
    assert len(subset(keys[:0], values[:0], 0.5, sentence_end=0).entries) == 0
    # a text without an end is one sentence
    assert len(subset(keys, values, 0.6, sentence_end=99).entries) == 7
    assert len(subset(keys, values, 0.4, sentence_end=99).entries) == 0


@pytest.mark.parametrize("sentence_end", [None, END])
def test_the_whole_is_the_datastore_itself(sentence_end: int | None) -> None:
    part = subset(KEYS, VALUES, 1.0, sentence_end=sentence_end)
    assert part.keys is KEYS
    assert part.values is VALUES
    np.testing.assert_array_equal(part.entries, np.arange(M))


@pytest.mark.parametrize("sentence_end", [None, END])
def test_every_part_is_measured_as_brute_force_does(sentence_end: int | None) -> None:
    record = make_record()
    points = measure_scaling(
        *(KEYS, VALUES, record),
        shares=SHARES,
        num_neighbours=K,
        seed=5,
        sentence_end=sentence_end,
    )
    assert [point.share for point in points] == list(SHARES)
    for point in points:
        part = subset(KEYS, VALUES, point.share, seed=5, sentence_end=sentence_end)
        distances, rows = nearest(part.keys)
        tokens = part.values[rows]
        is_gold = tokens == GOLD[:, None]
        assert point.num_entries == len(part.keys)
        assert point.gold_recall == pytest.approx(is_gold.any(axis=1).mean(), abs=1e-12)
        expected = np.mean([token in part.values for token in GOLD])
        assert point.gold_coverage == pytest.approx(expected, abs=1e-12)

        spread = np.sort(distances[:, -1] - distances[:, 0])[(QUERIES - 1) // 2]
        nmt_probs = np.exp(record.gold_log_probs.double().numpy())
        scores = {}
        for k in (1, 2, 4, 8):
            for temperature in (float(f"{factor * spread:.1e}") for factor in SPREADS):
                masses = np.exp(-(distances[:, :k] - distances[:, :1]) / temperature)
                knn_probs = (masses * is_gold[:, :k]).sum(axis=1) / masses.sum(axis=1)
                for weight in KNN_WEIGHTS:
                    mixed = weight * knn_probs + (1 - weight) * nmt_probs
                    scores[FixedCombiner(k, weight, temperature)] = np.log(mixed).mean()
        assert point.log_prob == pytest.approx(max(scores.values()), rel=1e-5)
        assert scores[point.setting] == pytest.approx(max(scores.values()), rel=1e-5)
        assert (point.bleu, point.bleu_interval, point.bleu_gain) == (None, None, None)
        assert point.seconds_per_1000_queries > 0


def test_more_entries_cover_more_gold_tokens_and_come_nearer() -> None:
    shares = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    points = measure_scaling(KEYS, VALUES, make_record(), shares=shares, num_neighbours=4)
    coverage = [point.gold_coverage for point in points]
    assert coverage == sorted(coverage)
    assert coverage[0] < coverage[-1]
    sizes = [point.memory_bytes for point in points]
    assert sizes == sorted(sizes)
    # Exact search: the j-th neighbour can only be replaced by a nearer one.
    indexes = [FlatIndex(subset(KEYS, VALUES, share).keys) for share in shares]
    found = [index.search(torch.from_numpy(HIDDEN), 4)[0] for index in indexes]
    for small, large in itertools.pairwise(found):
        assert (large <= small + 1e-4).all()
    # So what the whole finds is found the more the larger the part.
    whole = nearest(KEYS, 4)[1]
    kept = [np.isin(whole, subset(KEYS, VALUES, share).entries).mean() for share in shares]
    assert kept == sorted(kept)
    assert kept[-1] == 1.0


def test_the_whole_gives_what_the_whole_datastore_gives() -> None:
    (point,) = measure_scaling(KEYS, VALUES, make_record(), shares=[1.0], num_neighbours=K)
    retriever = Retriever(LocalSource(FlatIndex(KEYS), VALUES), K)
    found = retriever(DecoderStates(torch.from_numpy(HIDDEN)))
    is_gold = (found.tokens == torch.from_numpy(GOLD)[:, None]).any(dim=1)
    assert point.gold_recall == float(is_gold.double().mean())
    assert point.memory_bytes == M * (4 * D + 4) + 4 * M
    assert point.index == "exact (l2, cpu)"


def test_more_entries_can_push_the_gold_token_out() -> None:
    keys = np.array([[1.0], [0.0]], dtype=np.float16)
    record = dataclasses.replace(
        make_record(),
        gold=torch.tensor([7], dtype=torch.int32),
        gold_log_probs=torch.tensor([-1.0]),
        queries=torch.zeros(1, 1),
    )
    seed = next(s for s in range(99) if subset(keys, np.array([7, 3]), 0.5, s).entries == 0)
    part, whole = measure_scaling(
        keys, np.array([7, 3]), record, shares=(0.5, 1.0), num_neighbours=1, seed=seed
    )
    assert (part.gold_recall, whole.gold_recall) == (1.0, 0.0)
    assert (part.gold_coverage, whole.gold_coverage) == (1.0, 1.0)


def percentiles(numbers: np.ndarray) -> tuple[float, float]:
    """The 2.5th and the 97.5th: so far from the lowest to the highest of the sorted ones."""
    ranked = sorted(numbers.tolist())
    bounds = []
    for share in (0.025, 0.975):
        place = share * (len(ranked) - 1)
        below = int(place)
        above = min(below + 1, len(ranked) - 1)
        bounds.append(ranked[below] + (place - below) * (ranked[above] - ranked[below]))
    return bounds[0], bounds[1]


def test_decoding_gets_the_part_with_its_own_setting() -> None:
    calls: list[tuple[int, FixedCombiner]] = []
    rng = np.random.default_rng(8)
    samples = rng.normal(size=(3, 200)).cumsum(axis=0)  # alike, so that pairing matters
    scores = [
        Resampled("bleu", value, drawn, rng.normal(size=20))
        for value, drawn in zip((10.0, 12.5, 12.0), samples, strict=True)
    ]

    def decode(retriever: Retriever, setting: FixedCombiner) -> Resampled:
        assert retriever.num_neighbours == setting.num_neighbours
        calls.append((len(retriever.source), setting))
        return scores[len(calls) - 1]

    points = measure_scaling(
        KEYS, VALUES, make_record(), shares=(1.0, 0.1, 0.3), num_neighbours=K, decode=decode
    )
    assert calls == [(point.num_entries, point.setting) for point in points]
    assert [point.bleu for point in points] == [10.0, 12.5, 12.0]
    assert [point.share for point in points] == [0.1, 0.3, 1.0]
    for point, drawn in zip(points, samples, strict=True):
        assert point.bleu_interval == pytest.approx(percentiles(drawn))
    assert points[0].bleu_gain is None
    for place, gain in ((1, 2.5), (2, -0.5)):
        found = points[place].bleu_gain
        assert found is not None
        assert found.value == gain
        expected = percentiles(samples[place] - samples[place - 1])
        assert (found.low, found.high) == pytest.approx(expected)


def test_another_index_may_miss_neighbours() -> None:
    def build(keys: np.ndarray) -> FaissIndex:
        return FaissIndex.build(keys, "IVF20,Flat", parameters="nprobe=1")

    (exact,) = measure_scaling(KEYS, VALUES, make_record(), shares=[1.0], num_neighbours=32)
    (rough,) = measure_scaling(
        KEYS, VALUES, make_record(), shares=[1.0], num_neighbours=32, build_index=build
    )
    assert rough.index.startswith("IVF20")
    assert 0.3 < rough.gold_recall < exact.gold_recall
    assert rough.gold_coverage == exact.gold_coverage


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_lies_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(ScalingError, match=f"share .*{share}"):
        subset(KEYS, VALUES, share)


def test_what_cannot_be_measured_is_refused() -> None:
    record = make_record()
    with pytest.raises(ScalingError, match=r"900 keys .*899 values"):
        subset(KEYS, VALUES[:-1], 0.5)
    with pytest.raises(ScalingError, match=r"0\.01 .*9 of 900 .*10"):
        measure_scaling(KEYS, VALUES, record, num_neighbours=10)
    with pytest.raises(ScalingError, match=r"no queries.*keep_queries=True"):
        measure_scaling(KEYS, VALUES, dataclasses.replace(record, queries=None))
    empty = Record(**{name: tensor[:0] for name, tensor in record.arrays().items()})
    with pytest.raises(ScalingError, match="0 tokens"):
        measure_scaling(KEYS, VALUES, empty)

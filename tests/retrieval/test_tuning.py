"""The grid against the equations in float64; how it grows, and what is chosen from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_knnmt.retrieval import FixedCombiner, tuning
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.tuning import (
    Grid,
    TuningError,
    best_places,
    choose,
    mean_log_probs,
    reaches_for,
    score_grid,
    temperatures_for,
    tune_distance,
    tune_fixed,
)

M, K = 37, 8


def make_record(*, scale: float = 30.0, offset: float = 0.0) -> Record:
    """A record of few tokens, so that neighbours often repeat and often hold the gold token.

    Row 0 has no neighbour at all, row 1 has three, and in row 2 the model is sure against the gold.
    """
    generator = torch.Generator().manual_seed(5)
    distances = torch.rand(M, K, generator=generator).mul(scale).sort(dim=-1).values + offset
    distances[0] = torch.inf
    distances[1, 3:] = torch.inf
    gold_log_probs = -4.0 * torch.rand(M, generator=generator)
    gold_log_probs[2] = -150.0  # p_NMT(gold) is zero in float32
    tokens = torch.randint(0, 4, (M, K), generator=generator, dtype=torch.int32)
    gold = torch.randint(0, 4, (M,), generator=generator, dtype=torch.int32)
    return Record(
        tokens=tokens.masked_fill(distances.isinf(), 0),
        distances=distances,
        entries=torch.arange(M * K).view(M, K).masked_fill(distances.isinf(), -1),
        gold=gold,
        gold_log_probs=gold_log_probs,
        neighbour_log_probs=torch.zeros(M, K),
        sentences=torch.arange(M, dtype=torch.int32),
        queries=None,
    )


def log_prob_by_the_equations(record: Record, k: int, t: float, peak: float, reach: float) -> float:
    """Mean log p(gold): equations 2 and 3 of Khandelwal et al., 2021, with the λ of SK-MT."""
    total = 0.0
    for row in range(record.num_tokens):
        nmt_prob = np.exp(np.float64(record.gold_log_probs[row]))
        distances = record.distances[row, :k].double().numpy()
        tokens = record.tokens[row, :k].numpy()[np.isfinite(distances)]
        masses = np.exp(-distances[np.isfinite(distances)] / t)
        lambda_ = peak * max(0.0, 1 - distances[0] / reach) if len(tokens) else 0.0
        knn_prob = masses[tokens == int(record.gold[row])].sum() / masses.sum() if lambda_ else 0.0
        with np.errstate(divide="ignore"):
            total += float(np.log(lambda_ * knn_prob + (1 - lambda_) * nmt_prob))
    return total / record.num_tokens


@pytest.mark.parametrize("offset", [0.0, -300.0])  # inner products: distances below zero
def test_a_constant_weight_is_what_the_equations_say(
    offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "ROWS_AT_ONCE", 10)
    record = make_record(offset=offset)
    ks, weights, temperatures = [1, 2, 3, 8], [0.0, 0.1, 0.5, 0.99], [0.5, 10.0, 1000.0]
    grid = score_grid(record, ks, weights, temperatures)
    assert grid.scores.shape == (4, 3, 4)
    assert grid.base_score == pytest.approx(float(record.gold_log_probs.double().mean()))
    for place in np.ndindex(grid.scores.shape):
        at = grid.at(place)
        expected = log_prob_by_the_equations(
            record, at.num_neighbours, at.temperature, at.knn_weight, np.inf
        )
        assert grid.scores[place] == pytest.approx(expected, rel=2e-6), at


def test_a_weight_that_falls_with_the_distance_is_what_the_equations_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "ROWS_AT_ONCE", 10)
    record = make_record()
    values = [1, 2, 3, 8], [0.5, 10.0, 1000.0], [0.0, 0.4, 1.0], [1e-6, 3.0, 20.0, 500.0]
    scores = mean_log_probs(record, *values)
    assert scores.shape == (4, 3, 3, 4)
    for place in np.ndindex(scores.shape):
        k, t, peak, reach = (axis[i] for axis, i in zip(values, place, strict=True))
        expected = log_prob_by_the_equations(record, int(k), t, peak, reach)
        assert scores[place] == pytest.approx(expected, rel=2e-6), (k, t, peak, reach)
    # beyond the smallest distance of all there is the model alone
    np.testing.assert_allclose(scores[..., 0], float(record.gold_log_probs.double().mean()))


def test_no_weight_is_the_model_exactly_and_all_weight_the_datastore() -> None:
    record = make_record()
    scores = score_grid(record, [1, 8], [0.0, 1.0], [10.0]).scores
    base = float(record.gold_log_probs.double().mean())
    np.testing.assert_allclose(scores[:, :, 0], base, rtol=1e-12)
    assert (scores[:, :, 1] == -math.inf).all()  # some gold token is nobody's neighbour

    all_gold = Record(**{**vars(record), "tokens": record.gold[:, None].expand(M, K).clone()})
    only = score_grid(all_gold, [8], [1.0], [10.0]).scores[0, 0, 0]
    assert only == pytest.approx(float(record.gold_log_probs[0]) / M)  # row 0 had no neighbours


def test_temperatures_follow_the_scale_of_the_distances() -> None:
    small, large = make_record(scale=30.0), make_record(scale=3000.0, offset=-7e3)
    assert len(temperatures_for(small)) == len(tuning.SPREADS)
    for low, high in zip(temperatures_for(small), temperatures_for(large), strict=True):
        assert high == pytest.approx(100 * low, rel=0.11)  # two digits are kept
    spreads = (small.distances[3:, -1] - small.distances[3:, 0]).sort().values
    unit = temperatures_for(small)[tuning.SPREADS.index(1)]
    assert unit == pytest.approx(float(spreads[len(spreads) // 2]), rel=0.06)
    assert temperatures_for(large)[0] == float(f"{temperatures_for(large)[0]:.1e}")


def test_temperatures_exist_where_no_distances_differ() -> None:
    record = make_record()
    equal = Record(**{**vars(record), "distances": torch.full((M, K), 3.0)})
    assert temperatures_for(equal) == pytest.approx(tuning.SPREADS, rel=0.05)


def test_reaches_follow_the_nearest_distances_without_those_of_equal_keys() -> None:
    record = make_record()
    distances = record.distances.clone()
    distances[3:25, 0] = 0.0  # most tokens are in the datastore
    nearest = np.sort(distances[1:, 0][distances[1:, 0] > 0].numpy())
    reaches = reaches_for(Record(**{**vars(record), "distances": distances}))
    assert reaches[tuning.REACHES.index(1)] == float(f"{nearest[(len(nearest) - 1) // 2]:.1e}")
    assert reaches == tuple(sorted(reaches))


def grid_of(scores: np.ndarray, num_neighbours: tuple[int, ...]) -> Grid[FixedCombiner]:
    axes = {
        "num_neighbours": num_neighbours,
        "temperature": tuple(10.0 * 2**i for i in range(scores.shape[1])),
        "knn_weight": tuple((i + 1) / 10 for i in range(scores.shape[2])),
    }
    return Grid(FixedCombiner, axes, scores, base_score=-3.0)


def test_the_best_settings_lie_apart() -> None:
    scores = np.full((3, 4, 5), -9.0)
    scores[1, 1, 1] = -1.0
    scores[1, 1, 2] = -1.1  # one step from the best
    scores[2, 2, 2] = -1.2  # one step in each
    scores[1, 1, 3] = -1.3  # two steps in λ
    scores[1, 3, 1] = -1.4  # two steps in T
    grid = grid_of(scores, (2, 4, 8))
    assert best_places(grid, 3) == [(1, 1, 1), (1, 1, 3), (1, 3, 1)]
    assert best_places(grid, 1) == [(1, 1, 1)]
    assert grid.best == grid.at((1, 1, 1)) == FixedCombiner(4, 0.2, 20.0)
    assert grid.best_score == -1.0
    assert best_places(grid_of(scores[:1, :2, :2], (2,)), 5) == [(0, 0, 0)]  # all within one step


def test_one_neighbour_is_tried_at_one_temperature() -> None:
    scores = np.full((3, 4, 2), -1.0)
    scores[2] = -2.0
    places = best_places(grid_of(scores, (1, 2, 4)), 10)
    assert len([place for place in places if place[0] == 0]) == 1
    assert places[1][0] == 2  # k = 2 is one step from k = 1


def test_bleu_decides_among_the_candidates() -> None:
    grid = score_grid(make_record(), [8, 1, 4, 4], [0.7, 0.1, 0.4], [100.0, 1.0, 10.0])
    assert grid.axes["num_neighbours"] == (1, 4, 8)
    assert grid.axes["knn_weight"] == (0.1, 0.4, 0.7)
    places = best_places(grid, 3)
    asked: list[FixedCombiner] = []

    def decode(combiner: FixedCombiner) -> float:
        asked.append(combiner)
        return [30.0, 32.0, 32.0][len(asked) - 1]

    chosen = choose(grid, places, decode)
    assert asked == [grid.at(place) for place in places]
    assert chosen.combiner == asked[1]  # of equals the more probable one
    assert [candidate.bleu for candidate in chosen.candidates] == [32.0, 32.0, 30.0]
    assert chosen.candidates[2].log_prob == grid.scores.max()
    assert chosen.log_prob == grid.scores[places[1]]


def test_given_values_are_kept() -> None:
    def decode(combiner: FixedCombiner) -> float:
        return 1.0

    record = make_record()
    free = tune_fixed(record, decode)
    assert free.grid.axes["num_neighbours"] == (1, 2, 4, 8)
    assert 1 <= len(free.candidates) <= 4
    all_given = tune_fixed(record, decode, num_neighbours=3, knn_weight=0.35, temperature=25.0)
    assert all_given.combiner == FixedCombiner(3, 0.35, 25.0)
    for given in ({"num_neighbours": 3}, {"knn_weight": 0.9}, {"temperature": 0.01}):
        combiner = tune_fixed(record, decode, **given).combiner  # type: ignore[arg-type]
        assert {**vars(combiner), **given} == vars(combiner)
    for given in ({"num_neighbours": 3}, {"temperature": 1e3}, {"peak": 0.1}, {"reach": 2.0}):
        tuned = tune_distance(record, **given)  # type: ignore[arg-type]
        assert {**vars(tuned.combiner), **given} == vars(tuned.combiner)
        assert not {*given} & {*tuned.grid.extended}


def planted(peak: float, reach: float, temperature: float, farthest: float = 1.5) -> Record:
    """Tokens whose gold token is drawn from the mixture itself, so its setting is the best.

    The neighbours hold the tokens 1 and 2, the nearest at up to `farthest` reaches; the model draws
    3 nearly always.
    """
    rng, num_tokens = np.random.default_rng(4), 4000
    nearest = rng.uniform(0, farthest * reach, num_tokens)
    farther = nearest + rng.uniform(0, 3 * temperature, num_tokens)
    weight = peak * np.maximum(0, 1 - nearest / reach)
    first = 1 / (1 + np.exp(-(farther - nearest) / temperature))
    probs = np.stack([weight * first, weight * (1 - first), 1 - weight], axis=1)
    drawn = (probs.cumsum(axis=1) < rng.uniform(size=(num_tokens, 1))).sum(axis=1)
    model = np.where(drawn == 2, np.log(0.999), np.log(0.0005))
    return Record(
        tokens=torch.tensor([[1, 2]], dtype=torch.int32).repeat(num_tokens, 1),
        distances=torch.tensor(np.stack([nearest, farther], axis=1), dtype=torch.float32),
        entries=torch.arange(2 * num_tokens).view(num_tokens, 2),
        gold=torch.tensor(drawn + 1, dtype=torch.int32),
        gold_log_probs=torch.tensor(model, dtype=torch.float32),
        neighbour_log_probs=torch.full((num_tokens, 2), math.log(0.0005)),
        sentences=torch.arange(num_tokens, dtype=torch.int32),
        queries=None,
    )


def test_it_finds_the_setting_that_the_text_was_drawn_from() -> None:
    record = planted(peak=0.8, reach=100.0, temperature=20.0)
    tuned = tune_distance(record)
    assert tuned.combiner.num_neighbours == 2
    assert tuned.combiner.peak == pytest.approx(0.8, abs=0.11)
    assert tuned.combiner.reach == pytest.approx(100.0, rel=0.3)
    assert tuned.combiner.temperature == pytest.approx(20.0, rel=0.6)
    assert tuned.log_prob == tuned.grid.best_score > tuned.grid.base_score
    assert tuned.candidates == ()


@pytest.mark.parametrize(
    ("name", "constant", "narrow"),
    [
        ("temperature", "SPREADS", (0.01, 0.02, 0.04)),
        ("temperature", "SPREADS", (20, 40)),
        ("reach", "REACHES", (0.02, 0.04)),
        ("reach", "REACHES", (6, 12)),
        ("peak", "PEAKS", (0.01, 0.02)),
        ("peak", "PEAKS", (0.98, 0.99)),
    ],
)
def test_the_grid_grows_until_the_best_lies_inside(
    name: str, constant: str, narrow: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = planted(peak=0.6, reach=100.0, temperature=20.0)
    whole = tune_distance(record)
    monkeypatch.setattr(tuning, constant, narrow)
    tuned = tune_distance(record)
    values = tuned.grid.axes[name]
    assert name in tuned.grid.extended
    assert name not in whole.grid.extended
    assert values[0] < getattr(tuned.combiner, name) < values[-1]
    assert values == tuple(sorted({*values}))
    assert tuned.log_prob == pytest.approx(whole.log_prob, abs=0.01)
    # what was scored in steps is what the whole grid says
    again = mean_log_probs(record, *tuned.grid.axes.values())  # type: ignore[arg-type]
    np.testing.assert_allclose(tuned.grid.scores, again)


def test_the_grid_of_a_constant_weight_grows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    record = planted(peak=0.95, reach=100.0, temperature=20.0, farthest=0.01)
    monkeypatch.setattr(tuning, "KNN_WEIGHTS", (0.1, 0.2))
    tuned = tune_fixed(record, lambda combiner: combiner.knn_weight, num_candidates=1)
    assert tuned.grid.extended == ("knn_weight",)
    assert tuned.combiner.knn_weight == pytest.approx(0.95, abs=0.05)


def test_growing_ends_where_nothing_is_gained() -> None:
    record = make_record()
    never_right = Record(**{**vars(record), "gold": torch.full((M,), 9, dtype=torch.int32)})
    tuned = tune_distance(never_right)  # the less weight the better, without end
    assert len(tuned.grid.axes["peak"]) <= len(tuning.PEAKS) + tuning.MAX_GROWTH
    assert tuned.combiner.peak < min(tuning.PEAKS)
    assert tuned.log_prob == pytest.approx(tuned.grid.base_score, abs=0.01)


def test_inner_products_have_no_reach() -> None:
    with pytest.raises(CombinerError, match=r"knn\.metric=l2.*knn=fixed"):
        tune_distance(make_record(offset=-300.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([9], [0.5], [1.0]), "k = 9 .* 8 neighbours"),
        (([0], [0.5], [1.0]), "k is 0"),
        (([8], [1.5], [1.0]), r"λ is 1\.5"),
        (([8], [-0.1], [1.0]), r"λ is -0\.1"),
        (([8], [0.5], [0.0]), r"T is 0\.0"),
        (([8], [0.5], [math.nan]), "T is nan"),
        (([8], [], [1.0]), "knn_weight"),
    ],
)
def test_errors_name_the_value(
    arguments: tuple[list[int], list[float], list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_grid(make_record(), *arguments)


def test_nothing_to_choose_from_is_an_error() -> None:
    grid = score_grid(make_record(), [1], [0.5], [1.0])
    with pytest.raises(TuningError, match="at least 1 candidate"):
        choose(grid, [], lambda combiner: 1.0)

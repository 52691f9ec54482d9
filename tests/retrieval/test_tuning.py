"""The grid against the equations in float64; how it grows, and what is chosen from it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_knnmt.retrieval import FixedCombiner, tuning
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.tuning import (
    Grid,
    Scores,
    TuningError,
    reaches_for,
    score,
    score_grid,
    temperatures_for,
    tune_distance,
    tune_fixed,
)

M, K, V = 37, 8, 6


def make_record(*, scale: float = 30.0, offset: float = 0.0) -> Record:
    """A record of few tokens, so that neighbours often repeat and often hold the gold token.

    Row 0 has no neighbour at all, row 1 has three, and in row 2 the model is sure against the gold.
    """
    generator = torch.Generator().manual_seed(5)
    distances = torch.rand(M, K, generator=generator).mul(scale).sort(dim=-1).values + offset
    distances[0] = torch.inf
    distances[1, 3:] = torch.inf
    missing = distances.isinf()
    tokens = torch.randint(0, 4, (M, K), generator=generator).masked_fill(missing, 0)
    gold = torch.randint(0, 4, (M,), generator=generator)
    log_probs = model_log_probs(gold)
    return Record(
        tokens=tokens.int(),
        distances=distances,
        entries=torch.arange(M * K).view(M, K).masked_fill(missing, -1),
        gold=gold.int(),
        gold_log_probs=log_probs.gather(1, gold[:, None])[:, 0],
        neighbour_log_probs=log_probs.gather(1, tokens).masked_fill(missing, -torch.inf),
        sentences=torch.arange(M, dtype=torch.int32),
        queries=None,
        best_log_probs=log_probs.max(dim=1, keepdim=True).values,
    )


def model_log_probs(gold: Tensor) -> Tensor:
    """log p_NMT, [M, V]."""
    logits = 1.5 * torch.randn(M, V, generator=torch.Generator().manual_seed(6))
    logits[2, gold[2]] = -150.0  # zero in float32
    return logits.log_softmax(dim=1)


def accuracy_of_the_mixture(record: Record, k: int, t: float, peak: float, reach: float) -> float:
    """How often the dense mixture's most probable token is gold, row by row in float64."""
    nmt_probs = model_log_probs(record.gold.long()).double().exp().numpy()
    right = 0
    for row in range(M):
        distances = record.distances[row, :k].double().numpy()
        found = np.isfinite(distances)
        mixture = nmt_probs[row]
        if found.any():
            masses = np.exp(-(distances[found] - distances[0]) / t)
            knn = np.zeros(V)
            np.add.at(knn, record.tokens[row, :k].numpy()[found], masses / masses.sum())
            lambda_ = peak * max(0.0, 1 - distances[0] / reach)
            mixture = lambda_ * knn + (1 - lambda_) * mixture
        right += int(mixture.argmax()) == int(record.gold[row])
    return right / M


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
    assert grid.scores.log_probs.shape == (4, 3, 4)
    assert grid.scores.accuracies is None
    for place in np.ndindex(4, 3, 4):
        at = grid.at(place)
        expected = log_prob_by_the_equations(
            record, at.num_neighbours, at.temperature, at.knn_weight, np.inf
        )
        assert grid.scores.log_probs[place] == pytest.approx(expected, rel=2e-6), at


def test_a_weight_that_falls_with_the_distance_is_what_the_equations_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "ROWS_AT_ONCE", 10)
    record = make_record()
    values = [1, 2, 3, 8], [0.5, 10.0, 1000.0], [0.0, 0.4, 1.0], [1e-6, 3.0, 20.0, 500.0]
    scores = score(record, *values).log_probs
    assert scores.shape == (4, 3, 3, 4)
    for place in np.ndindex(scores.shape):
        k, t, peak, reach = (axis[i] for axis, i in zip(values, place, strict=True))
        expected = log_prob_by_the_equations(record, int(k), t, peak, reach)
        assert scores[place] == pytest.approx(expected, rel=2e-6), (k, t, peak, reach)
    # beyond the smallest distance of all there is the model alone
    np.testing.assert_allclose(scores[..., 0], float(record.gold_log_probs.double().mean()))


def test_accuracy_is_how_often_the_mixture_ranks_gold_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "ROWS_AT_ONCE", 10)
    record = make_record()
    values = [1, 2, 3, 8], [0.5, 10.0, 1000.0], [0.0, 0.3, 0.7, 1.0], [1e-6, 10.0, 40.0, math.inf]
    accuracies = score(record, *values).accuracies
    assert accuracies is not None
    for place in np.ndindex(accuracies.shape):
        k, t, peak, reach = (axis[i] for axis, i in zip(values, place, strict=True))
        expected = accuracy_of_the_mixture(record, int(k), t, peak, reach)
        assert accuracies[place] == pytest.approx(expected, abs=1e-12), (k, t, peak, reach)
    assert len({*accuracies.ravel()}) > 5


def test_no_weight_is_the_model_exactly_and_all_weight_the_datastore() -> None:
    record = make_record()
    scores = score_grid(record, [1, 8], [0.0, 1.0], [10.0]).scores.log_probs
    base = float(record.gold_log_probs.double().mean())
    np.testing.assert_allclose(scores[:, :, 0], base, rtol=1e-12)
    assert (scores[:, :, 1] == -math.inf).all()  # some gold token is nobody's neighbour

    all_gold = replace(record, tokens=record.gold[:, None].expand(M, K).clone())
    only = score_grid(all_gold, [8], [1.0], [10.0]).scores.log_probs[0, 0, 0]
    assert only == pytest.approx(
        float(record.gold_log_probs[0]) / M, rel=1e-5
    )  # row 0 had no neighbours


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
    equal = replace(record, distances=torch.full((M, K), 3.0))
    assert temperatures_for(equal) == pytest.approx(tuning.SPREADS, rel=0.05)


def test_reaches_follow_the_nearest_distances_without_those_of_equal_keys() -> None:
    record = make_record()
    distances = record.distances.clone()
    distances[3:25, 0] = 0.0  # most tokens are in the datastore
    nearest = np.sort(distances[1:, 0][distances[1:, 0] > 0].numpy())
    reaches = reaches_for(replace(record, distances=distances))
    assert reaches[tuning.REACHES.index(1)] == float(f"{nearest[(len(nearest) - 1) // 2]:.1e}")
    assert reaches == tuple(sorted(reaches))


def grid_of(log_probs: list[float], accuracies: list[float] | None) -> Grid[FixedCombiner]:
    """Settings that differ in λ, on 1,000 tokens."""
    axes = {
        "num_neighbours": (4,),
        "temperature": (10.0,),
        "knn_weight": tuple((i + 1) / 10 for i in range(len(log_probs))),
    }
    scores = [None if each is None else np.array([[each]]) for each in (log_probs, accuracies)]
    return Grid(FixedCombiner, axes, Scores(*scores), num_tokens=1000)  # type: ignore[arg-type]


def test_log_prob_decides_among_settings_that_are_as_accurate_as_the_best() -> None:
    error = math.sqrt(0.8 * 0.2 / 1000)  # 0.0126
    grid = grid_of([-1.0, -1.3, -1.2, -1.5], [0.7, 0.8, 0.8 - 0.9 * error, 0.79])
    assert grid.best == FixedCombiner(4, 0.3, 10.0)
    assert (grid.log_prob, grid.accuracy) == (-1.2, 0.8 - 0.9 * error)
    farther = grid_of([-1.0, -1.3, -1.2, -1.5], [0.7, 0.8, 0.8 - 1.1 * error, 0.79])
    assert farther.best == FixedCombiner(4, 0.2, 10.0)
    impossible = grid_of([-math.inf] * 3, [0.7, 0.8, 0.8])
    assert impossible.best == FixedCombiner(4, 0.2, 10.0)  # of equals the first
    by_log_prob = grid_of([-1.3, -1.2, -1.2], None)
    assert by_log_prob.best == FixedCombiner(4, 0.2, 10.0)
    assert (by_log_prob.log_prob, by_log_prob.accuracy) == (-1.2, None)


def test_given_values_are_kept() -> None:
    record = make_record()
    assert tune_fixed(record).axes["num_neighbours"] == (1, 2, 4, 8)
    all_given = tune_fixed(record, num_neighbours=3, knn_weight=0.35, temperature=25.0)
    assert all_given.best == FixedCombiner(3, 0.35, 25.0)
    for given in ({"num_neighbours": 3}, {"knn_weight": 0.9}, {"temperature": 0.01}):
        fixed = tune_fixed(record, **given)  # type: ignore[arg-type]
        assert {**vars(fixed.best), **given} == vars(fixed.best)
        assert not {*given} & {*fixed.extended}
    for given in ({"num_neighbours": 3}, {"temperature": 1e3}, {"peak": 0.1}, {"reach": 2.0}):
        tuned = tune_distance(record, **given)  # type: ignore[arg-type]
        assert {**vars(tuned.best), **given} == vars(tuned.best)
        assert not {*given} & {*tuned.extended}


def planted(peak: float, reach: float, temperature: float, farthest: float = 1.5) -> Record:
    """Tokens whose gold token is drawn from the mixture itself, so its setting is the best.

    The neighbours hold the tokens 1 and 2, the nearest at up to `farthest` reaches; the model draws
    3 nearly always.
    """
    rng, num_tokens = np.random.default_rng(4), 2000
    nearest = rng.uniform(0, farthest * reach, num_tokens)
    farther = nearest + rng.uniform(0, 3 * temperature, num_tokens)
    weight = peak * np.maximum(0, 1 - nearest / reach)
    first = 1 / (1 + np.exp(-(farther - nearest) / temperature))
    probs = np.stack([weight * first, weight * (1 - first), 1 - weight], axis=1)
    drawn = (probs.cumsum(axis=1) < rng.uniform(size=(num_tokens, 1))).sum(axis=1)
    model = np.log(np.where(drawn == 2, 0.999, 0.0005))
    return Record(
        tokens=torch.tensor([[1, 2]], dtype=torch.int32).repeat(num_tokens, 1),
        distances=torch.tensor(np.stack([nearest, farther], axis=1), dtype=torch.float32),
        entries=torch.arange(2 * num_tokens).view(num_tokens, 2),
        gold=torch.tensor(drawn + 1, dtype=torch.int32),
        gold_log_probs=torch.tensor(model, dtype=torch.float32),
        neighbour_log_probs=torch.full((num_tokens, 2), math.log(0.0005)),
        sentences=torch.arange(num_tokens, dtype=torch.int32),
        queries=None,
        best_log_probs=torch.full((num_tokens, 1), math.log(0.999)),
    )


def test_it_finds_a_setting_as_good_as_the_one_that_the_text_was_drawn_from() -> None:
    record = planted(peak=0.8, reach=100.0, temperature=20.0)
    tuned = tune_distance(record)
    true = score(record, [2], [20.0], [0.8], [100.0])
    assert true.accuracies is not None
    assert tuned.best.num_neighbours == 2
    assert tuned.accuracy == pytest.approx(float(true.accuracies.item()), abs=0.01)
    assert tuned.log_prob == pytest.approx(float(true.log_probs.item()), abs=0.02)
    assert tuned.num_tokens == 2000


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
    values = tuned.axes[name]
    assert name in tuned.extended
    assert name not in whole.extended
    assert values[0] < getattr(tuned.best, name) < values[-1]
    assert values == tuple(sorted({*values}))
    assert tuned.accuracy == pytest.approx(whole.accuracy, abs=0.02)
    # what was scored in steps is what the whole grid says
    again = score(record, *tuned.axes.values())  # type: ignore[arg-type]
    for ours, expected in zip(tuned.scores, again, strict=True):
        np.testing.assert_allclose(ours, expected)  # type: ignore[arg-type]


def test_the_grid_of_a_constant_weight_grows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    record = planted(peak=0.95, reach=100.0, temperature=20.0, farthest=0.01)
    monkeypatch.setattr(tuning, "KNN_WEIGHTS", (0.1, 0.2))
    tuned = tune_fixed(record)
    assert "knn_weight" in tuned.extended
    assert 0.5 < tuned.best.knn_weight < 1.0


def test_growing_ends_where_nothing_is_gained() -> None:
    record = make_record()
    never_right = replace(record, gold=torch.full((M,), 9, dtype=torch.int32))
    tuned = tune_distance(never_right)  # the less weight the better, without end
    assert len(tuned.axes["peak"]) <= len(tuning.PEAKS) + tuning.MAX_GROWTH
    assert tuned.best.peak < min(tuning.PEAKS)
    model_alone = float(record.gold_log_probs.double().mean())
    assert tuned.log_prob == pytest.approx(model_alone, abs=0.01)


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


def test_a_record_without_the_models_best_says_how_to_get_it() -> None:
    with pytest.raises(TuningError, match="keep_best"):
        tune_fixed(replace(make_record(), best_log_probs=None))


def test_an_empty_record_is_an_error() -> None:
    record = make_record()
    nothing = Record(**{n: None if t is None else t[:0] for n, t in vars(record).items()})
    with pytest.raises(TuningError, match="empty"):
        tune_distance(nothing)

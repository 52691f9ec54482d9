"""The grid against the equations written for reading, in float64; then what is chosen from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_knnmt.retrieval import tuning
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.tuning import (
    Grid,
    Setting,
    TuningError,
    best_places,
    choose,
    grid_scores,
    score_grid,
    temperatures_for,
    tune,
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


def log_prob_by_the_equations(record: Record, setting: Setting) -> float:
    """Mean log p(gold), token by token: equations 2 and 3 of Khandelwal et al., 2021."""
    total = 0.0
    for row in range(record.num_tokens):
        nmt_prob = np.exp(np.float64(record.gold_log_probs[row]))
        distances = record.distances[row, : setting.num_neighbours].double().numpy()
        tokens = record.tokens[row, : setting.num_neighbours].numpy()[np.isfinite(distances)]
        masses = np.exp(-distances[np.isfinite(distances)] / setting.temperature)
        lambda_ = setting.knn_weight if len(tokens) else 0.0
        knn_prob = masses[tokens == int(record.gold[row])].sum() / masses.sum() if lambda_ else 0.0
        with np.errstate(divide="ignore"):
            total += float(np.log(lambda_ * knn_prob + (1 - lambda_) * nmt_prob))
    return total / record.num_tokens


@pytest.mark.parametrize("offset", [0.0, -300.0])  # inner products: distances below zero
def test_the_grid_is_what_the_equations_say(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ROWS_AT_ONCE", 10)
    record = make_record(offset=offset)
    ks, weights, temperatures = [1, 2, 3, 8], [0.0, 0.1, 0.5, 0.99], [0.5, 10.0, 1000.0]
    scores = grid_scores(record, ks, weights, temperatures)
    assert scores.shape == (4, 3, 4)
    for i, k in enumerate(ks):
        for j, temperature in enumerate(temperatures):
            for m, weight in enumerate(weights):
                expected = log_prob_by_the_equations(record, Setting(k, weight, temperature))
                assert scores[i, j, m] == pytest.approx(expected, rel=2e-6), (
                    k,
                    temperature,
                    weight,
                )


def test_no_weight_is_the_model_exactly_and_all_weight_the_datastore() -> None:
    record = make_record()
    scores = grid_scores(record, [1, 8], [0.0, 1.0], [10.0])
    assert (scores[:, :, 0] == float(record.gold_log_probs.double().mean())).all()
    assert (scores[:, :, 1] == -math.inf).all()  # some gold token is nobody's neighbour

    all_gold = Record(**{**vars(record), "tokens": record.gold[:, None].expand(M, K).clone()})
    only = grid_scores(all_gold, [8], [1.0], [10.0])[0, 0, 0]
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


def grid_of(scores: np.ndarray, num_neighbours: tuple[int, ...]) -> Grid:
    temperatures = tuple(10.0 * 2**i for i in range(scores.shape[1]))
    weights = tuple((i + 1) / 10 for i in range(scores.shape[2]))
    return Grid(num_neighbours, temperatures, weights, scores, base_score=-3.0)


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
    assert grid.setting((1, 1, 3)) == Setting(4, 0.4, 20.0)
    assert str(grid.setting((1, 1, 3))) == "k 4, λ 0.4, T 20"
    assert best_places(grid_of(scores[:1, :2, :2], (2,)), 5) == [(0, 0, 0)]  # all within one step


def test_one_neighbour_is_tried_at_one_temperature() -> None:
    scores = np.full((3, 4, 2), -1.0)
    scores[2] = -2.0
    places = best_places(grid_of(scores, (1, 2, 4)), 10)
    assert len([place for place in places if place[0] == 0]) == 1
    assert places[1][0] == 2  # k = 2 is one step from k = 1


def test_bleu_decides_among_the_candidates() -> None:
    grid = score_grid(make_record(), [8, 1, 4, 4], [0.7, 0.1, 0.4], [100.0, 1.0, 10.0])
    assert grid.num_neighbours == (1, 4, 8)
    assert grid.knn_weights == (0.1, 0.4, 0.7)
    assert grid.base_score == pytest.approx(float(make_record().gold_log_probs.mean()))
    places = best_places(grid, 3)
    asked: list[Setting] = []

    def decode(setting: Setting) -> float:
        asked.append(setting)
        return [30.0, 32.0, 32.0][len(asked) - 1]

    chosen = choose(grid, places, decode)
    assert asked == [grid.setting(place) for place in places]
    assert chosen.setting == asked[1]  # of equals the more probable one
    assert [candidate.bleu for candidate in chosen.candidates] == [32.0, 32.0, 30.0]
    assert chosen.candidates[2].log_prob == grid.scores.max()


def test_tune_uses_what_was_recorded() -> None:
    asked: list[Setting] = []
    result = tune(make_record(), lambda setting: float(asked.append(setting) is None))
    assert result.grid.num_neighbours == (1, 2, 4, 8)
    assert result.grid.scores.shape == (4, 7, 9)
    assert 1 <= len(asked) <= 4
    assert result.setting == asked[0]
    given = tune(
        make_record(),
        lambda setting: 1.0,
        num_neighbours=[4],
        knn_weights=[0.3],
        temperatures=[25.0],
    )
    assert given.setting == Setting(4, 0.3, 25.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([9], [0.5], [1.0]), r"k = 9 cannot be scored: 8 neighbours .* 1 to 8 are allowed"),
        (([0], [0.5], [1.0]), r"k = 0 cannot be scored"),
        (([8], [1.5], [1.0]), r"λ = 1\.5 is no share of kNN: it must lie between 0 .* and 1"),
        (([8], [-0.1], [1.0]), r"λ = -0\.1 is no share"),
        (([8], [0.5], [0.0]), r"T = 0\.0 is no temperature: it must be a number above 0"),
        (([8], [0.5], [math.nan]), r"T = nan is no temperature"),
        (([8], [], [1.0]), r"No value of λ is given: at least 1"),
    ],
)
def test_errors_name_the_number(
    arguments: tuple[list[int], list[float], list[float]], message: str
) -> None:
    with pytest.raises(TuningError, match=message):
        grid_scores(make_record(), *arguments)


def test_nothing_to_choose_from_is_an_error() -> None:
    grid = score_grid(make_record(), [1], [0.5], [1.0])
    with pytest.raises(TuningError, match="no setting to choose from: at least 1 candidate"):
        choose(grid, [], lambda setting: 1.0)

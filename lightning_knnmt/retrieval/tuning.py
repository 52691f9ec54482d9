"""Chooses k, λ and temperature: a whole grid from one record, then the best few by decoding.

The mixture is that of Khandelwal et al., 2021 (arXiv:2010.00710), equations 2 and 3. Once a pass is
recorded, its mean log p(gold) over the validation set costs no model and no search, so hundreds of
settings are scored in less than a second. It is not what a translation is judged by, so BLEU
decides, among a few settings that lie apart.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.retrieval.record import Record

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

NUM_NEIGHBOURS = (1, 2, 4, 8, 16, 32)
KNN_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SPREADS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # temperatures, in median spreads of distances
ROWS_AT_ONCE = 4096  # bounds the temporaries: a few arrays of [rows, K] and [rows, k, λ]


class TuningError(ValueError):
    """A grid that cannot be scored."""


@dataclass(frozen=True)
class Setting:
    """The three numbers of a `FixedCombiner`."""

    num_neighbours: int
    knn_weight: float
    temperature: float

    def __str__(self) -> str:
        return f"k {self.num_neighbours}, λ {self.knn_weight:g}, T {self.temperature:g}"


@dataclass(frozen=True)
class Grid:
    """Settings and how probable each makes the text.

    Attributes:
        num_neighbours: The values of k, ascending.
        temperatures: The values of T, ascending.
        knn_weights: The values of λ, ascending.
        scores: Mean log p(gold) of each setting, [k, T, λ].
        base_score: The same without retrieval (λ = 0).
    """

    num_neighbours: tuple[int, ...]
    temperatures: tuple[float, ...]
    knn_weights: tuple[float, ...]
    scores: Array
    base_score: float

    def setting(self, place: tuple[int, int, int]) -> Setting:
        """Returns the setting at a place of `scores`."""
        k, temperature, weight = place
        return Setting(
            self.num_neighbours[k], self.knn_weights[weight], self.temperatures[temperature]
        )


@dataclass(frozen=True)
class Candidate:
    """A setting that was worth decoding with."""

    setting: Setting
    log_prob: float  # mean log p(gold)
    bleu: float  # of the translations that were decoded with it


@dataclass(frozen=True)
class Tuning:
    """What was chosen, and from what."""

    setting: Setting  # the best candidate's
    candidates: tuple[Candidate, ...]  # all that were decoded with, best first
    grid: Grid  # all that were scored


def tune(
    record: Record,
    decode: Callable[[Setting], float],
    *,
    num_neighbours: Sequence[int] | None = None,
    knn_weights: Sequence[float] = KNN_WEIGHTS,
    temperatures: Sequence[float] | None = None,
    num_candidates: int = 4,
) -> Tuning:
    """Scores the grid, decodes with the best few settings and chooses the one with the best BLEU.

    Args:
        record: The recorded pass over the validation set.
        decode: Translates with a setting and returns BLEU.
        num_neighbours: Values of k; by default powers of two up to 32 or what was recorded.
        knn_weights: Values of λ.
        temperatures: Values of T; by default `temperatures_for(record)`.
        num_candidates: How many settings to decode with, at most.
    """
    ks = num_neighbours or [k for k in NUM_NEIGHBOURS if k <= record.max_neighbours]
    grid = score_grid(record, ks, knn_weights, temperatures or temperatures_for(record))
    return choose(grid, best_places(grid, num_candidates), decode)


def temperatures_for(record: Record) -> tuple[float, ...]:
    """Derives temperatures from how far the recorded distances spread.

    p_kNN depends on exp(-(d_i - d_1) / T) alone, so the natural unit of T is the spread d_K - d_1
    between a token's farthest neighbour and its nearest. Its median over the tokens makes the grid
    fit keys of any size, any metric: far below it only the nearest neighbour counts, far above it
    all count the same. Two digits are kept, so that reports can be typed.
    """
    distances = record.distances
    farthest = distances.masked_fill(distances.isinf(), -torch.inf).amax(dim=-1)
    spread = farthest - distances[:, 0]  # -inf where nothing was found
    spread = spread[spread > 0]
    unit = float(spread.median()) if len(spread) else 1.0
    return tuple(float(f"{factor * unit:.1e}") for factor in SPREADS)


def score_grid(
    record: Record,
    num_neighbours: Sequence[int],
    knn_weights: Sequence[float],
    temperatures: Sequence[float],
) -> Grid:
    """Scores every combination of the given numbers, sorted and without repetitions."""
    ks, weights, ts = sorted({*num_neighbours}), sorted({*knn_weights}), sorted({*temperatures})
    scores = grid_scores(record, ks, weights, ts)
    base_score = float(record.gold_log_probs.double().mean())
    return Grid(tuple(ks), tuple(ts), tuple(weights), scores, base_score)


@torch.no_grad()
def grid_scores(
    record: Record,
    num_neighbours: Sequence[int],
    knn_weights: Sequence[float],
    temperatures: Sequence[float],
) -> Array:
    """Computes mean log p(gold) = mean log(λ p_kNN(gold) + (1 - λ) p_NMT(gold)).

    The k nearest of the recorded neighbours are taken for the result of a search for k; for an
    index that ranks a number of candidates growing with k, that is an approximation.

    Args:
        record: The recorded pass over M tokens.
        num_neighbours: Values of k, each at most the recorded K.
        knn_weights: Values of λ in [0, 1].
        temperatures: Values of T > 0.

    Returns:
        [k, T, λ], float64; -inf where λ = 1 and some gold token is not among the neighbours.
    """
    _check(record, num_neighbours, knn_weights, temperatures)
    sums = torch.zeros(
        len(num_neighbours), len(temperatures), len(knn_weights), dtype=torch.float64
    )
    last = torch.tensor(num_neighbours) - 1
    for start in range(0, record.num_tokens, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distances = record.distances[rows, : max(num_neighbours)]
        is_gold = record.tokens[rows, : max(num_neighbours)] == record.gold[rows, None]
        nmt_log_probs = record.gold_log_probs[rows]
        found = distances[:, 0].isfinite()
        # Where nothing was found all distances are infinite; any finite zero point will do.
        excess = distances - distances[:, :1].masked_fill(~found[:, None], 0.0)
        for column, temperature in enumerate(temperatures):
            # Cumulative sums along the neighbours hold the softmax for all k at once.
            masses = torch.exp(excess / -temperature)
            totals = masses.cumsum(dim=-1)[:, last]
            knn_probs = (masses * is_gold).cumsum(dim=-1)[:, last] / totals  # [rows, k]
            knn_log_probs = torch.where(found[:, None], knn_probs.log(), nmt_log_probs[:, None])
            sums[:, column] += _mixed_sums(nmt_log_probs[:, None], knn_log_probs, knn_weights)
    return (sums / record.num_tokens).numpy()


def best_places(grid: Grid, count: int) -> list[tuple[int, int, int]]:
    """Finds the best settings that differ enough to be worth decoding.

    Going down from the best, a setting is passed over if one that was taken lies within one step of
    it in k, T and λ alike. For k = 1 the temperature makes no difference.

    Args:
        grid: Scored settings.
        count: How many to find; fewer are returned where the grid has no more.

    Returns:
        Places in `grid.scores`, best first.
    """
    taken: list[tuple[int, int, int]] = []
    for flat in np.argsort(-grid.scores, axis=None, kind="stable"):
        k, temperature, weight = (int(i) for i in np.unravel_index(flat, grid.scores.shape))
        if not any(_are_near(grid, (k, temperature, weight), other) for other in taken):
            taken.append((k, temperature, weight))
        if len(taken) == count:
            break
    return taken


def choose(
    grid: Grid, places: Sequence[tuple[int, int, int]], decode: Callable[[Setting], float]
) -> Tuning:
    """Decodes with each of the settings and takes the one with the best BLEU.

    Args:
        grid: Scored settings.
        places: Which of them to try; of equals the first one wins.
        decode: Translates with a setting and returns BLEU.
    """
    if not places:
        raise TuningError("There is no setting to choose from: at least 1 candidate is needed.")
    candidates = []
    for place in places:
        setting = grid.setting(place)
        candidates.append(Candidate(setting, float(grid.scores[place]), decode(setting)))
        logger.info("%s: BLEU %.2f", setting, candidates[-1].bleu)
    candidates.sort(key=lambda candidate: -candidate.bleu)
    return Tuning(candidates[0].setting, tuple(candidates), grid)


def _are_near(grid: Grid, one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    steps = [abs(i - j) for i, j in zip(one, other, strict=True)]
    if 1 in (grid.num_neighbours[one[0]], grid.num_neighbours[other[0]]):
        steps[1] = 0  # one neighbour has probability 1 at every temperature
    return max(steps) <= 1


def _mixed_sums(
    nmt_log_probs: Tensor, knn_log_probs: Tensor, knn_weights: Sequence[float]
) -> Tensor:
    """Sums log((1 - λ) p_NMT + λ p_kNN) over the rows.

    Args:
        nmt_log_probs: [rows, 1].
        knn_log_probs: -inf where the gold token is not among the neighbours, [rows, k].
        knn_weights: λ.

    Returns:
        [k, λ], float64.
    """
    # The greater of the two is taken out, so that the rest needs one logarithm for each λ and can
    # neither overflow nor, unless λ is 0 or 1, vanish.
    greater = torch.maximum(nmt_log_probs, knn_log_probs)
    nmt_share = torch.exp(nmt_log_probs - greater)
    knn_share = torch.exp(knn_log_probs - greater)
    common = greater.sum(dim=0, dtype=torch.float64)
    sums = []
    for weight in knn_weights:
        if weight == 0.0:
            nmt = nmt_log_probs.sum(dim=0, dtype=torch.float64)
            sums.append(nmt.expand(knn_log_probs.shape[1]))
        elif weight == 1.0:
            sums.append(knn_log_probs.sum(dim=0, dtype=torch.float64))
        else:
            mixed = torch.log((1.0 - weight) * nmt_share + weight * knn_share)
            sums.append(common + mixed.sum(dim=0, dtype=torch.float64))
    return torch.stack(sums, dim=-1)


def _check(
    record: Record,
    num_neighbours: Sequence[int],
    knn_weights: Sequence[float],
    temperatures: Sequence[float],
) -> None:
    if record.num_tokens == 0:
        raise TuningError("The record is empty: at least 1 token is needed to score settings.")
    for name, values in (("k", num_neighbours), ("λ", knn_weights), ("T", temperatures)):
        if not values:
            raise TuningError(f"No value of {name} is given: at least 1 is needed.")
    for k in num_neighbours:
        if not 1 <= k <= record.max_neighbours:
            raise TuningError(
                f"k = {k} cannot be scored: {record.max_neighbours} neighbours were recorded, so 1 "
                f"to {record.max_neighbours} are allowed. Record more, or ask for fewer."
            )
    for weight in knn_weights:
        if not 0 <= weight <= 1:
            raise TuningError(
                f"λ = {weight} is no share of kNN: it must lie between 0 (the model alone) and 1 "
                "(the datastore alone)."
            )
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise TuningError(f"T = {temperature} is no temperature: it must be a number above 0.")

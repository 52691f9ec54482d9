"""Chooses a combiner's values: a whole grid from one record, then for some by decoding.

Once a teacher-forced pass over the validation set is recorded, the mean log p(gold) of a setting
costs no model and no search, so thousands of settings are scored in seconds. Where the best one
lies on the edge of the grid, the grid grows.

One formula serves both combiners: λ = peak · max(0, 1 - d₁ / reach), and a constant λ is the peak
with an infinite reach.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.retrieval.combiner import DistanceCombiner, FixedCombiner
from lightning_knnmt.retrieval.record import Record

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
Place = tuple[int, ...]  # where a setting stands in a grid's scores, one number an axis
Axes = Mapping[str, Sequence[float]]  # the values of each setting, ascending, by its name
C = TypeVar("C", bound=FixedCombiner | DistanceCombiner)

KNN_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PEAKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SPREADS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # temperatures, in median spreads of distances
REACHES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # in median distances of the nearest neighbour
ROWS_AT_ONCE = 4096  # bounds the temporaries: a few arrays of [rows, k, peaks]
MAX_GROWTH = 10  # values added at one end of an axis: three orders of magnitude
LEAST_GAIN = 1e-4  # of mean log p(gold); a grid that grew for less has grown enough


class TuningError(ValueError):
    """A grid that cannot be scored."""


@dataclass(frozen=True)
class Grid(Generic[C]):
    """Settings of a combiner and how probable each makes the text.

    Attributes:
        combiner: Made of one value from each axis.
        axes: The values that were tried, ascending, by the combiner's names for them.
        scores: Mean log p(gold) of each setting, with one dimension an axis, in their order.
        base_score: The same without retrieval.
        extended: The axes that grew because the best setting lay on their edge.
    """

    combiner: type[C]
    axes: Axes
    scores: Array
    base_score: float
    extended: tuple[str, ...] = ()

    @property
    def best_place(self) -> Place:
        """Where the best setting stands; of equals the first."""
        return tuple(int(i) for i in np.unravel_index(self.scores.argmax(), self.scores.shape))

    @property
    def best(self) -> C:
        """The setting that makes the text most probable."""
        return self.at(self.best_place)

    @property
    def best_score(self) -> float:
        return float(self.scores.max())

    def at(self, place: Place) -> C:
        """The setting at a place of `scores`."""
        named = zip(self.axes.items(), place, strict=True)
        values: dict[str, Any] = {name: axis[i] for (name, axis), i in named}
        return self.combiner(**values)


@dataclass(frozen=True)
class Candidate(Generic[C]):
    """A setting that was decoded with."""

    combiner: C
    log_prob: float  # mean log p(gold)
    bleu: float  # of the translations


@dataclass(frozen=True)
class Tuning(Generic[C]):
    """What was chosen, and from what.

    Attributes:
        combiner: The choice.
        log_prob: Its mean log p(gold).
        grid: All settings that were scored.
        candidates: Those that were decoded with, best BLEU first; empty if log p(gold) decided.
    """

    combiner: C
    log_prob: float
    grid: Grid[C]
    candidates: tuple[Candidate[C], ...] = ()


def tune_fixed(
    record: Record,
    decode: Callable[[FixedCombiner], float],
    *,
    num_neighbours: int | None = None,
    knn_weight: float | None = None,
    temperature: float | None = None,
    num_candidates: int = 4,
) -> Tuning[FixedCombiner]:
    """Chooses a `FixedCombiner`: the best few by log p(gold) that lie apart, of them by BLEU.

    Args:
        record: The recorded pass over the validation set. Its K bounds k.
        decode: Translates the validation set with a setting and returns BLEU.
        num_neighbours: k, if it is not to be tuned; likewise the other values.
        num_candidates: How many settings to decode with, at most.
    """
    grid = _grown(
        record,
        FixedCombiner,
        {
            "num_neighbours": _axis(num_neighbours, neighbour_counts(record)),
            "temperature": _axis(temperature, temperatures_for(record)),
            "knn_weight": _axis(knn_weight, KNN_WEIGHTS),
        },
    )
    return choose(grid, best_places(grid, num_candidates), decode)


def tune_distance(
    record: Record,
    *,
    num_neighbours: int | None = None,
    temperature: float | None = None,
    peak: float | None = None,
    reach: float | None = None,
) -> Tuning[DistanceCombiner]:
    """Chooses a `DistanceCombiner` by mean log p(gold) alone, in seconds.

    Args:
        record: The recorded pass over the validation set, with squared L2 distances. Its K bounds
            k: where the choice is K itself, a record of more neighbours may lead to a better one.
        num_neighbours: k, if it is not to be tuned; likewise the other values.
    """
    if (record.distances[:, 0] < 0).double().mean() > 0.5:  # no squared distance is negative
        DistanceCombiner.check_metric("ip")
    grid = _grown(
        record,
        DistanceCombiner,
        {
            "num_neighbours": _axis(num_neighbours, neighbour_counts(record)),
            "temperature": _axis(temperature, temperatures_for(record)),
            "peak": _axis(peak, PEAKS),
            "reach": _axis(reach, reaches_for(record)),
        },
    )
    return Tuning(grid.best, grid.best_score, grid)


def neighbour_counts(record: Record) -> tuple[int, ...]:
    """The powers of two up to the recorded K."""
    return tuple(2**i for i in range(record.max_neighbours.bit_length()))


def temperatures_for(record: Record) -> tuple[float, ...]:
    """Derives temperatures from how far the recorded distances spread.

    p_kNN depends on exp(-(d_i - d_1) / T) alone, so the natural unit of T is the spread d_K - d_1
    between a token's farthest neighbour and its nearest. Its median over the tokens makes the grid
    fit keys of any size and any metric: far below it only the nearest neighbour counts, far above
    it all count the same. Values have two digits, so that they can be typed.
    """
    distances = record.distances
    farthest = distances.masked_fill(distances.isinf(), -torch.inf).amax(dim=-1)
    spread = farthest - distances[:, 0]  # -inf where nothing was found
    return tuple(_two_digits(factor * _median(spread)) for factor in SPREADS)


def reaches_for(record: Record) -> tuple[float, ...]:
    """Derives reaches from how far the nearest neighbours are: multiples of the median d₁.

    Tokens whose key is in the datastore, at distance zero, say nothing of the scale and are left
    out.
    """
    nearest = record.distances[:, 0]
    return tuple(_two_digits(factor * _median(nearest)) for factor in REACHES)


def score_grid(
    record: Record,
    num_neighbours: Sequence[int],
    knn_weights: Sequence[float],
    temperatures: Sequence[float],
) -> Grid[FixedCombiner]:
    """Scores every combination of the given values of a `FixedCombiner`."""
    axes = {
        "num_neighbours": num_neighbours,
        "temperature": temperatures,
        "knn_weight": knn_weights,
    }
    return _scored(record, FixedCombiner, axes)


@torch.no_grad()
def mean_log_probs(
    record: Record,
    num_neighbours: Sequence[int],
    temperatures: Sequence[float],
    peaks: Sequence[float],
    reaches: Sequence[float] = (math.inf,),
) -> Array:
    """Computes mean log p(gold) = mean log(λ p_kNN(gold) + (1 - λ) p_NMT(gold)).

    λ = peak · max(0, 1 - d₁ / reach), and 0 where no neighbour was found. The k nearest of the
    recorded neighbours are taken for the result of a search for k; for an index that ranks a number
    of candidates growing with k, that is an approximation.

    Args:
        record: The recorded pass over M tokens.
        num_neighbours: Values of k, each at most the recorded K.
        temperatures: Values of T.
        peaks: Values of λ at distance zero.
        reaches: Distances from which λ is zero; infinite where λ is the same for every token.

    Returns:
        [k, T, peak, reach], float64; -inf where λ = 1 and some gold token is not among the
        neighbours.
    """
    shape = (len(num_neighbours), len(temperatures), len(peaks), len(reaches))
    sums = torch.zeros(shape, dtype=torch.float64)
    last = torch.tensor(num_neighbours) - 1
    weights = torch.tensor(peaks, dtype=torch.float64)
    for start in range(0, record.num_tokens, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distances = record.distances[rows, : max(num_neighbours)]
        is_gold = record.tokens[rows, : max(num_neighbours)] == record.gold[rows, None]
        nmt_probs = record.gold_log_probs[rows, None].double().exp()  # [rows, 1]
        found = distances[:, :1].isfinite()
        # Where nothing was found all distances are infinite; any finite zero point will do.
        nearest = distances[:, :1].masked_fill(~found, 0.0)
        excess = distances - nearest
        for t, temperature in enumerate(temperatures):
            # Cumulative sums along the neighbours hold the softmax for all k at once.
            masses = torch.exp(excess / -temperature)
            totals = masses.cumsum(dim=-1)[:, last]
            knn_probs = (masses * is_gold).cumsum(dim=-1)[:, last].double() / totals  # [rows, k]
            gains = (knn_probs - nmt_probs).masked_fill(~found, 0.0).unsqueeze(-1)
            for r, reach in enumerate(reaches):
                nearness = (1.0 - nearest.double() / reach).clamp(min=0.0, max=1.0)
                knn_weights = (nearness * weights).unsqueeze(1)  # [rows, 1, peak]
                mixed = torch.addcmul(nmt_probs.unsqueeze(-1), knn_weights, gains)
                sums[:, t, :, r] += mixed.log_().sum(dim=0)  # of [rows, k, peak]
    return (sums / record.num_tokens).numpy()


def best_places(grid: Grid[C], count: int) -> list[Place]:
    """Finds the best settings that differ enough to be worth decoding.

    Going down from the best, a setting is passed over if one that was taken lies within one step of
    it on every axis. For k = 1 the temperature makes no difference.

    Args:
        grid: Scored settings.
        count: How many to find; fewer are returned where the grid has no more.

    Returns:
        Places in `grid.scores`, best first.
    """
    taken: list[Place] = []
    for flat in np.argsort(-grid.scores, axis=None, kind="stable"):
        place = tuple(int(i) for i in np.unravel_index(flat, grid.scores.shape))
        if not any(_are_near(grid, place, other) for other in taken):
            taken.append(place)
        if len(taken) == count:
            break
    return taken


def choose(grid: Grid[C], places: Sequence[Place], decode: Callable[[C], float]) -> Tuning[C]:
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
        combiner = grid.at(place)
        candidates.append(Candidate(combiner, float(grid.scores[place]), decode(combiner)))
        logger.info("%s: BLEU %.2f", combiner, candidates[-1].bleu)
    candidates.sort(key=lambda candidate: -candidate.bleu)
    best = candidates[0]
    return Tuning(best.combiner, best.log_prob, grid, tuple(candidates))


def _are_near(grid: Grid[C], one: Place, other: Place) -> bool:
    steps = dict(zip(grid.axes, (abs(i - j) for i, j in zip(one, other, strict=True)), strict=True))
    if 1 in (grid.at(one).num_neighbours, grid.at(other).num_neighbours):
        steps["temperature"] = 0  # one neighbour has probability 1 at every temperature
    return max(steps.values()) <= 1


def _axis(given: float | None, tried: Sequence[float]) -> Sequence[float]:
    return tried if given is None else (given,)


def _scored(record: Record, combiner: type[C], axes: Axes) -> Grid[C]:
    """Scores the grid of these values, sorted and without repetitions."""
    if record.num_tokens == 0:
        raise TuningError("The record is empty: at least 1 token is needed to score settings.")
    tried = {key: tuple(sorted({*axes[key]})) for key in axes}
    if empty := [key for key in tried if not tried[key]]:
        raise TuningError(f"No value of {empty[0]} is given: at least 1 is needed.")
    first: dict[str, Any] = {key: tried[key][0] for key in tried}
    for name, axis in tried.items():
        for value in axis:
            combiner(**{**first, name: value})  # raises if there is no such combiner
    if (k := int(tried["num_neighbours"][-1])) > record.max_neighbours:
        raise TuningError(
            f"k = {k} cannot be scored: {record.max_neighbours} neighbours were recorded. Record "
            "more, or ask for fewer."
        )
    base_score = float(record.gold_log_probs.double().mean())
    return Grid(combiner, tried, _score(record, tried), base_score)


def _score(record: Record, axes: Axes) -> Array:
    ks = [int(k) for k in axes["num_neighbours"]]
    if "reach" in axes:
        return mean_log_probs(record, ks, axes["temperature"], axes["peak"], axes["reach"])
    return mean_log_probs(record, ks, axes["temperature"], axes["knn_weight"])[..., 0]


def _grown(record: Record, combiner: type[C], axes: Axes) -> Grid[C]:
    """Scores a grid that grows while its best setting lies on an edge and growing gains.

    Axes of one value are left as they are, for that value was given; so is k, which the record
    bounds.
    """
    grid = _scored(record, combiner, axes)
    for _ in range(MAX_GROWTH):
        wider = grid
        for name, place in zip(grid.axes, grid.best_place, strict=True):
            values = grid.axes[name]
            if name == "num_neighbours" or len(values) == 1:
                continue
            if place in (0, len(values) - 1):
                wider = _extended(record, wider, name, values[place], up=place > 0)
        gain = wider.best_score - grid.best_score
        grid = wider
        if not gain >= LEAST_GAIN:  # nan where the text is impossible
            break
    return grid


def _extended(record: Record, grid: Grid[C], name: str, edge: float, *, up: bool) -> Grid[C]:
    """Adds a value beyond an edge of an axis: half or twice as much, half the way to λ's 0 or 1."""
    if name in ("knn_weight", "peak"):
        value = round((edge + 1) / 2 if up else edge / 2, 4)
    else:
        value = _two_digits(edge * 2 if up else edge / 2)
    if value == edge:
        return grid
    added = _score(record, {**grid.axes, name: (value,)})
    axis = list(grid.axes).index(name)
    axes = {**grid.axes, name: tuple(sorted((*grid.axes[name], value)))}
    scores = np.concatenate((grid.scores, added) if up else (added, grid.scores), axis)
    extended = grid.extended if name in grid.extended else (*grid.extended, name)
    return replace(grid, axes=axes, scores=scores, extended=extended)


def _median(values: Tensor) -> float:
    """Of those that are finite and above zero; 1 if there are none."""
    values = values[values.isfinite() & (values > 0)]
    return float(values.median()) if len(values) else 1.0


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")

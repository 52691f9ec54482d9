"""Chooses a combiner's values by scoring a whole grid on one record: no model, no search, seconds.

Two scores of a teacher-forced pass over the validation set judge a setting: its accuracy, the share
of tokens that the mixture ranks first, which is what greedy search depends on and BLEU follows; and
the mean log p(gold), which is smoother but prefers smaller λ, for it punishes confidence more than
it rewards being right. So accuracy decides as far as it can: of the settings whose accuracy is
within one standard error of the best, the one with the greatest mean log p(gold) is chosen (the
one-standard-error rule of Breiman et al., 1984, Classification and Regression Trees).

One formula serves both combiners: λ = peak · max(0, 1 - d₁ / reach), and a constant λ is the peak
with an infinite reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.retrieval.combiner import DistanceCombiner, FixedCombiner, neighbour_probs
from lightning_knnmt.retrieval.record import Record

Array = np.ndarray[Any, np.dtype[Any]]
Axes = Mapping[str, Sequence[float]]  # the values of each setting, ascending, by its name
C = TypeVar("C", bound=FixedCombiner | DistanceCombiner)

KNN_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)
PEAKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SPREADS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # temperatures, in median spreads of distances
REACHES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # in median distances of the nearest neighbour
ROWS_AT_ONCE = 2048  # bounds the temporaries: a few arrays of [rows, peaks, reaches]
MAX_GROWTH = 10  # values added at one end of an axis: three orders of magnitude
LEAST_CHANGE = 1e-4  # of the choice's mean log p(gold); a grid that changed it by less is complete


RULE = 2  # raised when other settings would be chosen: what an older rule chose is chosen again


class TuningError(ValueError):
    """A grid that cannot be scored."""


class Scores(NamedTuple):
    """How well settings predict the text, with one dimension an axis of the grid, float64."""

    log_probs: Array  # mean log p(gold)
    accuracies: Array | None  # share of tokens that the mixture ranks first


@dataclass(frozen=True)
class Grid(Generic[C]):
    """Settings of a combiner and their scores.

    Attributes:
        combiner: Made of one value from each axis.
        axes: The values that were tried, ascending, by the combiner's names for them.
        scores: Of each setting, with one dimension an axis, in their order.
        num_tokens: Of the record.
        extended: The axes that grew because the choice lay on their edge.
    """

    combiner: type[C]
    axes: Axes
    scores: Scores
    num_tokens: int
    extended: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[int, ...]:
        """Where the choice stands: one index an axis."""
        log_probs, accuracies = self.scores
        if accuracies is None:
            ranked = [log_probs.ravel()]
        else:
            best = accuracies.max()
            error = math.sqrt(best * (1.0 - best) / self.num_tokens)
            candidates = np.where(accuracies >= best - error, log_probs, -np.inf)
            ranked = [accuracies.ravel(), candidates.ravel()]
        first = -np.arange(log_probs.size)  # of equals the first
        chosen = np.lexsort([first, *ranked])[-1]
        return tuple(int(i) for i in np.unravel_index(chosen, log_probs.shape))

    @property
    def best(self) -> C:
        """The choice, by accuracy and log p(gold), or by the latter alone if only that is known."""
        return self.at(self.place)

    @property
    def log_prob(self) -> float:
        """Mean log p(gold) of the choice."""
        return float(self.scores.log_probs[self.place])

    @property
    def accuracy(self) -> float | None:
        """Share of tokens that the choice ranks first; None if unknown."""
        accuracies = self.scores.accuracies
        return None if accuracies is None else float(accuracies[self.place])

    def at(self, place: tuple[int, ...]) -> C:
        """The setting at a place of the scores."""
        named = zip(self.axes.items(), place, strict=True)
        values: dict[str, Any] = {name: axis[i] for (name, axis), i in named}
        return self.combiner(**values)


def tune_fixed(
    record: Record,
    *,
    num_neighbours: int | None = None,
    knn_weight: float | None = None,
    temperature: float | None = None,
) -> Grid[FixedCombiner]:
    """Chooses a `FixedCombiner`: `best` of the grid that it returns.

    Args:
        record: The recorded pass over the validation set, with the model's best log-probability.
            Its K bounds k: where the choice is K itself, a record of more neighbours may lead to a
            better one.
        num_neighbours: k, if it is not to be tuned; likewise the other values.
    """
    axes = {
        "num_neighbours": _axis(num_neighbours, neighbour_counts(record)),
        "temperature": _axis(temperature, temperatures_for(record)),
        "knn_weight": _axis(knn_weight, KNN_WEIGHTS),
    }
    return _grown(record, FixedCombiner, axes)


def tune_distance(
    record: Record,
    *,
    num_neighbours: int | None = None,
    temperature: float | None = None,
    peak: float | None = None,
    reach: float | None = None,
) -> Grid[DistanceCombiner]:
    """Chooses a `DistanceCombiner`, as `tune_fixed` does; distances must be squared L2."""
    if (record.distances[:, 0] < 0).double().mean() > 0.5:  # no squared distance is negative
        DistanceCombiner.check_metric("ip")
    axes = {
        "num_neighbours": _axis(num_neighbours, neighbour_counts(record)),
        "temperature": _axis(temperature, temperatures_for(record)),
        "peak": _axis(peak, PEAKS),
        "reach": _axis(reach, reaches_for(record)),
    }
    return _grown(record, DistanceCombiner, axes)


def score_grid(
    record: Record,
    num_neighbours: Sequence[int],
    knn_weights: Sequence[float],
    temperatures: Sequence[float],
) -> Grid[FixedCombiner]:
    """Scores every combination of the given values of a `FixedCombiner` by log p(gold) alone."""
    axes = {
        "num_neighbours": num_neighbours,
        "temperature": temperatures,
        "knn_weight": knn_weights,
    }
    return _scored(record, FixedCombiner, axes, with_accuracy=False)


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


@torch.no_grad()
def score(
    record: Record,
    num_neighbours: Sequence[int],
    temperatures: Sequence[float],
    peaks: Sequence[float],
    reaches: Sequence[float] = (math.inf,),
    *,
    with_accuracy: bool = True,
) -> Scores:
    """Scores the mixture λ p_kNN + (1 - λ) p_NMT on the recorded tokens.

    λ = peak · max(0, 1 - d₁ / reach), and 0 where no neighbour was found. The k nearest of the
    recorded neighbours are taken for the result of a search for k; for an index that ranks a number
    of candidates growing with k, that is an approximation.

    Args:
        record: The recorded pass over M tokens, with the model's best log-probability if accuracy
            is wanted.
        num_neighbours: Values of k, each at most the recorded K.
        temperatures: Values of T.
        peaks: Values of λ at distance zero.
        reaches: Distances from which λ is zero; infinite where λ is the same for every token.
        with_accuracy: Whether accuracy is wanted.

    Returns:
        [k, T, peak, reach]; a log-probability is -inf where λ = 1 and some gold token is not among
        the neighbours.
    """
    shape = (len(num_neighbours), len(temperatures), len(peaks), len(reaches))
    log_probs = torch.zeros(shape, dtype=torch.float64)
    num_right = torch.zeros(shape, dtype=torch.int64)
    for start in range(0, record.num_tokens, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distances = record.distances[rows]
        is_gold = record.tokens[rows] == record.gold[rows, None]
        gold_nmt = record.gold_log_probs[rows].double().exp()  # [rows]
        rivals = _Rivals.of(record, rows) if with_accuracy else None
        weights = _knn_weights(distances[:, 0], peaks, reaches)  # [rows, peak, reach]
        for i, k in enumerate(num_neighbours):
            for j, temperature in enumerate(temperatures):
                probs = neighbour_probs(distances[:, :k], temperature)
                gold_knn = (probs * is_gold[:, :k]).sum(dim=-1)
                gains = (gold_knn - gold_nmt)[:, None, None]
                mixed = torch.addcmul(gold_nmt[:, None, None], weights, gains)
                log_probs[i, j] += mixed.log_().sum(dim=0)
                if rivals is not None:
                    low, high = rivals.weights_that_win(probs, gold_knn)
                    right = (weights > low[:, None, None]) & (weights < high[:, None, None])
                    num_right[i, j] += right.sum(dim=0)
    accuracies = (num_right.double() / record.num_tokens).numpy() if with_accuracy else None
    return Scores((log_probs / record.num_tokens).numpy(), accuracies)


class _Rivals(NamedTuple):
    """The tokens that gold has to beat: the neighbours' and the model's best."""

    is_rival: Tensor  # [rows, K + 1], the model's best last; gold itself is none
    nmt_leads: Tensor  # p_NMT(gold) - p_NMT(rival), [rows, K + 1]
    groups: Tensor  # numbers the different tokens of each row's neighbours, [rows, K]

    @classmethod
    def of(cls, record: Record, rows: slice) -> _Rivals:
        assert record.best_log_probs is not None, "checked before"
        tokens, gold = record.tokens[rows], record.gold[rows, None]
        gold_nmt = record.gold_log_probs[rows, None]
        best = record.best_log_probs[rows, :1]
        rivals = torch.cat([record.neighbour_log_probs[rows], best], dim=1)
        is_rival = torch.cat([tokens != gold, best > gold_nmt], dim=1)
        ascending, order = tokens.sort(dim=1)
        starts = torch.ones_like(order)
        starts[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
        groups = torch.empty_like(order).scatter_(1, order, starts.cumsum(dim=1) - 1)
        return cls(is_rival, gold_nmt.exp() - rivals.exp(), groups)

    def weights_that_win(self, probs: Tensor, gold_knn: Tensor) -> tuple[Tensor, Tensor]:
        """Between which λ gold is the most probable token of the mixture.

        (1 - λ) (p_NMT(gold) - p_NMT(v)) + λ (p_kNN(gold) - p_kNN(v)) > 0 is linear in λ, so all
        rivals v together leave an interval.

        Args:
            probs: Of the nearest k neighbours, [rows, k].
            gold_knn: p_kNN(gold), [rows].

        Returns:
            Lower and upper bound, both excluded, [rows]; an empty interval where gold never wins.
        """
        k = probs.shape[1]
        groups = self.groups[:, :k]
        totals = torch.zeros_like(self.nmt_leads).scatter_add_(1, groups, probs)
        rival_knn = torch.cat([totals.gather(1, groups), torch.zeros_like(probs[:, :1])], dim=1)
        nmt_leads = torch.cat([self.nmt_leads[:, :k], self.nmt_leads[:, -1:]], dim=1)
        is_rival = torch.cat([self.is_rival[:, :k], self.is_rival[:, -1:]], dim=1)
        slopes = gold_knn[:, None] - rival_knn - nmt_leads
        zeros = -nmt_leads / slopes
        low = zeros.masked_fill(~(is_rival & (slopes > 0)), -torch.inf).amax(dim=1)
        high = zeros.masked_fill(~(is_rival & (slopes < 0)), torch.inf).amin(dim=1)
        never = (is_rival & (slopes == 0) & (nmt_leads <= 0)).any(dim=1)
        return low, high.masked_fill(never, -torch.inf)


def _knn_weights(nearest: Tensor, peaks: Sequence[float], reaches: Sequence[float]) -> Tensor:
    """λ for every peak and reach, [rows, peak, reach]; 0 where no neighbour was found."""
    found = nearest.isfinite()
    distances = nearest.double().masked_fill(~found, 0.0).unsqueeze(-1)
    nearness = (1.0 - distances / torch.tensor(reaches, dtype=torch.float64)).clamp(0.0, 1.0)
    nearness = nearness * found.unsqueeze(-1)
    return nearness.unsqueeze(1) * torch.tensor(peaks, dtype=torch.float64).unsqueeze(-1)


def _axis(given: float | None, tried: Sequence[float]) -> Sequence[float]:
    return tried if given is None else (given,)


def _scored(record: Record, combiner: type[C], axes: Axes, *, with_accuracy: bool) -> Grid[C]:
    """Scores the grid of these values, sorted and without repetitions."""
    if record.num_tokens == 0:
        raise TuningError("The record is empty: at least 1 token is needed to score settings.")
    if with_accuracy and record.best_log_probs is None:
        raise TuningError(
            "The record lacks the model's best log-probabilities: record with keep_best=1."
        )
    tried = {name: tuple(sorted({*axes[name]})) for name in axes}
    if empty := [name for name in tried if not tried[name]]:
        raise TuningError(f"No value of {empty[0]} is given: at least 1 is needed.")
    first: dict[str, Any] = {name: tried[name][0] for name in tried}
    for name, axis in tried.items():
        for value in axis:
            combiner(**{**first, name: value})  # raises if there is no such combiner
    if (k := int(tried["num_neighbours"][-1])) > record.max_neighbours:
        raise TuningError(
            f"k = {k} cannot be scored: {record.max_neighbours} neighbours were recorded. Record "
            "more, or ask for fewer."
        )
    scores = _score(record, tried, with_accuracy)
    return Grid(combiner, tried, scores, record.num_tokens)


def _score(record: Record, axes: Axes, with_accuracy: bool) -> Scores:
    ks, ts = [int(k) for k in axes["num_neighbours"]], axes["temperature"]
    if "reach" in axes:
        return score(record, ks, ts, axes["peak"], axes["reach"], with_accuracy=with_accuracy)
    log_probs, accuracies = score(record, ks, ts, axes["knn_weight"], with_accuracy=with_accuracy)
    return Scores(log_probs[..., 0], None if accuracies is None else accuracies[..., 0])


def _grown(record: Record, combiner: type[C], axes: Axes) -> Grid[C]:
    """Scores a grid that grows while its choice lies on an edge and growing changes the choice.

    Axes of one value are left as they are, for that value was given; so is k, which the record
    bounds.
    """
    grid = _scored(record, combiner, axes, with_accuracy=True)
    for _ in range(MAX_GROWTH):
        before, log_prob = grid.best, grid.log_prob
        for name, i in zip(grid.axes, grid.place, strict=True):
            values = grid.axes[name]
            if name != "num_neighbours" and len(values) > 1 and i in (0, len(values) - 1):
                grid = _extended(record, grid, name, values[i], up=i > 0)
        if grid.best == before or abs(grid.log_prob - log_prob) < LEAST_CHANGE:
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
    added = _score(record, {**grid.axes, name: (value,)}, with_accuracy=True)
    axis = list(grid.axes).index(name)
    pairs: Any = zip(grid.scores, added, strict=True)
    scores = Scores(*(np.concatenate(pair if up else pair[::-1], axis) for pair in pairs))
    axes = {**grid.axes, name: tuple(sorted((*grid.axes[name], value)))}
    extended = grid.extended if name in grid.extended else (*grid.extended, name)
    return replace(grid, axes=axes, scores=scores, extended=extended)


def _median(values: Tensor) -> float:
    """Of those that are finite and above zero; 1 if there are none."""
    values = values[values.isfinite() & (values > 0)]
    return float(values.median()) if len(values) else 1.0


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")

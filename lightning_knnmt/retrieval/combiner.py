"""Combiners weigh the neighbours: a probability for each, and λ for all of them.

Khandelwal et al., 2021 (arXiv:2010.00710), equations 2 and 3:

    p_kNN(y) ∝ Σ_{i: v_i = y} exp(-d_i / T)
    p(y)     = λ p_kNN(y) + (1 - λ) p_NMT(y)

Every combiner returns a probability for each neighbour and a λ, so the functions of this file and
`KNNDistribution` serve all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_knnmt.retrieval.checks import check_integer, check_number
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.index import Metric
from lightning_knnmt.retrieval.retriever import Neighbours

SMALLEST = torch.finfo(torch.float32).tiny


class Weighting(NamedTuple):
    """A combiner's weights for one retrieval, in float32."""

    neighbour_probs: Tensor  # [..., K] sum to one; all zero where no neighbour was found
    knn_weight: Tensor  # [..., 1] λ; zero where no neighbour was found


class Mixture(NamedTuple):
    """The mixed distribution and what went into it, over the whole vocabulary, in float32."""

    log_probs: Tensor  # [..., V] log((1 - λ) p_NMT + λ p_kNN)
    knn_probs: Tensor  # [..., V]
    knn_weight: Tensor  # [..., 1] λ


class ModelView(NamedTuple):
    """The model's own log-probabilities, as far as a combiner needs them."""

    best_log_probs: Tensor  # [..., num_best] of its best tokens, descending
    neighbour_log_probs: Tensor  # [..., K] of the neighbours' tokens


class Combiner(Protocol):
    """Weighs neighbours. It never searches, never loads and knows no vocabulary."""

    @property
    def num_neighbours(self) -> int:
        """K, the neighbours it weighs."""

    @property
    def num_best(self) -> int:
        """How many of the model's best tokens it needs; 0 if it ignores the model."""

    def __call__(self, neighbours: Neighbours, view: ModelView | None = None) -> Weighting:
        """Weighs the neighbours of each query, [..., K]; one that uses the model needs `view`."""


def neighbour_probs(distances: Tensor, temperature: float) -> Tensor:
    """softmax(-d / T) over the neighbours that were found.

    Args:
        distances: inf where there is no neighbour, [..., K].
        temperature: T, greater than zero.

    Returns:
        [..., K]; all zero where no neighbour was found.
    """
    nearest = distances[..., :1]
    # by hand, as softmax makes a row of infinities NaN: here inf - inf does, and becomes zero
    weights = torch.exp((nearest - distances) / temperature).nan_to_num(nan=0.0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1.0)  # the nearest counts 1


def spread(probs: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """Adds the neighbours' probabilities up by token: p_kNN.

    Args:
        probs: Of each neighbour, [..., K].
        tokens: Its value, [..., K].
        vocab_size: V.

    Returns:
        [..., V].
    """
    zeros = probs.new_zeros(*probs.shape[:-1], vocab_size)
    return zeros.scatter_add_(-1, tokens, probs)


def interpolate(nmt_log_probs: Tensor, knn_probs: Tensor, knn_weight: Tensor) -> Tensor:
    """Mixes the two distributions: log((1 - λ) p_NMT + λ p_kNN).

    With λ = 0 the result is nmt_log_probs, bit for bit.

    Args:
        nmt_log_probs: Log of p_NMT, [..., V].
        knn_probs: p_kNN, zero for tokens that no neighbour holds, [..., V].
        knn_weight: λ in [0, 1], the share of p_kNN, [..., 1].

    Returns:
        Log-probabilities, [..., V].
    """
    share = knn_probs * knn_weight
    # the clamp keeps the gradient of the zeros, which trained combiners need, from becoming NaN
    knn_log_probs = share.clamp(min=SMALLEST).log().masked_fill(share < SMALLEST, float("-inf"))
    return torch.logaddexp(nmt_log_probs + torch.log1p(-knn_weight), knn_log_probs)


@dataclass(frozen=True)
class FixedCombiner:
    """λ and T are the same for every token (Khandelwal et al., 2021).

    Attributes:
        num_neighbours: K, at least 1.
        knn_weight: λ, from 0 (the model alone) to 1 (the datastore alone).
        temperature: T, greater than 0, in units of distance: tens to hundreds for squared L2.
    """

    num_neighbours: int
    knn_weight: float
    temperature: float

    num_best = 0

    def __post_init__(self) -> None:
        check_integer("The number of neighbours k", self.num_neighbours)
        _check_share("The kNN weight λ", self.knn_weight)
        _check_positive("The temperature T", self.temperature)

    def __call__(self, neighbours: Neighbours, view: ModelView | None = None) -> Weighting:
        probs = neighbour_probs(neighbours.distances, self.temperature)
        found = neighbours.distances[..., :1].isfinite()  # ascending: the first one tells
        return Weighting(probs, found * self.knn_weight)

    def __str__(self) -> str:
        return f"k {self.num_neighbours}, λ {self.knn_weight:g}, T {self.temperature:g}"


@dataclass(frozen=True)
class DistanceCombiner:
    """λ falls with the distance d₁ of the nearest neighbour: λ = peak · max(0, 1 - d₁ / reach).

    The rule of SK-MT (Dai et al., 2023, arXiv:2302.12188), there on a few retrieved sentences. A
    token whose nearest neighbour lies beyond the reach is left to the model, so text unlike the
    datastore's is translated as without retrieval. Only squared L2 distances will do: they are zero
    where key and query are equal. See `check_metric`.

    Attributes:
        num_neighbours: K, at least 1.
        temperature: T, greater than 0, in units of distance.
        peak: λ at distance zero, from 0 to 1.
        reach: The distance from which λ is zero, greater than 0.
    """

    num_neighbours: int
    temperature: float
    peak: float
    reach: float

    num_best = 0

    def __post_init__(self) -> None:
        check_integer("The number of neighbours k", self.num_neighbours)
        _check_positive("The temperature T", self.temperature)
        _check_share("The peak of λ", self.peak)
        _check_positive("The reach", self.reach)

    @staticmethod
    def check_metric(metric: Metric) -> None:
        """Raises CombinerError if distances of this metric have no zero to measure from."""
        if metric != "l2":
            raise CombinerError(
                f"knn=distance needs squared L2 distances, but knn.metric is {metric}, whose "
                "distances are negated inner products and not zero where key and query are equal. "
                "Set knn.metric=l2, or choose knn=fixed."
            )

    def __call__(self, neighbours: Neighbours, view: ModelView | None = None) -> Weighting:
        distances = neighbours.distances
        # inf, where nothing was found, becomes 0; an index's rounding may put d₁ just below zero
        nearness = (1.0 - distances[..., :1] / self.reach).clamp(min=0.0, max=1.0)
        return Weighting(neighbour_probs(distances, self.temperature), self.peak * nearness)

    def __str__(self) -> str:
        return (
            f"k {self.num_neighbours}, T {self.temperature:g}, peak {self.peak:g}, "
            f"reach {self.reach:g}"
        )


def _check_share(what: str, value: object) -> None:
    allowed = "lie between 0 (the model alone) and 1 (the datastore alone)"
    check_number(what, value, allowed, lambda share: 0.0 <= share <= 1.0)


def _check_positive(what: str, value: object) -> None:
    check_number(what, value, "be a number greater than 0", lambda number: 0.0 < number < math.inf)

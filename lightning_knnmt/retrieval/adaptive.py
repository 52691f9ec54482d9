"""Combiners that choose λ and k for each token: a small network looks at the neighbours.

Zheng et al., 2021, "Adaptive Nearest Neighbor Machine Translation" (arXiv:2105.13022). The network
sees the distances d_1 ... d_K and, for each i, c_i: how many different tokens the i nearest hold.
It weighs the softmaxes over the 1, 2, 4, ... K nearest neighbours against each other and against
the model.

The authors' program and knn-box never count token 0; here c_i is the plain count. Distances enter
as they are, as in the original: squared L2 distances of hidden states lie at tens to hundreds, for
which the initial weights are made. Negated inner products lie far below zero and would saturate
every tanh: `distance_offset`, one value fitted to the training record, is subtracted from them
first (0 for L2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_knnmt.retrieval.combiner import ModelView, Weighting
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.retriever import Neighbours

BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 that is


def distinct_tokens(tokens: Tensor, found: Tensor) -> Tensor:
    """Counts the different tokens among the i nearest neighbours, for each i.

    Args:
        tokens: Nearest first, [..., K].
        found: False for missing neighbours, which come last and count nothing, [..., K].

    Returns:
        c_1 ... c_K, int64, [..., K].
    """
    held, order = tokens.sort(dim=-1, stable=True)  # stable: of equal tokens the nearest is first
    first = torch.ones_like(held, dtype=torch.bool)
    first[..., 1:] = held[..., 1:] != held[..., :-1]
    return torch.zeros_like(first).scatter_(-1, order, first).logical_and_(found).cumsum(dim=-1)


def fill_missing(distances: Tensor, found: Tensor, default: float) -> Tensor:
    """Puts the farthest neighbour's distance in the place of the infinite ones.

    Args:
        distances: inf where there is no neighbour, [..., K].
        found: Where there is one, [..., K].
        default: For queries without any neighbour.

    Returns:
        Finite values, [..., K].
    """
    farthest = distances.masked_fill(~found, float("-inf")).amax(dim=-1, keepdim=True)
    farthest = farthest.masked_fill(farthest.isinf(), default)
    return torch.where(found, distances, farthest)


def mix_softmaxes(
    distances: Tensor, found: Tensor, shares: Tensor, reach: Tensor, temperature: float | Tensor
) -> Tensor:
    """Σ_r share_r softmax(-d / T) over the k_r nearest.

    Args:
        distances: Ascending and finite, [..., K].
        found: False for neighbours that get nothing, [..., K].
        shares: Of each softmax, summing to one, [..., R].
        reach: 1 where neighbour i is among the k_r nearest, else 0, [R, K].
        temperature: T, a single value or [..., 1].

    Returns:
        A probability for each neighbour, all zero where none was found, [..., K].
    """
    masses = torch.exp((distances[..., :1] - distances) / temperature) * found
    totals = (masses @ reach.T).clamp(min=1.0)  # [..., R]; the nearest counts 1
    return masses * ((shares / totals) @ reach)


class Seen(NamedTuple):
    """What a combiner computes from the neighbours before its own weights are involved."""

    features: Tensor  # [..., 2 K] [d_1 ... d_K, c_1 ... c_K]
    distances: Tensor  # [..., K] without infinities
    found: Tensor  # [..., K]


def look_at(neighbours: Neighbours, distance_offset: float) -> Seen:
    """Counts tokens and fills gaps; training does this once for all its updates."""
    found = neighbours.distances.isfinite()
    distances = fill_missing(neighbours.distances, found, distance_offset)
    counts = distinct_tokens(neighbours.tokens, found)
    return Seen(torch.cat([distances - distance_offset, counts], dim=-1), distances, found)


class MetaNetwork(nn.Module):
    """W_2 tanh(W_1 [d; c]) with the authors' initial weights, smaller for the larger inputs, d."""

    def __init__(self, num_neighbours: int, hidden_dim: int, num_outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * num_neighbours, hidden_dim)
        self.second = nn.Linear(hidden_dim, num_outputs)
        nn.init.xavier_normal_(self.first.weight.data[:, :num_neighbours], gain=0.01)
        nn.init.xavier_normal_(self.first.weight.data[:, num_neighbours:], gain=0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., 2 K] -> [..., num_outputs]."""
        return self.second(self.first(inputs).tanh())  # type: ignore[no-any-return]


class AdaptiveCombiner(nn.Module):
    """AK-MT: π_0 p_NMT + Σ_r π_r p_kNN over the k_r nearest, π from the meta-k network.

    π = softmax(network([d; c])) has one weight for the model and one for each k_r in 1, 2, 4,
    ... K, so λ = 1 - π_0 and the neighbours' probabilities are Σ_r π_r softmax_{k_r}(-d / T) / λ.
    """

    num_best = 0

    def __init__(
        self,
        num_neighbours: int,
        temperature: float,
        hidden_dim: int = 32,
        *,
        distance_offset: float = 0.0,
    ) -> None:
        """Draws initial weights.

        Args:
            num_neighbours: K, a power of two.
            temperature: T, the same for all tokens.
            hidden_dim: Of the network.
            distance_offset: What the network subtracts from the distances, see above.

        Raises:
            CombinerError: If K is no power of two, or T not above 0.
        """
        super().__init__()
        self.num_neighbours = num_neighbours
        self.temperature = temperature
        self.hidden_dim = hidden_dim
        self.distance_offset = distance_offset
        self.register_buffer("reach", _reach(num_neighbours, temperature), persistent=False)
        self.network = MetaNetwork(num_neighbours, hidden_dim, 1 + len(self.reach))

    reach: Tensor  # [R, K]

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_neighbours": self.num_neighbours,
            "temperature": self.temperature,
            "hidden_dim": self.hidden_dim,
            "distance_offset": self.distance_offset,
        }

    def look(self, neighbours: Neighbours, view: ModelView | None = None) -> Seen:
        """What `weigh` needs to know about the neighbours."""
        return look_at(neighbours, self.distance_offset)

    def weigh(self, seen: Seen) -> Weighting:
        """Applies the network."""
        # In float32: distances of hundreds, rounded to bfloat16, would tell little.
        with torch.autocast(seen.distances.device.type, enabled=False):
            logits = self.network(seen.features)  # [..., 1 + R]
            # π_r / λ and λ, each without a difference or a quotient that could vanish
            shares = logits[..., 1:].softmax(dim=-1)
            knn_logit = logits[..., 1:].logsumexp(dim=-1, keepdim=True) - logits[..., :1]
            probs = mix_softmaxes(seen.distances, seen.found, shares, self.reach, self.temperature)
            return Weighting(probs, as_weight(knn_logit, seen.found))

    def forward(self, neighbours: Neighbours, view: ModelView | None = None) -> Weighting:
        return self.weigh(self.look(neighbours))


class KNNBoxCombiner(nn.Module):
    """knn-box's variant of AK-MT (github.com/NJUNLP/knn-box): λ comes from a separate network.

    The k-network weighs the k_r in 1, 2, 4, ... K without the model; a second one with a sigmoid
    gives λ. A third, off by default, gives each token T times a sigmoid for its temperature:
    knn-box's own is that with T = 1, which for hidden states leaves the nearest neighbour alone.
    """

    num_best = 0

    def __init__(
        self,
        num_neighbours: int,
        temperature: float,
        hidden_dim: int = 32,
        *,
        distance_offset: float = 0.0,
        learn_temperature: bool = False,
    ) -> None:
        """Draws initial weights; arguments and errors are `AdaptiveCombiner`'s but for one.

        Args:
            learn_temperature: Scale T for each token by a factor from 0 to 1.
        """
        super().__init__()
        self.num_neighbours = num_neighbours
        self.temperature = temperature
        self.hidden_dim = hidden_dim
        self.distance_offset = distance_offset
        self.learn_temperature = learn_temperature
        self.register_buffer("reach", _reach(num_neighbours, temperature), persistent=False)
        self.k_network = MetaNetwork(num_neighbours, hidden_dim, len(self.reach))
        first = self.k_network.first.weight.data
        nn.init.normal_(first[:, :num_neighbours], std=0.01)
        nn.init.normal_(first[:, num_neighbours:], std=0.1)
        self.weight_network = MetaNetwork(num_neighbours, hidden_dim, 1)
        nn.init.xavier_normal_(self.weight_network.second.weight)
        if learn_temperature:
            self.temperature_network = MetaNetwork(num_neighbours, hidden_dim, 1)
            nn.init.xavier_normal_(self.temperature_network.second.weight)

    reach: Tensor  # [R, K]

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_neighbours": self.num_neighbours,
            "temperature": self.temperature,
            "hidden_dim": self.hidden_dim,
            "distance_offset": self.distance_offset,
            "learn_temperature": self.learn_temperature,
        }

    def look(self, neighbours: Neighbours, view: ModelView | None = None) -> Seen:
        """What `weigh` needs to know about the neighbours."""
        return look_at(neighbours, self.distance_offset)

    def weigh(self, seen: Seen) -> Weighting:
        """Applies the networks, in float32."""
        with torch.autocast(seen.distances.device.type, enabled=False):
            temperature: float | Tensor = self.temperature
            if self.learn_temperature:
                temperature = temperature * self.temperature_network(seen.features).sigmoid()
            shares = self.k_network(seen.features).softmax(dim=-1)
            probs = mix_softmaxes(seen.distances, seen.found, shares, self.reach, temperature)
            knn_logit = self.weight_network(seen.features)
            return Weighting(probs, as_weight(knn_logit, seen.found))

    def forward(self, neighbours: Neighbours, view: ModelView | None = None) -> Weighting:
        return self.weigh(self.look(neighbours))


def as_weight(knn_logit: Tensor, found: Tensor) -> Tensor:
    """λ, never quite 1: then log(1 - λ) has no gradient, and what no neighbour holds no chance."""
    return knn_logit.sigmoid().clamp(max=BELOW_ONE) * found[..., :1]


def _reach(num_neighbours: int, temperature: float) -> Tensor:
    """1 where neighbour i is among the 1, 2, 4, ... K nearest, [R, K]."""
    if num_neighbours < 1 or num_neighbours & (num_neighbours - 1):
        raise CombinerError(
            f"An adaptive combiner cannot weigh {num_neighbours} neighbours: its k are 1, 2, 4 and "
            "so on, so the largest must be a power of two. Take the next one, for example 8 or 16."
        )
    if not 0.0 < temperature < float("inf"):
        raise CombinerError(
            f"The temperature T is {temperature}, but it must be a number greater than 0."
        )
    ks = 2 ** torch.arange(num_neighbours.bit_length())
    return (torch.arange(num_neighbours) < ks[:, None]).float()

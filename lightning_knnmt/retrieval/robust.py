"""A combiner that also uses the model's confidence in the neighbours' tokens.

Jiang et al., 2022, "Towards Robust k-Nearest-Neighbor Machine Translation" (arXiv:2210.08808). For
neighbour i with key k_i and token v_i, a small network computes c_i from log p_NMT(v_i | k_i), the
model's belief where the entry was made, and log p_NMT(v_i | h), its belief now:

    p_kNN ∝ exp(-d_i / T' + c_i),  [S_kNN, τ] = network([d; counts]),  1 / T' = 2 sigmoid(τ) / T
    λ = softmax([S_kNN, S_NMT])_1,  S_NMT = w [the model's best 8 log-probs; both of all neighbours]

The authors' T is 1; ours, twice sigmoid(0), is where training starts. In training some tokens
retrieve in noise, fewer and fewer of them: distances are disturbed, and where no neighbour holds
the gold token, one that does is put in front. A disturbed key k + ε changes the squared distance to
h by 2 (k - h) ε and a constant, so that keys need not be read: it is a normal number's 2 σ √d.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval.adaptive import (
    MetaNetwork,
    as_weight,
    distinct_tokens,
    fill_missing,
)
from lightning_knnmt.retrieval.combiner import ModelView, Weighting
from lightning_knnmt.retrieval.distribution import BaseDistribution
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.index import as_tensor
from lightning_knnmt.retrieval.retriever import Neighbours

NOISE_SHARE, NOISE_DECAY, NOISE_STD = 1.0, 1000.0, 0.01  # the authors' α_0, β (updates) and σ
ROWS_AT_ONCE = 1024  # bounds the [rows, V] logits
UNLIKELY = -100.0  # in place of a log-probability of -inf


@torch.no_grad()  # else every chunk's logits would stay for a gradient
def label_log_probs(
    keys: npt.NDArray[Any], values: npt.NDArray[Any], base: BaseDistribution, device: torch.device
) -> Tensor:
    """log p_NMT of each entry's token at its own key; keys must be the output projection's inputs.

    Args:
        keys: [M, D].
        values: [M].
        base: The model's own distribution.
        device: Where that computes.

    Returns:
        float32, on the CPU, [M].
    """
    found = torch.empty(len(keys))
    for start in range(0, len(keys), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        hidden = as_tensor(keys[rows]).to(device, torch.float32)
        tokens = as_tensor(values[rows]).to(device, torch.int64)[:, None]
        found[rows] = base.top_with(DecoderStates(hidden), 1, tokens)[0][:, 1]
    return found


class RobustSeen(NamedTuple):
    """What the combiner computes before its own weights are involved."""

    tokens: Tensor  # [..., K]
    distances: Tensor  # [..., K] ascending, without infinities
    found: Tensor  # [..., K]
    label_log_probs: Tensor  # [..., K] log p_NMT(v_i | k_i)
    nmt_log_probs: Tensor  # [..., K] log p_NMT(v_i | h)
    best_log_probs: Tensor  # [..., 8]


class RobustCombiner(nn.Module):
    """Robust kNN-MT.

    Attributes:
        label_log_probs: log p_NMT of each entry's token at its key, [M]; belongs to one datastore
            and output projection, and is not among the weights.
    """

    num_best = 8

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
            num_neighbours: K.
            temperature: T.
            hidden_dim: Of the network that sees distances and counts.
            distance_offset: Subtracted from what that network sees of the distances.

        Raises:
            CombinerError: If T is not above 0.
        """
        super().__init__()
        if not 0.0 < temperature < float("inf"):
            raise CombinerError(
                f"The temperature T is {temperature}, but it must be a number greater than 0."
            )
        self.num_neighbours = num_neighbours
        self.temperature = temperature
        self.hidden_dim = hidden_dim
        self.distance_offset = distance_offset
        self.register_buffer("label_log_probs", None, persistent=False)
        self.calibration = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.network = MetaNetwork(num_neighbours, hidden_dim, 2)
        self.nmt_score = nn.Linear(2 * num_neighbours + self.num_best, 1)

    label_log_probs: Tensor | None

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_neighbours": self.num_neighbours,
            "temperature": self.temperature,
            "hidden_dim": self.hidden_dim,
            "distance_offset": self.distance_offset,
        }

    def look(self, neighbours: Neighbours, view: ModelView | None = None) -> RobustSeen:
        """What `weigh` needs to know.

        Raises:
            CombinerError: If the combiner has no `label_log_probs`, or `view` is missing.
        """
        if self.label_log_probs is None or view is None:
            raise CombinerError(
                "A robust combiner needs the model's log-probabilities, and label_log_probs of the "
                "datastore: set them before it is used."
            )
        found = neighbours.distances.isfinite()
        labels = self.label_log_probs[neighbours.entries.clamp(min=0)]
        return RobustSeen(
            neighbours.tokens,
            fill_missing(neighbours.distances, found, self.distance_offset),
            found,
            labels.masked_fill(~found, 0.0).clamp(min=UNLIKELY),
            view.neighbour_log_probs.masked_fill(~found, 0.0).clamp(min=UNLIKELY),
            view.best_log_probs.clamp(min=UNLIKELY),
        )

    def weigh(self, seen: RobustSeen) -> Weighting:
        """Asks the networks, in float32."""
        with torch.autocast(seen.distances.device.type, enabled=False):
            counts = distinct_tokens(seen.tokens, seen.found)
            features = torch.cat([seen.distances - self.distance_offset, counts], dim=-1)
            knn_score, tau = self.network(features).split(1, dim=-1)  # [..., 1] each
            beliefs = torch.stack([seen.label_log_probs, seen.nmt_log_probs], dim=-1)
            calibration = self.calibration(beliefs).squeeze(-1)  # c, [..., K]
            logits = calibration - seen.distances * (2.0 * tau.sigmoid() / self.temperature)
            # A row without neighbours: equal values instead of an empty softmax, then zeros.
            logits = logits.masked_fill(~seen.found, torch.finfo(logits.dtype).min)
            probs = logits.softmax(dim=-1) * seen.found
            nmt_score = self.nmt_score(torch.cat([seen.best_log_probs, beliefs.flatten(-2)], -1))
            return Weighting(probs, as_weight(knn_score - nmt_score, seen.found))

    def forward(self, neighbours: Neighbours, view: ModelView | None = None) -> Weighting:
        return self.weigh(self.look(neighbours, view))

    def disturb(
        self,
        seen: RobustSeen,
        gold: Tensor,
        gold_log_probs: Tensor,
        update: int,
        generator: torch.Generator,
    ) -> RobustSeen:
        """What a training update sees of some tokens.

        Args:
            seen: Of M tokens.
            gold: The tokens, [M].
            gold_log_probs: log p_NMT of them, [M].
            update: Number of the update, from 1: noise becomes rare.
            generator: Decides which tokens are disturbed.
        """
        share = NOISE_SHARE * math.exp(-update / NOISE_DECAY)
        chosen = torch.rand(len(gold), 2, generator=generator) < share  # by the two kinds of noise
        shift = 2 * NOISE_STD * seen.distances.clamp(min=0.0).sqrt()
        shift *= torch.randn(shift.shape, generator=generator)
        distances = seen.distances + shift * (chosen[:, :1] & seen.found)
        order = distances.masked_fill(~seen.found, torch.inf).sort(dim=-1, stable=True).indices
        absent = chosen[:, 1:] & (~seen.found | (seen.tokens != gold[:, None])).all(-1, True)

        def with_gold_in_front(column: Tensor, of_gold: Tensor) -> Tensor:
            column = column.gather(-1, order)
            shifted = torch.cat([of_gold[:, None].to(column.dtype), column[:, :-1]], dim=-1)
            return torch.where(absent, shifted, column)

        return RobustSeen(
            with_gold_in_front(seen.tokens, gold),
            with_gold_in_front(distances, torch.zeros_like(gold_log_probs)),
            with_gold_in_front(seen.found, torch.ones_like(gold)),
            with_gold_in_front(seen.label_log_probs, gold_log_probs),
            with_gold_in_front(seen.nmt_log_probs, gold_log_probs),
            seen.best_log_probs,
        )

"""What a gradient step on a token's neighbours predicts: kNN-MT's relaxed form, and a real step.

Gao et al., 2023 (arXiv:2305.13034), explain kNN-MT as a gradient step on the output projection.

The relaxed form. They drop the softmax over the neighbours and the one over the vocabulary (linear
attention: Irie et al., 2022, arXiv:2202.05798):

    p = (1 - λ) softmax(W_O h + b) + λ V softmax(-d / T)                the mixture
    (W_O + λ/T ΔW_kNN) h = (1 - λ) W_O h + c λ/T V (Kᵀ h)               relaxed

with c = 1 for the inner product and 2 for squared L2 (see `gradients`). The result is not a
distribution. Here it is taken for what it is called, an updated output projection: its outputs are
logits, and their softmax is the relaxed prediction. This involves three choices. The bias belongs
to the layer and shrinks with it, to (1 - λ) b. L2's offset -(|K_j|² + |h|²)/T, which is not linear
in h, is left out, because it is not part of the gradient; results depend on this. And without the
softmax over the neighbours their weights need not sum to one, so λ/T is a step size: the prediction
depends on it, on k and on the length of the keys, and a T that suits the mixture need not suit it.
The logits shrink by the factor 1 - λ, so without a strong key the relaxed prediction is much
flatter than p_NMT: the most probable tokens agree more often than the divergence suggests.

The explicit step. Their per-token experiment: for every query, the output projection takes one step
of SGD, with learning rate η, on cross-entropy summed over the K pairs that it retrieved, and then
predicts the token:

    W' h = W_O h + η (V - P) (Kᵀ h)

so the layer need not be copied. Momentum makes no difference to a first step. A bias moves too, by
η Σ_j (V_j - P_j), as in `OPLFineTuner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_knnmt.analysis.gradients import KEY_FACTORS
from lightning_knnmt.analysis.predictions import kl_divergence
from lightning_knnmt.analysis.retrieved import (
    LOGITS_AT_ONCE,
    AnalysisError,
    Retrieved,
    chunks,
    tokens_with_neighbours,
)
from lightning_knnmt.decoding import Stateless
from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval.combiner import interpolate, spread
from lightning_knnmt.retrieval.index import Metric, as_tensor, check_metric
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.retriever import Retriever

LEARNING_RATE = 0.1  # the paper's code


@dataclass(frozen=True)
class RelaxedAgreement:
    """How similar mixture and relaxed prediction are for one k and T; None without tokens.

    Attributes:
        metric: "l2" or "ip".
        num_neighbours: k.
        temperature: T.
        knn_weight: λ.
        num_tokens: Tokens with a neighbour.
        mean_kl: Of KL(mixture || relaxed), in nats.
        median_kl: Its median.
        top_agreement: Share of the tokens for which both have the same most probable token.
    """

    metric: Metric
    num_neighbours: int
    temperature: float
    knn_weight: float
    num_tokens: int
    mean_kl: float | None
    median_kl: float | None
    top_agreement: float | None


@torch.no_grad()
def relaxed_against_softmax(
    record: Record,
    keys: npt.NDArray[Any] | Tensor,
    output_projection: nn.Linear,
    metric: Metric,
    *,
    num_neighbours: Sequence[int],
    temperatures: Sequence[float],
    knn_weight: float,
) -> tuple[RelaxedAgreement, ...]:
    """Compares both forms for every k and T, k varying slowest.

    Distances are computed from the keys, so a record made with one metric serves the other too: its
    neighbours are then candidates that get new weights, as in the paper's code.

    Args:
        record: With queries, of M tokens; tokens without neighbours are left out.
        keys: The datastore's keys, [entries, D].
        output_projection: W_O and b.
        metric: "l2" or "ip".
        num_neighbours: Values of k.
        temperatures: Values of T > 0.
        knn_weight: λ in [0, 1].
    """
    _check(metric, num_neighbours, temperatures, knn_weight)
    settings = [(k, temperature) for k in num_neighbours for temperature in temperatures]
    kls: list[list[Tensor]] = [[torch.empty(0)] for _ in settings]
    same: list[list[Tensor]] = [[torch.empty(0)] for _ in settings]
    rows = tokens_with_neighbours(record)
    for _, retrieved in chunks(record, keys, rows, max(num_neighbours), output_projection):
        logits = output_projection(retrieved.queries)  # [m, V]
        for i, (k, temperature) in enumerate(settings):
            form = (retrieved.nearest(k), logits, metric, temperature, knn_weight)
            mixture, relaxed = mixture_log_probs(*form), relaxed_log_probs(*form)
            kls[i].append(kl_divergence(mixture, relaxed))
            same[i].append((mixture.argmax(dim=1) == relaxed.argmax(dim=1)).float())
    results = []
    for (k, temperature), kl, agreement in zip(settings, kls, same, strict=True):
        divergences, shares = torch.cat(kl).double(), torch.cat(agreement).double()
        results.append(
            RelaxedAgreement(
                metric,
                k,
                temperature,
                knn_weight,
                num_tokens=len(rows),
                mean_kl=float(divergences.mean()) if len(rows) else None,
                median_kl=float(divergences.median()) if len(rows) else None,
                top_agreement=float(shares.mean()) if len(rows) else None,
            )
        )
    return tuple(results)


def mixture_log_probs(
    retrieved: Retrieved, logits: Tensor, metric: Metric, temperature: float, knn_weight: float
) -> Tensor:
    """The softmax form: log((1 - λ) p_NMT + λ p_kNN), [m, V].

    Args:
        retrieved: m tokens, each with at least one neighbour.
        logits: The model's own, W_O h + b, [m, V].
        metric: "l2" or "ip".
        temperature: T.
        knn_weight: λ.
    """
    queries = retrieved.queries.unsqueeze(1)  # [m, 1, D]
    if metric == "l2":
        distances = (retrieved.keys - queries).square().sum(dim=2)  # [m, K]
    else:
        distances = -(retrieved.keys * queries).sum(dim=2)
    # Unlike in `neighbour_probs`, these distances need not ascend.
    scores = (-distances / temperature).masked_fill(~retrieved.found, -torch.inf)
    knn_probs = spread(torch.softmax(scores, dim=1), retrieved.values, logits.shape[1])
    weight = logits.new_full((len(logits), 1), knn_weight)
    return interpolate(torch.log_softmax(logits, dim=1), knn_probs, weight)


def relaxed_log_probs(
    retrieved: Retrieved, logits: Tensor, metric: Metric, temperature: float, knn_weight: float
) -> Tensor:
    """The relaxed form, log softmax((W_O + λ/T ΔW_kNN) h + (1 - λ) b), [m, V].

    Apart from a scaling, it changes the logits of the neighbours' tokens only.

    Args:
        retrieved: m tokens.
        logits: The model's own, W_O h + b, [m, V].
        metric: "l2" or "ip".
        temperature: T.
        knn_weight: λ.
    """
    pull = (retrieved.keys @ retrieved.queries.unsqueeze(2)).squeeze(2)  # [m, K] Kᵀ h
    step = KEY_FACTORS[metric] * knn_weight / temperature
    updated = ((1.0 - knn_weight) * logits).scatter_add_(1, retrieved.values, step * pull)
    return torch.log_softmax(updated, dim=1)


def _check(
    metric: Metric, num_neighbours: Sequence[int], temperatures: Sequence[float], knn_weight: float
) -> None:
    check_metric(metric)
    if not num_neighbours or min(num_neighbours) < 1:
        raise AnalysisError(
            f"The values of k are {num_neighbours}, but there must be at least one, and all must "
            "be at least 1."
        )
    if not temperatures or not all(0.0 < value < float("inf") for value in temperatures):
        raise AnalysisError(
            f"The temperatures are {temperatures}, but there must be at least one, and all must be "
            "greater than 0."
        )
    if not 0.0 <= knn_weight <= 1.0:
        raise AnalysisError(
            f"The kNN weight λ is {knn_weight}, but it must lie between 0 (the model alone) and 1 "
            "(the datastore alone)."
        )


@torch.no_grad()
def updated_log_probs(
    retrieved: Retrieved, output_projection: nn.Linear, learning_rate: float
) -> Tensor:
    """Log-probabilities after the step, [m, V]; costs m K |V| D multiplications.

    Args:
        retrieved: m tokens with their K pairs.
        output_projection: W_O and b.
        learning_rate: η.
    """
    pull = (retrieved.keys @ retrieved.queries.unsqueeze(-1)).squeeze(-1)  # [m, K] Kᵀ h
    if output_projection.bias is not None:
        pull = pull + 1.0  # the bias is the weight of a constant input of 1
    pull = learning_rate * pull.masked_fill(~retrieved.found, 0.0)
    probs = torch.softmax(output_projection(retrieved.keys), dim=-1)  # [m, K, V] P
    logits: Tensor = output_projection(retrieved.queries)  # [m, V]
    logits = logits - (pull.unsqueeze(1) @ probs).squeeze(1)
    logits.scatter_add_(1, retrieved.values, pull)
    return torch.log_softmax(logits, dim=-1)


@dataclass(frozen=True)
class ExplicitStepDistribution(Stateless):
    """The layer after a step for every hidden state, as a next-token distribution.

    A state without neighbours keeps the layer's own distribution.

    Attributes:
        output_projection: W_O and b.
        retriever: Finds the pairs.
        keys: The datastore's keys, [entries, D].
        learning_rate: η.
    """

    output_projection: nn.Linear
    retriever: Retriever
    keys: npt.NDArray[Any] | Tensor
    learning_rate: float = LEARNING_RATE

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        """Log-probabilities of all tokens: [..., D] -> [..., V]."""
        hidden = states.hidden
        flat = hidden.reshape(-1, hidden.shape[-1])
        vocab_size = self.output_projection.out_features
        at_once = max(1, LOGITS_AT_ONCE // (self.retriever.num_neighbours * vocab_size))
        parts = [self._step(flat[i : i + at_once]) for i in range(0, len(flat), at_once)]
        empty = flat.new_empty(0, vocab_size)
        return torch.cat([empty, *parts]).view(*hidden.shape[:-1], vocab_size)

    def top(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        """The best n tokens: log-probabilities, descending, and tokens, [N, n] each."""
        best, tokens = self(states).topk(n)
        return best, tokens

    def _step(self, hidden: Tensor) -> Tensor:
        tokens, _, entries = self.retriever(DecoderStates(hidden))
        found = entries >= 0
        keys = as_tensor(self.keys)[entries.clamp(min=0).cpu()].to(hidden)
        keys = keys.masked_fill(~found.unsqueeze(-1), 0.0)
        retrieved = Retrieved(hidden, keys, tokens, found)
        return updated_log_probs(retrieved, self.output_projection, self.learning_rate)

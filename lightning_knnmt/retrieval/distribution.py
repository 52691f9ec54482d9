"""kNN-MT as one more distribution over the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_knnmt.retrieval.combiner import (
    Combiner,
    Mixture,
    ModelView,
    interpolate,
    spread,
)
from lightning_knnmt.retrieval.retriever import Neighbours, Retriever


class BaseDistribution(Protocol):
    """The model's own distribution, as far as mixing needs it."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of all tokens: [..., D] -> [..., V]."""

    def top_with(self, hidden: Tensor, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The best n tokens, descending, then the given ones, with their log-probabilities.

        Args:
            hidden: [N, D].
            n: How many of the best.
            tokens: [N, K].

        Returns:
            Log-probabilities, [N, n + K], and tokens, [N, n + K].
        """


@dataclass
class KNNDistribution:
    """p = (1 - λ) p_NMT + λ p_kNN, with neighbours from a datastore.

    Not an nn.Module on purpose: attached to a LightningModule it must not enter its checkpoints.

    Attributes:
        base: The model's own distribution, p_NMT.
        retriever: Finds the neighbours.
        combiner: Weighs them.
    """

    base: BaseDistribution
    retriever: Retriever
    combiner: Combiner

    def __post_init__(self) -> None:
        if self.retriever.num_neighbours != self.combiner.num_neighbours:
            raise ValueError(
                f"The retriever finds {self.retriever.num_neighbours} neighbours, but the combiner "
                f"weighs {self.combiner.num_neighbours}: give both the same k."
            )

    def mixture(self, hidden: Tensor) -> tuple[Neighbours, Mixture]:
        """The neighbours and the mixed distribution over the whole vocabulary.

        Args:
            hidden: [..., D].
        """
        neighbours = self.retriever(hidden)
        nmt_log_probs = self.base(hidden).float()
        view = ModelView(
            nmt_log_probs.topk(self.combiner.num_best, dim=-1).values,
            nmt_log_probs.gather(-1, neighbours.tokens),
        )
        weighting = self.combiner(neighbours, view)
        knn_probs = spread(weighting.neighbour_probs, neighbours.tokens, nmt_log_probs.shape[-1])
        log_probs = interpolate(nmt_log_probs, knn_probs, weighting.knn_weight)
        return neighbours, Mixture(log_probs, knn_probs, weighting.knn_weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of all tokens: [..., D] -> [..., V]."""
        return self.mixture(hidden)[1].log_probs

    def top(self, hidden: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The best n tokens of the mixture, without building it.

        Tokens that no neighbour holds keep the order that p_NMT gives them, so the best n of the
        mixture are among the best n of p_NMT and the neighbours' tokens.

        Args:
            hidden: [N, D].
            n: Tokens wanted.

        Returns:
            Log-probabilities, [N, n] descending, and tokens, [N, n], all different. With λ = 1 and
            fewer than n different neighbour tokens the rest have log-probability -inf.
        """
        neighbours = self.retriever(hidden)
        # sorted by token, equal ones are adjacent: all pairs would be [N, n + K, K] comparisons
        held, order = neighbours.tokens.sort(dim=1)  # [N, K]
        num_best = max(n, self.combiner.num_best)  # b
        nmt_log_probs, tokens = self.base.top_with(hidden, num_best, held)  # [N, b + K]
        nmt_log_probs = nmt_log_probs.float()
        num_best = tokens.shape[1] - held.shape[1]  # a small vocabulary has fewer
        of_held = nmt_log_probs[:, num_best:]
        view = ModelView(
            nmt_log_probs[:, : self.combiner.num_best],
            torch.empty_like(of_held).scatter_(1, order, of_held),
        )
        weighting = self.combiner(neighbours, view)
        probs = weighting.neighbour_probs.gather(1, order)
        first = torch.ones_like(held, dtype=torch.bool)  # of its token
        torch.ne(held[:, 1:], held[:, :-1], out=first[:, 1:])
        run = first.cumsum(dim=1) - 1  # number of the token among the different ones
        totals = torch.zeros_like(probs).scatter_add_(1, run, probs).gather(1, run)

        is_held = tokens[:, :num_best].unsqueeze(2) == held.unsqueeze(1)  # [N, b, K]
        knn_probs = torch.cat([(is_held * probs.unsqueeze(1)).sum(dim=2), totals], dim=1)
        log_probs = interpolate(nmt_log_probs, knn_probs, weighting.knn_weight)
        repeated = is_held.any(dim=1).logical_or_(~first)
        log_probs[:, num_best:].masked_fill_(repeated, float("-inf"))
        # stable: of equals the model's own order wins, and -inf is filled up with its best tokens
        log_probs, order = log_probs.sort(dim=1, descending=True, stable=True)
        return log_probs[:, :n], tokens.gather(1, order[:, :n])

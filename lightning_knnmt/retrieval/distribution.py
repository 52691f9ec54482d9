"""kNN-MT as one more distribution over the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_knnmt.retrieval.combiner import Combiner, Mixture, interpolate, spread
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
        weighting = self.combiner(neighbours)
        nmt_log_probs = self.base(hidden).float()
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
        weighting = self.combiner(neighbours)
        nmt_log_probs, tokens = self.base.top_with(hidden, n, neighbours.tokens)  # [N, n + K]
        holds = tokens.unsqueeze(2) == neighbours.tokens.unsqueeze(1)  # [N, n + K, K]
        knn_probs = (holds * weighting.neighbour_probs.unsqueeze(1)).sum(dim=2)
        log_probs = interpolate(nmt_log_probs.float(), knn_probs, weighting.knn_weight)
        log_probs[:, n:].masked_fill_(_seen_before(tokens, n), float("-inf"))
        # stable: of equals the model's own order wins, and -inf is filled up with its best tokens
        log_probs, order = log_probs.sort(dim=1, descending=True, stable=True)
        return log_probs[:, :n], tokens.gather(1, order[:, :n])


def _seen_before(tokens: Tensor, n: int) -> Tensor:
    """Which of tokens[:, n:] stand further left already: [N, n + K] -> [N, K]."""
    same = tokens[:, n:].unsqueeze(2) == tokens.unsqueeze(1)  # [N, K, n + K]
    return same.tril(diagonal=n - 1).any(dim=2)

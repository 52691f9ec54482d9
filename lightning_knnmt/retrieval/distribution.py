"""kNN-MT as one more distribution over the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_knnmt.decoding import Stateless
from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval.combiner import (
    Combiner,
    Mixture,
    ModelView,
    Weighting,
    interpolate,
    spread,
)
from lightning_knnmt.retrieval.retriever import Neighbours, Retriever


class BaseDistribution(Protocol):
    """The model's own distribution, as far as mixing needs it."""

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        """Log-probabilities of all tokens: [..., D] -> [..., V]."""

    def top_with(self, states: DecoderStates, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The best n tokens, descending, then the given ones, with their log-probabilities.

        Args:
            states: [N, D].
            n: How many of the best.
            tokens: [N, K].

        Returns:
            Log-probabilities, [N, n + K], and tokens, [N, n + K].
        """


class Evidence(NamedTuple):
    """Why some tokens were emitted: what the model and each neighbour contributed.

    Attributes:
        nmt_probs: p_NMT of each token, [n].
        knn_weight: λ, [n].
        knn_probs: p_kNN of each token, [n].
        probs: Of each token in the mixture, (1 - λ) p_NMT + λ p_kNN, [n].
        neighbours: What was found, [n, K] each.
        shares: The part of `probs` that each neighbour brought, [n, K]: 0 where it holds another
            token. With the model's part, (1 - λ) p_NMT / p, they sum to 1.
        nmt_share: The model's part, [n].
        nmt_tokens: What the model alone would have emitted instead, or the same, [n].
    """

    nmt_probs: Tensor
    knn_weight: Tensor
    knn_probs: Tensor
    probs: Tensor
    neighbours: Neighbours
    shares: Tensor
    nmt_share: Tensor
    nmt_tokens: Tensor


@dataclass(frozen=True)
class KNNDistribution(Stateless):
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

    def mixture(self, states: DecoderStates) -> tuple[Neighbours, Mixture]:
        """The neighbours and the mixed distribution over the whole vocabulary, [..., D]."""
        neighbours, nmt_log_probs, weighting = self._weighted(states)
        knn_probs = spread(weighting.neighbour_probs, neighbours.tokens, nmt_log_probs.shape[-1])
        log_probs = interpolate(nmt_log_probs, knn_probs, weighting.knn_weight)
        return neighbours, Mixture(log_probs, knn_probs, weighting.knn_weight)

    def evidence(self, states: DecoderStates, tokens: Tensor) -> Evidence:
        """What speaks for given tokens: states [n, D], tokens [n]."""
        neighbours, nmt_log_probs, weighting = self._weighted(states)
        nmt_probs = nmt_log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).exp()
        knn_weight = weighting.knn_weight.squeeze(-1)
        for_token = weighting.neighbour_probs * (neighbours.tokens == tokens.unsqueeze(-1))
        knn_probs = for_token.sum(dim=-1)
        from_nmt = (1.0 - knn_weight) * nmt_probs
        from_neighbours = knn_weight.unsqueeze(-1) * for_token
        probs = from_nmt + from_neighbours.sum(dim=-1)
        divisor = probs.clamp(min=torch.finfo(probs.dtype).tiny)
        return Evidence(
            nmt_probs,
            knn_weight,
            knn_probs,
            probs,
            neighbours,
            from_neighbours / divisor.unsqueeze(-1),
            from_nmt / divisor,
            self._best(states, 1)[1].squeeze(-1),
        )

    def _weighted(self, states: DecoderStates) -> tuple[Neighbours, Tensor, Weighting]:
        """The neighbours, log p_NMT of all tokens and the combiner's word."""
        neighbours = self.retriever(states)
        nmt_log_probs = self.base(states).float()
        best, _ = self._best(states, self.combiner.num_best)
        view = ModelView(best, nmt_log_probs.gather(-1, neighbours.tokens))
        return neighbours, nmt_log_probs, self.combiner(neighbours, view)

    def _best(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        """The model's best n tokens that may be emitted, as `top` and records show them.

        Returns:
            log p_NMT and tokens, [..., n] each.
        """
        hidden = states.hidden
        if n == 0:
            nothing = hidden.new_empty(*hidden.shape[:-1], 0, dtype=torch.float32)
            return nothing, nothing.long()
        flat = DecoderStates(hidden.reshape(-1, hidden.shape[-1]))
        no_others = torch.empty(len(flat.hidden), 0, dtype=torch.int64, device=hidden.device)
        log_probs, tokens = self.base.top_with(flat, n, no_others)
        shape = (*hidden.shape[:-1], -1)
        return log_probs.float().view(shape), tokens.view(shape)

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        """Log-probabilities of all tokens: [..., D] -> [..., V]."""
        return self.mixture(states)[1].log_probs

    def top(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        """The best n tokens of the mixture, without building it.

        Tokens that no neighbour holds keep the order that p_NMT gives them, so the best n of the
        mixture are among the best n of p_NMT and the neighbours' tokens. Tokens that the model
        never emits are not among these as long as the datastore holds none of them.

        Args:
            states: [N, D].
            n: Tokens wanted.

        Returns:
            Log-probabilities, [N, n] descending, and tokens, [N, n], all different; fewer than n if
            the model may emit no more. With λ = 1 and fewer than n different neighbour tokens the
            rest have log-probability -inf.
        """
        neighbours = self.retriever(states)
        # Sorted by token, equal ones are adjacent: all pairs would be [N, n + K, K] comparisons.
        # Missing neighbours hold no token, so none may become a candidate through them.
        held, order = neighbours.tokens.masked_fill(neighbours.entries < 0, -1).sort(dim=1)
        num_best = max(n, self.combiner.num_best)  # b
        nmt_log_probs, tokens = self.base.top_with(
            states, num_best, held.clamp(min=0)
        )  # [N, b + K]
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
        no_candidate = is_held.any(dim=1).logical_or_(~first).logical_or_(held < 0)
        log_probs[:, num_best:].masked_fill_(no_candidate, float("-inf"))
        # stable: of equals the model's own order wins, and -inf is filled up with its best tokens
        log_probs, order = log_probs.sort(dim=1, descending=True, stable=True)
        # Columns beyond the model's best were only room for other tokens that neighbours hold.
        n = min(n, num_best)
        return log_probs[:, :n], tokens.gather(1, order[:, :n])

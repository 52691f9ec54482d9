"""What one explicit step of fine-tuning on a token's own neighbours would predict.

The per-token experiment of Gao et al., 2023 (arXiv:2305.13034): for every query, the output
projection takes one step of SGD, with learning rate η, on cross-entropy summed over the K pairs
that it retrieved, and then predicts the token:

    W' h = W_O h + η (V - P) (Kᵀ h)

so the layer is never copied. Momentum makes no difference to a first step. The bias, where there is
one, moves too, by η Σ_j (V_j - P_j), as `OPLFineTuner` would move it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_knnmt.analysis.retrieved import LOGITS_AT_ONCE, Retrieved, chunks
from lightning_knnmt.retrieval.index import as_tensor
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.retriever import Retriever

LEARNING_RATE = 0.1  # the paper's code


class ExplicitStep(NamedTuple):
    """What the layer says about each token after that token's own step."""

    gold_log_probs: Tensor  # [M] in nats
    top_tokens: Tensor  # [M] int64: the most probable one


def take_explicit_steps(
    record: Record,
    keys: npt.NDArray[Any] | Tensor,
    output_projection: nn.Linear,
    num_neighbours: int,
    learning_rate: float = LEARNING_RATE,
) -> ExplicitStep:
    """Takes every token's step; a token without neighbours keeps p_NMT.

    Args:
        record: With queries, of M tokens.
        keys: The datastore's keys, [entries, D].
        output_projection: W_O and b; it does not change.
        num_neighbours: k.
        learning_rate: η.
    """
    gold, best = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    parts = explicit_step_log_probs(record, keys, output_projection, num_neighbours, learning_rate)
    for rows, log_probs in parts:
        gold.append(log_probs.gather(1, record.gold[rows, None].long()).squeeze(1))
        best.append(log_probs.argmax(dim=1))
    return ExplicitStep(torch.cat(gold), torch.cat(best))


def explicit_step_log_probs(
    record: Record,
    keys: npt.NDArray[Any] | Tensor,
    output_projection: nn.Linear,
    num_neighbours: int,
    learning_rate: float = LEARNING_RATE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Takes every token's step and yields the distributions, some tokens at a time.

    Args:
        record: With queries, of M tokens.
        keys: The datastore's keys, [entries, D].
        output_projection: W_O and b.
        num_neighbours: k.
        learning_rate: η.

    Yields:
        The tokens' numbers in the record, [m], and their log-probabilities, [m, V].
    """
    everything = torch.arange(record.num_tokens)
    for rows, retrieved in chunks(record, keys, everything, num_neighbours, output_projection):
        yield rows, updated_log_probs(retrieved, output_projection, learning_rate)


@torch.no_grad()
def updated_log_probs(
    retrieved: Retrieved, output_projection: nn.Linear, learning_rate: float
) -> Tensor:
    """Log-probabilities after the step: [m, V], m K |V| D multiplications.

    Args:
        retrieved: m tokens with their K pairs.
        output_projection: W_O and b.
        learning_rate: η.
    """
    pull = (retrieved.keys @ retrieved.queries.unsqueeze(-1)).squeeze(-1)  # [m, K] Kᵀ h
    if output_projection.bias is not None:
        pull = pull + 1.0  # the bias is the weight of an input that is always 1
    pull = learning_rate * pull.masked_fill(~retrieved.found, 0.0)
    probs = torch.softmax(output_projection(retrieved.keys), dim=-1)  # [m, K, V] P
    logits: Tensor = output_projection(retrieved.queries)  # [m, V]
    logits = logits - (pull.unsqueeze(1) @ probs).squeeze(1)
    logits.scatter_add_(1, retrieved.values, pull)
    return torch.log_softmax(logits, dim=-1)


@dataclass(frozen=True)
class ExplicitStepDistribution:
    """The layer after a step for every hidden state, as one more next-token distribution.

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

    def __call__(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of all tokens: [..., D] -> [..., V]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        vocab_size = self.output_projection.out_features
        at_once = max(1, LOGITS_AT_ONCE // (self.retriever.num_neighbours * vocab_size))
        parts = [self._step(rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
        empty = rows.new_empty(0, vocab_size)
        return torch.cat([empty, *parts]).view(*hidden.shape[:-1], vocab_size)

    def top(self, hidden: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The best n tokens: log-probabilities, descending, and tokens, [N, n] each."""
        best, tokens = self(hidden).topk(n)
        return best, tokens

    def _step(self, hidden: Tensor) -> Tensor:
        tokens, _, entries = self.retriever(hidden)
        found = entries >= 0
        keys = as_tensor(self.keys)[entries.clamp(min=0).cpu()].to(hidden)
        keys = keys.masked_fill(~found.unsqueeze(-1), 0.0)
        retrieved = Retrieved(hidden, keys, tokens, found)
        return updated_log_probs(retrieved, self.output_projection, self.learning_rate)

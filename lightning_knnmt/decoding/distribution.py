"""From a hidden state to the next token's distribution: the seam that all else looks through.

Shapes: N rows, D model_dim, V vocabulary, n best, C tokens of a chunk, G chunks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

CHUNK = 128


class NextTokenDistribution(Protocol):
    """What a hidden state says about the next token."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """The definition: log-probabilities of all tokens, [..., D] -> [..., V]."""

    def top(self, hidden: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """What a search needs: the best n tokens.

        Args:
            hidden: [N, D].
            n: How many; a vocabulary smaller than that gives all it has.

        Returns:
            Log-probabilities, descending, and tokens, all different, [N, n] each.
        """


def best_tokens(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """torch.topk over a vocabulary, exactly and several times as fast on a CPU.

    The best n tokens lie in the n chunks with the largest maxima (or in the rest that fills no
    chunk), and the maxima are found at the speed of memory: only n * C tokens are ever sorted.

    Args:
        logits: [N, V].

    Returns:
        Logits, descending, and tokens, [N, min(n, V)] each.
    """
    vocab_size = logits.shape[1]
    num_chunks = vocab_size // CHUNK
    if n >= num_chunks:  # nothing to gain
        best, tokens = logits.topk(min(n, vocab_size))
        return best, tokens
    # Chunk g is tokens g, g + G, g + 2 G, ...: with neighbours in different chunks, the reduction
    # runs over contiguous memory.
    maxima = logits[:, : CHUNK * num_chunks].view(len(logits), CHUNK, -1).amax(1)  # [N, G]
    chunks = maxima.argmax(-1, keepdim=True) if n == 1 else maxima.topk(n).indices  # [N, n]
    members = torch.arange(0, CHUNK * num_chunks, num_chunks, device=logits.device)
    inside = (chunks.unsqueeze(-1) + members).flatten(1)  # [N, n * C]
    rest = torch.arange(CHUNK * num_chunks, vocab_size, device=logits.device)
    candidates = torch.cat([inside, rest.expand(len(inside), -1)], dim=1)
    scores = logits.gather(1, candidates)
    best, where = scores.max(-1, keepdim=True) if n == 1 else scores.topk(n)
    return best, candidates.gather(1, where)


@dataclass(frozen=True)
class SoftmaxDistribution:
    """Plain NMT: log softmax(W_O hidden), in float32 whatever the model's precision.

    Attributes:
        output_projection: W_O, the OPL.
    """

    output_projection: nn.Linear

    def __call__(self, hidden: Tensor) -> Tensor:
        """The definition: log-probabilities of all tokens, [..., D] -> [..., V]."""
        return torch.log_softmax(self._logits(hidden), dim=-1)

    def top(self, hidden: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The best n tokens: [N, D] -> log-probabilities, descending, and tokens, [N, n] each."""
        logits = self._logits(hidden)
        best, tokens = best_tokens(logits, n)
        return best - _consume_for_log_normalizer(logits, best[:, :1]), tokens

    def top_with(self, hidden: Tensor, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The best n tokens and some others, from one product.

        Args:
            hidden: [N, D].
            n: How many of the best.
            tokens: The others, [N, K].

        Returns:
            Log-probabilities and tokens, [N, n + K] each: the best, descending, then the others.
        """
        logits = self._logits(hidden)
        best, tokens_of_best = best_tokens(logits, n)
        scores = torch.cat([best, logits.gather(1, tokens)], dim=1)
        log_probs = scores - _consume_for_log_normalizer(logits, best[:, :1])
        return log_probs, torch.cat([tokens_of_best, tokens], dim=1)

    def _inputs(self, hidden: Tensor) -> Tensor:
        """Leaves out a key of another layer that follows each hidden state, [..., 2 D]."""
        dim = self.output_projection.in_features
        # Contiguous, so that the products are those of hidden states alone, bit for bit.
        return hidden if hidden.shape[-1] == dim else hidden[..., :dim].contiguous()

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], float32."""
        logits: Tensor = self.output_projection(self._inputs(hidden)).float()
        return logits


def _consume_for_log_normalizer(logits: Tensor, highest: Tensor) -> Tensor:
    """torch.logsumexp over the vocabulary, in the logits' own memory, which is spoilt.

    Args:
        logits: [N, V].
        highest: The largest logit of each row, [N, 1].

    Returns:
        [N, 1].
    """
    return logits.sub_(highest).exp_().sum(1, keepdim=True).log_() + highest

"""From decoder states to the next token's distribution: the seam that all else looks through.

A distribution may depend on the sentences that are being decoded, so it is asked in a session:
`begin` opens one for a batch. Distributions that depend on the states alone are their own session.

Shapes: B sentences, N rows (B * beam_size, a sentence's beams adjacent), D model_dim, V vocabulary,
n best, C tokens of a chunk, G chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from lightning_knnmt.models import DecoderStates

CHUNK = 128


class Session(Protocol):
    """The next token's distribution while one batch is decoded.

    Row r belongs to sentence r // beam_size for as long as the batch is decoded.
    """

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        """Log-probabilities of all tokens, [..., D] -> [..., V].

        Args:
            states: Of the session's rows or, given `rows`, of some of them.
            rows: Which rows the states belong to, in any order and number, [...].
        """

    def top(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        """The best n tokens of each row that a search may emit.

        Args:
            states: Of all rows, [N, D].
            n: How many; a vocabulary smaller than that gives all it has.

        Returns:
            Log-probabilities, descending, and tokens, all different, [N, n] each.
        """

    def keep(self, sentences: Tensor) -> None:
        """Drops the rows of all but the given sentences, [B']."""


class NextTokenDistribution(Protocol):
    """Opens sessions."""

    def begin(self, source_ids: Tensor, source_mask: Tensor, beam_size: int) -> Session:
        """Prepares for a batch.

        Args:
            source_ids: [B, S].
            source_mask: True at tokens, [B, S].
            beam_size: Rows of each sentence.
        """


class Stateless:
    """A distribution of the decoder states alone, whatever the sentences: its own session."""

    def begin(self, source_ids: Tensor, source_mask: Tensor, beam_size: int) -> Self:
        return self

    def keep(self, sentences: Tensor) -> None:
        """Nothing is kept for any sentence."""


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
class SoftmaxDistribution(Stateless):
    """Plain NMT: log softmax(W_O hidden), in float32 whatever the model's precision.

    Attributes:
        output_projection: W_O, the OPL.
        never: Tokens that `top` never returns, such as <unk>, as fairseq's search never returns
            padding. Their probability stays where the softmax puts it: nothing is renormalised.
    """

    output_projection: nn.Linear
    never: Sequence[int] = ()

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        """The definition: log-probabilities of all tokens, [..., D] -> [..., V]."""
        return torch.log_softmax(self._logits(states), dim=-1)

    def top(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        """The best n tokens: [N, D] -> log-probabilities, descending, and tokens, [N, n] each."""
        logits = self._logits(states)
        best, tokens, log_normalizer = self._consume(logits, n)
        return best - log_normalizer, tokens

    def top_with(self, states: DecoderStates, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The best n tokens, then the given ones, with their log-probabilities.

        Args:
            states: [N, D].
            n: How many of the best.
            tokens: Any K tokens of each row, those in `never` too, [N, K].

        Returns:
            Log-probabilities and tokens, [N, n + K] each: the best, descending, then the others.
        """
        logits = self._logits(states)
        given = logits.gather(1, tokens)
        best, tokens_of_best, log_normalizer = self._consume(logits, n)
        log_probs = torch.cat([best, given], dim=1) - log_normalizer
        return log_probs, torch.cat([tokens_of_best, tokens], dim=1)

    def _consume(self, logits: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best n logits and tokens, and the log of the normaliser, [N, 1].

        Works in the logits' own memory, which is spoilt.
        """
        if self.never:
            never = list(self.never)
            set_aside = logits[:, never]  # a copy, [N, number of them]
            logits[:, never] = float("-inf")
            best, tokens = best_tokens(logits, min(n, logits.shape[1] - len(never)))
            logits[:, never] = set_aside
            highest = torch.maximum(best[:, :1], set_aside.amax(1, keepdim=True))
        else:
            best, tokens = best_tokens(logits, n)
            highest = best[:, :1]
        return best, tokens, logits.sub_(highest).exp_().sum(1, keepdim=True).log_() + highest

    def _logits(self, states: DecoderStates) -> Tensor:
        """[..., D] -> [..., V], float32."""
        logits: Tensor = self.output_projection(states.hidden).float()
        return logits

"""Beam search over any incremental decoder and any next-token distribution; greedy is beam_size=1.

The rules are fairseq's (Ott et al., 2019, arXiv:1904.01038): of the best 2 * beam_size
continuations of a sentence, an end-of-sentence token finishes a hypothesis only among the first
beam_size; the first beam_size others go on; a sentence is done once beam_size are finished.

Shapes: B sentences, still in the batch; N = B * beam_size rows, a sentence's beams adjacent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_knnmt.decoding.distribution import NextTokenDistribution
from lightning_knnmt.models import DecoderStates

# Finished sentences leave once they are this share of the batch: leaving copies what remains.
LEAVING_SHARE = 0.05
LOWEST = torch.finfo(torch.float32).min


class DecoderCache(Protocol):
    """What a decoder keeps between steps."""

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row rows[i] began; rows [N']."""

    def keep(self, sentences: Tensor) -> None:
        """Drops the memory of all but the given sentences, [B']."""


class IncrementalDecoder(Protocol):
    """What search needs of a model; what its encoder remembers is its own business."""

    def encode(self, source_ids: Tensor) -> Any:
        """[B, S] -> memory."""

    def start(self, memory: Any, beam_size: int) -> Any:
        """Returns a `DecoderCache` for B * beam_size rows."""

    def decode_step(self, tokens: Tensor, cache: Any) -> DecoderStates:
        """Reads one more token of each row, [N]; returns the states for the next, [N, D]."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished translation.

    Attributes:
        tokens: EOS included, the start id not.
        score: The sum of the tokens' log-probabilities.
        normalized_score: The score over length ** length_penalty; hypotheses are ranked by it.
    """

    tokens: list[int]
    score: float
    normalized_score: float


class _Finished:
    """The hypotheses finished so far: beam_size places for each sentence."""

    def __init__(
        self, num_sentences: int, beam_size: int, longest: int, device: torch.device
    ) -> None:
        shape = (num_sentences, beam_size)
        self._counts = torch.zeros(num_sentences, dtype=torch.long, device=device)
        self._lengths = torch.zeros(shape, dtype=torch.long, device=device)
        self._scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
        self._tokens = torch.zeros((*shape, longest), dtype=torch.long, device=device)

    def add(
        self,
        sentences: Tensor,
        finishing: Tensor,
        totals: Tensor,
        history: Tensor,
        parents: Tensor,
        eos_id: int,
    ) -> Tensor:
        """Takes hypotheses in, best first, as long as their sentence has places.

        Args:
            sentences: The sentences' original numbers, [B].
            finishing: True at candidates that finish, [B, beam].
            totals: Scores of the candidates, [B, C].
            history: Tokens of the rows that the candidates continue, [N, length].
            parents: Their rows, [B, C].
            eos_id: The token that finishes them.

        Returns:
            How many hypotheses each of the sentences has now, [B].
        """
        places = self._counts[sentences].unsqueeze(1) + finishing.cumsum(1) - 1  # [B, beam]
        taken = finishing & (places < self._scores.shape[1])
        row, candidate = taken.nonzero(as_tuple=True)
        sentence, place = sentences[row], places[row, candidate]
        length = history.shape[1]
        self._scores[sentence, place] = totals[row, candidate]
        self._lengths[sentence, place] = length + 1
        self._tokens[sentence, place, :length] = history[parents[row, candidate]]
        self._tokens[sentence, place, length] = eos_id
        self._counts[sentences] += taken.sum(1)
        return self._counts[sentences]

    def ranked(self, length_penalty: float, eos_id: int) -> list[list[Hypothesis]]:
        """Each sentence's hypotheses, best first; the empty one where nothing was possible."""
        columns = (self._counts, self._scores, self._lengths, self._tokens)
        ranked = []
        for count, scores, lengths, tokens in zip(*(c.tolist() for c in columns), strict=True):
            hypotheses = [
                Hypothesis(tokens[i][:length], scores[i], scores[i] / length**length_penalty)
                for i, length in enumerate(lengths[:count])
            ]
            hypotheses = hypotheses or [Hypothesis([eos_id], float("-inf"), float("-inf"))]
            ranked.append(sorted(hypotheses, key=lambda h: h.normalized_score, reverse=True))
        return ranked


def _only(
    token: int, token_log_probs: Tensor, rows: Tensor, log_probs: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Leaves some rows but one continuation.

    Args:
        token_log_probs: Of that token in each of the rows, [number of rows].
        rows: True at the rows that are meant, [N].
        log_probs: [N, n].
        tokens: [N, n].
    """
    log_probs = log_probs.masked_fill(rows.unsqueeze(1), float("-inf"))
    log_probs[rows, 0] = token_log_probs.to(log_probs.dtype)
    return log_probs, tokens.masked_fill(rows.unsqueeze(1), token)


def _check(beam_size: int, min_length: int, limits: Tensor, prefix: Sequence[int]) -> None:
    if beam_size < 1:
        raise ValueError(f"beam_size is {beam_size}; it must be at least 1 (greedy decoding).")
    shortest = int(limits.min())
    if not 0 <= min_length < shortest:
        raise ValueError(
            f"min_length is {min_length} and the smallest max_length {shortest}: min_length must "
            "be at least 0, and max_length larger, for EOS counts in it."
        )
    if len(prefix) >= shortest:
        raise ValueError(
            f"The prefix of {len(prefix)} tokens leaves no room in the smallest max_length "
            f"{shortest}: max_length must be larger, for prefix and EOS count in it."
        )


@torch.inference_mode()
def beam_search(
    model: IncrementalDecoder,
    source_ids: Tensor,
    next_token: NextTokenDistribution,
    *,
    source_mask: Tensor | None = None,
    start_id: int,
    eos_id: int,
    beam_size: int = 4,
    min_length: int = 0,
    max_length: int | Tensor = 256,
    length_penalty: float = 1.0,
    prefix: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """Translates a batch; the model should be in evaluation mode.

    Args:
        source_ids: [B, S].
        next_token: Turns decoder states into log-probabilities.
        source_mask: True at tokens, [B, S]; None if there is no padding.
        start_id: The decoder's first input.
        eos_id: Ends a hypothesis.
        beam_size: Hypotheses kept, and finished, for each sentence; 1 is greedy decoding.
        min_length: Fewest tokens before EOS.
        max_length: Most tokens, EOS included: one number, or one for each sentence, [B]. The last
            is EOS, whatever its probability.
        length_penalty: Hypotheses are ranked by score / length ** length_penalty.
        prefix: Tokens that every hypothesis begins with, given, so with log-probability 0; they
            count in its length.

    Returns:
        For each sentence its hypotheses, at least one and at most beam_size, best first.
    """
    num_sentences, device = len(source_ids), source_ids.device
    limits = torch.as_tensor(max_length, device=device).expand(num_sentences)  # [B]
    _check(beam_size, min_length, limits, prefix)
    longest = int(limits.max())
    finished = _Finished(num_sentences, beam_size, longest, device)
    cache: DecoderCache = model.start(model.encode(source_ids), beam_size)
    mask = torch.ones_like(source_ids, dtype=torch.bool) if source_mask is None else source_mask
    session = next_token.begin(source_ids, mask, beam_size)

    sentences = torch.arange(num_sentences, device=device)  # [B], their original numbers
    done = torch.zeros(num_sentences, dtype=torch.bool, device=device)  # [B]
    # [B, beam], in float32 whatever the model's precision
    scores = torch.full((num_sentences, beam_size), -torch.inf, dtype=torch.float32, device=device)
    scores[:, 0] = 0.0  # all beams start alike: one of them counts
    tokens = torch.full((num_sentences * beam_size,), start_id, device=device)  # [N]
    history = tokens.new_empty(len(tokens), longest)  # [N, longest]

    for step in range(longest):
        states = model.decode_step(tokens, cache)  # [N, D]
        # Greedy search needs one continuation; one more where EOS may take a place in vain.
        wanted = (2 * beam_size if beam_size > 1 else 1) + (step < min_length)
        log_probs, continuations = session.top(states, wanted)  # [N, n]
        if step < min_length:
            log_probs = log_probs.masked_fill(continuations == eos_id, float("-inf"))
        if step < len(prefix):
            rows = torch.ones(len(tokens), dtype=torch.bool, device=device)
            given = log_probs.new_zeros(len(tokens))
            log_probs, continuations = _only(prefix[step], given, rows, log_probs, continuations)
        forced = (limits <= step + 1) & ~done  # [B]
        if forced.any():
            rows = forced.repeat_interleave(beam_size)
            # Even an impossible end is better than none.
            at_end = session(states.select(rows), rows.nonzero().squeeze(1))
            eos_log_probs = at_end[:, eos_id].clamp(min=LOWEST)
            log_probs, continuations = _only(eos_id, eos_log_probs, rows, log_probs, continuations)

        # The best C candidates of each sentence, [B, C].
        totals = scores.unsqueeze(-1) + log_probs.view(*scores.shape, -1)  # [B, beam, n]
        num_candidates = min(max(2 * beam_size, wanted), totals[0].numel())
        totals, order = totals.flatten(1).topk(num_candidates)
        candidates = continuations.view(len(scores), -1).gather(1, order)
        first_rows = torch.arange(0, len(tokens), beam_size, device=device).unsqueeze(1)  # [B, 1]
        parents = first_rows + order // continuations.shape[1]  # rows
        ends = candidates == eos_id

        finishing = ends[:, :beam_size] & (totals[:, :beam_size] > float("-inf"))
        finishing &= ~done.unsqueeze(1)
        if finishing.any():
            counts = finished.add(sentences, finishing, totals, history[:, :step], parents, eos_id)
            done = done | (counts >= beam_size)
        done = done | forced

        # The first beam_size others go on, [B, beam].
        others = ends.sort(dim=1, stable=True).indices[:, :beam_size]
        scores = totals.gather(1, others).masked_fill(ends.gather(1, others), float("-inf"))
        tokens, rows = candidates.gather(1, others), parents.gather(1, others)
        num_done = int(done.sum())
        if num_done == len(done):
            break
        leaving = num_done >= LEAVING_SHARE * len(done)
        if leaving:
            stay = (~done).nonzero().squeeze(1)
            scores, tokens, rows = scores[stay], tokens[stay], rows[stay]
            sentences, limits, done = sentences[stay], limits[stay], done[stay]
            cache.keep(stay)
            session.keep(stay)
        tokens, rows = tokens.flatten(), rows.flatten()  # [N]
        if leaving or beam_size > 1:
            cache.reorder(rows)
            history = history.index_select(0, rows)
        history[:, step] = tokens
    return finished.ranked(length_penalty, eos_id)

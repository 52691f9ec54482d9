"""A recorded pass: what the model and the datastore predicted for every token of a text.

One teacher-forced pass keeps, for each target token, its neighbours with their distances, and
log p_NMT of the gold token and of each neighbour's token. For every k up to the recorded one, every
λ and every temperature, the mixture (Khandelwal et al., 2021, arXiv:2010.00710, equations 2 and 3)
follows from that without running the model or searching again. Rows stand in the text's
order, whatever the order of the batches or the number of processes that recorded them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval.distribution import BaseDistribution
from lightning_knnmt.retrieval.retriever import Retriever

ROWS_AT_ONCE = 512  # bounds the [rows, V] logits: 65 MB for a vocabulary of 32,000


class RecordError(ValueError):
    """A record cannot be made."""


@dataclass(frozen=True)
class Record:
    """What is known about M target tokens; token ids are int32, entries int64, the rest float32.

    A missing neighbour has distance inf, log-prob -inf, token 0 and entry -1.

    Attributes:
        tokens: The neighbours' tokens, nearest first, [M, K].
        distances: Their distances, [M, K].
        entries: Their rows of the datastore, where their keys are, [M, K].
        gold: The tokens of the text itself, [M].
        gold_log_probs: log p_NMT of them, [M].
        neighbour_log_probs: log p_NMT of the neighbours' tokens, [M, K].
        sentences: Each token's sentence in the text, ascending, [M].
        queries: The keys that were searched for, [M, D]; None if they were not kept.
        best_log_probs: log p_NMT of the model's best tokens, descending, [M, n]; None likewise.
    """

    tokens: Tensor
    distances: Tensor
    entries: Tensor
    gold: Tensor
    gold_log_probs: Tensor
    neighbour_log_probs: Tensor
    sentences: Tensor
    queries: Tensor | None
    best_log_probs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def max_neighbours(self) -> int:
        return self.tokens.shape[1]

    def arrays(self) -> dict[str, Tensor]:
        """Returns the tensors that were kept, by name."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}


def merge(parts: Sequence[Record]) -> Record:
    """Joins the records of several batches or processes, in the text's order.

    Args:
        parts: Records with the same K; the tokens of a sentence are all in one of them, in order.
    """
    if not parts:
        raise RecordError("There is nothing to merge: no token was recorded.")
    # Lightning evaluates under inference_mode, whose tensors could train no combiner later.
    with torch.inference_mode(False), torch.no_grad():
        order = torch.argsort(torch.cat([part.sentences for part in parts]), stable=True)
        joined = {
            name: torch.cat([part.arrays()[name] for part in parts])[order]
            for name in parts[0].arrays()
        }
    return Record(queries=joined.pop("queries", None), **joined)


class Recorder:
    """Fills a record, batch by batch, from a teacher-forced pass."""

    def __init__(
        self,
        retriever: Retriever,
        base: BaseDistribution,
        *,
        keep_queries: bool = False,
        keep_best: int = 0,
    ) -> None:
        """Prepares a record.

        Args:
            retriever: Finds K neighbours, the most that any later use will want.
            base: p_NMT.
            keep_queries: Keeps the queries too, for tuning an index on held-out queries.
            keep_best: How many of the model's best log-probabilities to keep.
        """
        self.retriever = retriever
        self.base = base
        self.keep_queries = keep_queries
        self.keep_best = keep_best
        self._parts: list[Record] = []

    @property
    def num_tokens(self) -> int:
        """How many tokens were recorded so far."""
        return sum(part.num_tokens for part in self._parts)

    def write(self, states: DecoderStates, labels: Tensor, sentences: Tensor) -> None:
        """Records some tokens; a sentence's tokens come in order and all in one call.

        Args:
            states: What the decoder returned, [m, D] each.
            labels: The token that follows each of them, [m].
            sentences: The sentence of the text it belongs to, [m].
        """
        hidden = states.hidden
        sizes = (len(hidden), len(labels), len(sentences))
        if hidden.ndim != 2 or labels.ndim != 1 or sentences.ndim != 1 or len(set(sizes)) > 1:
            raise RecordError(
                f"Hidden states {list(hidden.shape)}, labels {list(labels.shape)} and sentence "
                f"numbers {list(sentences.shape)} do not fit together: [m, D], [m] and [m] are "
                "allowed. Select the real tokens with the label mask first."
            )
        for start in range(0, len(hidden), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            self._parts.append(self._record(states.select(rows), labels[rows], sentences[rows]))

    def finish(self) -> Record:
        """Returns everything that was written, in the text's order."""
        return merge(self._parts)

    @torch.no_grad()
    def _record(self, states: DecoderStates, labels: Tensor, sentences: Tensor) -> Record:
        neighbours = self.retriever(states)
        wanted = torch.cat([labels[:, None], neighbours.tokens], dim=-1)
        log_probs, _ = self.base.top_with(states, max(1, self.keep_best), wanted)
        num_best = log_probs.shape[1] - wanted.shape[1]
        best, log_probs = log_probs.float().tensor_split([num_best], dim=1)
        missing = neighbours.entries < 0
        queries = states.of(self.retriever.key_layer)
        return Record(
            tokens=neighbours.tokens.to("cpu", torch.int32),
            distances=neighbours.distances.to("cpu", torch.float32),
            entries=neighbours.entries.cpu(),
            gold=labels.to("cpu", torch.int32),
            gold_log_probs=log_probs[:, 0].cpu(),
            neighbour_log_probs=log_probs[:, 1:].masked_fill(missing, -torch.inf).cpu(),
            sentences=sentences.to("cpu", torch.int32),
            # A copy, as the caller may reuse the batch's memory.
            queries=queries.to("cpu", torch.float32, copy=True) if self.keep_queries else None,
            best_log_probs=best.cpu() if self.keep_best else None,
        )

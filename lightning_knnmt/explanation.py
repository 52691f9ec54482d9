"""Why a translation reads as it does: what decided each token, the model or which training pairs.

The words of the translation are given, so nothing is searched: the model reads them teacher-forced
and the distribution is asked for its evidence. Shapes: n tokens, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.data import Batch, Tokenizer, one_line
from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.models import DecoderStates, Transformer
from lightning_knnmt.retrieval import Datastore, KNNDistribution


@dataclass(frozen=True)
class Neighbour:
    """An entry of the datastore that was near.

    Attributes:
        entry: Its row in the datastore.
        sentence: The pair of sentences that it comes from.
        token: The text of its token; empty for the end of a sentence.
        distance: Between query and key.
        share: The part of the emitted token's probability that it brought; 0 if it holds another.
        span: Where its token stands in the pair's target, in characters; None if that is not known.
    """

    entry: int
    sentence: int
    token: str
    distance: float
    share: float
    span: tuple[int, int] | None


@dataclass(frozen=True)
class Token:
    """A token of a translation and what decided it.

    Attributes:
        token: Its text; empty for the end of a sentence.
        span: Where it stands in the translation, in characters, the space before it included.
        neighbours: The nearest entries, nearest first.
        prob: Its probability, (1 - λ) p_NMT + λ p_kNN.
        nmt_prob: p_NMT.
        knn_weight: λ.
        knn_prob: p_kNN.
        nmt_share: The model's part of `prob`. With the neighbours' shares it adds up to 1.
        instead_of: The token that the model alone would have chosen here, after the same words;
            None if it is this one.
    """

    token: str
    span: tuple[int, int]
    neighbours: tuple[Neighbour, ...]
    prob: float
    nmt_prob: float
    knn_weight: float
    knn_prob: float
    nmt_share: float
    instead_of: str | None = field(default=None, kw_only=True)

    @property
    def knn_share(self) -> float:
        """The part of `prob` that the datastore brought."""
        return 1.0 - self.nmt_share


@dataclass(frozen=True)
class Explanation:
    """What decided each token of a translation.

    Attributes:
        text: The translation.
        tokens: Its tokens.
        pairs: Source and target of the pairs of sentences that neighbours come from, by number.
    """

    text: str
    tokens: tuple[Token, ...]
    pairs: Mapping[int, tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON.

        `tokens` has for each token `token`, `span`, `p`, `p_nmt`, `lambda`, `p_knn`, `nmt_share`,
        `instead_of` and `neighbours`, each with `entry`, `sentence`, `token`, `distance`, `share`
        and `span`; `pairs` has `source` and `target` of every sentence named there. See `Token` and
        `Neighbour` for what they mean.
        """
        return {
            "tokens": [
                {
                    "token": each.token,
                    "span": list(each.span),
                    "p": each.prob,
                    "p_nmt": each.nmt_prob,
                    "lambda": each.knn_weight,
                    "p_knn": each.knn_prob,
                    "nmt_share": each.nmt_share,
                    "instead_of": each.instead_of,
                    "neighbours": [vars(neighbour) for neighbour in each.neighbours],
                }
                for each in self.tokens
            ],
            "pairs": {
                str(sentence): {"source": source, "target": target}
                for sentence, (source, target) in self.pairs.items()
            },
        }


class Explainer:
    """Explains the translations of one system."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        distribution: SoftmaxDistribution | KNNDistribution,
        datastore: Datastore | None,
    ) -> None:
        """
        Args:
            model: In evaluation mode.
            tokenizer: Its own.
            distribution: What the translations were decoded with.
            datastore: Whose neighbours take part; None without retrieval.
        """
        self._model, self._tokenizer = model, tokenizer
        self._distribution, self._datastore = distribution, datastore

    @torch.inference_mode()
    def explain(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Explanation]]:
        """Explains translations that are given as batches' targets.

        Yields:
            Each sentence's row (`Batch.index`) and its explanation.
        """
        device = next(self._model.parameters()).device
        for batch in batches:
            batch = batch.to(device)
            states = self._model(batch.source_ids, batch.decoder_input)
            for i, row in enumerate(batch.index.tolist()):
                here = batch.label_mask[i]
                yield row, self._of_sentence(states.select(i).select(here), batch.labels[i][here])

    def _of_sentence(self, states: DecoderStates, labels: Tensor) -> Explanation:
        """Explains one translation: states [n, D] each, labels [n]."""
        ids = labels.tolist()
        text, spans = spans_of(self._tokenizer, ids)
        pairs = _Pairs(self._tokenizer, self._datastore)
        mixed = isinstance(self._distribution, KNNDistribution)
        if isinstance(self._distribution, KNNDistribution):
            evidence = self._distribution.evidence(states, labels)
            of_tokens = [evidence.probs, evidence.nmt_probs, evidence.knn_weight]
            of_tokens += [evidence.knn_probs, evidence.nmt_share]
            model_alone = evidence.nmt_tokens.tolist()
            found = evidence.neighbours
            nearest = [found.entries, found.tokens, found.distances, evidence.shares]
        else:
            log_probs = self._distribution(states).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            probs, zeros = log_probs.exp(), torch.zeros_like(log_probs)
            of_tokens, nearest = [probs, probs, zeros, zeros, zeros + 1.0], []
            model_alone = ids  # beam search may choose others, but then no datastore made it
        tokens = []
        for i, (token, span) in enumerate(zip(ids, spans, strict=True)):
            neighbours = pairs.neighbours(*(each[i].tolist() for each in nearest)) if mixed else ()
            values = (float(each[i]) for each in of_tokens)
            other = model_alone[i]
            instead_of = None if other == token else self._tokenizer.decode([other])
            decoded = self._tokenizer.decode([token])
            tokens.append(Token(decoded, span, neighbours, *values, instead_of=instead_of))
        # What every translation begins with was given, not decided.
        given = len(self._tokenizer.vocabulary.target_prefix)
        return Explanation(text, tuple(tokens[given:]), pairs.texts)


class _Pairs:
    """The pairs of sentences that neighbours come from.

    Attributes:
        texts: Source and target of those that were asked for.
    """

    def __init__(self, tokenizer: Tokenizer, datastore: Datastore | None) -> None:
        self._tokenizer, self._datastore = tokenizer, datastore
        self._places: dict[int, tuple[list[int], list[tuple[int, int] | None]]] = {}
        self.texts: dict[int, tuple[str, str]] = {}

    def neighbours(
        self,
        entries: Sequence[int],
        tokens: Sequence[int],
        distances: Sequence[float],
        shares: Sequence[float],
    ) -> tuple[Neighbour, ...]:
        """The neighbours of one token; without those that an approximate index did not find."""
        assert self._datastore is not None, "there are no neighbours without a datastore"
        sentences = self._datastore.sentences_of(np.array(entries)).tolist()
        found = zip(entries, sentences, tokens, distances, shares, strict=True)
        return tuple(
            Neighbour(
                entry,
                sentence,
                self._tokenizer.decode([token]),
                distance,
                share,
                self._span(entry, sentence, token),
            )
            for entry, sentence, token, distance, share in found
            if entry >= 0
        )

    def _span(self, entry: int, sentence: int, token: int) -> tuple[int, int] | None:
        assert self._datastore is not None
        if sentence not in self._places:
            self.texts[sentence] = self._datastore.pair(sentence)
            self._places[sentence] = self._places_in(self.texts[sentence][1])
        ids, spans = self._places[sentence]
        position = entry - int(self._datastore.offsets[sentence])
        # A line that was cut when the datastore was built ends elsewhere.
        fits = position < len(ids) and ids[position] == token
        return spans[position] if fits else None

    def _places_in(self, target: str) -> tuple[list[int], list[tuple[int, int] | None]]:
        """The ids of a target that a datastore keeps, and where they stand in it."""
        (ids,) = self._tokenizer.encode_target([target])
        decoded, spans = spans_of(self._tokenizer, ids)
        kept = [i for i, each in enumerate(ids) if each not in self._never_emitted]
        return [ids[i] for i in kept], [place_in(target, decoded, spans[i]) for i in kept]

    @property
    def _never_emitted(self) -> frozenset[int]:
        return frozenset(self._tokenizer.vocabulary.never_emitted)


def spans_of(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of some ids and the characters that each of them stands for."""
    text = tokenizer.decode(ids)
    spans, start = [], 0
    for count in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:count])
        # A character may take several tokens, and detokenization joins words afterwards.
        same = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), None)
        end = max(start, min(len(prefix), len(text)) if same is None else same)
        spans.append((start, end))
        start = end
    return text, spans


def place_in(target: str, decoded: str, span: tuple[int, int]) -> tuple[int, int] | None:
    """Where a token of a decoded text stands in the text that was encoded.

    Decoding may change spaces and loses unknown characters, so the two are aligned. None if the
    token is among what differs.
    """
    start, end = span
    while start < end and decoded[start].isspace():
        start += 1
    if target == decoded:
        return start, end
    blocks = SequenceMatcher(None, decoded, target, autojunk=False).get_matching_blocks()
    for ours, theirs, size in blocks:
        if ours <= start and end <= ours + size:
            return start - ours + theirs, end - ours + theirs
    return None


def joined(explanations: Sequence[Explanation], text: str) -> Explanation:
    """One explanation of a line that was translated in parts.

    Args:
        explanations: Of the parts.
        text: Their texts, joined.
    """
    tokens: list[Token] = []
    pairs: dict[int, tuple[str, str]] = {}
    place = 0
    for part in explanations:
        place = text.index(one_line(part.text), place)
        for each in part.tokens:
            start, end = each.span
            tokens.append(replace(each, span=(start + place, end + place)))
        pairs.update(part.pairs)
        place += len(part.text)
    return Explanation(text, tuple(tokens), pairs)

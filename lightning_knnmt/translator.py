"""Text in, text out: the one place that translates lines."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from lightning_knnmt.data import Batch, Example, TokenBatchSampler, Tokenizer, collate, one_line
from lightning_knnmt.decoding import (
    BeamSearch,
    Hypothesis,
    SoftmaxDistribution,
    translate_batches,
)
from lightning_knnmt.explanation import Explainer, Explanation, joined
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import load_pretrained
from lightning_knnmt.retrieval import Precision, Retrieval

log = logging.getLogger(__name__)

FIRST_WINDOW = 64  # lines
WINDOW_CHARACTERS = 1 << 22  # in a window of very long lines
SENTENCE_END = re.compile(r"[.!?…؟।]+[\"'”’»)\]]*\s+|[。！？]+[」』”’）]*\s*")
CLAUSE_END = re.compile(r"[,;:]\s+|[，、；：]\s*")
SPACE = re.compile(r"\s+")
Ids = Sequence[int]

UNKNOWN_CHARACTER = "\ue000"  # of the private use area: in no vocabulary


class Alternative(NamedTuple):
    """One hypothesis of the search.

    Attributes:
        text: Its text, without line breaks.
        score: Its log-probability over length ** length_penalty; mean over the parts of a line that
            was translated in parts.
    """

    text: str
    score: float


@dataclass(frozen=True)
class Translation:
    """What one line became.

    Attributes:
        source: The line.
        text: The translation, without line breaks; empty for a line that says nothing.
        score: See `Alternative`; 0 where nothing was translated.
        alternatives: The best hypotheses, as many as were asked for and found; the translation
            itself is the first.
        explanation: What decided each token; None unless it was asked for.
    """

    source: str
    text: str
    score: float
    alternatives: tuple[Alternative, ...]
    explanation: Explanation | None = None


class Translator:
    """Translates text with a model, and with retrieval where it is given."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        retrieval: Retrieval | None = None,
        *,
        search: BeamSearch | None = None,
        precision: Precision = Precision(),  # noqa: B008  # immutable
        max_tokens: int = 4096,
        window: int = 1024,
        max_source_length: int = 256,
    ) -> None:
        """
        Args:
            model: Put into evaluation mode; translates on the device it is on.
            tokenizer: The one that makes the model's ids.
            retrieval: Prepared for this model; None to translate by the model alone.
            search: How to decode; greedily if None.
            precision: The arithmetic; that which the retrieval was prepared with.
            max_tokens: Most source ids in a batch, padding included.
            window: Most lines that are read before the first of them is translated. Lines of like
                length are batched together within a window.
            max_source_length: Most ids of a line, EOS included, that is translated in one piece.
        """
        for name, value, least in (
            ("max_tokens", max_tokens, 1),
            ("window", window, 1),
            ("max_source_length", max_source_length, 8),
        ):
            if type(value) is not int or value < least:
                raise ValueError(
                    f"{name} is {value!r}; it must be a whole number, {least} or more."
                )
        self.model = model.eval()
        self.precision = precision
        self.tokenizer = tokenizer
        self.search = search or BeamSearch(beam_size=1)
        self.max_tokens = max_tokens
        self.window = window
        self.max_source_length = min(max_source_length, model.max_positions)
        vocabulary = tokenizer.vocabulary
        self.retrieval = retrieval
        self.base = SoftmaxDistribution(model.output_projection, vocabulary.never_emitted)
        self.distribution = self.base if retrieval is None else retrieval.distribution(self.base)
        if retrieval is not None and not retrieval.fits(model, precision):
            raise ValueError(
                "The retrieval was prepared for other weights or another precision than this "
                "model's: prepare it again (Retrieval.prepare)."
            )
        datastore = None if retrieval is None else retrieval.datastore
        self._explainer = Explainer(model, tokenizer, self.distribution, datastore)
        # What is left of a line that says nothing: a language's token, the mark of a space, EOS.
        nothing = tokenizer.encode_source(["", UNKNOWN_CHARACTER])
        self._silent = {*vocabulary.special_ids, vocabulary.unk_id}.union(*nothing)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        model_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """A translator of a system, or of a model without retrieval.

        Args:
            path: A run's folder (outputs/NAME), a system's folder, a file of `System.pack`, or
                whatever `load_pretrained` reads.
            device: Where the model computes and an exact index is searched.
            model_options: Other arguments of `load_pretrained`, for a model that is no system.
            options: Other arguments of the constructor.

        Raises:
            SavedSystemError: If a part of the system is missing or has changed.
            UnknownFormatError: If there is neither a system nor a model.
        """
        from lightning_knnmt.system import System, find_system  # which makes translators

        if find_system(Path(path)) is not None or any(Path(path).glob("checkpoints/*.ckpt")):
            if model_options:
                raise ValueError(
                    f"{path} is a system, which says how its model is loaded: leave out "
                    f"{', '.join(model_options)}."
                )
            return System.load(path).translator(device, **options)  # type: ignore[return-value]
        model, tokenizer = load_pretrained(path, **(model_options or {}))
        return cls(model.to(device), tokenizer, **options)

    def translate(
        self,
        lines: Iterable[str],
        *,
        beam_size: int | None = None,
        nbest: int = 1,
        explain: bool = False,
    ) -> Iterator[Translation]:
        """Translates lines one by one, in their order; endless input takes bounded memory.

        A line is never split or lost: whatever characters it holds, one translation comes out. An
        empty line, or one without a known character, becomes an empty translation. Lines longer
        than `max_source_length` are translated in parts, at sentence ends if possible; a warning
        names them. Neither the window nor the batch has an influence on a translation, except that
        rounding differs in the last digits.

        Args:
            lines: Any number of them.
            beam_size: Hypotheses kept for each line; None for the search's own.
            nbest: How many alternatives each translation brings, at most `beam_size`.
            explain: Whether each brings an explanation, for which the model reads it once more.

        Raises:
            ValueError: If an argument is impossible, or a line holds half of a surrogate pair.
        """
        if isinstance(lines, str):
            raise ValueError("lines is a single str; give a list of lines, such as [line].")
        return self.translate_windows(
            windows_of(lines, self.window), beam_size=beam_size, nbest=nbest, explain=explain
        )

    def translate_windows(
        self,
        windows: Iterable[Sequence[str]],
        *,
        beam_size: int | None = None,
        nbest: int = 1,
        explain: bool = False,
    ) -> Iterator[Translation]:
        """Like `translate`, of lines that come in groups: each is translated when it has come."""
        search = self.search
        if beam_size is not None:
            search = replace(search, beam_size=beam_size)
        if type(nbest) is not int or not 1 <= nbest <= search.beam_size:
            raise ValueError(
                f"nbest is {nbest!r}, but a search with beam_size={search.beam_size} finds 1 to "
                f"{search.beam_size} hypotheses: choose nbest among these, or a larger beam_size."
            )
        return self._translations(windows, search, nbest, explain)

    def _translations(
        self, windows: Iterable[Sequence[str]], search: BeamSearch, nbest: int, explain: bool
    ) -> Iterator[Translation]:
        first = 1
        for lines in windows:
            parts = self._parts(lines, first)
            sources = [ids for of_line in parts for ids in of_line]
            found = self._hypotheses(sources, search)
            explained = self._explanations(sources, found) if explain else []
            end = 0
            for line, of_line in zip(lines, parts, strict=True):
                start, end = end, end + len(of_line)
                translation = self._translation(line, found[start:end], nbest)
                if explain:
                    whole = joined(explained[start:end], translation.text)
                    translation = replace(translation, explanation=whole)
                yield translation
            first += len(lines)

    def _hypotheses(self, sources: Sequence[Ids], search: BeamSearch) -> list[list[Hypothesis]]:
        """The hypotheses of each source, best first."""
        batches = self._batches(sources, [[]] * len(sources))
        vocabulary = self.tokenizer.vocabulary
        with self.precision.context():
            found = dict(
                translate_batches(self.model, vocabulary, batches, search, self.distribution)
            )
        return [found[row] for row in range(len(sources))]

    def _explanations(
        self, sources: Sequence[Ids], found: Sequence[Sequence[Hypothesis]]
    ) -> list[Explanation]:
        """What decided the best hypothesis of each source."""
        batches = self._batches(sources, [hypotheses[0].tokens for hypotheses in found])
        with self.precision.context():
            explained = dict(self._explainer.explain(batches))
        return [explained[row] for row in range(len(sources))]

    def _batches(self, sources: Sequence[Ids], targets: Sequence[Ids]) -> Iterator[Batch]:
        if not sources:
            return
        lengths = [np.array([len(ids) for ids in side]) for side in (sources, targets)]
        for rows in TokenBatchSampler(lengths[0], lengths[1], self.max_tokens):
            examples = [Example(row, sources[row], targets[row]) for row in rows]
            yield collate(examples, self.tokenizer.vocabulary)

    def _translation(
        self, line: str, parts: Sequence[Sequence[Hypothesis]], nbest: int
    ) -> Translation:
        """What the hypotheses of the parts of a line say together."""
        alternatives = []
        for rank in range(max((len(some[:nbest]) for some in parts), default=1)):
            chosen = [some[min(rank, len(some) - 1)] for some in parts]
            text = join_parts([self.tokenizer.decode(each.tokens) for each in chosen])
            # The mean, so that the first alternative is also the best.
            score = sum(each.normalized_score for each in chosen) / max(len(chosen), 1)
            alternatives.append(Alternative(text, score))
        return Translation(line, *alternatives[0], tuple(alternatives))

    # From lines to ids

    def _parts(self, lines: Sequence[str], first: int) -> list[list[list[int]]]:
        """The ids of each line's parts: none of a line that says nothing, one of most others."""
        _check_text(lines, first)
        lines = [one_line(line) for line in lines]
        encoded = self.tokenizer.encode_source(lines)
        parts = []
        for number, line, ids in zip(range(first, first + len(lines)), lines, encoded, strict=True):
            of_line = [ids]
            if len(ids) > self.max_source_length:
                of_line = self.tokenizer.encode_source(split_line(line, self._fits))
                log.warning(
                    "Line %d has %s tokens, more than %d: it is translated in %d parts.",
                    *(number, f"{len(ids):,}", self.max_source_length, len(of_line)),
                )
            of_line = [ids for ids in of_line if not self._silent.issuperset(ids)]
            if not of_line and line.strip():
                log.warning(
                    "Line %d has no character that the model knows: its translation is empty.",
                    number,
                )
            parts.append(of_line)
        return parts

    def _fits(self, text: str) -> bool:
        return len(self.tokenizer.encode_source([text])[0]) <= self.max_source_length


def windows_of(lines: Iterable[str], most: int) -> Iterator[list[str]]:
    """Cuts lines into groups of at most so many lines, and a few megabytes."""
    sizes = window_sizes(most)
    window: list[str] = []
    size, characters = next(sizes), 0
    for line in lines:
        window.append(line)
        characters += len(line)
        if len(window) >= size or characters >= WINDOW_CHARACTERS:
            yield window
            window, size, characters = [], next(sizes), 0
    if window:
        yield window


def window_sizes(most: int) -> Iterator[int]:
    """The most lines of each group, small ones first: so the first translations come soon."""
    size = min(FIRST_WINDOW, most)
    while True:
        yield size
        size = min(2 * size, most)


def _check_text(lines: Sequence[str], first: int) -> None:
    for number, line in enumerate(lines, first):
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Line {number}, character {error.start + 1} is U+{ord(line[error.start]):04X}, "
                "half of a surrogate pair, which is not text: read the file as UTF-8."
            ) from None


# ------------------------------------------------------------- lines that are too long


def split_line(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Cuts text into parts that fit: at sentence ends, else near the middle of a sentence.

    A sentence that is too long is halved where a clause ends, else between words, else between
    characters. Nothing but white space at the cuts is left out.
    """
    text = text.strip()
    if len(text) < 2 or fits(text):
        return [text] if text else []
    cuts = [match.end() for match in SENTENCE_END.finditer(text) if _ends_sentence(text, match)]
    cuts = cuts or [_middle(text)]
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [short for part in parts for short in split_line(part, fits)]


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Whether a full stop is none of an abbreviation, and something follows it."""
    following = text[match.end() : match.end() + 1]
    before = SPACE.split(text[max(match.start() - 8, 0) : match.start()])[-1]
    abbreviation = match[0].startswith(".") and not match[0].startswith("..") and len(before) < 3
    return bool(following) and not following.islower() and not abbreviation


def _middle(text: str) -> int:
    """Where to cut a sentence in two."""
    half = len(text) / 2
    for pattern, farthest in ((CLAUSE_END, half / 2), (SPACE, half)):
        ends = (match.end() for match in pattern.finditer(text) if match.end() < len(text))
        nearest = min(ends, key=lambda end: abs(end - half), default=0)
        if nearest and abs(nearest - half) <= farthest:
            return nearest
    return len(text) // 2


def join_parts(texts: Iterable[str]) -> str:
    """One line of the translations of a line's parts."""
    joined = ""
    for text in map(one_line, texts):
        wide = bool(joined and text) and _is_wide(joined[-1]) and _is_wide(text[0])
        joined += text if not joined or not text or wide else f" {text}"
    return joined


def _is_wide(character: str) -> bool:
    """Whether it is of a script that puts no spaces between sentences."""
    return unicodedata.east_asian_width(character) in "WF"

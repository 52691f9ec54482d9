"""Encodes two aligned files into flat arrays of ids on disk, a chunk of lines at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from lightning_knnmt.data.text import TextError, TextPair
from lightning_knnmt.data.tokenizer import Tokenizer

_CHUNK_LINES = 20_000
UNKNOWN_LINES = 1_000  # of a side, looked at for what the vocabulary lacks


@dataclass(frozen=True)
class LinePolicy:
    """What to do with pairs that are too long or empty.

    Attributes:
        max_length: Maximum ids of a side, EOS included.
        long_lines: Whether to cut a longer side (EOS stays last) or skip its pair.
        empty_lines: Whether an empty line is an error or its pair is skipped.
    """

    max_length: int = 256
    long_lines: Literal["cut", "skip"] = "cut"
    empty_lines: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        """Rejects values that no policy has."""
        if self.max_length < 2:
            raise ValueError(
                f"max_length is {self.max_length}, but must be at least 2: one id and EOS."
            )
        if self.long_lines not in ("cut", "skip"):
            raise ValueError(f"long_lines is {self.long_lines!r}, but must be 'cut' or 'skip'.")
        if self.empty_lines not in ("error", "skip"):
            raise ValueError(f"empty_lines is {self.empty_lines!r}, but must be 'error' or 'skip'.")

    def aligned(self) -> LinePolicy:
        """The policy that skips no line: hypotheses must stay aligned with references."""
        return replace(self, long_lines="cut", empty_lines="error")


@dataclass
class UnknownCounts:
    """What the vocabulary lacks in one side's text.

    Attributes:
        tokens: All ids, EOS included.
        unknown: Those of ``<unk>``.
        symbols: How often each missing character or piece occurs in the lines inspected.
        lines: How many lines were inspected: the first ones with something unknown.
    """

    tokens: int = 0
    unknown: int = 0
    symbols: dict[str, int] = field(default_factory=dict)
    lines: int = 0


@dataclass
class EncodingCounts:
    """What was done to the lines; kept in the manifest, so that every run can report it."""

    pairs: int = 0
    long: int = 0
    empty: int = 0
    first_long: int = 0
    longest: int = 0
    source: UnknownCounts = field(default_factory=UnknownCounts)
    target: UnknownCounts = field(default_factory=UnknownCounts)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The counts in a manifest; older ones have none of unknown tokens."""
        unknown = {side: UnknownCounts(**content.get(side, {})) for side in ("source", "target")}
        return cls(**{**content, **unknown})


def write_arrays(
    directory: Path, text: TextPair, num_lines: int, tokenizer: Tokenizer, policy: LinePolicy
) -> EncodingCounts:
    """Writes the arrays of a corpus; ids take two bytes each if they fit.

    Args:
        directory: An empty folder. Gets ``{source,target}_{ids,offsets}.npy``, and ``lines.npy``
            with each pair's line number.
        text: The files.
        num_lines: Their number of lines, for the progress bar.
        tokenizer: Encodes the text.
        policy: What to do with long and empty lines.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary.largest_size <= 1 << 16 else np.int32)
    counts = EncodingCounts()
    lengths: tuple[list[npt.NDArray[np.int32]], ...] = ([], [])
    with (
        _GrowingArray(directory / "source_ids.npy", dtype) as source_ids,
        _GrowingArray(directory / "target_ids.npy", dtype) as target_ids,
        _GrowingArray(directory / "lines.npy", np.dtype(np.int32)) as lines,
    ):
        for chunk in _chunks(_usable(text, policy, counts), num_lines):
            numbers = [number for number, _, _ in chunk]
            text_sides = [source for _, source, _ in chunk], [target for _, _, target in chunk]
            sides = [
                tokenizer.encode_source(text_sides[0]),
                tokenizer.encode_target(text_sides[1]),
            ]
            kept = _fit(numbers, sides, policy, counts)
            lines.append(np.array([numbers[i] for i in kept]))
            for side, array, unknown in (
                (0, source_ids, counts.source),
                (1, target_ids, counts.target),
            ):
                sentences = [sides[side][i] for i in kept]
                sizes = np.fromiter(map(len, sentences), np.int32, len(sentences))
                ids = np.fromiter(chain.from_iterable(sentences), dtype, int(sizes.sum()))
                array.append(ids)
                lengths[side].append(sizes)
                unk_id = tokenizer.unk_ids[side]
                unknown.tokens += len(ids)
                if found := int(np.count_nonzero(ids == unk_id)):
                    unknown.unknown += found
                    with_some = (text_sides[side][i] for i in kept if unk_id in sides[side][i])
                    _look_at_unknown(with_some, unknown, tokenizer, side)
        if lines.size == 0:
            raise TextError(
                f"No pair of {text.source_path} and {text.target_path} is left: all "
                f"{counts.pairs:,} were skipped as empty or too long; raise max_length or correct "
                "the text."
            )
    for side_name, side_lengths in zip(("source", "target"), lengths, strict=True):
        all_lengths = np.concatenate(side_lengths)
        offsets = np.zeros(len(all_lengths) + 1, dtype=np.int64)
        np.cumsum(all_lengths, out=offsets[1:])
        np.save(directory / f"{side_name}_offsets.npy", offsets)
    return counts


def _look_at_unknown(
    lines: Iterable[str], unknown: UnknownCounts, tokenizer: Tokenizer, side: int
) -> None:
    """Counts the unknown symbols in a side's lines, until enough lines were inspected."""
    for line in islice(lines, max(0, UNKNOWN_LINES - unknown.lines)):
        unknown.lines += 1
        for symbol in tokenizer.unknown_symbols(line, "target" if side else "source"):
            unknown.symbols[symbol] = unknown.symbols.get(symbol, 0) + 1


def _usable(
    text: TextPair, policy: LinePolicy, counts: EncodingCounts
) -> Iterator[tuple[int, str, str]]:
    """Line number, source and target of every pair without an empty side."""
    for number, (source, target) in enumerate(text.read(), start=1):
        counts.pairs = number
        if source.strip() and target.strip():
            yield number, source, target
        elif policy.empty_lines == "skip":
            counts.empty += 1
        else:
            path = text.target_path if source.strip() else text.source_path
            raise TextError(
                f"{path}, line {number} is empty, and every line must hold text; fill it or delete "
                "the line from both files (training text may also be read with empty_lines=skip)."
            )


def _chunks(
    pairs: Iterator[tuple[int, str, str]], num_lines: int
) -> Iterator[list[tuple[int, str, str]]]:
    console = Console(stderr=True)
    chunks = iter(lambda: list(islice(pairs, _CHUNK_LINES)), [])
    # A bar that lasts less than a second would only flicker.
    hidden = num_lines <= 2 * _CHUNK_LINES or not console.is_terminal
    return iter(
        track(
            chunks,
            "Encoding",
            total=-(-num_lines // _CHUNK_LINES),
            console=console,
            transient=True,
            disable=hidden,
        )
    )


def _fit(
    numbers: Sequence[int],
    sides: Sequence[list[list[int]]],
    policy: LinePolicy,
    counts: EncodingCounts,
) -> list[int]:
    """Cuts long sentences in place, or skips their pairs; returns the rows to keep."""
    longest = [max(pair) for pair in zip(*(map(len, side) for side in sides), strict=True)]
    too_long = [i for i, length in enumerate(longest) if length > policy.max_length]
    if not too_long:
        return list(range(len(longest)))
    counts.first_long = counts.first_long or numbers[too_long[0]]
    counts.long += len(too_long)
    counts.longest = max(counts.longest, *(longest[i] for i in too_long))
    if policy.long_lines == "skip":
        dropped = set(too_long)
        return [i for i in range(len(longest)) if i not in dropped]
    for side in sides:
        for i in too_long:
            if len(side[i]) > policy.max_length:
                side[i] = [*side[i][: policy.max_length - 1], side[i][-1]]
    return list(range(len(longest)))


class _GrowingArray:
    """A one-dimensional ``.npy`` file whose length is only known at the end.

    The header is written twice, first as a placeholder: numpy pads it, so that a longer first axis
    fits into the same bytes.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self.size = 0

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.size,)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: npt.NDArray[Any]) -> None:
        """Appends values."""
        values.astype(self._dtype, copy=False).tofile(self._file)
        self.size += len(values)

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._write_header()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._write_header()
        self._file.close()

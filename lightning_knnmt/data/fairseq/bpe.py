"""Byte-pair encoding with codes learned elsewhere (Sennrich et al., 2016, arXiv:1508.07909).

The files of subword-nmt and of fastBPE: a merge on each line, the likelier first. Every piece of a
word but its last ends in `@@`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Self

from lightning_knnmt.data.text import read_lines
from lightning_knnmt.data.tokenizer import TokenizerError

CONTINUED = "@@"
END = "</w>"
_WORDS_KEPT = 1 << 18
_VERSION = re.compile(r"#version: (\d+)\.(\d+)")


class BytePairEncoding:
    """Cuts words into pieces by merging pairs of symbols, the earliest merge of the list first.

    Args:
        merges: Pairs of symbols; `</w>` marks a word's end.
        end_stands_alone: Whether a word's end is a symbol of its own, as in subword-nmt 0.1; else
            it is part of the last character.
    """

    def __init__(self, merges: Sequence[tuple[str, str]], end_stands_alone: bool = False) -> None:
        self.merges = tuple(merges)
        self.end_stands_alone = end_stands_alone
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(self.merges):
            self._ranks.setdefault(pair, rank)
        text = "\n".join(map(" ".join, self.merges))
        self.digest = hashlib.sha256(f"{end_stands_alone}\n{text}".encode()).hexdigest()
        self.split = lru_cache(maxsize=_WORDS_KEPT)(self._split)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Reads codes of subword-nmt (any version) or of fastBPE (with counts in a third column).

        Raises:
            TokenizerError: If there is no such file, or a line is no merge.
        """
        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"There is no file of BPE codes {path}.")
        merges: list[tuple[str, str]] = []
        version, has_counts = None, False
        for number, line in enumerate(read_lines(path), start=1):
            if number == 1 and (match := _VERSION.match(line)):
                version = int(match[1]), int(match[2])
                continue
            columns = line.strip("\r ").split(" ")
            counted = len(columns) == 3 and columns[2].isdecimal() and version is None
            if not (len(columns) == 2 or counted) or not all(columns):
                raise TokenizerError(
                    f"{path}, line {number}: {line[:80]!r} is not a merge of two symbols (with a "
                    "count after them in fastBPE's files); give the codes that subword-nmt or "
                    "fastBPE learned."
                )
            has_counts = has_counts or counted
            merges.append((columns[0], columns[1]))
        if not merges:
            raise TokenizerError(f"{path} holds no merges; give the codes that were learned.")
        if version is not None:
            return cls(merges, version < (0, 2))
        # Without a version it is fastBPE's, or an old one of subword-nmt, or a copy of which the
        # first line was cut off: the merges themselves tell.
        alone = any(right == END for _, right in merges)
        attached = any(right.endswith(END) for _, right in merges)
        return cls(merges, not has_counts and (alone or not attached))

    def encode(self, words: Sequence[str]) -> list[str]:
        """The pieces of all words."""
        return [piece for word in words for piece in self.split(word)]

    def _split(self, word: str) -> tuple[str, ...]:
        """One word's pieces."""
        symbols = [*word, END] if self.end_stands_alone else [*word[:-1], word[-1:] + END]
        while len(symbols) > 1:
            known = [pair for pair in pairwise(symbols) if pair in self._ranks]
            if not known:
                break
            symbols = _merge(symbols, min(known, key=self._ranks.__getitem__))
        if symbols[-1] == END:
            symbols.pop()
        symbols[-1] = symbols[-1].removesuffix(END)
        return (*(symbol + CONTINUED for symbol in symbols[:-1]), symbols[-1])

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[tuple[str, str], ...], bool]]:
        """Travels to worker processes as its merges."""
        return type(self), (self.merges, self.end_stands_alone)


def join_pieces(pieces: Sequence[str]) -> str:
    """The words of pieces, with spaces between."""
    return f"{' '.join(pieces)} ".replace(f"{CONTINUED} ", "").strip()


def _merge(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Every occurrence of the pair, from the left, becomes one symbol."""
    merged: list[str] = []
    i = 0
    while i < len(symbols):
        width = 2 if tuple(symbols[i : i + 2]) == pair else 1
        merged.append("".join(symbols[i : i + width]))
        i += width
    return merged

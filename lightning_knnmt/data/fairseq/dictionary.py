"""fairseq's dictionaries, `dict.LANGUAGE.txt` (Ott et al., 2019, arXiv:1904.01038).

Four special symbols are in no file; then each line holds a symbol, a space and its count. The
`madeupword0000` symbols that bring the size to a multiple of 8 are lines like the others, which
fairseq-preprocess wrote: reading adds none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from lightning_knnmt.data.text import TextError, read_lines

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
SPECIALS = (BOS, PAD, EOS, UNK)
PAD_ID, EOS_ID, UNK_ID = 1, 2, 3
OVERWRITE = "#fairseq:overwrite"


@dataclass(frozen=True)
class FairseqDictionary:
    """The symbols of one side and their ids.

    Attributes:
        symbols: Every symbol, the specials first; its place is its id. A symbol may occur again
            (`#fairseq:overwrite`); the last place is then its id.
    """

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises unless the symbols begin with fairseq's four special ones."""
        if self.symbols[: len(SPECIALS)] != SPECIALS:
            raise ValueError(
                f"A fairseq dictionary begins with {' '.join(SPECIALS)}, but these symbols begin "
                f"with {' '.join(self.symbols[: len(SPECIALS)])}."
            )

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Reads a `dict.LANGUAGE.txt`.

        Raises:
            TextError: If there is no such file, or a line is not a symbol with a count, or repeats
                a symbol.
        """
        path = Path(path)
        if not path.is_file():
            raise TextError(f"There is no fairseq dictionary {path}.")
        symbols, seen = list(SPECIALS), set(SPECIALS)
        for number, line in enumerate(read_lines(path), start=1):
            overwrites = line.rstrip().endswith(f" {OVERWRITE}")
            entry = line.rstrip().removesuffix(OVERWRITE).rstrip(" ")
            symbol, space, count = entry.rpartition(" ")
            if not (symbol and space and count.isascii() and count.isdigit()):
                raise TextError(
                    f"{path}, line {number}: {line[:80]!r} is not a symbol, a space and its count; "
                    "use the dict.*.txt that fairseq-preprocess wrote."
                )
            if symbol in seen and not overwrites:
                raise TextError(
                    f"{path}, line {number}: the symbol {symbol!r} occurred before; remove the "
                    f"line, or end it with {OVERWRITE} if the model was trained that way."
                )
            seen.add(symbol)
            symbols.append(symbol)
        return cls(tuple(symbols))

    def __len__(self) -> int:
        """Number of ids, V, the specials included."""
        return len(self.symbols)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each symbol."""
        return {symbol: i for i, symbol in enumerate(self.symbols)}

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the symbols in their order."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()

    def encode(self, symbols: Iterable[str]) -> list[int]:
        """The id of each symbol, or that of `<unk>`; EOS is not added."""
        return [self.ids.get(symbol, UNK_ID) for symbol in symbols]

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The symbol of each id, special ones included."""
        return [self.symbols[int(i)] for i in ids]

"""fairseq's ``data-bin`` folders: which files hold what, and whether a model can read them.

The folder holds ``dict.LANGUAGE.txt`` of both languages and, for each split, the files of
``fairseq_bin``. Ids mean what those dictionaries say, so the model's tokenizer must have the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning_knnmt.data.fairseq.binary import DataBinError
from lightning_knnmt.data.fairseq.dictionary import SPECIALS, FairseqDictionary
from lightning_knnmt.data.tokenizer import Tokenizer


class DictionarySide(Protocol):
    """One language of a tokenizer whose ids come from a fairseq dictionary."""

    @property
    def dictionary(self) -> FairseqDictionary:
        """What the ids mean."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones not skipped."""
        ...


@runtime_checkable
class DictionaryTokenizer(Tokenizer, Protocol):
    """A tokenizer whose ids come from fairseq dictionaries."""

    @property
    def source(self) -> DictionarySide:
        """The source's language."""
        ...

    @property
    def target(self) -> DictionarySide:
        """The target's language."""
        ...


@dataclass(frozen=True)
class DataBin:
    """A folder that ``fairseq-preprocess`` wrote, read for one direction.

    Attributes:
        root: The folder.
        source_lang: Of its two languages the one to translate from; either may be.
        target_lang: The other.
    """

    root: Path
    source_lang: str
    target_lang: str

    @property
    def is_there(self) -> bool:
        """Whether the folder holds a dictionary, as every data-bin and no folder of text does."""
        return any(self._dictionary_path(lang).is_file() for lang in self._languages)

    def has(self, split: str) -> bool:
        """Whether the folder holds a split, or a side of it."""
        sides = (self.side(split, lang) for lang in self._languages)
        return any(side.with_name(f"{side.name}.idx").is_file() for side in sides)

    def side(self, split: str, lang: str) -> Path:
        """Path of one side of a split, without ``.idx`` or ``.bin``."""
        pairs = [f"{a}-{b}" for a, b in (self._languages, self._languages[::-1])]
        prefixes = [self.root / f"{split}.{pair}.{lang}" for pair in pairs]
        # fairseq, too, takes text that was binarised for the other direction.
        there = [prefix for prefix in prefixes if prefix.with_name(f"{prefix.name}.idx").is_file()]
        return (there or prefixes)[0]

    def require(self, tokenizer: Tokenizer) -> DictionaryTokenizer:
        """The tokenizer, whose dictionaries are checked to be the folder's."""
        if not isinstance(tokenizer, DictionaryTokenizer):
            raise DataBinError(
                f"{self.root} holds ids of fairseq's dictionaries, but this model's tokenizer, a "
                f"{type(tokenizer).__name__}, has none; use a fairseq model, or the plain text."
            )
        ours = (tokenizer.source.dictionary, tokenizer.target.dictionary)
        for lang, dictionary in zip(self._languages, ours, strict=True):
            path = self._dictionary_path(lang)
            refuse_other_dictionary(path, FairseqDictionary.read(path), dictionary)
        return tokenizer

    @property
    def _languages(self) -> tuple[str, str]:
        return self.source_lang, self.target_lang

    def _dictionary_path(self, lang: str) -> Path:
        return self.root / f"dict.{lang}.txt"


def refuse_other_dictionary(path: Path, theirs: FairseqDictionary, ours: FairseqDictionary) -> None:
    """Raises unless both dictionaries give every symbol the same id."""
    if theirs.symbols == ours.symbols:
        return
    # The specials stand in no file and are always the same.
    symbols = [each.symbols[len(SPECIALS) :] for each in (theirs, ours)]
    shorter = min(map(len, symbols))
    pairs = zip(symbols[0][:shorter], symbols[1][:shorter], strict=True)
    line = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    there, here = (repr(side[line]) if line < len(side) else "no symbol" for side in symbols)
    raise DataBinError(
        f"{path} has {len(symbols[0]):,} symbols and the model's dictionary {len(symbols[1]):,}; "
        f"line {line + 1:,} is the first to differ: {there} there, {here} in the model. Binarise "
        "the text with the model's dictionaries (fairseq-preprocess --srcdict, --tgtdict)."
    )

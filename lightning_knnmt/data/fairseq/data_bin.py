r"""fairseq's ``data-bin`` folders: what ``fairseq-preprocess`` wrote, read in place.

The folder holds ``dict.LANGUAGE.txt`` of both languages and two files for each side of a split,
``SPLIT.SOURCE-TARGET.LANGUAGE.bin`` and ``.idx`` (Ott et al., 2019, arXiv:1904.01038). Ids mean
what those dictionaries say, so the model's tokenizer must have the same. The first file is the ids
of all sentences, each ended by ``</s>``; the second, little-endian (fairseq 0.12.2,
``data/indexed_dataset.py``, ``MMapIndexedDataset``):

    9 bytes  "MMIDIDX\0\0"
    uint64   version, 1
    uint8    code of the ids' type
    uint64   number of sentences, n
    int32    ids of each sentence, [n]
    int64    byte at which each begins in the ``.bin``, [n]
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lightning_knnmt.data.fairseq.dictionary import SPECIALS, FairseqDictionary
from lightning_knnmt.data.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQ")
# Codes 6 and 7 are floating point, which no ids are.
ID_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
    9: np.dtype("<u4"),
    10: np.dtype("<u8"),
}


class DataBinError(ValueError):
    """Binarised text that cannot be used; the message names file and remedy."""


class IndexedIds:
    """One side of a split: all ids, memory-mapped, and where each sentence begins.

    Args:
        prefix: Path of the two files without ``.idx`` and ``.bin``.

    Attributes:
        ids: The concatenated ids of all sentences, a view of the file.
        offsets: Where each sentence begins in them, then their count, [n + 1].
    """

    def __init__(self, prefix: Path) -> None:
        index_path, ids_path = data_files(prefix)
        self._index_path = index_path
        index = index_path.read_bytes()
        id_type, count = self._read_header(index)
        first = HEADER.size + 4 * count
        sizes = np.frombuffer(index, "<i4", count, HEADER.size)
        pointers = np.frombuffer(index, "<i8", count, first)
        self.offsets: npt.NDArray[np.int64] = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(sizes, out=self.offsets[1:])
        if sizes.min() < 1 or not np.array_equal(pointers, self.offsets[:-1] * id_type.itemsize):
            raise DataBinError(
                f"{index_path} is damaged: its sentences are not contiguous; binarise the text "
                "again."
            )
        promised, found = int(self.offsets[-1]) * id_type.itemsize, ids_path.stat().st_size
        if found != promised:
            raise DataBinError(
                f"{ids_path} has {found:,} bytes, but {index_path.name} says {promised:,}: one of "
                "them is truncated or from another run. Copy both again, or binarise again."
            )
        self.ids: npt.NDArray[Any] = np.memmap(ids_path, id_type, mode="r")

    def _read_header(self, index: bytes) -> tuple[np.dtype[Any], int]:
        """The type of the ids, and the number of sentences."""
        path = self._index_path
        if index.startswith(OLD_MAGIC):
            raise DataBinError(
                f"{path} has fairseq's old format TNTIDX, which is not supported; binarise the "
                "text again with fairseq-preprocess --dataset-impl mmap."
            )
        if not index.startswith(MAGIC):
            raise DataBinError(
                f"{path} begins with {index[:9]!r} instead of {MAGIC!r}, so it is not an index of "
                "fairseq's; binarise the text with fairseq-preprocess --dataset-impl mmap."
            )
        if len(index) < HEADER.size:
            raise DataBinError(
                f"{path} ends within its header of {HEADER.size} bytes; copy it again, or binarise "
                "the text again."
            )
        _, version, code, count = HEADER.unpack_from(index)
        if version != VERSION or code not in ID_TYPES:
            raise DataBinError(
                f"{path} has version {version} and type code {code}; supported are version "
                f"{VERSION} and the codes {', '.join(map(str, ID_TYPES))} (integers)."
            )
        promised = HEADER.size + 12 * count
        if len(index) != promised:
            raise DataBinError(
                f"{path} has {len(index):,} bytes, but its {count:,} sentences take {promised:,}; "
                "copy it again, or binarise the text again."
            )
        if count == 0:
            raise DataBinError(f"{path} holds no sentence; it needs at least one.")
        return ID_TYPES[code], count

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> npt.NDArray[Any]:
        """The ids of a sentence, a view of the file."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    def check_ends(self, eos_id: int) -> None:
        """Raises unless every sentence ends with ``</s>``."""
        wrong = np.flatnonzero(self.ids[self.offsets[1:] - 1] != eos_id)
        if len(wrong):
            raise DataBinError(
                f"{self._index_path}: sentence {wrong[0] + 1:,} ends with id "
                f"{int(self[wrong[0]][-1])}, but every sentence must end with </s>, id {eos_id}; "
                "binarise the text again, with the model's dictionaries."
            )


def data_files(prefix: Path) -> tuple[Path, Path]:
    """``PREFIX.idx`` and ``PREFIX.bin``; lists the folder if one is missing."""
    paths = [prefix.with_name(prefix.name + ending) for ending in (".idx", ".bin")]
    for path in paths:
        if not path.is_file():
            present = sorted(entry.name for entry in prefix.parent.glob("*.idx"))
            raise DataBinError(
                f"There is no {path}; the folder holds {', '.join(present) or 'no .idx file'}. A "
                "split has an .idx and a .bin for each language."
            )
    return paths[0], paths[1]


class DictionarySide(Protocol):
    """One language of a tokenizer whose ids come from a fairseq dictionary."""

    @property
    def dictionary(self) -> FairseqDictionary:
        """The symbol of each id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ones are not skipped."""
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
    """A folder that ``fairseq-preprocess`` wrote, for one translation direction.

    Attributes:
        root: The folder.
        source_lang: The language to translate from, either one of the two.
        target_lang: The other.
    """

    root: Path
    source_lang: str
    target_lang: str

    @property
    def is_there(self) -> bool:
        """Whether the folder holds a dictionary, as every data-bin does."""
        return any(self._dictionary_path(lang).is_file() for lang in self._languages)

    def has(self, split: str) -> bool:
        """Whether the folder holds a split, or one side of it."""
        sides = (self.side(split, lang) for lang in self._languages)
        return any(side.with_name(f"{side.name}.idx").is_file() for side in sides)

    def side(self, split: str, lang: str) -> Path:
        """Path of one side of a split, without ``.idx`` or ``.bin``."""
        pairs = [f"{a}-{b}" for a, b in (self._languages, self._languages[::-1])]
        prefixes = [self.root / f"{split}.{pair}.{lang}" for pair in pairs]
        # Like fairseq, accepts text that was binarised for the other direction.
        there = [prefix for prefix in prefixes if prefix.with_name(f"{prefix.name}.idx").is_file()]
        return (there or prefixes)[0]

    def require(self, tokenizer: Tokenizer) -> DictionaryTokenizer:
        """The tokenizer; raises unless its dictionaries are the folder's."""
        if not isinstance(tokenizer, DictionaryTokenizer):
            raise DataBinError(
                f"{self.root} holds ids of fairseq's dictionaries, but this model's tokenizer, a "
                f"{type(tokenizer).__name__}, has none; use a fairseq model, or plain text."
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
    # The special symbols are in no file and always the same.
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

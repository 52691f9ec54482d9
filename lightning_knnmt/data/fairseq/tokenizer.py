"""How fairseq's models treat text: Moses, byte-pair encoding, a dictionary for each side.

Moses (Koehn et al., 2007) by sacremoses, its port to Python, in the steps of fairseq's WMT scripts:
punctuation is normalised, control characters go, words are separated (dashes inside them too) and
escaped for XML. Byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909) by codes learned
elsewhere, in the files of subword-nmt or fastBPE: a merge on each line, the likelier first; every
piece of a word but its last ends in `@@`. Text that was tokenized or segmented before it is given
skips these steps, and translations come back in the same state.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from lightning_knnmt.data.fairseq.dictionary import (
    EOS_ID,
    PAD_ID,
    SPECIALS,
    UNK_ID,
    FairseqDictionary,
)
from lightning_knnmt.data.text import read_lines
from lightning_knnmt.data.tokenizer import TokenizerError, Vocabulary


class Moses:
    """Splits text of one language into words, and joins words into text.

    Args:
        language: Its code, such as `de`; abbreviations and quotation marks differ.
        replace_unicode_punctuation: Whether to replace full-width and other punctuation by ASCII
            first, as Hugging Face's FSMT does and fairseq's scripts do not.

    Raises:
        TokenizerError: If sacremoses is not installed.
    """

    def __init__(self, language: str, replace_unicode_punctuation: bool = False) -> None:
        self.language = language
        self.replace_unicode_punctuation = replace_unicode_punctuation
        sacremoses = _import_sacremoses()
        self._normalizer = sacremoses.MosesPunctNormalizer(
            language,
            pre_replace_unicode_punct=replace_unicode_punctuation,
            post_remove_control_chars=True,
        )
        self._tokenizer = sacremoses.MosesTokenizer(language)
        self._detokenizer = sacremoses.MosesDetokenizer(language)

    def tokenize(self, line: str) -> list[str]:
        """The words of a line of plain text."""
        words: list[str] = self._tokenizer.tokenize(
            self._normalizer.normalize(line), aggressive_dash_splits=True, escape=True
        )
        return words

    def detokenize(self, words: Sequence[str]) -> str:
        """Joins words into plain text."""
        text: str = self._detokenizer.detokenize(list(words), unescape=True)
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its settings."""
        return type(self), (self.language, self.replace_unicode_punctuation)


def _import_sacremoses() -> Any:
    try:
        import sacremoses
    except ImportError as error:
        raise TokenizerError(
            f"This model's text goes through Moses, but sacremoses cannot be imported ({error}): "
            "`pip install sacremoses`, or give text that Moses tokenized already and say so "
            "(text='tokenized')."
        ) from error
    return sacremoses


CONTINUED = "@@"
END = "</w>"
_WORDS_KEPT = 1 << 18
_VERSION = re.compile(r"#version: (\d+)\.(\d+)")


class BytePairEncoding:
    """Splits words into pieces by merging pairs of symbols, in the order of the merges.

    Args:
        merges: Pairs of symbols; `</w>` marks a word's end.
        end_stands_alone: Whether the end of a word is its own symbol, as in subword-nmt 0.1;
            otherwise it is part of the last character.
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
        """Reads codes of subword-nmt (any version) or fastBPE (with counts in a third column).

        Raises:
            TokenizerError: If there is no such file, or a line is not a merge.
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
        # Without a version the file is from fastBPE or an old subword-nmt, or has lost its first
        # line: the merges themselves show which.
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
        """Pickled as its merges."""
        return type(self), (self.merges, self.end_stands_alone)


def join_pieces(pieces: Sequence[str]) -> str:
    """Joins pieces into words, separated by spaces."""
    return f"{' '.join(pieces)} ".replace(f"{CONTINUED} ", "").strip()


def _merge(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Merges every occurrence of the pair, from the left."""
    merged: list[str] = []
    i = 0
    while i < len(symbols):
        width = 2 if tuple(symbols[i : i + 2]) == pair else 1
        merged.append("".join(symbols[i : i + width]))
        i += width
    return merged


TextState = Literal["raw", "tokenized", "segmented"]
TEXT_STATES = ("raw", "tokenized", "segmented")


class Side(NamedTuple):
    """How one language's text is processed.

    Attributes:
        dictionary: The pieces and their ids.
        codes: Segments words; None for text that is already segmented.
        moses: Tokenizes text; None for text that is already tokenized.
    """

    dictionary: FairseqDictionary
    codes: BytePairEncoding | None = None
    moses: Moses | None = None

    def pieces(self, line: str) -> list[str]:
        """The pieces of a line."""
        words = self.moses.tokenize(line) if self.moses else line.split()
        return self.codes.encode(words) if self.codes else words

    def encode(self, line: str) -> list[int]:
        """Ids of a line, EOS last."""
        return [*self.dictionary.encode(self.pieces(line)), EOS_ID]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        pieces = [self.dictionary.symbols[i] for i in ids]
        if self.codes is None:
            return " ".join(pieces)
        words = join_pieces(pieces)
        return self.moses.detokenize(words.split()) if self.moses else words

    def state(self) -> dict[str, Any]:
        """Plain types."""
        codes, moses = self.codes, self.moses
        return {
            "symbols": "\n".join(self.dictionary.symbols),
            "merges": codes and "\n".join(map(" ".join, codes.merges)),
            "end_stands_alone": codes and codes.end_stands_alone,
            "language": moses and moses.language,
            "replace_unicode_punctuation": moses and moses.replace_unicode_punctuation,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The side whose `state()` this is."""
        codes = moses = None
        if state["merges"] is not None:
            pairs = (line.split(" ") for line in state["merges"].split("\n"))
            codes = BytePairEncoding([(a, b) for a, b in pairs], state["end_stands_alone"])
        if state["language"] is not None:
            moses = Moses(state["language"], state["replace_unicode_punctuation"])
        return cls(FairseqDictionary(tuple(state["symbols"].split("\n"))), codes, moses)


class FairseqTokenizer:
    """Turns text into the ids of a fairseq model, and back.

    There is no start symbol: the decoder starts with EOS.

    Args:
        source: Processes source text.
        target: Processes target text, and reverses it for output.

    Raises:
        TokenizerError: If a side has Moses but no codes.
    """

    KIND: ClassVar = "fairseq"

    def __init__(self, source: Side, target: Side) -> None:
        if any(side.moses and not side.codes for side in (source, target)):
            raise TokenizerError(
                "Moses without BPE codes is not supported: give the codes, or segmented text "
                "without Moses."
            )
        self.source, self.target = source, target
        size, source_size = len(target.dictionary), len(source.dictionary)
        shared = source.dictionary.symbols == target.dictionary.symbols
        self.vocabulary = Vocabulary(
            size=size,
            pad_id=PAD_ID,
            start_id=EOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            source_size=None if shared else source_size,
        )
        states = json.dumps([side.state() for side in (source, target)], sort_keys=True)
        self.digest = hashlib.sha256(f"{self.KIND}\0{states}".encode()).hexdigest()
        self.unk_ids = (UNK_ID, UNK_ID)
        self._silent_ids = {SPECIALS.index("<s>"), PAD_ID, EOS_ID}

    @property
    def text(self) -> TextState:
        """How far input and output text is processed: raw, tokenized or segmented."""
        if self.target.moses:
            return "raw"
        return "tokenized" if self.target.codes else "segmented"

    def encode_source(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, EOS last."""
        return [self.source.encode(line) for line in lines]

    def encode_target(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, EOS last."""
        return [self.target.encode(line) for line in lines]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; padding, `<s>` and EOS are skipped."""
        return self.target.decode([int(i) for i in ids if int(i) not in self._silent_ids])

    def unknown_symbols(self, line: str, side: Literal["source", "target"]) -> list[str]:
        """The pieces that the dictionary lacks; for unsegmented text, single characters."""
        chosen = self.source if side == "source" else self.target
        known = chosen.dictionary.ids
        return [p.removesuffix(CONTINUED) for p in chosen.pieces(line) if p not in known]

    def state(self) -> dict[str, Any]:
        """Plain types: `torch.load(weights_only=True)` reads them."""
        return {"kind": self.KIND, "source": self.source.state(), "target": self.target.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokenizer whose `state()` this is."""
        return cls(Side.from_state(state["source"]), Side.from_state(state["target"]))

    def __reduce__(self) -> tuple[type[Self], tuple[Side, Side]]:
        """Pickled as its sides."""
        return type(self), (self.source, self.target)


def dictionary_of_table(table: Mapping[str, int]) -> FairseqDictionary:
    """The fairseq dictionary behind an FSMT model's vocab-src.json or vocab-tgt.json.

    FSMT marks the last piece of a word (`</w>`), fairseq all the others (`@@`).

    Raises:
        TokenizerError: If the ids are not 0, 1, 2, ... or fairseq's specials not the first.
    """
    pieces = {i: piece for piece, i in table.items()}
    if set(pieces) != set(range(len(table))) or tuple(map(pieces.get, range(4))) != SPECIALS:
        raise TokenizerError(
            f"The ids of its {len(table)} pieces must be 0 to {len(table) - 1}, "
            f"{' '.join(SPECIALS)} first; get the file again."
        )
    in_order = (pieces[i] for i in range(4, len(table)))
    symbols = (p.removesuffix(END) if p.endswith(END) else f"{p}{CONTINUED}" for p in in_order)
    return FairseqDictionary((*SPECIALS, *symbols))

"""The way of text in fairseq's models: Moses, byte-pair encoding, a dictionary for each side.

How far a text has gone on that way already, when it is given: it comes back in the same state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from lightning_knnmt.data.fairseq.bpe import CONTINUED, END, BytePairEncoding, join_pieces
from lightning_knnmt.data.fairseq.dictionary import (
    EOS_ID,
    PAD_ID,
    SPECIALS,
    UNK_ID,
    FairseqDictionary,
)
from lightning_knnmt.data.fairseq.moses import Moses
from lightning_knnmt.data.tokenizer import TokenizerError
from lightning_knnmt.data.vocabulary import Vocabulary

KIND = "fairseq"
TextState = Literal["raw", "tokenized", "segmented"]
TEXT_STATES = ("raw", "tokenized", "segmented")


class Side(NamedTuple):
    """What one language's text goes through.

    Attributes:
        dictionary: Of its pieces.
        codes: Cuts its words; None for text that is segmented already.
        moses: Separates its words; None for text that is tokenized already.
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
    """Text to the ids of a fairseq model and back.

    There is no start symbol: the decoder starts with EOS.

    Args:
        source: What source text goes through.
        target: Likewise; decoded text goes back through it.

    Raises:
        TokenizerError: If a side has Moses but no codes.
    """

    def __init__(self, source: Side, target: Side) -> None:
        if any(side.moses and not side.codes for side in (source, target)):
            raise TokenizerError(
                "Moses without BPE codes is not supported: give the codes, or text that is "
                "segmented already, without Moses."
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
        self.digest = hashlib.sha256(f"{KIND}\0{states}".encode()).hexdigest()
        self.unk_ids = (UNK_ID, UNK_ID)
        self._silent_ids = {SPECIALS.index("<s>"), PAD_ID, EOS_ID}

    @property
    def text(self) -> TextState:
        """The state of the text that goes in and comes out."""
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
        """The pieces that the dictionary lacks; single characters, unless text is given cut."""
        chosen = self.source if side == "source" else self.target
        known = chosen.dictionary.ids
        return [p.removesuffix(CONTINUED) for p in chosen.pieces(line) if p not in known]

    def state(self) -> dict[str, Any]:
        """Plain types: `torch.load(weights_only=True)` reads them."""
        return {"kind": KIND, "source": self.source.state(), "target": self.target.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokenizer whose `state()` this is."""
        return cls(Side.from_state(state["source"]), Side.from_state(state["target"]))

    def __reduce__(self) -> tuple[type[Self], tuple[Side, Side]]:
        """Travels to worker processes as its sides."""
        return type(self), (self.source, self.target)


def dictionary_of_table(table: Mapping[str, int]) -> FairseqDictionary:
    """The dictionary from which Hugging Face's FSMT made its vocab-src.json or vocab-tgt.json.

    There a word's last piece is marked (`</w>`), in fairseq all the others (`@@`).

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

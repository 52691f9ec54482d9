"""SentencePiece with separate tables of ids, as in Hugging Face's and two-vocabulary Marian models.

SentencePiece segments the sentence, but a table gives each piece its id: OPUS-MT has a model for
each side, and M2M-100 and NLLB add language tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import sentencepiece
import torch
from torch import Tensor

from lightning_knnmt.data.tokenizer import Side, TokenizerError, Vocabulary, unknown_characters

EOS, UNKNOWN = "</s>", "<unk>"


class PieceTokenizer:
    """Segments with SentencePiece and looks ids up in tables.

    A piece that is not in the table gets the table's id of ``<unk>``. Decoding skips ids without a
    piece, such as language tokens.

    Args:
        source_model: A serialized SentencePiece model, the contents of a ``.spm`` file.
        target_model: The target's model; the same bytes if one model segments both sides.
        source_pieces: The id of each source piece, ``</s>`` and ``<unk>`` included.
        target_pieces: The id of each target piece; the same table for a shared vocabulary.
        vocabulary: The special ids; every encoded target begins with its ``target_prefix``.
        source_prefix: Ids at the beginning of every encoded source, such as a language token.
    """

    KIND: ClassVar = "sentencepiece with tables"

    def __init__(
        self,
        source_model: bytes,
        target_model: bytes,
        source_pieces: Mapping[str, int],
        target_pieces: Mapping[str, int],
        vocabulary: Vocabulary,
        source_prefix: Sequence[int] = (),
    ) -> None:
        self.vocabulary = vocabulary
        self._models = (source_model, target_model)
        self._tables = (dict(source_pieces), dict(target_pieces))
        self._source_prefix = tuple(source_prefix)
        for side, table in zip(("source", "target"), self._tables, strict=True):
            missing = [piece for piece in (EOS, UNKNOWN) if piece not in table]
            if missing:
                raise TokenizerError(
                    f"The {side} vocabulary has no {missing[0]}; every vocabulary needs {EOS} and "
                    f"{UNKNOWN}."
                )
        self._source, self._target = (read_sentencepiece(model) for model in self._models)
        self._names = {i: piece for piece, i in self._tables[1].items()}
        self.unk_ids = (self._tables[0][UNKNOWN], self._tables[1][UNKNOWN])
        self._silent_ids = vocabulary.special_ids
        self.digest = self._compute_digest()

    def _compute_digest(self) -> str:
        digest = hashlib.sha256(self.KIND.encode())
        for model in self._models:
            digest.update(hashlib.sha256(model).digest())
        plain = [*self._tables, _as_dict(self.vocabulary), self._source_prefix]
        digest.update(json.dumps(plain, sort_keys=True).encode())
        return digest.hexdigest()

    def encode_source(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line after the source's prefix, EOS last."""
        return _encode(self._source, self._tables[0], lines, self._source_prefix)

    def encode_target(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line after the target's prefix, EOS last."""
        return _encode(self._target, self._tables[1], lines, self.vocabulary.target_prefix)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special ids and those without a piece are skipped."""
        pieces = [
            self._names[int(i)]
            for i in ids
            if int(i) not in self._silent_ids and int(i) in self._names
        ]
        text: str = self._target.DecodePieces(pieces)
        # A piece from the other side's model, which this one does not know, keeps its "▁".
        return text.replace("▁", " ").strip()

    def unknown_symbols(self, line: str, side: Side) -> list[str]:
        """The characters without a piece, and the pieces without an id."""
        at = 0 if side == "source" else 1
        processor, table = (self._source, self._target)[at], self._tables[at]
        pieces: list[str] = processor.Encode(line, out_type=str)
        cut_off = [
            p for p in pieces if p not in table and processor.PieceToId(p) != processor.unk_id()
        ]
        return [*unknown_characters(processor, line), *(p.replace("▁", "") for p in cut_off)]

    def state(self) -> dict[str, Any]:
        """Plain types and tensors: ``torch.load(weights_only=True)`` reads it."""
        source_model, target_model = (_as_tensor(model) for model in self._models)
        return {
            "kind": self.KIND,
            "source_model": source_model,
            "target_model": target_model,
            "source_pieces": self._tables[0],
            "target_pieces": self._tables[1],
            "vocabulary": _as_dict(self.vocabulary),
            "source_prefix": list(self._source_prefix),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokenizer whose ``state()`` this is."""
        fields = dict(state["vocabulary"])
        vocabulary = Vocabulary(**{**fields, "target_prefix": tuple(fields["target_prefix"])})
        return cls(
            _as_bytes(state["source_model"]),
            _as_bytes(state["target_model"]),
            state["source_pieces"],
            state["target_pieces"],
            vocabulary,
            state["source_prefix"],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its parts."""
        return type(self), (*self._models, *self._tables, self.vocabulary, self._source_prefix)


def read_sentencepiece(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """A processor of a serialized model.

    Raises:
        TokenizerError: If the bytes are not a model.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise TokenizerError(
            f"These {len(model):,} bytes are not a SentencePiece model; give the contents of a "
            ".spm or .model file."
        ) from error
    return processor


def sentencepiece_pieces(model: bytes) -> list[str]:
    """The pieces of a serialized model, in the order of the model's own ids."""
    processor = read_sentencepiece(model)
    pieces: list[str] = processor.IdToPiece(list(range(processor.GetPieceSize())))
    return pieces


def _encode(
    processor: sentencepiece.SentencePieceProcessor,
    table: Mapping[str, int],
    lines: Sequence[str],
    prefix: Sequence[int],
) -> list[list[int]]:
    unknown, eos = table[UNKNOWN], table[EOS]
    encoded = processor.Encode(list(lines), out_type=str)
    return [[*prefix, *(table.get(piece, unknown) for piece in line), eos] for line in encoded]


def _as_dict(vocabulary: Vocabulary) -> dict[str, Any]:
    return {**vars(vocabulary), "target_prefix": list(vocabulary.target_prefix)}


def _as_tensor(model: bytes) -> Tensor:
    return torch.frombuffer(bytearray(model), dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()

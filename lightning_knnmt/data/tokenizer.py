"""Text to ids and back, and which ids are not text.

SentencePiece (Kudo & Richardson, 2018, arXiv:1808.06226), with the unigram model of Kudo (2018,
arXiv:1804.10959) when a model is trained here.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import sentencepiece
import torch

from lightning_knnmt.data.text import TextError, read_lines, summarize_file
from lightning_knnmt.files import locked, write_atomically


@dataclass(frozen=True)
class Vocabulary:
    """The number of ids, and which of them are not text.

    Padding may share its id with the decoder's start: masks are computed from labels and sources,
    which contain no start id.

    Attributes:
        size: Number of ids, V: the rows of the embedding.
        pad_id: Fills the shorter rows of a batch.
        start_id: The decoder's first input.
        eos_id: Ends every source and every target.
        unk_id: Replaces a symbol that the vocabulary lacks.
        target_prefix: The first tokens of every target, after the start id: the target language's
            token in a multilingual model, usually nothing. Encoded targets contain it, so models
            learn and datastores hold it like any token; search begins every hypothesis with it.
        source_size: Number of source ids if the source has its own vocabulary; None if source and
            target share one.
    """

    size: int
    pad_id: int
    start_id: int
    eos_id: int
    unk_id: int
    target_prefix: tuple[int, ...] = ()
    source_size: int | None = None

    def __post_init__(self) -> None:
        """Rejects ids outside the vocabulary."""
        for name in ("pad_id", "start_id", "eos_id", "unk_id"):
            value = getattr(self, name)
            if not 0 <= value < self.size:
                raise ValueError(
                    f"{name} is {value}, outside the vocabulary's ids 0 to {self.size - 1}."
                )
        outside = [i for i in self.target_prefix if not 0 <= i < self.size]
        if outside:
            raise ValueError(
                f"target_prefix holds {outside[0]}, outside the vocabulary's ids 0 to "
                f"{self.size - 1}."
            )

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids without text: padding, start, end and a target's prefix."""
        return frozenset({self.pad_id, self.start_id, self.eos_id, *self.target_prefix})

    @property
    def never_emitted(self) -> tuple[int, ...]:
        """The ids that no output contains, ascending: unknown, padding and the decoder's start.

        The end is not among them even where it is also the start, as in fairseq's models.
        """
        return tuple(sorted({self.unk_id, self.pad_id, self.start_id} - {self.eos_id}))

    @property
    def largest_size(self) -> int:
        """Number of ids of the larger side, which determines the type of id arrays."""
        return max(self.size, self.source_size or 0)


log = logging.getLogger(__name__)

# The trainer sums counts per thread, so the number of threads can change the model's last digits:
# it is fixed, not taken from the machine.
_TRAINING_THREADS = 8


Side = Literal["source", "target"]


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read."""


class Tokenizer(Protocol):
    """Turns lines into ids and back; source and target may be treated differently.

    Attributes:
        vocabulary: The special ids and the size.
        digest: SHA-256, in hex, of everything that determines the ids.
        unk_ids: The id of ``<unk>`` in a source and in a target.
    """

    vocabulary: Vocabulary
    digest: str
    unk_ids: tuple[int, int]

    def encode_source(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, EOS last, no start id."""
        ...

    def encode_target(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, EOS last, no start id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; padding, start and EOS are skipped."""
        ...

    def unknown_symbols(self, line: str, side: Side) -> list[str]:
        """The characters, or pieces of words, in a line that the vocabulary lacks."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain types and tensors, for ``tokenizer_from_state``."""
        ...


class SentencePieceTokenizer:
    """One SentencePiece model for both languages.

    Models trained here have padding 0, unknown 1, start 2 and EOS 3. A model without a padding
    piece, such as Marian's (EOS 0, unknown 1), gets one more id after its last piece for padding
    and, if there is no start piece either, for the start: the embedding that Marian keeps at zero.

    Args:
        model_bytes: A serialized SentencePiece model, the contents of a ``.spm`` or ``.model``
            file.
    """

    KIND: ClassVar = "sentencepiece"

    def __init__(self, model_bytes: bytes) -> None:
        self._model_bytes = model_bytes
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError as error:
            raise TokenizerError(
                f"These {len(model_bytes):,} bytes are not a SentencePiece model; give the "
                "contents of a .spm or .model file."
            ) from error
        self.digest = hashlib.sha256(b"sentencepiece\0" + model_bytes).hexdigest()
        self.vocabulary = self._read_vocabulary()
        self.unk_ids = (self.vocabulary.unk_id, self.vocabulary.unk_id)
        self._silent_ids = self.vocabulary.special_ids

    def _read_vocabulary(self) -> Vocabulary:
        pieces = self._processor.GetPieceSize()
        if self._processor.eos_id() < 0:
            raise TokenizerError(
                "This SentencePiece model has no end-of-sentence piece, which decoding needs to "
                "stop; train it with eos_id set."
            )
        has_pad = self._processor.pad_id() >= 0
        pad_id = self._processor.pad_id() if has_pad else pieces
        return Vocabulary(
            size=pieces if has_pad else pieces + 1,
            pad_id=pad_id,
            start_id=self._processor.bos_id() if self._processor.bos_id() >= 0 else pad_id,
            eos_id=self._processor.eos_id(),
            unk_id=self._processor.unk_id(),
        )

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Reads a ``.spm`` or ``.model`` file."""
        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"There is no SentencePiece model {path}.")
        try:
            return cls(path.read_bytes())
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    @classmethod
    def train(
        cls,
        files: Sequence[Path],
        vocab_size: int,
        *,
        cache_dir: Path,
        character_coverage: float = 1.0,
        byte_fallback: bool = False,
        max_sentences: int = 2_000_000,
    ) -> Self:
        """Trains one model on all files together, or reads it from the cache.

        The same text and options give the same model on every machine.

        Args:
            files: UTF-8 text, one sentence a line; usually both sides of the training text.
            vocab_size: Number of pieces, special ones included; an error if the text is too small
                for them.
            cache_dir: Where the model is kept, by the digest of text and options.
            character_coverage: Share of characters that get a piece; 0.9995 for large character
                sets.
            byte_fallback: Whether a rare character becomes its UTF-8 bytes instead of ``<unk>``.
            max_sentences: Maximum sentences to train on; longer text is sampled.
        """
        options = {
            "vocab_size": vocab_size,
            "character_coverage": character_coverage,
            "byte_fallback": byte_fallback,
            "input_sentence_size": max_sentences,
        }
        contents = [summarize_file(path, cache_dir).sha256 for path in files]
        key = hashlib.sha256(json.dumps([contents, options]).encode()).hexdigest()
        path = cache_dir / "tokenizers" / f"{key[:32]}.model"
        with locked(path):
            if not path.exists():
                log.info("Training a SentencePiece model of %d pieces.", vocab_size)
                write_atomically(path, _train_sentencepiece(files, options))
        return cls.from_file(path)

    def encode_source(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, EOS last."""
        ids: list[list[int]] = self._processor.Encode(list(lines), out_type=int, add_eos=True)
        return ids

    def encode_target(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, EOS last."""
        return self.encode_source(lines)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; padding, start and EOS are skipped."""
        text: str = self._processor.Decode([int(i) for i in ids if int(i) not in self._silent_ids])
        return text

    def unknown_symbols(self, line: str, side: Side) -> list[str]:
        """The characters that the model has no piece for."""
        return unknown_characters(self._processor, line)

    def state(self) -> dict[str, Any]:
        """The model's bytes as a tensor: ``torch.load(weights_only=True)`` reads it."""
        model = torch.frombuffer(bytearray(self._model_bytes), dtype=torch.uint8)
        return {"kind": self.KIND, "model": model}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokenizer whose ``state()`` this is."""
        return cls(state["model"].cpu().numpy().tobytes())

    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]:
        """Pickled as the model's bytes."""
        return type(self), (self._model_bytes,)


def tokenizer_from_state(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose ``state()`` this is.

    Raises:
        TokenizerError: If it is of an unknown kind.
    """
    # Both build on this file.
    from lightning_knnmt.data.fairseq.tokenizer import FairseqTokenizer
    from lightning_knnmt.data.pieces import PieceTokenizer

    kinds: tuple[type[SentencePieceTokenizer | PieceTokenizer | FairseqTokenizer], ...]
    kinds = (SentencePieceTokenizer, PieceTokenizer, FairseqTokenizer)
    for kind in kinds:
        if state.get("kind") == kind.KIND:
            return kind.from_state(state)
    known = ", ".join(repr(kind.KIND) for kind in kinds)
    raise TokenizerError(
        f"This state holds a tokenizer of the unknown kind {state.get('kind')!r}; known are "
        f"{known}. It may come from a newer version."
    )


def unknown_characters(processor: sentencepiece.SentencePieceProcessor, line: str) -> list[str]:
    """The characters of a line that a SentencePiece model has no piece for."""
    pieces: list[str] = processor.Encode(line, out_type=str)
    unk_id = processor.unk_id()
    unknown = "".join(piece for piece in pieces if processor.PieceToId(piece) == unk_id)
    return list(unknown.replace("▁", ""))


def _train_sentencepiece(files: Sequence[Path], options: dict[str, Any]) -> bytes:
    model = io.BytesIO()
    # The trainer swallows exceptions, so they are kept and raised afterwards.
    failures: list[TextError] = []
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_guarded(files, failures),
            model_writer=model,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        if not failures:
            names = " and ".join(str(path) for path in files)
            raise TokenizerError(_training_advice(str(error), options, names)) from error
    if failures:
        raise failures[0]
    return model.getvalue()


def _guarded(files: Sequence[Path], failures: list[TextError]) -> Iterator[str]:
    try:
        yield from chain.from_iterable(read_lines(path) for path in files)
    except TextError as error:
        failures.append(error)


def _training_advice(message: str, options: dict[str, Any], names: str) -> str:
    size = options["vocab_size"]
    reason = message.splitlines()[-1].strip()
    if "too high" in reason:
        limit = reason.rsplit("<=", 1)[-1].strip(" .")
        return (
            f"A vocabulary of {size} pieces is larger than the text of {names} supports; set "
            f"vocab_size to at most {limit}."
        )
    if "smaller than required_chars" in reason:
        return (
            f"A vocabulary of {size} pieces is smaller than the number of different characters in "
            f"{names}; set vocab_size higher, or character_coverage below "
            f"{options['character_coverage']}."
        )
    return f"SentencePiece could not train a model of {size} pieces on {names}: {reason}"

"""Rebuilds a tokenizer from what a checkpoint keeps of it."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_knnmt.data import pieces
from lightning_knnmt.data.fairseq import tokenizer as fairseq_tokenizer
from lightning_knnmt.data.fairseq.tokenizer import FairseqTokenizer
from lightning_knnmt.data.pieces import PieceTokenizer
from lightning_knnmt.data.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerError

_READERS: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    "sentencepiece": SentencePieceTokenizer.from_state,
    pieces.KIND: PieceTokenizer.from_state,
    fairseq_tokenizer.KIND: FairseqTokenizer.from_state,
}


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose ``state()`` this is."""
    kind = state.get("kind")
    if kind not in _READERS:
        known = ", ".join(map(repr, _READERS))
        raise TokenizerError(
            f"This state holds a tokenizer of the unknown kind {kind!r}; known are {known}. It may "
            "come from a newer version."
        )
    return _READERS[kind](state)

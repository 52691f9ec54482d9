"""Rebuilds a tokenizer from what a checkpoint keeps of it."""

from typing import Any

from lightning_knnmt.data.pieces import KIND, PieceTokenizer
from lightning_knnmt.data.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerError


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose ``state()`` this is."""
    kind = state.get("kind")
    if kind == "sentencepiece":
        return SentencePieceTokenizer.from_state(state)
    if kind == KIND:
        return PieceTokenizer.from_state(state)
    raise TokenizerError(
        f"This state holds a tokenizer of the unknown kind {kind!r}; known are 'sentencepiece' and "
        f"{KIND!r}. It may come from a newer version."
    )

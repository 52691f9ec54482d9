"""Moses' treatment of text (Koehn et al., 2007), by sacremoses, its port to Python.

The steps of fairseq's WMT scripts: punctuation is normalised, control characters go, words are
separated (dashes inside them too) and escaped for XML.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_knnmt.data.tokenizer import TokenizerError


class Moses:
    """Text of one language to words and back.

    Args:
        language: Its code, such as `de`: abbreviations and quotation marks differ.
        replace_unicode_punctuation: Whether full-width and other punctuation becomes ASCII first,
            as Hugging Face's FSMT does and fairseq's scripts do not.

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
        """Plain text of words."""
        text: str = self._detokenizer.detokenize(list(words), unescape=True)
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to worker processes as its settings."""
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

"""How good translations are: BLEU and chrF by sacreBLEU.

BLEU: Papineni et al., 2002.  chrF: Popovic, 2015.  Signatures: Post, 2018 (arXiv:1804.08771).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

MetricName = Literal["bleu", "chrf"]
Array = np.ndarray[Any, np.dtype[Any]]

CHINESE = ("zh", "zho", "chi", "cn", "cmn", "yue", "wuu", "lzh")
TOKENIZERS = dict.fromkeys(CHINESE, "zh") | {
    **dict.fromkeys(("ja", "jpn", "jp"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
}
EXTRAS = {"ja-mecab": ("Japanese", "ja"), "ko-mecab": ("Korean", "ko")}
# Tibetan, Thai, Lao, Burmese, Khmer; kana; Chinese characters.
UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
COPIED_SHARE = 0.5  # of the translations' words: more than names and numbers explain
TOKENISED_SHARE = 0.05  # of lines that end in " .", as raw text hardly ever does


class ScoringError(ValueError):
    """Hypotheses and references that cannot be compared, or a metric that does not exist."""


class Score(NamedTuple):
    """A corpus score from 0 to 100, and sacreBLEU's account of how it was computed."""

    value: float
    signature: str


class Metric(Protocol):
    """A corpus score that is a function of counts summed over the sentences."""

    name: ClassVar[MetricName]

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
        """Scores a corpus of raw text with one reference for each sentence."""
        ...

    def counts(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """Counts matches in each sentence, [sentences, C]."""
        ...

    def from_counts(self, counts: Array) -> Array:
        """Computes scores from 0 to 100 from summed counts, [..., C] -> [...]."""
        ...


@dataclass(frozen=True)
class Bleu:
    """BLEU with sacreBLEU's defaults.

    Attributes:
        tokenizer: How sacreBLEU divides the text into words; `for_language` chooses it.
    """

    tokenizer: str
    name: ClassVar[MetricName] = "bleu"

    def __post_init__(self) -> None:
        if self.tokenizer not in BLEU.TOKENIZERS:
            raise ScoringError(
                f"There is no BLEU tokenizer {self.tokenizer!r}: set data.bleu_tokenizer to one of "
                f"{', '.join(BLEU.TOKENIZERS)}, or to null for the target language's."
            )
        _ = self._scorer  # raises now if it cannot be made, not after hours of decoding

    @classmethod
    def for_language(cls, language: str, tokenizer: str | None = None) -> Self:
        """Makes the metric for text in a language.

        Args:
            language: A code, with or without a script or region: zh, zh_CN, zho-Hans, ...
            tokenizer: Used whatever the language, if given.

        Raises:
            ScoringError: If there is no such tokenizer, or its packages are missing.
        """
        code = re.split("[-_]", language.lower())[0]
        return cls(tokenizer or TOKENIZERS.get(code, "13a"))

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
        check_aligned(hypotheses, references)
        value = self._scorer.corpus_score(hypotheses, [references]).score
        return Score(float(value), str(self._scorer.get_signature()))

    def counts(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """Counts lengths and n-grams in each sentence.

        Returns:
            Length of the hypothesis and of the reference, then matching n-grams of orders 1-4,
            then the hypothesis' n-grams of orders 1-4, [sentences, 10].
        """
        return _counts(self._scorer, hypotheses, references)

    def from_counts(self, counts: Array) -> Array:
        """Computes BLEU from summed counts, [..., 10] -> [...]."""
        ours, reference = counts[..., 0], counts[..., 1]
        correct, total = counts[..., 2:6], counts[..., 6:10]
        missed = correct == 0
        # "exp" smoothing: the first order without a match counts as 1/2 match, the next 1/4, ...
        matches = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), correct)
        log_precision = np.log(matches / np.maximum(total, 1)).mean(axis=-1)
        log_brevity = np.minimum(0.0, 1.0 - reference / np.maximum(ours, 1))
        undefined = missed.all(axis=-1) | (total == 0).any(axis=-1)
        return np.where(undefined, 0.0, 100.0 * np.exp(log_precision + log_brevity))

    @cached_property
    def _scorer(self) -> BLEU:
        try:
            # `force` silences sacreBLEU's advice on tokenised text; `find_doubts` gives ours.
            return BLEU(tokenize=self.tokenizer, force=True)
        except Exception as error:
            if self.tokenizer in EXTRAS and isinstance(error, RuntimeError):
                language, extra = EXTRAS[self.tokenizer]
                raise ScoringError(
                    f"The BLEU tokenizer {self.tokenizer}, which {language} text needs, lacks its "
                    f"packages: install them with `pip install 'lightning-knnmt[{extra}]'`, or set "
                    "data.bleu_tokenizer=char."
                ) from error
            raise ScoringError(
                f"The BLEU tokenizer {self.tokenizer} cannot be loaded ({error}): set "
                "data.bleu_tokenizer=char, or to null for the target language's."
            ) from error


@dataclass(frozen=True)
class ChrF:
    """chrF2 with sacreBLEU's defaults: character n-grams, whatever the language."""

    name: ClassVar[MetricName] = "chrf"

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
        check_aligned(hypotheses, references)
        metric = CHRF()
        value = metric.corpus_score(hypotheses, [references]).score
        return Score(float(value), str(metric.get_signature()))

    def counts(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """Counts character n-grams in each sentence.

        Returns:
            For orders 1-6: how many are in the hypothesis, in the reference and in both,
            [sentences, 18].
        """
        return _counts(CHRF(), hypotheses, references)

    def from_counts(self, counts: Array) -> Array:
        """Computes F2 of the orders' mean precision and mean recall, [..., 18] -> [...]."""
        ours, reference, matches = counts[..., 0::3], counts[..., 1::3], counts[..., 2::3]
        occurs = (ours > 0) & (reference > 0)
        orders = np.maximum(occurs.sum(axis=-1), 1)
        precision = np.where(occurs, matches / np.maximum(ours, 1), 0.0).sum(axis=-1) / orders
        recall = np.where(occurs, matches / np.maximum(reference, 1), 0.0).sum(axis=-1) / orders
        scores: Array = 500.0 * precision * recall / np.maximum(4.0 * precision + recall, 1e-300)
        return scores


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Array:
    """Scores every sentence alone by chrF2, [sentences]."""
    check_aligned(hypotheses, references)
    metric = CHRF()
    pairs = zip(hypotheses, references, strict=True)
    return np.array([metric.sentence_score(ours, [gold]).score for ours, gold in pairs])


def find_doubts(
    hypotheses: Sequence[str],
    references: Sequence[str],
    tokenizer: str,
    sources: Sequence[str] = (),
) -> list[str]:
    """Finds reasons not to trust BLEU of these texts, one sentence each.

    Args:
        hypotheses: The translations.
        references: Their references.
        tokenizer: The one that BLEU is counted with.
        sources: What was translated, if translations are to be compared with it.
    """
    doubts = []
    if sources:
        copied, right = (_shared_words(hypotheses, lines) for lines in (sources, references))
        if copied > max(COPIED_SHARE, 2 * right):
            doubts.append(
                f"{copied:.0%} of the translations' words stand in their sources, but only "
                f"{right:.0%} in their references: are the languages swapped? `lightning-knnmt "
                "doctor` examines model and text."
            )
    for name, lines in (("translations", hypotheses), ("references", references)):
        tokenised = sum(line.endswith(" .") for line in lines)
        if tokenised > TOKENISED_SHARE * len(lines):
            doubts.append(
                f"{tokenised:,} of {len(lines):,} {name} end in a separate full stop, as tokenised "
                "text does: BLEU expects raw text, so detokenise both sides before you compare the "
                "scores with others."
            )
            break
    text = "".join("".join(references).split())
    if tokenizer in ("13a", "intl", "none") and 2 * len(UNSPACED.findall(text)) > len(text):
        doubts.append(
            f"The references have hardly any spaces, so BLEU's tokenizer {tokenizer} takes whole "
            "phrases for words: set data.bleu_tokenizer=zh for Chinese, ja-mecab for Japanese, "
            "char for other languages."
        )
    return doubts


def _shared_words(lines: Sequence[str], others: Sequence[str]) -> float:
    """The share of the lines' different words that the other lines, one for each, have too."""
    words = [({*a.split()}, {*b.split()}) for a, b in zip(lines, others, strict=True)]
    return sum(len(a & b) for a, b in words) / max(1, sum(len(a) for a, _ in words))


def check_aligned(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raises if there is not one hypothesis for each reference."""
    if len(hypotheses) != len(references):
        raise ScoringError(
            f"There are {len(hypotheses):,} hypotheses but {len(references):,} references: every "
            "reference needs exactly one hypothesis. Score translations of the same file, and drop "
            "no lines."
        )
    if not references:
        raise ScoringError("There are 0 hypotheses and 0 references: at least 1 pair is needed.")


def _counts(metric: BLEU | CHRF, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
    check_aligned(hypotheses, references)
    # sacreBLEU has no public name for counts; its own significance module reads them like this.
    return np.array(metric._extract_corpus_statistics(hypotheses, [references]), dtype=np.float64)

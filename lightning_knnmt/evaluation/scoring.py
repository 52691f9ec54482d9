"""How good translations are: BLEU and chrF by sacreBLEU.

BLEU: Papineni et al., 2002.  chrF: Popovic, 2015.  Signatures: Post, 2018 (arXiv:1804.08771).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

MetricName = Literal["bleu", "chrf"]
Array = np.ndarray[Any, np.dtype[Any]]


class ScoringError(ValueError):
    """Hypotheses and references that cannot be compared."""


class Score(NamedTuple):
    """A corpus score from 0 to 100, and sacreBLEU's account of how it was computed."""

    value: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Scores a corpus by BLEU: raw text, one reference each, sacreBLEU's defaults."""
    return _score(BLEU(), hypotheses, references)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Scores a corpus by chrF2: raw text, one reference each, sacreBLEU's defaults."""
    return _score(CHRF(), hypotheses, references)


def sentence_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Array:
    """Scores every sentence alone by BLEU, over the n-gram orders it has, [sentences]."""
    check_aligned(hypotheses, references)
    metric = BLEU(effective_order=True)
    pairs = zip(hypotheses, references, strict=True)
    return np.array([metric.sentence_score(ours, [gold]).score for ours, gold in pairs])


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Array:
    """Scores every sentence alone by chrF2, [sentences]."""
    check_aligned(hypotheses, references)
    metric = CHRF()
    pairs = zip(hypotheses, references, strict=True)
    return np.array([metric.sentence_score(ours, [gold]).score for ours, gold in pairs])


def bleu_from_counts(counts: Array) -> Array:
    """Computes BLEU from summed counts, with sacreBLEU's default smoothing ("exp").

    Args:
        counts: Length of the hypothesis and of the reference, then matching n-grams of orders 1-4,
            then the hypothesis' n-grams of orders 1-4, [..., 10].

    Returns:
        BLEU from 0 to 100, [...].
    """
    ours, reference = counts[..., 0], counts[..., 1]
    correct, total = counts[..., 2:6], counts[..., 6:10]
    missed = correct == 0
    # NIST smoothing: the first order without a match counts as 1/2 match, the next as 1/4, ...
    matches = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), correct)
    log_precision = np.log(matches / np.maximum(total, 1)).mean(axis=-1)
    log_brevity = np.minimum(0.0, 1.0 - reference / np.maximum(ours, 1))
    undefined = missed.all(axis=-1) | (total == 0).any(axis=-1)
    return np.where(undefined, 0.0, 100.0 * np.exp(log_precision + log_brevity))


def chrf_from_counts(counts: Array) -> Array:
    """Computes chrF2 from summed counts: F2 of the orders' mean precision and mean recall.

    Args:
        counts: For character n-grams of orders 1-6: how many are in the hypothesis, in the
            reference and in both, [..., 18].

    Returns:
        chrF from 0 to 100, [...].
    """
    ours, reference, matches = counts[..., 0::3], counts[..., 1::3], counts[..., 2::3]
    occurs = (ours > 0) & (reference > 0)
    orders = np.maximum(occurs.sum(axis=-1), 1)
    precision = np.where(occurs, matches / np.maximum(ours, 1), 0.0).sum(axis=-1) / orders
    recall = np.where(occurs, matches / np.maximum(reference, 1), 0.0).sum(axis=-1) / orders
    scores: Array = 500.0 * precision * recall / np.maximum(4.0 * precision + recall, 1e-300)
    return scores


METRICS: dict[MetricName, tuple[type[BLEU] | type[CHRF], Callable[[Array], Array]]] = {
    "bleu": (BLEU, bleu_from_counts),
    "chrf": (CHRF, chrf_from_counts),
}


def _score(metric: BLEU | CHRF, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    check_aligned(hypotheses, references)
    value = metric.corpus_score(hypotheses, [references]).score
    return Score(float(value), str(metric.get_signature()))


def check_aligned(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Refuses hypotheses that are not one for each reference."""
    if len(hypotheses) != len(references):
        raise ScoringError(
            f"There are {len(hypotheses):,} hypotheses but {len(references):,} references: every "
            "reference needs exactly one hypothesis. Score translations of the same file, and drop "
            "no lines."
        )
    if not references:
        raise ScoringError("There are 0 hypotheses and 0 references: at least 1 pair is needed.")

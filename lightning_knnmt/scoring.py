"""How good translations are: BLEU and chrF by sacreBLEU, and how sure one can be of a difference.

BLEU: Papineni et al., 2002.  chrF: Popovic, 2015.  Signatures: Post, 2018 (arXiv:1804.08771).
Paired bootstrap: Koehn, 2004, "Statistical significance tests for machine translation evaluation".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

MetricName = Literal["bleu", "chrf"]
Array = np.ndarray[Any, np.dtype[Any]]

SACREBLEU_SEED = 12345  # sacreBLEU's default: one seed draws the same resamples there and here
DRAWS_AT_ONCE = 1_000_000  # sentence numbers drawn in one piece; three arrays of 8 MB


class ScoringError(ValueError):
    """Hypotheses and references that cannot be compared."""


class Score(NamedTuple):
    """A corpus score from 0 to 100, and sacreBLEU's account of how it was computed."""

    value: float
    signature: str


@dataclass(frozen=True)
class Difference:
    """How much better a system is than a baseline, and how sure that is.

    `low` and `high` bound the 95 % confidence interval. `p_value` is the one that
    `sacrebleu --paired-bs` prints.
    """

    metric: MetricName
    value: float
    low: float
    high: float
    p_value: float
    num_samples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


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


def paired_bootstrap(
    system: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[str],
    metric: MetricName = "bleu",
    *,
    num_samples: int = 1000,
    seed: int = SACREBLEU_SEED,
) -> Difference:
    """Estimates how much of two systems' difference is owed to the choice of test sentences.

    Test sets of the same size are drawn from the sentences with replacement. Both metrics are
    functions of counts summed over sentences, so a draw is a row of weights, and all draws are one
    matrix product.

    Args:
        system: The translations that should be better.
        baseline: The translations they are compared with, line by line.
        references: One reference for each sentence.
        metric: What to compare by.
        num_samples: How many test sets to draw.
        seed: Fixes the draws.

    Returns:
        The difference system - baseline on the real test set, with its 95 % interval.
    """
    if metric not in METRICS:
        raise ScoringError(f"Unknown metric {metric!r}: allowed are 'bleu' and 'chrf'.")
    if num_samples < 1:
        raise ScoringError(f"{num_samples} bootstrap samples were asked for; at least 1 is needed.")
    check_aligned(system, references)
    check_aligned(baseline, references)
    scorer_type, from_counts = METRICS[metric]
    scorer = scorer_type(references=[references])
    # sacreBLEU has no public name for counts; its own significance module reads them like this.
    ours, theirs = (
        np.array(scorer._extract_corpus_statistics(lines, None), dtype=np.float64)
        for lines in (system, baseline)
    )
    value = float(from_counts(ours.sum(axis=0)) - from_counts(theirs.sum(axis=0)))
    differences = resampled_differences(from_counts, ours, theirs, num_samples, seed)
    low, high = (float(bound) for bound in np.percentile(differences, [2.5, 97.5]))
    return Difference(metric, value, low, high, _p_value(differences, value), num_samples)


def resampled_differences(
    from_counts: Callable[[Array], Array],
    ours: Array,
    theirs: Array,
    num_samples: int,
    seed: int,
) -> Array:
    """Scores both systems on test sets drawn with replacement and returns how much ours is better.

    Args:
        from_counts: Turns summed counts, [..., C], into scores, [...].
        ours: The system's counts for each sentence, [sentences, C].
        theirs: The baseline's, [sentences, C].
        num_samples: How many test sets to draw.
        seed: Fixes the draws.

    Returns:
        The differences, [num_samples].
    """
    differences = np.empty(num_samples)
    rng = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_ONCE // len(ours))
    for first in range(0, num_samples, step):
        last = min(first + step, num_samples)
        weights = draw_weights(rng, last - first, len(ours))
        differences[first:last] = from_counts(weights @ ours) - from_counts(weights @ theirs)
    return differences


def draw_weights(rng: np.random.Generator, num_samples: int, num_sentences: int) -> Array:
    """Draws test sets with replacement.

    Returns:
        How often each sentence is in each test set, [num_samples, num_sentences].
    """
    rows = rng.choice(num_sentences, size=(num_samples, num_sentences), replace=True)
    rows += np.arange(num_samples)[:, None] * num_sentences
    counted = np.bincount(rows.ravel(), minlength=num_samples * num_sentences)
    return counted.reshape(num_samples, num_sentences).astype(np.float64)


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


def _p_value(differences: Array, value: float) -> float:
    """Computes sacreBLEU's p: how often sizes of differences exceed their mean by the real one."""
    if value == 0 and not differences.any():
        return 1.0  # a system against itself, which sacreBLEU would call significantly different
    sizes = np.abs(differences)
    exceeded = int((sizes - sizes.mean() > abs(value)).sum())
    return (exceeded + 1) / (len(differences) + 1)


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

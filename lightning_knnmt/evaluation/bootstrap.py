"""How sure one can be of a difference between two systems: the paired bootstrap.

Koehn, 2004, "Statistical significance tests for machine translation evaluation".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_knnmt.evaluation.scoring import (
    METRICS,
    Array,
    MetricName,
    ScoringError,
    check_aligned,
)

SACREBLEU_SEED = 12345  # sacreBLEU's default: one seed draws the same resamples there and here
# By so much of its interval, and so many points, must a line move a difference to be named.
# Ordinary lines, of 200 to 1,000, moved it by 0.05 to 0.24; by more where systems scored alike.
DECISIVE_SHARE = 0.25
DECISIVE_POINTS = 0.5
DRAWS_AT_ONCE = 1_000_000  # sentence numbers drawn in one piece; three arrays of 8 MB


@dataclass(frozen=True)
class Difference:
    """How much better a system is than a baseline, and how sure that is.

    `low` and `high` bound the 95 % confidence interval. `p_value` is the one that
    `sacrebleu --paired-bs` prints. `line` counts from 1: the sentence without which the difference
    changes most, to `without`.
    """

    metric: MetricName
    value: float
    low: float
    high: float
    p_value: float
    num_samples: int
    line: int
    without: float

    @property
    def hangs_on_one_line(self) -> bool:
        """Whether one sentence moves the difference by half a point and a quarter of its interval.

        Then neither the difference nor the interval says much of other text. A line of 200 dots
        gives BLEU most of its matches in a test set of a few thousand words.
        """
        width = self.high - self.low
        return abs(self.value - self.without) > max(DECISIVE_POINTS, DECISIVE_SHARE * width)

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Resampled:
    """A system's score on the real test set and on test sets drawn from it.

    Attributes:
        samples: The scores of the drawn test sets, [num_samples].
        without_each: The scores of the real test set without its n-th sentence, [sentences].
    """

    metric: MetricName
    value: float
    samples: Array
    without_each: Array


def resample(
    system: Sequence[str],
    references: Sequence[str],
    metric: MetricName = "bleu",
    *,
    num_samples: int = 1000,
    seed: int = SACREBLEU_SEED,
) -> Resampled:
    """Scores a system on test sets of the same size, drawn from the sentences with replacement.

    Both metrics are functions of counts summed over sentences, so a draw is a row of weights, and
    all draws are one matrix product. The same seed draws the same sentences for every system.

    Args:
        system: The translations.
        references: One reference for each sentence.
        metric: What to score by.
        num_samples: How many test sets to draw.
        seed: Fixes the draws.
    """
    if metric not in METRICS:
        raise ScoringError(f"Unknown metric {metric!r}: allowed are 'bleu' and 'chrf'.")
    if num_samples < 1:
        raise ScoringError(f"{num_samples} bootstrap samples were asked for; at least 1 is needed.")
    check_aligned(system, references)
    scorer_type, from_counts = METRICS[metric]
    scorer = scorer_type(references=[references])
    # sacreBLEU has no public name for counts; its own significance module reads them like this.
    counts = np.array(scorer._extract_corpus_statistics(system, None), dtype=np.float64)
    samples = resampled_scores(from_counts, counts, num_samples, seed)
    total = counts.sum(axis=0)
    return Resampled(metric, float(from_counts(total)), samples, from_counts(total - counts))


def difference(system: Resampled, baseline: Resampled) -> Difference:
    """Estimates how much of two systems' difference is owed to the choice of test sentences.

    Args:
        system: The one that should be better.
        baseline: The one it is compared with, on the same draws of the same test set.

    Returns:
        The difference system - baseline on the real test set, with its 95 % interval.
    """
    value = system.value - baseline.value
    samples = system.samples - baseline.samples
    low, high = (float(bound) for bound in np.percentile(samples, [2.5, 97.5]))
    p_value = _p_value(samples, value)
    without_each = system.without_each - baseline.without_each
    row = int(np.abs(without_each - value).argmax())
    without = float(without_each[row])
    return Difference(system.metric, value, low, high, p_value, len(samples), row + 1, without)


def paired_bootstrap(
    system: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[str],
    metric: MetricName = "bleu",
    *,
    num_samples: int = 1000,
    seed: int = SACREBLEU_SEED,
) -> Difference:
    """The `difference` of two systems' translations, `resample`d with the same seed."""
    ours, theirs = (
        resample(lines, references, metric, num_samples=num_samples, seed=seed)
        for lines in (system, baseline)
    )
    return difference(ours, theirs)


def resampled_scores(
    from_counts: Callable[[Array], Array], counts: Array, num_samples: int, seed: int
) -> Array:
    """Scores a system on test sets drawn with replacement.

    Args:
        from_counts: Turns summed counts, [..., C], into scores, [...].
        counts: The system's counts for each sentence, [sentences, C].
        num_samples: How many test sets to draw.
        seed: Fixes the draws.

    Returns:
        The scores, [num_samples].
    """
    scores = np.empty(num_samples)
    rng = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_ONCE // len(counts))
    for first in range(0, num_samples, step):
        last = min(first + step, num_samples)
        scores[first:last] = from_counts(draw_weights(rng, last - first, len(counts)) @ counts)
    return scores


def draw_weights(rng: np.random.Generator, num_samples: int, num_sentences: int) -> Array:
    """Draws test sets with replacement.

    Returns:
        How often each sentence is in each test set, [num_samples, num_sentences].
    """
    rows = rng.choice(num_sentences, size=(num_samples, num_sentences), replace=True)
    rows += np.arange(num_samples)[:, None] * num_sentences
    counted = np.bincount(rows.ravel(), minlength=num_samples * num_sentences)
    return counted.reshape(num_samples, num_sentences).astype(np.float64)


def _p_value(differences: Array, value: float) -> float:
    """Computes sacreBLEU's p: how often sizes of differences exceed their mean by the real one."""
    if value == 0 and not differences.any():
        return 1.0  # a system against itself, which sacreBLEU would call significantly different
    sizes = np.abs(differences)
    exceeded = int((sizes - sizes.mean() > abs(value)).sum())
    return (exceeded + 1) / (len(differences) + 1)

"""How sure a score, a difference or a mean is: the bootstrap over sentences.

Koehn, 2004, "Statistical significance tests for machine translation evaluation".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_knnmt.evaluation.scoring import Array, Metric, MetricName, ScoringError

NUM_SAMPLES = 1000
SACREBLEU_SEED = 12345  # sacreBLEU's default: one seed draws the same resamples there and here
# A line is named if it moves a difference by more than this share of the interval and this many
# points. Ordinary lines moved it by 0.05 to 0.24 of the interval; more where systems scored alike.
DECISIVE_SHARE = 0.25
DECISIVE_POINTS = 0.5
DRAWS_AT_ONCE = 1_000_000  # drawn in one piece; three arrays of 8 MB


@dataclass(frozen=True)
class Difference:
    """How much better a system is than a baseline, and how sure that is.

    Attributes:
        low: Lower bound of the 95 % confidence interval.
        high: Its upper bound.
        p_value: As `sacrebleu --paired-bs` prints it.
        line: The sentence, from 1, without which the difference changes most.
        without: The difference without it.
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

        Then neither the difference nor its interval says much about other text. For example, a
        line of 200 dots has most of the matches in a test set of a few thousand words.
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
    metric: Metric,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = SACREBLEU_SEED,
) -> Resampled:
    """Scores a system on test sets of the same size, drawn from the sentences with replacement.

    The same seed draws the same sentences for every system.

    Args:
        system: The translations.
        references: One reference for each sentence.
        metric: What to score by.
        num_samples: How many test sets to draw.
        seed: Fixes the draws.
    """
    counts = metric.counts(system, references)
    samples = metric.from_counts(resampled_sums(counts, num_samples, seed))
    total = counts.sum(axis=0)
    without_each = metric.from_counts(total - counts)
    return Resampled(metric.name, float(metric.from_counts(total)), samples, without_each)


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
    low, high = interval(samples)
    p_value = _p_value(samples, value)
    without_each = system.without_each - baseline.without_each
    row = int(np.abs(without_each - value).argmax())
    without = float(without_each[row])
    return Difference(system.metric, value, low, high, p_value, len(samples), row + 1, without)


def paired_bootstrap(
    system: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[str],
    metric: Metric,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = SACREBLEU_SEED,
) -> Difference:
    """The `difference` of two systems' translations, `resample`d with the same seed."""
    ours, theirs = (
        resample(lines, references, metric, num_samples=num_samples, seed=seed)
        for lines in (system, baseline)
    )
    return difference(ours, theirs)


def mean_interval(
    values: Array,
    sentences: Array,
    num_samples: int = NUM_SAMPLES,
    seed: int = SACREBLEU_SEED,
) -> tuple[float, float]:
    """Estimates the 95 % interval of a mean over tokens, had other sentences been the text.

    Sentences are drawn, not tokens, because the tokens of a sentence resemble each other.

    Args:
        values: One for each token, [M].
        sentences: Each token's sentence, [M].
        num_samples: How many sets of sentences to draw.
        seed: Fixes the draws.
    """
    _, places = np.unique(sentences, return_inverse=True)
    sums = np.stack([np.bincount(places, weights=values), np.bincount(places)], axis=1)
    totals, counts = resampled_sums(sums, num_samples, seed).T
    return interval(totals / counts)


def resampled_sums(counts: Array, num_samples: int, seed: int) -> Array:
    """Sums counts over test sets of the same size, drawn from the sentences with replacement.

    A draw is a row of weights, and all draws are one matrix product.

    Args:
        counts: [sentences, ...].
        num_samples: How many test sets to draw.
        seed: Fixes the draws.

    Returns:
        [num_samples, ...].
    """
    if num_samples < 1:
        raise ScoringError(f"{num_samples} bootstrap samples were asked for; at least 1 is needed.")
    flat = counts.reshape(len(counts), -1)
    rng = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_ONCE // len(counts))
    pieces = [
        draw_weights(rng, min(step, num_samples - first), len(counts)) @ flat
        for first in range(0, num_samples, step)
    ]
    return np.concatenate(pieces).reshape(num_samples, *counts.shape[1:])


def interval(samples: Array) -> tuple[float, float]:
    """The bounds between which 95 % of the samples lie."""
    low, high = (float(bound) for bound in np.percentile(samples, [2.5, 97.5]))
    return low, high


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

"""Which of the references' words a system finds: recall by frequency, all and domain-specific ones.

In a sentence a word counts as found as often as it occurs in both translation and reference; recall
is the sum of what was found over the sum of what the references have. Words that are rare in the
domain are where retrieval and fine-tuning differ (Gao et al., 2023, "Nearest Neighbor Machine
Translation is Meta-Optimizer on Output Projection Layer", arXiv:2305.13034); the paper
leaves buckets and matching open, compare-mt (Neubig et al., 2019, arXiv:1903.07926) matches like
this.

Domain-specific words are those of the domain's training text that are there at least twice as
frequent, relative to the texts' lengths, as in general text. Where general text is small, many are
specific because it lacks them and for nothing else; see `FrequencyBuckets.of`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_knnmt.analysis.frequency import BUCKETS, FrequencyBuckets, split_words
from lightning_knnmt.evaluation.bootstrap import DRAWS_AT_ONCE, SACREBLEU_SEED, draw_weights
from lightning_knnmt.evaluation.scoring import ScoringError, check_aligned

Array = np.ndarray[Any, np.dtype[Any]]

ROWS = (*BUCKETS, "all")  # of a result: the buckets, then all words together
PERCENTILES = (2.5, 97.5)
MIN_SAMPLES = 40  # of fewer, one draw is more than 2.5 %


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class BucketRecall:
    """What a system finds of one bucket's words.

    Attributes:
        bucket: One of `ROWS`.
        training_types: Different words of the domain's training text in the bucket.
        reference_words: Words of the references in the bucket.
        found_words: How many of them the system found.
        recall: From 0 to 1; None if the references have no such word.
    """

    bucket: str
    training_types: int
    reference_words: int
    found_words: int
    recall: Estimate | None


@dataclass(frozen=True)
class BucketDifference:
    """How much more of one bucket's words a system finds than a baseline; see `BucketRecall`."""

    bucket: str
    reference_words: int
    difference: Estimate | None


@dataclass(frozen=True)
class WordRecall:
    """A system's recall; both tuples have one item for each of `ROWS`.

    No domain-specific word is unseen: that item of `domain_specific` has 0 words and no recall.
    Words that the domain's training text lacks are among all words only.
    """

    all_words: tuple[BucketRecall, ...]
    domain_specific: tuple[BucketRecall, ...]


@dataclass(frozen=True)
class WordRecallDifference:
    """How much better a system's recall is; both tuples have one item for each of `ROWS`.

    That of unseen domain-specific words has no difference, as in `WordRecall`.
    """

    all_words: tuple[BucketDifference, ...]
    domain_specific: tuple[BucketDifference, ...]


def measure_word_recall(
    hypotheses: Sequence[str],
    references: Sequence[str],
    buckets: FrequencyBuckets,
    *,
    num_samples: int = 1000,
    seed: int = SACREBLEU_SEED,
) -> WordRecall:
    """Computes recall in each bucket, with bootstrap intervals over the sentences.

    Args:
        hypotheses: The translations, detokenised, line by line.
        references: One for each of them.
        buckets: Of the domain.
        num_samples: How many test sets to draw, at least 40.
        seed: Fixes the draws.
    """
    counts = count_words(hypotheses, references, buckets)
    recalls = estimate_ratios(counts, num_samples, seed)
    found, wanted = counts.sum(axis=0).astype(int).tolist()
    all_words, specific = (
        tuple(map(BucketRecall, ROWS, *columns))
        for columns in zip(_training_types(buckets), wanted, found, recalls, strict=True)
    )
    return WordRecall(all_words, specific)


def recall_difference(
    system: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[str],
    buckets: FrequencyBuckets,
    *,
    num_samples: int = 1000,
    seed: int = SACREBLEU_SEED,
) -> WordRecallDifference:
    """Compares two systems' recall by a paired bootstrap: both are judged on the same draws.

    Args:
        system: The translations that should be better.
        baseline: The translations they are compared with, line by line.
        references: One for each sentence.
        buckets: Of the domain.
        num_samples: How many test sets to draw, at least 40.
        seed: Fixes the draws.
    """
    counts = count_words(system, references, buckets)
    # Both recalls have one denominator, so their difference is a ratio of sums too.
    counts[:, 0] -= count_words(baseline, references, buckets)[:, 0]
    differences = estimate_ratios(counts, num_samples, seed)
    wanted = counts[:, 1].sum(axis=0).astype(int).tolist()
    all_words, specific = (
        tuple(map(BucketDifference, ROWS, *columns))
        for columns in zip(wanted, differences, strict=True)
    )
    return WordRecallDifference(all_words, specific)


def count_words(
    hypotheses: Sequence[str], references: Sequence[str], buckets: FrequencyBuckets
) -> Array:
    """Counts found and wanted words of every sentence.

    Returns:
        [sentences, 2, 2, ROWS]: found and wanted; all words and domain-specific ones.
    """
    check_aligned(hypotheses, references)
    places: list[tuple[int, int, int]] = []  # sentence, bucket, whether specific
    found_and_wanted: list[tuple[int, int]] = []
    for row, (ours, gold) in enumerate(zip(hypotheses, references, strict=True)):
        given = Counter(split_words(ours))
        for word, wanted in Counter(split_words(gold)).items():
            places.append((row, *buckets.place(word)))
            found_and_wanted.append((min(given[word], wanted), wanted))
    counts = np.zeros((len(references), 2, 2, len(BUCKETS)))
    if places:
        sentence, bucket, specific = np.array(places).T
        for side, numbers in enumerate(np.array(found_and_wanted).T):
            np.add.at(counts[:, side, 0], (sentence, bucket), numbers)
            np.add.at(counts[:, side, 1], (sentence, bucket), numbers * specific)
    return np.concatenate([counts, counts.sum(axis=-1, keepdims=True)], axis=-1)


def estimate_ratios(counts: Array, num_samples: int, seed: int) -> list[list[Estimate | None]]:
    """Divides sums over the sentences, and over test sets drawn from them with replacement.

    A test set may lack a rare bucket's words; the interval is of those that have some.

    Args:
        counts: Numerators and denominators, [sentences, 2, 2, ROWS].
        num_samples: How many test sets to draw.
        seed: Fixes the draws.

    Returns:
        For all words and domain-specific ones, one estimate for each of `ROWS`, None where the
        denominator is 0.
    """
    if num_samples < MIN_SAMPLES:
        raise ScoringError(
            f"{num_samples} bootstrap samples were asked for; a 95 % interval needs at least "
            f"{MIN_SAMPLES}."
        )
    sums, drawn = counts.sum(axis=0), resampled_sums(counts, num_samples, seed)
    estimates: list[list[Estimate | None]] = [[], []]
    for group, row in np.ndindex(*sums.shape[1:]):
        numerator, denominator = sums[:, group, row]
        estimate = None
        if denominator:
            numerators, denominators = drawn[:, :, group, row].T
            ratios = numerators[denominators > 0] / denominators[denominators > 0]
            low, high = np.percentile(ratios, PERCENTILES)
            estimate = Estimate(float(numerator / denominator), float(low), float(high))
        estimates[group].append(estimate)
    return estimates


def resampled_sums(counts: Array, num_samples: int, seed: int) -> Array:
    """Sums counts over test sets of the same size, drawn from the sentences with replacement.

    Args:
        counts: [sentences, ...].
        num_samples: How many test sets to draw.
        seed: Fixes the draws.

    Returns:
        [num_samples, ...].
    """
    flat = counts.reshape(len(counts), -1)
    rng = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_ONCE // len(counts))
    pieces = [
        draw_weights(rng, min(step, num_samples - first), len(counts)) @ flat
        for first in range(0, num_samples, step)
    ]
    return np.concatenate(pieces).reshape(num_samples, *counts.shape[1:])


def _training_types(buckets: FrequencyBuckets) -> list[list[int]]:
    """Counts the domain's types for each of `ROWS`: all and domain-specific ones."""
    types = np.zeros((2, len(BUCKETS)), dtype=np.int64)
    for word in buckets.in_domain.counts:
        bucket, is_specific = buckets.place(word)
        types[: 1 + is_specific, bucket] += 1
    return [[*row, sum(row)] for row in types.tolist()]

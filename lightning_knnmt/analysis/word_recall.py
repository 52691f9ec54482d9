"""Recall of the references' words by frequency: all words, and domain-specific ones.

In a sentence, a word counts as found as often as it occurs in both translation and reference;
recall is the sum of found words over the sum of reference words. Words that are rare in the domain
are where retrieval and fine-tuning differ (Gao et al., 2023, arXiv:2305.13034). That paper leaves
buckets and matching open; compare-mt (Neubig et al., 2019, arXiv:1903.07926) matches in this way.

Domain-specific words occur in the domain's training text, and there at least twice as frequently,
relative to the texts' lengths, as in general text. If the general text is small, many words are
specific only because it lacks them; see `FrequencyBuckets.of`.

Words are those of sacreBLEU's 13a tokenizer on detokenised text, case kept, whatever pieces a model
reads and writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from lightning_knnmt.evaluation.bootstrap import (
    NUM_SAMPLES,
    SACREBLEU_SEED,
    interval,
    resampled_sums,
)
from lightning_knnmt.evaluation.scoring import Array, ScoringError, check_aligned

BUCKETS = ("top 1 %", "1-5 %", "5-20 %", "20-100 %", "unseen")
UNSEEN = len(BUCKETS) - 1
EDGES = (0.01, 0.05, 0.20)  # shares of the types, most frequent first
SPECIFIC_RATIO = 2  # of a word's relative frequencies, in the domain and in general text

_tokenize: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]


ROWS = (*BUCKETS, "all")  # of a result
MIN_SAMPLES = 40  # with fewer, one draw is more than 2.5 %


class FrequencyError(ValueError):
    """Text without words."""


class Place(NamedTuple):
    """The bucket of a word, an index of `BUCKETS`, and whether it is domain-specific."""

    bucket: int
    is_specific: bool


ABSENT = Place(UNSEEN, False)


def split_words(line: str) -> list[str]:
    """Splits a detokenised line into words and punctuation marks, as sacreBLEU's 13a does."""
    return _tokenize(line).split()


@dataclass(frozen=True)
class Frequencies:
    """The count of each word of a corpus, at least 1."""

    counts: Mapping[str, int]
    num_tokens: int

    @classmethod
    def of(cls, lines: Iterable[str]) -> Frequencies:
        """Counts the words of detokenised lines."""
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(split_words(line))
        return cls(counts, counts.total())


@dataclass(frozen=True)
class FrequencyBuckets:
    """The place of each word of a domain's training text; other words have `ABSENT`."""

    in_domain: Frequencies
    places: Mapping[str, Place]

    @classmethod
    def of(cls, in_domain: Frequencies, general: Frequencies) -> FrequencyBuckets:
        """Divides the domain's words into bands by count, and compares them with general text.

        Words with equal counts stay together, in the band of the middle of their ranks: a word's
        bucket follows from its count alone, and without ties the bands have exactly the shares of
        the types.

        A word is domain-specific if it occurs in the domain's training text and its relative
        frequency there, count / tokens, is at least twice that in the general text. No other word
        is, so no domain-specific word is in the bucket "unseen".

        Nothing is smoothed: a word that occurs once in the domain and never in the general text is
        domain-specific. A small general text lacks many ordinary words, which are then
        domain-specific by absence alone.

        Args:
            in_domain: Of the target side of the domain's training text.
            general: Of the target side of text from other domains.
        """
        for name, corpus in (("in-domain", in_domain), ("general", general)):
            if not corpus.counts:
                raise FrequencyError(
                    f"The {name} corpus has no words, so frequencies cannot be compared: give the "
                    "lines of its target side."
                )
        bucket_of_count = buckets_of_counts(in_domain.counts.values())
        places = {}
        for word, inside in in_domain.counts.items():
            outside = general.counts.get(word, 0)
            # the relative frequencies, multiplied out: integers compare exactly
            is_specific = (
                inside * general.num_tokens >= SPECIFIC_RATIO * outside * in_domain.num_tokens
            )
            places[word] = Place(bucket_of_count[inside], is_specific)
        return cls(in_domain, places)

    def place(self, word: str) -> Place:
        """The place of a word; unseen and not specific if the domain's text lacks it."""
        return self.places.get(word, ABSENT)


def buckets_of_counts(counts: Iterable[int]) -> dict[int, int]:
    """Divides types into bands by count; types with equal counts stay together.

    Args:
        counts: Of all types that occur.

    Returns:
        The bucket's index by count; count 0 is unseen.
    """
    different, sizes = np.unique([*counts], return_counts=True)
    different, sizes = different[::-1], sizes[::-1]  # most frequent first
    middles = (np.cumsum(sizes) - sizes / 2) / max(1, sizes.sum())
    buckets = np.searchsorted(EDGES, middles, side="right")
    return {0: UNSEEN, **dict(zip(different.tolist(), buckets.tolist(), strict=True))}


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BucketRecall:
    """Recall of one bucket's words.

    Attributes:
        bucket: One of `ROWS`.
        training_types: Different words of the domain's training text.
        reference_words: Words of the references.
        found_words: Those that the system found.
        recall: From 0 to 1; None if the references have no such word.
    """

    bucket: str
    training_types: int
    reference_words: int
    found_words: int
    recall: Estimate | None


@dataclass(frozen=True)
class BucketDifference:
    """A system's recall of one bucket's words minus a baseline's; see `BucketRecall`."""

    bucket: str
    reference_words: int
    difference: Estimate | None


@dataclass(frozen=True)
class WordRecall:
    """A system's recall; both tuples have one item for each of `ROWS`.

    Words that the domain's training text lacks count among all words only, so the item "unseen" of
    `domain_specific` has 0 words and no recall.
    """

    all_words: tuple[BucketRecall, ...]
    domain_specific: tuple[BucketRecall, ...]


@dataclass(frozen=True)
class WordRecallDifference:
    """Differences of recall; both tuples have one item for each of `ROWS`.

    As in `WordRecall`, there is none for unseen domain-specific words.
    """

    all_words: tuple[BucketDifference, ...]
    domain_specific: tuple[BucketDifference, ...]


def measure_word_recall(
    hypotheses: Sequence[str],
    references: Sequence[str],
    buckets: FrequencyBuckets,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = SACREBLEU_SEED,
) -> WordRecall:
    """Measures recall in each bucket, with intervals by bootstrap over sentences.

    Args:
        hypotheses: Detokenised translations.
        references: One for each translation.
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
    num_samples: int = NUM_SAMPLES,
    seed: int = SACREBLEU_SEED,
) -> WordRecallDifference:
    """Compares two systems' recall by paired bootstrap, on the same draws.

    Args:
        system: Translations.
        baseline: The translations that they are compared with.
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
    """Counts found and wanted words in each sentence.

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
    """Estimates ratios of sums over the sentences, with intervals by bootstrap.

    Drawn test sets that lack a bucket's words are left out of its interval.

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
            f"num_samples is {num_samples}, but a 95 % interval needs at least {MIN_SAMPLES} "
            "bootstrap samples."
        )
    sums, drawn = counts.sum(axis=0), resampled_sums(counts, num_samples, seed)
    estimates: list[list[Estimate | None]] = [[], []]
    for group, row in np.ndindex(*sums.shape[1:]):
        numerator, denominator = sums[:, group, row]
        estimate = None
        if denominator:
            numerators, denominators = drawn[:, :, group, row].T
            ratios = numerators[denominators > 0] / denominators[denominators > 0]
            estimate = Estimate(float(numerator / denominator), *interval(ratios))
        estimates[group].append(estimate)
    return estimates


def _training_types(buckets: FrequencyBuckets) -> list[list[int]]:
    """Counts the domain's types for each of `ROWS`, all and domain-specific ones."""
    types = np.zeros((2, len(BUCKETS)), dtype=np.int64)
    for word in buckets.in_domain.counts:
        bucket, is_specific = buckets.place(word)
        types[: 1 + is_specific, bucket] += 1
    return [[*row, sum(row)] for row in types.tolist()]

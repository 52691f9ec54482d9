"""How frequent words are in a domain and outside of it, and the buckets that follow from that.

Words are what sacreBLEU's 13a tokenizer makes of detokenised text, case kept: whatever pieces a
model reads and writes, its translations are compared by the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

BUCKETS = ("top 1 %", "1-5 %", "5-20 %", "20-100 %", "unseen")
UNSEEN = len(BUCKETS) - 1
EDGES = (0.01, 0.05, 0.20)  # shares of the types, most frequent first
SPECIFIC_RATIO = 2  # of a word's shares of the tokens, in the domain and in general text

_tokenize: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]


class FrequencyError(ValueError):
    """Text that no frequencies follow from."""


class Place(NamedTuple):
    """Where a word belongs: a number of `BUCKETS`, and whether it is domain-specific."""

    bucket: int
    is_specific: bool


ABSENT = Place(UNSEEN, False)


def split_words(line: str) -> list[str]:
    """Splits a detokenised line into words and punctuation marks, as sacreBLEU's 13a does."""
    return _tokenize(line).split()


@dataclass(frozen=True)
class Frequencies:
    """How often each word occurs in a corpus; no word has count 0."""

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
    """Where each word of a domain's training text belongs, and so all other words."""

    in_domain: Frequencies
    places: Mapping[str, Place]

    @classmethod
    def of(cls, in_domain: Frequencies, general: Frequencies) -> FrequencyBuckets:
        """Cuts the domain's words, ranked by count, into bands and compares them with general text.

        Words with the same count stay together, in the band where the middle of their ranks lies:
        a word's bucket follows from its count alone, and without ties the bands hold the very
        shares of the types.

        A word is domain-specific if it occurs in the domain's training text and its relative
        frequency there, count / tokens, is at least twice that in the general text. A word that the
        domain's training text does not have is not domain-specific, whether general text has it or
        not: no domain-specific word is in the bucket "unseen".

        Nothing is smoothed: a word that occurs once in the domain and never in the general text is
        domain-specific. So general text that is small, which lacks many ordinary words, makes them
        domain-specific by absence alone.

        Args:
            in_domain: Of the target side of the domain's training text.
            general: Of the target side of text from outside of the domain.
        """
        for name, corpus in (("in-domain", in_domain), ("general", general)):
            if not corpus.counts:
                raise FrequencyError(
                    f"The {name} corpus has no word: at least 1 is needed to compare frequencies. "
                    "Give its target side, line by line."
                )
        bucket_of_count = buckets_of_counts(in_domain.counts.values())
        places = {}
        for word, inside in in_domain.counts.items():
            outside = general.counts.get(word, 0)
            # the shares of the tokens, multiplied out: whole numbers compare exactly
            is_specific = (
                inside * general.num_tokens >= SPECIFIC_RATIO * outside * in_domain.num_tokens
            )
            places[word] = Place(bucket_of_count[inside], is_specific)
        return cls(in_domain, places)

    def place(self, word: str) -> Place:
        """Finds where a word belongs: unseen and not specific if the domain's text lacks it."""
        return self.places.get(word, ABSENT)


def buckets_of_counts(counts: Iterable[int]) -> dict[int, int]:
    """Cuts types, ranked by count, into bands; those with equal counts stay together.

    Args:
        counts: Of all types that occur.

    Returns:
        The number of the bucket, by count; count 0 is unseen.
    """
    different, sizes = np.unique([*counts], return_counts=True)
    different, sizes = different[::-1], sizes[::-1]  # most frequent first
    middles = (np.cumsum(sizes) - sizes / 2) / max(1, sizes.sum())
    buckets = np.searchsorted(EDGES, middles, side="right")
    return {0: UNSEEN, **dict(zip(different.tolist(), buckets.tolist(), strict=True))}

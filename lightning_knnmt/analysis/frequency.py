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
SPECIFIC_RATIO = 2

_tokenize: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]


class FrequencyError(ValueError):
    """Text that no frequencies follow from."""


class Place(NamedTuple):
    """Where a word belongs: a number of `BUCKETS`, and whether it is domain-specific."""

    bucket: int
    is_specific: bool


ABSENT = Place(UNSEEN, True)


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
    """Where each word of a domain's and of general text belongs."""

    in_domain: Frequencies
    places: Mapping[str, Place]

    @classmethod
    def of(cls, in_domain: Frequencies, general: Frequencies) -> FrequencyBuckets:
        """Cuts the domain's words, ranked by count, into bands and compares them with general text.

        Words with the same count stay together, in the band where the middle of their ranks lies:
        a word's bucket follows from its count alone, and without ties the bands hold the very
        shares of the types.

        A word is domain-specific if it is absent from the general text, or if its relative
        frequency in the domain is at least twice that in general. Both are smoothed by adding one
        occurrence to each word of the two corpora together, (count + 1) / (tokens + types), so that
        chance counts weigh less. A general word that never occurs in the domain is not specific.

        Args:
            in_domain: Of the target side of the domain's training text.
            general: Of text from outside of the domain.
        """
        for name, corpus in (("in-domain", in_domain), ("general", general)):
            if not corpus.counts:
                raise FrequencyError(
                    f"The {name} corpus has no word: at least 1 is needed to compare frequencies. "
                    "Give its target side, line by line."
                )
        bucket_of_count = {0: UNSEEN, **_buckets_of_counts(in_domain)}
        words = in_domain.counts.keys() | general.counts.keys()
        tokens_inside, tokens_outside = (c.num_tokens + len(words) for c in (in_domain, general))
        places = {}
        for word in words:
            inside, outside = in_domain.counts.get(word, 0), general.counts.get(word, 0)
            # the ratio of (count + 1) / tokens, multiplied out: whole numbers compare exactly
            is_frequent = (inside + 1) * tokens_outside >= SPECIFIC_RATIO * (
                (outside + 1) * tokens_inside
            )
            is_specific = outside == 0 or (inside > 0 and is_frequent)
            places[word] = Place(bucket_of_count[inside], is_specific)
        return cls(in_domain, places)

    def place(self, word: str) -> Place:
        """Finds where a word belongs, if in neither text: unseen and domain-specific."""
        return self.places.get(word, ABSENT)


def _buckets_of_counts(corpus: Frequencies) -> dict[int, int]:
    """Finds the bucket of the words that occur so often."""
    counts, sizes = np.unique(list(corpus.counts.values()), return_counts=True)
    counts, sizes = counts[::-1], sizes[::-1]  # most frequent first
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    buckets = np.searchsorted(EDGES, middles, side="right")
    return dict(zip(counts.tolist(), buckets.tolist(), strict=True))

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
SPECIFIC_RATIO = 2.0

_tokenize: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]


class FrequencyError(ValueError):
    """Text that no frequencies follow from."""


class Place(NamedTuple):
    """Where a word belongs: a number of `BUCKETS`, and whether it is domain-specific."""

    bucket: int
    is_specific: bool


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
    """Words by their frequency in the domain's training text, as bands of its types.

    Words with the same count stay together, in the band where the middle of their ranks lies: a
    word's bucket follows from its count alone, and without ties the bands hold the very shares.

    Attributes:
        in_domain: Of the target side of the domain's training text.
        general: Of text from outside of the domain.
        bucket_of_count: The bucket of words that occur so often in the domain.
        num_types: How many words both corpora have together, for smoothing.
    """

    in_domain: Frequencies
    general: Frequencies
    bucket_of_count: Mapping[int, int]
    num_types: int

    @classmethod
    def of(cls, in_domain: Frequencies, general: Frequencies) -> FrequencyBuckets:
        """Ranks the domain's words and cuts the ranks into bands."""
        for name, corpus in (("in-domain", in_domain), ("general", general)):
            if not corpus.counts:
                raise FrequencyError(
                    f"The {name} corpus has no word: at least 1 is needed to compare frequencies. "
                    "Give its target side, line by line."
                )
        counts, sizes = np.unique(list(in_domain.counts.values()), return_counts=True)
        counts, sizes = counts[::-1], sizes[::-1]  # most frequent first
        middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
        buckets = np.searchsorted(EDGES, middles, side="right")
        bucket_of_count = dict(zip(counts.tolist(), buckets.tolist(), strict=True))
        num_types = len(in_domain.counts.keys() | general.counts.keys())
        return cls(in_domain, general, bucket_of_count, num_types)

    def place(self, word: str) -> Place:
        """Finds a word's bucket, and whether it is domain-specific.

        It is if it is absent from the general text, or if its relative frequency in the domain is
        at least twice that in general. Both are smoothed by adding one occurrence to each word of
        the two corpora together: (count + 1) / (tokens + types), so that chance counts weigh less.
        A general word that never occurs in the domain's text is not specific.
        """
        inside, outside = self.in_domain.counts.get(word, 0), self.general.counts.get(word, 0)
        bucket = self.bucket_of_count[inside] if inside else UNSEEN
        if not outside:
            return Place(bucket, True)
        share_inside = (inside + 1) / (self.in_domain.num_tokens + self.num_types)
        share_outside = (outside + 1) / (self.general.num_tokens + self.num_types)
        return Place(bucket, inside > 0 and share_inside >= SPECIFIC_RATIO * share_outside)

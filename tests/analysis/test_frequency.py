"""Words and buckets against ranks and ratios written out for reading."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lightning_knnmt.analysis import BUCKETS, Frequencies, FrequencyBuckets, FrequencyError
from lightning_knnmt.analysis.frequency import split_words

GENERAL = Frequencies.of(["one two three"])


def counted(counts: dict[str, int]) -> Frequencies:
    return Frequencies.of([" ".join([word] * count) for word, count in counts.items()])


def test_words_are_sacrebleus_13a_with_case() -> None:
    line = 'Turn it "off", at 3.5 °C (or 1,000)!'
    assert split_words(line) == [
        *("Turn", "it", '"', "off", '"', ",", "at", "3.5", "°C", "(", "or", "1,000", ")", "!")
    ]
    assert split_words("") == []


def test_frequencies_count_all_lines() -> None:
    frequencies = Frequencies.of(["the lamp, the Lamp", "", "lamp."])
    assert frequencies.counts == {"the": 2, "lamp": 2, ",": 1, "Lamp": 1, ".": 1}
    assert frequencies.num_tokens == 7


def test_without_ties_the_bands_hold_the_very_shares_of_the_types() -> None:
    buckets = FrequencyBuckets.of(counted({f"w{i}": 300 - i for i in range(200)}), GENERAL)
    places = [buckets.place(f"w{i}").bucket for i in range(200)]
    assert places == [0] * 2 + [1] * 8 + [2] * 30 + [3] * 160
    assert BUCKETS[buckets.place("never").bucket] == "unseen"


def test_ties_stay_together_where_the_middle_of_their_ranks_lies() -> None:
    rng = random.Random(4)
    counts = {f"w{i}": rng.choice([1, 1, 1, 1, 2, 2, 3, 5, 8, 9, 30, 31, 32]) for i in range(400)}
    buckets = FrequencyBuckets.of(counted(counts), GENERAL)
    ranked = sorted(counts.values(), reverse=True)
    for word, count in counts.items():
        ranks = [rank for rank, other in enumerate(ranked, start=1) if other == count]
        middle = (ranks[0] + ranks[-1] - 1) / 2 / len(ranked)
        expected = sum(middle >= edge for edge in (0.01, 0.05, 0.2))
        assert buckets.place(word).bucket == expected, (word, count)
    sizes = Counter(buckets.place(word).bucket for word in counts)
    assert sizes[0] == 0  # 8 % of the words have the greatest count
    assert sizes[1] > 0
    assert sizes[3] > 200


def test_domain_specific_words_are_twice_as_frequent_as_in_general() -> None:
    in_domain = counted({"sensor": 7, "lamp": 6, "the": 40, "only": 1})
    general = counted({"the": 52, "lamp": 7, "sensor": 7, "house": 30})
    buckets = FrequencyBuckets.of(in_domain, general)
    # 54 and 96 tokens of 5 types: 8/59 against 8/101 is 1.71 times, 41/59 against 53/101 less.
    assert not buckets.place("sensor").is_specific
    assert not buckets.place("the").is_specific
    assert buckets.place("only").is_specific
    assert buckets.place("nowhere").is_specific
    assert not buckets.place("house").is_specific  # general, and never seen in the domain

    # 54 + 5 and 113 + 5: the ratio of (count + 1) alone decides, 1 means exactly twice.
    general = counted({"the": 57, "lamp": 6, "sensor": 8, "house": 42})
    buckets = FrequencyBuckets.of(in_domain, general)
    assert buckets.place("lamp").is_specific  # 7/59 against 7/118: exactly twice
    assert not buckets.place("sensor").is_specific  # 8/59 against 9/118: 1.78 times


def test_a_rare_general_word_is_not_specific_for_its_smoothing_alone() -> None:
    buckets = FrequencyBuckets.of(counted({"lamp": 3}), counted({"the": 2000, "house": 1}))
    assert buckets.place("house") == (4, False)  # (0+1)/(3+3) is far above (1+1)/(2001+3)


@pytest.mark.parametrize("empty", ["in-domain", "general"])
def test_a_corpus_without_words_is_refused(empty: str) -> None:
    some, none = Frequencies.of(["a"]), Frequencies.of(["", " "])
    corpora = (none, some) if empty == "in-domain" else (some, none)
    with pytest.raises(FrequencyError, match=f"The {empty} corpus has no word: at least 1 is need"):
        FrequencyBuckets.of(*corpora)

"""Words and buckets against ranks and fractions written out for reading."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest

from lightning_knnmt.analysis import BUCKETS, Frequencies, FrequencyBuckets, FrequencyError
from lightning_knnmt.analysis.frequency import UNSEEN, split_words

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


def test_specific_words_have_at_least_twice_the_share_of_tokens() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        rng = random.Random(seed)
        words = [f"w{i}" for i in range(rng.randint(2, 40))]
        weights = [1 / (i + 1) for i in range(len(words))]
        # round sizes, for exactly twice to happen; either may be hundreds of times the other
        sizes = rng.choices([1, 4, 10, 20, 60, 200, 600], k=2)
        domain, general = (rng.choices(words, weights, k=size) for size in sizes)
        buckets = FrequencyBuckets.of(*(Frequencies.of([" ".join(t)]) for t in (domain, general)))
        for word in [*words, "nowhere"]:
            inside = Fraction(domain.count(word), len(domain))
            outside = Fraction(general.count(word), len(general))
            is_specific = inside > 0 and (outside == 0 or inside / outside >= 2)
            assert buckets.place(word).is_specific is is_specific, (seed, word, inside, outside)
            assert (buckets.place(word).bucket == UNSEEN) is (inside == 0)
            if not inside:
                seen["in neither" if not outside else "in general only"] += 1
            elif not outside:
                seen["in the domain only"] += 1
            else:
                seen["under" if not is_specific else "over" if inside > 2 * outside else "at"] += 1
    assert len(seen) == 6  # every case there is
    assert min(seen.values()) >= 20


def test_the_threshold_is_two_and_exact() -> None:
    domain = counted({"lamp": 20, "sensor": 19, "switch": 21, "the": 40})  # 100 tokens
    general = counted({"lamp": 50, "sensor": 50, "switch": 50, "house": 350})  # 500
    buckets = FrequencyBuckets.of(domain, general)
    assert buckets.place("lamp").is_specific  # 20 % against 10 %: exactly twice
    assert not buckets.place("sensor").is_specific  # 1.9 times
    assert buckets.place("switch").is_specific  # 2.1 times
    assert buckets.place("the").is_specific  # absent from general

    half = 2**60  # 2**61 - 1 is 2**61 as a float
    domain = Frequencies({"lamp": 2 * half - 1, "the": 1}, 2 * half)
    buckets = FrequencyBuckets.of(domain, Frequencies({"lamp": half, "house": half}, 2 * half))
    assert not buckets.place("lamp").is_specific


def test_what_the_domain_does_not_have_is_not_specific() -> None:
    buckets = FrequencyBuckets.of(counted({"lamp": 3}), counted({"the": 2000, "house": 1}))
    for word in ("the", "house", "nowhere"):
        assert buckets.place(word) == (UNSEEN, False)
    assert buckets.place("lamp").is_specific


@pytest.mark.parametrize(("domain_size", "general_size"), [(1_000, 100_000), (100_000, 1_000)])
def test_neither_size_nor_vocabulary_shifts_the_threshold(
    domain_size: int, general_size: int
) -> None:
    per_mille = {"the": (50, 50), "of": (38, 20), "sensor": (20, 10), "lamp": (2, 1)}
    sides = []
    for side, size in enumerate((domain_size, general_size)):
        counts = {word: shares[side] * size // 1000 for word, shares in per_mille.items()}
        rest = size - sum(counts.values())  # up to 10,000 types of its own
        own = Counter(f"{'dg'[side]}{i % 10_000}" for i in range(rest))
        sides.append(Frequencies({**counts, **own}, size))
    buckets = FrequencyBuckets.of(*sides)
    assert not buckets.place("the").is_specific  # the same share
    assert not buckets.place("of").is_specific  # 1.9 times
    assert buckets.place("sensor").is_specific  # exactly twice
    assert buckets.place("lamp").is_specific  # exactly twice, of a rare word


def test_small_general_text_makes_words_specific_by_absence_alone() -> None:
    domain = counted({f"w{i}": 1 + i % 7 for i in range(100)})
    same = FrequencyBuckets.of(domain, domain)
    tiny = FrequencyBuckets.of(domain, counted({"w0": 1}))
    assert not any(same.place(word).is_specific for word in domain.counts)
    assert [word for word in domain.counts if not tiny.place(word).is_specific] == ["w0"]


@pytest.mark.parametrize("empty", ["in-domain", "general"])
def test_a_corpus_without_words_is_refused(empty: str) -> None:
    some, none = Frequencies.of(["a"]), Frequencies.of(["", " "])
    corpora = (none, some) if empty == "in-domain" else (some, none)
    with pytest.raises(FrequencyError, match=f"The {empty} corpus has no word: at least 1 is need"):
        FrequencyBuckets.of(*corpora)

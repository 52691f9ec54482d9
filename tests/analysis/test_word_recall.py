"""Words, buckets and recall, against ranks, fractions and lists of struck-out words."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from lightning_knnmt.analysis.word_recall import (
    BUCKETS,
    ROWS,
    UNSEEN,
    BucketDifference,
    BucketRecall,
    Estimate,
    Frequencies,
    FrequencyBuckets,
    FrequencyError,
    count_words,
    estimate_ratios,
    measure_word_recall,
    recall_difference,
    split_words,
)
from lightning_knnmt.evaluation.scoring import ScoringError

WORDS = [f"w{i}" for i in range(60)]
WEIGHTS = [1 / (i + 1) for i in range(60)]


def sentences(count: int, seed: int, words: list[str] = WORDS) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(words, WEIGHTS[: len(words)], k=rng.randint(0, 12))) + "."
        for _ in range(count)
    ]


def worsened(lines: list[str], share: float, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < share else word for word in line.split())
        for line in lines
    ]


BUCKETS_OF_TOY = FrequencyBuckets.of(
    Frequencies.of(sentences(150, 1, WORDS[:50])), Frequencies.of(sentences(80, 2, WORDS[::2]))
)
REFERENCES = sentences(40, 3)
SYSTEM = worsened(REFERENCES, 0.2, 4)
BASELINE = worsened(REFERENCES, 0.5, 5)


def struck_out(hypothesis: str, reference: str, row: str, specific: bool) -> tuple[int, int]:
    """Found and wanted words of one sentence, by striking each match out of the hypothesis."""
    left, found, wanted = split_words(hypothesis), 0, 0
    for word in split_words(reference):
        place = BUCKETS_OF_TOY.place(word)
        matches = word in left
        if matches:
            left.remove(word)
        if row in ("all", BUCKETS[place.bucket]) and (place.is_specific or not specific):
            found, wanted = found + matches, wanted + 1
    return found, wanted


def table(lines: list[str], row: str, specific: bool) -> np.ndarray:
    """Found and wanted words of each sentence, [sentences, 2]."""
    pairs = zip(lines, REFERENCES, strict=True)
    return np.array([struck_out(ours, gold, row, specific) for ours, gold in pairs])


@pytest.mark.parametrize("specific", [False, True])
def test_recall_is_found_over_wanted_words(specific: bool) -> None:
    result = measure_word_recall(SYSTEM, REFERENCES, BUCKETS_OF_TOY, num_samples=40)
    rows = result.domain_specific if specific else result.all_words
    assert tuple(row.bucket for row in rows) == ROWS
    for row in rows:
        found, wanted = table(SYSTEM, row.bucket, specific).sum(axis=0)
        types = [BUCKETS_OF_TOY.place(word) for word in BUCKETS_OF_TOY.in_domain.counts]
        expected = sum(
            row.bucket in ("all", BUCKETS[place.bucket]) and (place.is_specific or not specific)
            for place in types
        )
        assert (row.found_words, row.reference_words) == (found, wanted)
        assert row.training_types == expected
        if wanted:
            assert row.recall is not None
            assert row.recall.value == found / wanted
            assert 0 <= row.recall.low <= row.recall.high <= 1
    assert sum(row.reference_words > 0 for row in rows) >= 4  # the toy says something


def test_matches_are_clipped_by_the_other_side() -> None:
    buckets = FrequencyBuckets.of(Frequencies.of(["a b c"]), Frequencies.of(["a b c"]))
    hypotheses, references = ["a a a b", "c a"], ["a a b b", "b a c d"]
    everything = measure_word_recall(hypotheses, references, buckets, num_samples=40).all_words[-1]
    assert (everything.found_words, everything.reference_words) == (3 + 2, 8)


def test_the_interval_is_that_of_a_direct_loop_over_the_same_draws() -> None:
    counts = count_words(SYSTEM, REFERENCES, BUCKETS_OF_TOY)
    estimates = estimate_ratios(counts, 50, seed=9)
    draws = np.random.default_rng(9).choice(len(REFERENCES), (50, len(REFERENCES)))
    for group, specific in enumerate((False, True)):
        for estimate, row in zip(estimates[group], ROWS, strict=True):
            sentence_counts = table(SYSTEM, row, specific)
            recalls = []
            for draw in draws:
                found = sum(int(sentence_counts[i, 0]) for i in draw)
                wanted = sum(int(sentence_counts[i, 1]) for i in draw)
                if wanted:
                    recalls.append(found / wanted)
            if not recalls:
                assert estimate is None
                continue
            assert estimate is not None
            low, high = np.percentile(recalls, [2.5, 97.5])
            assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-12)


def test_differences_are_paired() -> None:
    result = recall_difference(SYSTEM, BASELINE, REFERENCES, BUCKETS_OF_TOY, num_samples=50, seed=9)
    draws = np.random.default_rng(9).choice(len(REFERENCES), (50, len(REFERENCES)))
    for row in result.all_words:
        ours, theirs = (table(lines, row.bucket, False) for lines in (SYSTEM, BASELINE))
        if row.difference is None:
            assert row.reference_words == 0
            continue
        value = (ours[:, 0].sum() - theirs[:, 0].sum()) / ours[:, 1].sum()
        drawn = [
            ours[draw, 0].sum() / ours[draw, 1].sum() - theirs[draw, 0].sum() / ours[draw, 1].sum()
            for draw in draws
            if ours[draw, 1].sum()
        ]
        assert row.difference.value == pytest.approx(value)
        bounds = row.difference.low, row.difference.high
        assert bounds == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=1e-12)
    everything = result.all_words[-1].difference
    assert everything is not None
    assert 0 < everything.low < everything.value


def test_a_system_does_not_differ_from_itself() -> None:
    result = recall_difference(SYSTEM, SYSTEM, REFERENCES, BUCKETS_OF_TOY, num_samples=40)
    for row in (*result.all_words, *result.domain_specific):
        assert row.difference in (None, Estimate(0.0, 0.0, 0.0))


def test_a_perfect_and_a_silent_system() -> None:
    perfect = measure_word_recall(REFERENCES, REFERENCES, BUCKETS_OF_TOY, num_samples=40)
    silent = measure_word_recall([""] * len(REFERENCES), REFERENCES, BUCKETS_OF_TOY, num_samples=40)
    for row, nothing in zip(perfect.all_words, silent.all_words, strict=True):
        assert row.recall in (None, Estimate(1.0, 1.0, 1.0))
        assert nothing.recall in (None, Estimate(0.0, 0.0, 0.0))


def test_an_empty_bucket_has_no_recall() -> None:
    buckets = FrequencyBuckets.of(Frequencies.of(["a a b"]), Frequencies.of(["a b"]))
    result = measure_word_recall(["a"], ["a"], buckets, num_samples=40)
    assert result.all_words[-2] == BucketRecall("unseen", 0, 0, 0, None)
    assert result.domain_specific[-1] == BucketRecall("all", 0, 0, 0, None)
    difference = recall_difference([""], ["a"], [""], buckets, num_samples=40)
    assert all(row.difference is None for row in difference.all_words)


def test_what_the_domain_does_not_have_counts_among_all_words_only() -> None:
    # "general" is in general text alone, "new" in neither; "lamp" is the domain's own.
    buckets = FrequencyBuckets.of(
        Frequencies.of(["the lamp"]), Frequencies.of(["the general the general"])
    )
    hypotheses, references = ["the general lamp", "new"], ["the general lamp", "new lamp new"]
    result = measure_word_recall(hypotheses, references, buckets, num_samples=40)
    unseen, everything = result.all_words[-2:]
    assert (unseen.bucket, unseen.reference_words, unseen.found_words) == ("unseen", 3, 2)
    assert (everything.reference_words, everything.found_words) == (6, 4)
    unseen, everything = result.domain_specific[-2:]
    assert unseen == BucketRecall("unseen", 0, 0, 0, None)
    assert (everything.training_types, everything.reference_words) == (1, 2)
    assert everything.found_words == 1

    difference = recall_difference(hypotheses, ["", ""], references, buckets, num_samples=40)
    assert difference.all_words[-2].difference is not None
    assert difference.domain_specific[-2] == BucketDifference("unseen", 0, None)


@pytest.mark.parametrize("lines", [REFERENCES, SYSTEM, BASELINE])
def test_no_domain_specific_word_is_unseen(lines: list[str]) -> None:
    result = measure_word_recall(lines, REFERENCES, BUCKETS_OF_TOY, num_samples=40)
    assert result.all_words[-2].reference_words > 0
    assert result.domain_specific[-2] == BucketRecall("unseen", 0, 0, 0, None)


def test_a_word_of_one_sentence_is_judged_by_the_draws_that_hold_it() -> None:
    buckets = FrequencyBuckets.of(Frequencies.of(["a"]), Frequencies.of(["a"]))
    result = measure_word_recall(["a b", *["a"] * 9], ["a b", *["a"] * 9], buckets)
    assert result.all_words[-2].recall == Estimate(1.0, 1.0, 1.0)  # "unseen"


def test_lines_must_match_and_samples_be_enough() -> None:
    with pytest.raises(ScoringError, match=r"2 .*1 "):
        measure_word_recall(["a", "b"], ["a"], BUCKETS_OF_TOY)
    with pytest.raises(ScoringError, match=r"39.*40"):
        measure_word_recall(["a"], ["a"], BUCKETS_OF_TOY, num_samples=39)


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
    with pytest.raises(FrequencyError, match=empty):
        FrequencyBuckets.of(*corpora)

"""Word recall against lists from which matches are struck out, and a bootstrap drawn by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lightning_knnmt.analysis import word_recall
from lightning_knnmt.analysis.frequency import (
    BUCKETS,
    Frequencies,
    FrequencyBuckets,
    split_words,
)
from lightning_knnmt.analysis.word_recall import (
    ROWS,
    BucketDifference,
    BucketRecall,
    Estimate,
    count_words,
    estimate_ratios,
    measure_word_recall,
    recall_difference,
    resampled_sums,
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
    assert everything.excludes_zero
    assert everything.value > 0


def test_a_system_does_not_differ_from_itself() -> None:
    result = recall_difference(SYSTEM, SYSTEM, REFERENCES, BUCKETS_OF_TOY, num_samples=40)
    for row in (*result.all_words, *result.domain_specific):
        assert row.difference in (None, Estimate(0.0, 0.0, 0.0))
    assert not Estimate(0.0, 0.0, 0.0).excludes_zero
    assert Estimate(-0.2, -0.3, -0.1).excludes_zero


def test_draws_in_pieces_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_words(SYSTEM, REFERENCES, BUCKETS_OF_TOY)
    at_once = resampled_sums(counts, 50, seed=2)
    monkeypatch.setattr(word_recall, "DRAWS_AT_ONCE", 7 * len(REFERENCES))
    np.testing.assert_array_equal(resampled_sums(counts, 50, seed=2), at_once)
    assert at_once.shape == (50, 2, 2, len(ROWS))


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
    with pytest.raises(ScoringError, match="2 hypotheses but 1 references"):
        measure_word_recall(["a", "b"], ["a"], BUCKETS_OF_TOY)
    with pytest.raises(ScoringError, match=r"39 bootstrap samples .* needs at least 40"):
        measure_word_recall(["a"], ["a"], BUCKETS_OF_TOY, num_samples=39)

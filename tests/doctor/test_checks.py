"""Single checks against numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_knnmt.doctor.checks import (
    check_bleu,
    check_pieces,
    check_round_trip,
    check_style,
    check_unknown,
    contrast,
)
from lightning_knnmt.doctor.retrieval_checks import (
    check_gold,
    check_nearest,
    check_temperature,
    gold_probs,
)
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.retrieval import FixedCombiner, Record


@pytest.fixture
def record() -> Record:
    """Three tokens with two neighbours; the last token found none."""
    return Record(
        tokens=torch.tensor([[5, 6], [7, 5], [0, 0]], dtype=torch.int32),
        distances=torch.tensor([[1.0, 3.0], [2.0, 2.0], [math.inf, math.inf]]),
        entries=torch.tensor([[0, 1], [2, 3], [-1, -1]]),
        gold=torch.tensor([5, 5, 0], dtype=torch.int32),
        gold_log_probs=torch.tensor([0.5, 0.25, 0.125]).log(),
        neighbour_log_probs=torch.zeros(3, 2),
        sentences=torch.zeros(3, dtype=torch.int32),
        queries=None,
    )


def test_gold_probs_are_the_mixture(record: Record) -> None:
    # T = 2: e^0 / (e^0 + e^-1) for the first; one half for the second; nothing for the third.
    knn = [1 / (1 + math.exp(-1)), 0.5, None]
    nmt = [0.5, 0.25, 0.125]
    expected = [p if q is None else 0.7 * p + 0.3 * q for p, q in zip(nmt, knn, strict=True)]
    np.testing.assert_allclose(gold_probs(record, FixedCombiner(2, 0.3, 2.0)), expected, rtol=1e-6)
    finding = check_gold(record, FixedCombiner(2, 0.3, 2.0))
    assert finding.verdict == "ok"
    assert f"{sum(nmt) / 3:.3f} without retrieval, {sum(expected) / 3:.3f} with it" in finding.text
    logs = [sum(map(math.log, each)) / 3 for each in (nmt, expected)]
    assert f"{logs[0]:.2f} and {logs[1]:.2f}" in finding.text


def test_retrieval_that_does_not_help_is_told(record: Record) -> None:
    wrong = replace(record, gold=torch.tensor([8, 8, 8], dtype=torch.int32))
    assert (
        "retrieval from this text does not help"
        in check_gold(wrong, FixedCombiner(2, 0.3, 2.0)).text
    )


def test_the_nearest_neighbour_counts_as_right_where_there_is_one(record: Record) -> None:
    finding = check_nearest(record)
    assert "right for 33.3% of the held-out tokens; median distance 1" in finding.text
    wrong = replace(record, gold=torch.tensor([8, 8, 8], dtype=torch.int32))
    assert check_nearest(wrong).verdict == "problem"


def test_a_temperature_beside_the_grid_is_a_warning(record: Record) -> None:
    suggested = FixedCombiner(2, 0.3, 2.0)  # the only spread is 2, so tuning tries 0.125 to 8
    verdicts = {
        temperature: check_temperature(record, suggested, temperature).verdict
        for temperature in (0.01, 0.1, 0.13, 8.0, 9.0, 33.0)
    }
    assert list(verdicts.values()) == ["problem", "warning", "ok", "ok", "warning", "problem"]
    assert "2 suits these distances (0.12 to 8)" in check_temperature(record, suggested, None).text


def test_unknown_and_pieces_leave_eos_out() -> None:
    ids = [[9, 1, 9, 2], [1, 9, 2]]
    finding = check_unknown(ids, 1, ["}", "{", "}"], "pt")
    assert finding.verdict == "problem"
    assert finding.text.startswith("40.00% of the pieces are <unk>")
    assert "lacks } {" in finding.text
    many = check_unknown(ids, 1, [chr(ord("a") + i) for i in range(20)], "pt").text
    assert "a b c d e f g h i j ..." in many
    assert check_pieces(["a b", "c"], ids, "pt").text.startswith("1.67 pieces")
    assert check_pieces(["a"], [[9] * 6], "pt").verdict == "warning"
    assert check_pieces(["a" * 30], [[9] * 26], "zh").verdict == "ok"  # hardly any spaces


def test_a_broken_round_trip_shows_the_difference() -> None:
    finding = check_round_trip(["a b", "c d "], ["a b", "c d"], [False, False], "en")
    assert finding.verdict == "ok"
    assert finding.text.startswith("100.0%")
    start = "a long sentence whose end is different from what it was before, namely: "
    lines, decoded = [f"{start}ﬁne", "c d"], [f"{start}fine", "c d"]
    finding = check_round_trip(lines, decoded, [False, False], "en")
    assert finding.verdict == "warning"
    assert finding.text.startswith("50.0%")
    assert "namely: ﬁne' became '" in finding.text
    assert "namely: fine'" in finding.text


def test_characters_that_are_lost_are_a_warning() -> None:
    lines = ["as it is"] * 98 + ["{name} está", "x\u00a0y"]
    decoded = ["as it is"] * 98 + [" ⁇ name ⁇  está", "x y"]
    finding = check_round_trip(lines, decoded, [False] * 98 + [True, False], "pt")
    assert finding.verdict == "warning"  # though fewer lines than 5 % are broken
    assert "'{name} está' became ' ⁇ name ⁇  está'" in finding.text
    assert "1 of 100" in finding.text


@pytest.mark.parametrize(
    ("before", "after"),
    [("same", "same and more"), ("x" * 90 + "A" + "y" * 90, "x" * 90 + "B" + "y" * 90), ("", "a")],
)
def test_contrasted_lines_show_where_they_differ(before: str, after: str) -> None:
    quotes = contrast(before, after)
    assert quotes[0] != quotes[1]
    assert all(len(quote) <= 62 for quote in quotes)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("Un@@ fort@@ unately not.", "BPE"),
        ("▁Unfortunately ▁not.", "SentencePiece"),
        ("It &apos;s not.", "Moses"),
        ("Unfortunately not .", "punctuation"),
        ("unfortunately not.", "capitals"),
    ],
)
def test_each_style_is_told(reference: str, words: str) -> None:
    finding = check_style(["Unfortunately not."], [reference])
    assert finding.verdict == "problem"
    assert words in finding.text
    assert check_style(["Unfortunately not."], ["It is raining."]).verdict == "ok"


def test_a_copied_source_is_named() -> None:
    sources = ["the door of the house is open today .", "the light in the room is red now ."]
    references = ["a porta da casa está aberta hoje .", "a luz da sala está vermelha agora ."]
    bleu = Bleu("13a")
    finding = check_bleu(sources, references, sources, bleu)
    assert finding.verdict != "ok"
    assert "copies the source" in finding.text
    assert check_bleu(references, references, sources, bleu).verdict == "ok"

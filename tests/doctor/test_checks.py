"""Single checks against numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_knnmt.doctor.checks import (
    check_bleu,
    check_gold,
    check_nearest,
    check_pieces,
    check_round_trip,
    check_style,
    check_temperature,
    check_unknown,
    gold_probs,
)
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.retrieval import Record
from lightning_knnmt.retrieval.tuning import Setting


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
    np.testing.assert_allclose(gold_probs(record, Setting(2, 0.3, 2.0)), expected, rtol=1e-6)
    finding = check_gold(record, Setting(2, 0.3, 2.0))
    assert finding.verdict == "ok"
    assert f"{sum(nmt) / 3:.3f} without retrieval, {sum(expected) / 3:.3f} with it" in finding.text
    logs = [sum(map(math.log, each)) / 3 for each in (nmt, expected)]
    assert f"{logs[0]:.2f} and {logs[1]:.2f}" in finding.text


def test_retrieval_that_does_not_help_is_told(record: Record) -> None:
    wrong = replace(record, gold=torch.tensor([8, 8, 8], dtype=torch.int32))
    assert "retrieval from this text does not help" in check_gold(wrong, Setting(2, 0.3, 2.0)).text


def test_the_nearest_neighbour_counts_as_right_where_there_is_one(record: Record) -> None:
    finding = check_nearest(record)
    assert "right for 33.3% of the held-out tokens; median distance 1" in finding.text
    wrong = replace(record, gold=torch.tensor([8, 8, 8], dtype=torch.int32))
    assert check_nearest(wrong).verdict == "problem"


def test_a_temperature_beside_the_grid_is_a_warning(record: Record) -> None:
    suggested = Setting(2, 0.3, 2.0)  # the only spread is 2, so tuning tries 0.125 to 8
    verdicts = {
        temperature: check_temperature(record, suggested, temperature).verdict
        for temperature in (0.01, 0.1, 0.13, 8.0, 9.0, 33.0)
    }
    assert list(verdicts.values()) == ["problem", "warning", "ok", "ok", "warning", "problem"]
    assert "2 suits these distances (0.12 to 8)" in check_temperature(record, suggested, None).text


def test_unknown_and_pieces_leave_eos_out() -> None:
    ids = [[9, 1, 9, 2], [1, 9, 2]]
    assert check_unknown(ids, 1, "pt").text.startswith("40.00% of the pieces are <unk>")
    assert check_pieces(["a b", "c"], ids, "pt").text == "1.67 pieces a word."
    assert check_pieces(["a"], [[9] * 6], "pt").verdict == "warning"
    assert check_pieces(["a" * 30], [[9] * 26], "zh").verdict == "ok"  # hardly any spaces


def test_a_broken_round_trip_shows_an_example() -> None:
    finding = check_round_trip(["a b", "c d "], ["a b", "c d"], "en")
    assert finding.text == "100.0% of the lines come back from encoding and decoding unchanged."
    finding = check_round_trip(["a {b}", "c d"], ["a b", "c d"], "en")
    assert finding.verdict == "warning"
    assert finding.text.endswith("50.0% of the lines come back from encoding and decoding unchanged"
                                 "; 'a {b}' became 'a b'.")  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("Un@@ fort@@ unately not.", "joints of BPE"),
        ("▁Unfortunately ▁not.", "SentencePiece's mark"),
        ("It &apos;s not.", "escaped by Moses"),
        ("Unfortunately not .", "punctuation apart"),
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
    finding = check_bleu(sources, references, sources, Bleu("13a"))
    assert finding.verdict != "ok"
    assert "it copies the source" in finding.text
    assert check_bleu(references, references, sources, Bleu("13a")).verdict == "ok"

"""Predictions compared, against sums in NumPy float64 written for reading."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_knnmt.analysis import predictions
from lightning_knnmt.analysis.predictions import PredictionComparison, kl_divergence
from lightning_knnmt.analysis.retrieved import AnalysisError

M, V = 23, 9
Array = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture
def systems() -> dict[str, Tensor]:
    """Two softmaxes, and a third that excludes two tokens."""
    three = torch.randn(M, V)
    three[:, 2:4] = -torch.inf
    logits = {"nmt": torch.randn(M, V), "knn": 2 * torch.randn(M, V), "half": three}
    return {name: part.log_softmax(dim=-1) for name, part in logits.items()}


@pytest.fixture
def gold() -> Tensor:
    return torch.randint(0, V, (M,))


@pytest.fixture
def sentences() -> Tensor:
    """Of 1, 2, 3 ... tokens, in the order of batches rather than of the text."""
    return torch.repeat_interleave(
        torch.tensor([7, 1, 5, 0, 3, 4]), torch.tensor([1, 2, 3, 4, 6, 7])
    )


def kl(p: Array, q: Array) -> float:
    total = 0.0
    for one, other in zip(p, q, strict=True):
        if one > 0:
            total += one * math.log(one / other) if other > 0 else math.inf
    return total


def js(p: Array, q: Array) -> float:
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def compared(systems: dict[str, Tensor], gold: Tensor, sentences: Tensor) -> PredictionComparison:
    """All of it, in chunks of seven tokens."""
    comparison = PredictionComparison()
    for start in range(0, M, 7):
        rows = slice(start, start + 7)
        some = {name: part[rows] for name, part in systems.items()}
        comparison.add(some, gold[rows], sentences[rows])
    return comparison


def test_gold_probabilities(systems: dict[str, Tensor], gold: Tensor, sentences: Tensor) -> None:
    comparison = compared(systems, gold, sentences)
    report = comparison.report()
    assert (report.num_tokens, report.num_sentences) == (M, 6)
    assert list(report.gold) == ["nmt", "knn", "half"]
    for name, found in report.gold.items():
        probs = np.exp(systems[name].double().numpy()[np.arange(M), gold.numpy()])
        np.testing.assert_allclose(comparison.gold_probs()[name], probs, rtol=1e-5)
        ascending = sorted(probs)
        summary = found.probabilities
        assert summary.count == M
        assert summary.mean == pytest.approx(sum(probs) / M)
        assert summary.variance == pytest.approx(sum((probs - summary.mean) ** 2) / M, rel=1e-5)
        # the 6th, 12th and 18th of 23
        quartiles = [summary.lower_quartile, summary.median, summary.upper_quartile]
        assert quartiles == pytest.approx([ascending[5], ascending[11], ascending[17]])
        assert found.low < summary.mean < found.high
        logs = systems[name].double().numpy()[np.arange(M), gold.numpy()]
        assert found.mean_log == pytest.approx(logs.mean(), rel=1e-5)


@pytest.mark.parametrize("rows_at_once", [3, 100])
def test_agreements(
    systems: dict[str, Tensor],
    gold: Tensor,
    sentences: Tensor,
    rows_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predictions, "ROWS_AT_ONCE", rows_at_once)
    agreements = compared(systems, gold, sentences).report(10).agreements
    pairs = [(found.first, found.second) for found in agreements]
    assert pairs == [("nmt", "knn"), ("nmt", "half"), ("knn", "half")]
    for found in agreements:
        p, q = (np.exp(systems[name].double().numpy()) for name in (found.first, found.second))
        same = [a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)]
        forth = sorted(kl(a, b) for a, b in zip(p, q, strict=True))
        back = sorted(kl(b, a) for a, b in zip(p, q, strict=True))
        middle = sorted(js(a, b) for a, b in zip(p, q, strict=True))
        assert found.top_agreement == pytest.approx(sum(same) / M)
        gains = (p - q)[np.arange(M), gold.numpy()]
        assert found.gold_gain == pytest.approx(gains.mean(), rel=1e-4)
        low, high = found.gold_gain_interval  # of ten resamples, which sets of sentences bound
        by_sentence = {s: gains[sentences.numpy() == s].mean() for s in sentences.tolist()}
        assert min(by_sentence.values()) < low < high < max(by_sentence.values())
        assert found.mean_kl == pytest.approx(sum(forth) / M, rel=1e-5)
        assert found.median_kl == pytest.approx(forth[11], rel=1e-5)
        assert found.mean_reverse_kl == pytest.approx(sum(back) / M, rel=1e-5)
        assert found.median_reverse_kl == pytest.approx(back[11], rel=1e-5)
        assert found.mean_js == pytest.approx(sum(middle) / M, rel=1e-5)
        assert found.median_js == pytest.approx(middle[11], rel=1e-5)
    assert agreements[1].mean_kl == math.inf
    assert agreements[1].mean_reverse_kl < math.inf


def test_a_system_agrees_with_itself(
    systems: dict[str, Tensor], gold: Tensor, sentences: Tensor
) -> None:
    twice = {"one": systems["half"], "other": systems["half"]}
    (found,) = compared(twice, gold, sentences).report(10).agreements
    assert (found.top_agreement, found.gold_gain, found.gold_gain_interval) == (1.0, 0.0, (0, 0))
    assert dataclasses.astuple(found)[5:] == pytest.approx((0,) * 6, abs=1e-6)


def test_divergences_at_their_ends() -> None:
    left, right = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    tiny = torch.tensor([0.0, -200.0])  # its probability is 0 in float32
    assert float(kl_divergence(left, right)) == math.inf
    assert float(kl_divergence(tiny, left)) == 0.0
    smallest = torch.tensor([0.0, -103.2])  # half of its probability would be 0
    for one, other, expected in ((left, right, math.log(2)), (smallest, left, 0.0)):
        comparison = PredictionComparison()
        systems = {"one": one[None], "other": other[None]}
        comparison.add(systems, torch.tensor([0]), torch.tensor([0]))
        (found,) = comparison.report(1).agreements
        assert found.mean_js == pytest.approx(expected)


def test_a_report_goes_into_json(
    systems: dict[str, Tensor], gold: Tensor, sentences: Tensor
) -> None:
    report = dataclasses.asdict(compared(systems, gold, sentences).report(10))
    again = json.loads(json.dumps(report))
    assert again["gold"] == report["gold"]
    assert again["agreements"] == json.loads(json.dumps(report["agreements"]))
    assert again["agreements"][0]["gold_gain"] == report["agreements"][0]["gold_gain"]


def test_what_cannot_be_compared(
    systems: dict[str, Tensor], gold: Tensor, sentences: Tensor
) -> None:
    with pytest.raises(AnalysisError, match="no tokens"):
        PredictionComparison().report()
    with pytest.raises(AnalysisError, match="none"):
        PredictionComparison().add({}, gold, sentences)
    comparison = compared(systems, gold, sentences)
    with pytest.raises(AnalysisError, match=r"nmt, .*nmt, knn, half"):
        comparison.add({"nmt": systems["nmt"]}, gold, sentences)
    narrow = {**systems, "knn": systems["knn"][:, :4]}
    with pytest.raises(AnalysisError, match="vocabulary"):
        comparison.add(narrow, gold, sentences)
    with pytest.raises(AnalysisError, match=r"\(4,\).*\(23,\)"):
        comparison.add(systems, gold[:4], sentences)

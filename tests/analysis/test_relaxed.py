"""Both forms of kNN-MT, against an updated matrix and a dictionary of probabilities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.analysis import retrieved
from lightning_knnmt.analysis.gradient_steps import relaxed_against_softmax
from lightning_knnmt.analysis.retrieved import AnalysisError
from lightning_knnmt.retrieval import Metric, Record

M, K, D, V, ENTRIES = 9, 4, 5, 11, 30
WEIGHT = 0.4


@pytest.fixture
def record() -> Record:
    """Nine tokens; the fourth misses a neighbour and the last one found none."""
    entries = torch.stack([torch.randperm(ENTRIES)[:K] for _ in range(M)])
    entries[3, 3] = -1
    entries[8] = -1
    missing = entries < 0
    return Record(
        tokens=torch.randint(1, 5, (M, K)).masked_fill(missing, 0).int(),
        distances=torch.zeros(M, K),  # of another metric
        entries=entries,
        gold=torch.zeros(M).int(),
        gold_log_probs=torch.zeros(M),
        neighbour_log_probs=torch.zeros(M, K),
        sentences=torch.zeros(M).int(),
        queries=torch.randn(M, D),
    )


@pytest.fixture
def keys() -> Tensor:
    return torch.randn(ENTRIES, D).half()


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def projection(request: pytest.FixtureRequest) -> nn.Linear:
    return nn.Linear(D, V, bias=request.param, dtype=torch.float64)


def both_forms(
    record: Record,
    keys: Tensor,
    projection: nn.Linear,
    metric: Metric,
    k: int,
    temperature: float,
    token: int,
) -> tuple[list[float], list[float]]:
    """The mixture and the relaxed prediction of one token, probabilities over the vocabulary."""
    assert record.queries is not None
    h = record.queries[token].double()
    weight = projection.weight.detach()
    bias = torch.zeros(V) if projection.bias is None else projection.bias.detach()
    nmt = torch.softmax(weight @ h + bias, dim=0)
    masses = torch.zeros(V, dtype=torch.float64)
    gradient = -temperature * weight
    for entry, value in zip(record.entries[token, :k], record.tokens[token, :k], strict=True):
        if entry < 0:
            continue
        key = keys[entry].double()
        if metric == "l2":
            masses[value] += math.exp(-float((h - key) @ (h - key)) / temperature)
            gradient[value] += 2 * key
        else:
            masses[value] += math.exp(float(h @ key) / temperature)
            gradient[value] += key
    mixture = (1 - WEIGHT) * nmt + WEIGHT * masses / masses.sum()
    updated = weight + WEIGHT / temperature * gradient
    relaxed = torch.softmax(updated @ h + (1 - WEIGHT) * bias, dim=0)
    return mixture.tolist(), relaxed.tolist()


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_both_forms_for_every_k_and_temperature(
    record: Record,
    keys: Tensor,
    projection: nn.Linear,
    metric: Metric,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieved, "LOGITS_AT_ONCE", 3 * K * V)  # three tokens at a time
    ks, temperatures = (1, 4), (0.7, 20.0)
    results = relaxed_against_softmax(
        record,
        keys,
        projection,
        metric,
        num_neighbours=ks,
        temperatures=temperatures,
        knn_weight=WEIGHT,
    )
    settings = [(k, temperature) for k in ks for temperature in temperatures]
    assert [(result.num_neighbours, result.temperature) for result in results] == settings
    for (k, temperature), result in zip(settings, results, strict=True):
        kls, same = [], []
        for token in range(8):
            p, q = both_forms(record, keys, projection, metric, k, temperature, token)
            kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(p.index(max(p)) == q.index(max(q)))
        assert (result.metric, result.knn_weight, result.num_tokens) == (metric, WEIGHT, 8)
        assert result.mean_kl == pytest.approx(sum(kls) / 8, rel=1e-5)
        assert result.median_kl == pytest.approx(sorted(kls)[3], rel=1e-5)
        assert result.top_agreement == sum(same) / 8


def test_without_retrieval_both_are_the_model(
    record: Record, keys: Tensor, projection: nn.Linear
) -> None:
    (result,) = relaxed_against_softmax(
        record, keys, projection, "l2", num_neighbours=[2], temperatures=[5.0], knn_weight=0.0
    )
    assert result.mean_kl == pytest.approx(0.0, abs=1e-9)
    assert result.top_agreement == 1.0


def test_without_any_neighbour_there_is_nothing_to_compare(
    record: Record, keys: Tensor, projection: nn.Linear
) -> None:
    empty = dataclasses.replace(record, entries=torch.full((M, K), -1))
    (result,) = relaxed_against_softmax(
        empty, keys, projection, "l2", num_neighbours=[2], temperatures=[5.0], knn_weight=0.5
    )
    assert (result.num_tokens, result.mean_kl, result.top_agreement) == (0, None, None)


@pytest.mark.parametrize(
    ("ks", "temperatures", "weight", "message"),
    [
        ([], [1.0], 0.5, r"k .*\[\]"),
        ([0], [1.0], 0.5, r"k .*\[0\].* 1"),
        ([5], [1.0], 0.5, r"5 .*4 .*1 to 4"),
        ([1], [], 0.5, r"temperatures .*\[\]"),
        ([1], [0.0], 0.5, r"temperatures .*\[0\.0\].* 0"),
        ([1], [1.0], 1.5, r"λ .*1\.5.*0 .*1"),
    ],
)
def test_settings_that_are_none(
    record: Record,
    keys: Tensor,
    projection: nn.Linear,
    ks: Sequence[int],
    temperatures: Sequence[float],
    weight: float,
    message: str,
) -> None:
    with pytest.raises(AnalysisError, match=message):
        relaxed_against_softmax(
            record,
            keys,
            projection,
            "l2",
            num_neighbours=ks,
            temperatures=temperatures,
            knn_weight=weight,
        )

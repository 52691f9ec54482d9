"""One explicit step in closed form, against a cloned layer and torch's own optimizer."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.analysis import (
    AnalysisError,
    ExplicitStepDistribution,
    explicit_step_log_probs,
    retrieved,
    take_explicit_steps,
)
from lightning_knnmt.analysis import explicit_step as module
from lightning_knnmt.retrieval import FlatIndex, Record, Recorder, Retriever

D, V, K, ENTRIES, LEARNING_RATE = 5, 9, 3, 40, 0.1


class SomeMissing(FlatIndex):
    """Loses the last neighbour of every query, and all of the queries whose first number is big."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, entries = super().search(queries, k)
        lost = (torch.arange(k) == k - 1) | (queries[:, :1] > 1.0)
        return distances.masked_fill(lost, torch.inf), entries.masked_fill(lost, -1)


class Base:
    """p_NMT of a layer."""

    def __init__(self, projection: nn.Linear) -> None:
        self.projection = projection

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.projection(hidden).log_softmax(dim=-1)  # type: ignore[no-any-return]

    def top_with(self, hidden: Tensor, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self(hidden)
        ids = torch.cat([log_probs.topk(n).indices, tokens], dim=-1)
        return log_probs.gather(-1, ids), ids


@pytest.fixture
def keys() -> Tensor:
    return torch.randn(ENTRIES, D).half()


@pytest.fixture
def hidden() -> Tensor:
    hidden = torch.randn(8, D)
    hidden[5, 0] = 2.0  # finds nothing
    return hidden


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def projection(request: pytest.FixtureRequest) -> nn.Linear:
    return nn.Linear(D, V, bias=request.param)


@pytest.fixture
def retriever(keys: Tensor) -> Retriever:
    return Retriever(torch.randint(0, 4, (ENTRIES,)), SomeMissing(keys), K)


@pytest.fixture
def record(retriever: Retriever, projection: nn.Linear, hidden: Tensor) -> Record:
    recorder = Recorder(retriever, Base(projection), keep_queries=True)
    with torch.no_grad():
        recorder.write(hidden, torch.randint(0, V, (8,)), torch.zeros(8).long())
    return recorder.finish()


def by_sgd(projection: nn.Linear, record: Record, keys: Tensor, k: int) -> Tensor:
    """Clones the layer for each token, takes a step and asks it: log-probabilities, [M, V]."""
    assert record.queries is not None
    rows = []
    for token, query in enumerate(record.queries):
        clone = copy.deepcopy(projection)
        optimizer = torch.optim.SGD(clone.parameters(), lr=LEARNING_RATE, momentum=0.9)
        found = record.entries[token, :k][record.entries[token, :k] >= 0]
        labels = record.tokens[token, : len(found)].long()
        logits = clone(keys[found].float())
        torch.autograd.backward(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        optimizer.step()
        rows.append(clone(query).log_softmax(dim=-1).detach())
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 3])
def test_a_step_is_that_of_sgd(
    record: Record, keys: Tensor, projection: nn.Linear, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieved, "LOGITS_AT_ONCE", 3 * k * V)  # three tokens at a time
    before = projection.weight.clone()
    expected = by_sgd(projection, record, keys, k)
    parts = list(explicit_step_log_probs(record, keys, projection, k, LEARNING_RATE))
    assert [part.tolist() for part, _ in parts] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    torch.testing.assert_close(torch.cat([log_probs for _, log_probs in parts]), expected)
    result = take_explicit_steps(record, keys, projection, k, LEARNING_RATE)
    gold = record.gold.long()
    torch.testing.assert_close(result.gold_log_probs, expected[torch.arange(8), gold])
    assert result.top_tokens.tolist() == expected.argmax(dim=1).tolist()
    assert torch.equal(projection.weight, before)


def test_a_token_without_neighbours_keeps_its_distribution(
    record: Record, keys: Tensor, projection: nn.Linear
) -> None:
    changed = take_explicit_steps(record, keys, projection, K).gold_log_probs
    same = torch.isclose(changed, record.gold_log_probs, atol=1e-6, rtol=0)
    assert same.tolist() == [bool(entry < 0) for entry in record.entries[:, 0]]
    assert same.any()


def test_the_distribution_takes_the_same_steps(
    record: Record,
    keys: Tensor,
    projection: nn.Linear,
    retriever: Retriever,
    hidden: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 3 * K * V)
    expected = by_sgd(projection, record, keys, K)
    distribution = ExplicitStepDistribution(projection, retriever, keys.numpy(), LEARNING_RATE)
    found = distribution(hidden.view(2, 4, D))
    torch.testing.assert_close(found, expected.view(2, 4, V))
    best, tokens = distribution.top(hidden, 2)
    torch.testing.assert_close(best, expected.topk(2).values)
    torch.testing.assert_close(expected.gather(1, tokens), best)
    assert distribution(hidden[:0]).shape == (0, V)


def test_a_record_without_queries(record: Record, keys: Tensor, projection: nn.Linear) -> None:
    without = dataclasses.replace(record, queries=None)
    with pytest.raises(AnalysisError, match="keep_queries=True"):
        take_explicit_steps(without, keys, projection, K)

"""One explicit step in closed form, against a cloned layer and torch's own optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.analysis import gradient_steps
from lightning_knnmt.analysis.gradient_steps import ExplicitStepDistribution
from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import FlatIndex, LocalSource, Retriever

D, V, K, ENTRIES, LEARNING_RATE = 5, 9, 3, 40, 0.1


class SomeMissing(FlatIndex):
    """Loses the last neighbour of every query, and all of the queries whose first number is big."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, entries = super().search(queries, k)
        lost = ((torch.arange(k) == k - 1) & (k > 1)) | (queries[:, :1] > 1.0)
        return distances.masked_fill(lost, torch.inf), entries.masked_fill(lost, -1)


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


@pytest.fixture(params=[1, K])
def retriever(keys: Tensor, request: pytest.FixtureRequest) -> Retriever:
    source = LocalSource(SomeMissing(keys), torch.randint(0, 4, (ENTRIES,)))
    return Retriever(source, request.param)


def by_sgd(projection: nn.Linear, retriever: Retriever, keys: Tensor, hidden: Tensor) -> Tensor:
    """Clones the layer for each state, takes a step and asks it: log-probabilities, [N, V]."""
    neighbours = retriever(DecoderStates(hidden))
    rows = []
    for query, tokens, entries in zip(hidden, neighbours.tokens, neighbours.entries, strict=True):
        clone = copy.deepcopy(projection)
        optimizer = torch.optim.SGD(clone.parameters(), lr=LEARNING_RATE, momentum=0.9)
        found = entries >= 0
        logits = clone(keys[entries[found]].float())
        loss = nn.functional.cross_entropy(logits, tokens[found], reduction="sum")
        torch.autograd.backward(loss)
        optimizer.step()
        rows.append(clone(query).log_softmax(dim=-1).detach())
    return torch.stack(rows)


@pytest.mark.parametrize("rows_at_once", [3, 100])
def test_the_steps_are_those_of_sgd(
    keys: Tensor,
    projection: nn.Linear,
    retriever: Retriever,
    hidden: Tensor,
    rows_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound = rows_at_once * retriever.num_neighbours * V
    monkeypatch.setattr(gradient_steps, "LOGITS_AT_ONCE", bound)
    before = projection.weight.clone()
    expected = by_sgd(projection, retriever, keys, hidden)
    distribution = ExplicitStepDistribution(projection, retriever, keys.numpy(), LEARNING_RATE)
    found = distribution(DecoderStates(hidden.view(2, 4, D)))
    torch.testing.assert_close(found, expected.view(2, 4, V))
    best, tokens = distribution.top(DecoderStates(hidden), 2)
    torch.testing.assert_close(best, expected.topk(2).values)
    torch.testing.assert_close(expected.gather(1, tokens), best)
    assert distribution(DecoderStates(hidden[:0])).shape == (0, V)
    assert torch.equal(projection.weight, before)


def test_a_state_without_neighbours_keeps_its_distribution(
    keys: Tensor, projection: nn.Linear, retriever: Retriever, hidden: Tensor
) -> None:
    states = DecoderStates(hidden)
    changed = ExplicitStepDistribution(projection, retriever, keys.numpy())(states)
    alone = projection(hidden).log_softmax(dim=-1)
    same = torch.isclose(changed, alone, atol=1e-6, rtol=0).all(dim=1)
    assert same.tolist() == [bool(row < 0) for row in retriever(states).entries[:, 0]]
    assert same.any()

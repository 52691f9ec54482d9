"""From hidden states to neighbours."""

import pytest
import torch
from torch import Tensor

from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import FlatIndex, LocalSource, Metric, Retriever

KEYS = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
VALUES = torch.arange(30, dtype=torch.int32) + 100


def test_shapes_and_types() -> None:
    retriever = Retriever(LocalSource(FlatIndex(KEYS.half()), VALUES), 4)
    neighbours = retriever(DecoderStates(torch.randn(2, 3, 8)))
    assert [each.shape for each in neighbours] == [(2, 3, 4)] * 3
    assert [each.dtype for each in neighbours] == [torch.int64, torch.float32, torch.int64]
    assert torch.equal(neighbours.tokens, neighbours.entries + 100)
    assert (neighbours.distances.diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sentences_own_entry_is_at_distance_zero(dtype: torch.dtype) -> None:
    neighbours = Retriever(LocalSource(FlatIndex(KEYS.half()), VALUES), 1)(
        DecoderStates(KEYS.to(dtype))
    )
    assert torch.equal(neighbours.entries[:, 0], torch.arange(30))
    assert torch.equal(neighbours.distances, torch.zeros(30, 1))


def test_it_keeps_no_graph() -> None:
    states = DecoderStates(torch.randn(2, 8, requires_grad=True))
    retriever = Retriever(LocalSource(FlatIndex(KEYS), VALUES), 2)
    assert not retriever(states).distances.requires_grad


class Empty:
    """An approximate index that found one neighbour only."""

    metric: Metric = "l2"
    description = "empty"
    num_bytes = 0

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances = torch.full((len(queries), k), float("inf"))
        distances[:, 0] = 1
        entries = torch.full((len(queries), k), -1)
        entries[:, 0] = 5
        return distances, entries


def test_missing_neighbours_get_a_valid_token() -> None:
    neighbours = Retriever(LocalSource(Empty(), VALUES), 3)(DecoderStates(torch.zeros(1, 8)))
    assert neighbours.tokens.tolist() == [[105, 0, 0]]
    assert neighbours.entries.tolist() == [[5, -1, -1]]
    assert neighbours.distances[0, 1:].isinf().all()


def test_more_neighbours_than_entries() -> None:
    with pytest.raises(ValueError, match=r"\b31\b.*\b30\b"):
        Retriever(LocalSource(FlatIndex(KEYS), VALUES), 31)

"""Recall at k against exact search."""

import torch
from torch import Tensor

from lightning_knnmt.retrieval import FlatIndex, Metric
from lightning_knnmt.retrieval.recall import Truth, measure_recall, recall_at_k


class HalfBlind:
    """Finds the nearest half of what is asked for."""

    metric: Metric = "l2"
    description = "half blind"
    num_bytes = 0

    def __init__(self, index: FlatIndex) -> None:
        self.index = index

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, entries = self.index.search(queries, k)
        distances[:, k // 2 :], entries[:, k // 2 :] = float("inf"), -1
        return distances, entries


def test_what_exact_search_finds_is_everything() -> None:
    exact, queries = FlatIndex(torch.randn(300, 8).half()), torch.randn(100, 8)
    assert measure_recall(exact, Truth.of(exact, queries, 10)) == 1.0


def test_half_is_half() -> None:
    exact, queries = FlatIndex(torch.randn(300, 8).half()), torch.randn(100, 8)
    assert measure_recall(HalfBlind(exact), Truth.of(exact, queries, 10)) == 0.5


def test_wrong_entries_are_not_recalled() -> None:
    exact, queries = FlatIndex(torch.randn(300, 8).half()), torch.randn(20, 8)
    farthest = exact.search(queries.half().float(), 300)[1][:, -5:]
    assert recall_at_k(Truth.of(exact, queries, 5), farthest) == 0.0


def test_among_equals_any_will_do() -> None:
    exact = FlatIndex(torch.ones(10, 4).half())
    truth = Truth.of(exact, torch.zeros(1, 4), 3)
    assert recall_at_k(truth, torch.tensor([[9, 4, 6]])) == 1.0

"""How much of the truth an index finds: recall at k against exact search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_knnmt.retrieval.index import FlatIndex, Index

QUERIES_AT_ONCE = 64  # as many rows as a decoding step has
RELATIVE_TOLERANCE = 1e-5  # of float32 sums over the dimensions


@dataclass(frozen=True)
class Truth:
    """What exact search finds for some queries.

    Attributes:
        exact: The index that found it.
        queries: [Q, D] float32.
        farthest: Distance of each query's k-th neighbour, [Q, 1].
        k: Neighbours per query.
    """

    exact: FlatIndex
    queries: Tensor
    farthest: Tensor
    k: int

    @classmethod
    def of(cls, exact: FlatIndex, queries: Tensor, k: int) -> Truth:
        """Searches for the queries, [Q, D], rounded to float16 as a retriever rounds them."""
        queries = queries.half().float()
        farthest = [exact.search(rows, k)[0][:, -1:] for rows in in_batches(queries)]
        return cls(exact, queries, torch.cat(farthest), k)


def in_batches(tensor: Tensor, batch_size: int = QUERIES_AT_ONCE) -> tuple[Tensor, ...]:
    """Cuts a tensor into pieces of batch_size rows, the last one shorter."""
    return torch.split(tensor, batch_size)


def recall_at_k(truth: Truth, entries: Tensor) -> float:
    """Share of found entries that are as near as the exact k-th neighbour.

    By distance and not by row: text repeats itself, and among equally distant entries any will do.

    Args:
        truth: For Q queries.
        entries: What an index found for them, [Q, k]; -1 counts as not found.
    """
    near = []
    for rows in in_batches(torch.arange(len(entries))):
        queries = truth.queries[rows].to(truth.exact.device)
        found = entries[rows].to(truth.exact.device)
        distances = truth.exact.distances(queries, found.clamp(min=0))
        farthest = truth.farthest[rows].to(truth.exact.device)
        slack = RELATIVE_TOLERANCE * (1.0 + queries.square().sum(dim=1, keepdim=True))
        near.append((distances <= farthest + slack) & (found >= 0))
    return float(torch.cat(near).float().mean())


def measure_recall(index: Index, truth: Truth) -> float:
    """Searches for the truth's queries and returns the recall at k."""
    found = [index.search(rows, truth.k)[1] for rows in in_batches(truth.queries)]
    return recall_at_k(truth, torch.cat(found))

"""From decoder states to neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from lightning_knnmt.models import DecoderStates, KeyLayer
from lightning_knnmt.retrieval.datastore import DEFAULT_KEY_LAYER
from lightning_knnmt.retrieval.index import Index, Metric, as_tensor, check_k


class Neighbours(NamedTuple):
    """The nearest entries of each query, nearest first.

    A neighbour that an approximate index did not find has entry -1, distance inf and token 0, a
    valid id that no combiner gives any weight to.
    """

    tokens: Tensor  # [..., K] int64: the entries' values
    distances: Tensor  # [..., K] float32: ascending
    entries: Tensor  # [..., K] int64: rows of the datastore


class Source(Protocol):
    """Where neighbours come from: they come with their tokens, wherever those are kept."""

    @property
    def metric(self) -> Metric:
        """ "l2": squared Euclidean distance; "ip": negated inner product."""

    @property
    def description(self) -> str:
        """What it is, for reports."""

    @property
    def num_bytes(self) -> int:
        """Its approximate size in memory."""

    def __len__(self) -> int:
        """Number of entries."""

    def neighbours(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest entries of each query, [N, D] float32 -> [N, k] each."""


class LocalSource:
    """An index over keys on this machine, and the values that belong to them."""

    def __init__(self, index: Index, values: npt.NDArray[Any] | Tensor) -> None:
        """
        Args:
            index: Over the datastore's keys.
            values: The datastore's values, [M]; a memory map will do.
        """
        self.index = index
        self.values = as_tensor(values)

    @property
    def metric(self) -> Metric:
        return self.index.metric

    @property
    def description(self) -> str:
        return self.index.description

    @property
    def num_bytes(self) -> int:
        return self.index.num_bytes

    def __len__(self) -> int:
        return len(self.values)

    def neighbours(self, queries: Tensor, k: int) -> Neighbours:
        distances, entries = self.index.search(queries, k)
        rows = entries.clamp(min=0).to(self.values.device)
        tokens = self.values[rows].to(entries.device, torch.int64)
        return Neighbours(tokens.masked_fill(entries < 0, 0), distances, entries)


@dataclass(frozen=True)
class Retriever:
    """Looks decoder states up in a source.

    Queries are rounded to float16, as the keys were: equal states have distance zero exactly
    in any precision of the model, and the rounding costs a few microseconds.

    Attributes:
        source: Where neighbours come from.
        num_neighbours: K, for every query.
        key_layer: Whose inputs the keys are, and so the queries.
    """

    source: Source
    num_neighbours: int
    key_layer: KeyLayer = DEFAULT_KEY_LAYER

    def __post_init__(self) -> None:
        check_k(self.num_neighbours, len(self.source))

    @torch.no_grad()
    def __call__(self, states: DecoderStates) -> Neighbours:
        """The neighbours of each state, [..., D] -> [..., K] each."""
        queries = states.of(self.key_layer)
        shape = (*queries.shape[:-1], self.num_neighbours)
        queries = queries.reshape(-1, queries.shape[-1]).half().float()
        found = self.source.neighbours(queries, self.num_neighbours)
        return Neighbours(*(each.view(shape) for each in found))

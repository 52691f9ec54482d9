"""From hidden states to neighbours."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from lightning_knnmt.retrieval.datastore import DEFAULT_KEY_LAYER, KeyLayer
from lightning_knnmt.retrieval.index import Index, as_tensor, check_k


class Neighbours(NamedTuple):
    """The nearest entries of each query, nearest first.

    A neighbour that an approximate index did not find has entry -1, distance inf and token 0, a
    valid id that no combiner gives any weight to.
    """

    tokens: Tensor  # [..., K] int64: the entries' values
    distances: Tensor  # [..., K] float32: ascending
    entries: Tensor  # [..., K] int64: rows of the datastore


def keys_of(hidden: Tensor, key_layer: KeyLayer) -> Tensor:
    """The keys in what a decoder returns.

    Args:
        hidden: Hidden states, [..., D]; for another layer's keys, those follow: [..., 2 D].
        key_layer: Of the manifest.

    Returns:
        [..., D].
    """
    return hidden if key_layer == DEFAULT_KEY_LAYER else hidden.chunk(2, dim=-1)[1]


class Retriever:
    """Looks hidden states up in a datastore.

    Queries are rounded to float16, as the keys were: equal hidden states have distance zero
    exactly, whatever the model's precision, and the rounding costs some microseconds.
    """

    def __init__(
        self,
        values: npt.NDArray[Any] | Tensor,
        index: Index,
        num_neighbours: int,
        key_layer: KeyLayer = DEFAULT_KEY_LAYER,
    ) -> None:
        """Checks that there are enough entries.

        Args:
            values: The datastore's values, [M]; a memory map will do.
            index: Over the datastore's keys.
            num_neighbours: K, for every query.
            key_layer: The datastore's: the queries must come from where the keys did.
        """
        self.values = as_tensor(values)
        check_k(num_neighbours, len(self.values))
        self.index = index
        self.num_neighbours = num_neighbours
        self.key_layer = key_layer

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Neighbours:
        """Finds the neighbours of each hidden state.

        Args:
            hidden: What the decoder returned, [..., D]; with another layer's keys [..., 2 D].
        """
        queries = keys_of(hidden, self.key_layer)
        queries = queries.reshape(-1, queries.shape[-1]).half().float()
        distances, entries = self.index.search(queries, self.num_neighbours)
        rows = entries.clamp(min=0).to(self.values.device)
        tokens = self.values[rows].to(entries.device, torch.int64)
        tokens = tokens.masked_fill(entries < 0, 0)
        shape = (*hidden.shape[:-1], self.num_neighbours)
        return Neighbours(tokens.view(shape), distances.view(shape), entries.view(shape))

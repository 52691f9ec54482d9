"""The pairs that tokens retrieved, with their keys: K_m and V_m of Gao et al., 2023."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_knnmt.retrieval.index import as_tensor
from lightning_knnmt.retrieval.record import Record

LOGITS_AT_ONCE = 2**22  # elements of [m, K, V]: 16 MB, a few of which are held at a time


class AnalysisError(ValueError):
    """Arguments that cannot be analysed."""


class Retrieved(NamedTuple):
    """m tokens and the K pairs that each of them retrieved.

    A missing neighbour has key 0 and value 0, so it adds nothing to terms with a key.
    """

    queries: Tensor  # [m, D] h, the output projection's inputs
    keys: Tensor  # [m, K, D] the columns of K_m
    values: Tensor  # [m, K] int64: the rows of the ones in V_m
    found: Tensor  # [m, K] bool

    def nearest(self, k: int) -> Retrieved:
        """The same tokens with their k nearest neighbours."""
        return Retrieved(self.queries, self.keys[:, :k], self.values[:, :k], self.found[:, :k])


def gather(
    record: Record,
    keys: npt.NDArray[Any] | Tensor,
    rows: Tensor,
    num_neighbours: int,
    dtype: torch.dtype = torch.float32,
) -> Retrieved:
    """Reads the keys of some tokens' neighbours.

    Args:
        record: With queries.
        keys: The datastore's keys, [entries, D], such as a memory map.
        rows: Which tokens of the record, [m].
        num_neighbours: k, the nearest of the recorded neighbours.
        dtype: Of the result's keys and queries.
    """
    entries = record.entries[rows, :num_neighbours].long()  # [m, K]
    found = entries >= 0
    rows_of_keys = as_tensor(keys)[entries.clamp(min=0)].to(dtype)  # [m, K, D]
    assert record.queries is not None  # `check` has said so
    return Retrieved(
        queries=record.queries[rows].to(dtype),
        keys=rows_of_keys.masked_fill(~found.unsqueeze(-1), 0.0),
        values=record.tokens[rows, :num_neighbours].long().masked_fill(~found, 0),
        found=found,
    )


def chunks(
    record: Record,
    keys: npt.NDArray[Any] | Tensor,
    rows: Tensor,
    num_neighbours: int,
    output_projection: nn.Linear,
) -> Iterator[tuple[Tensor, Retrieved]]:
    """Yields tokens in chunks, so that [m, K, V] stays small.

    Args:
        record: With queries.
        keys: The datastore's keys, [entries, D].
        rows: Which tokens of the record, [M].
        num_neighbours: k.
        output_projection: W_O, [V, D]; its dtype is that of the results.

    Yields:
        The chunk's part of `rows`, [m], and what those tokens retrieved.
    """
    check(record, keys, num_neighbours, output_projection)
    at_once = max(1, LOGITS_AT_ONCE // (num_neighbours * output_projection.out_features))
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        yield part, gather(record, keys, part, num_neighbours, output_projection.weight.dtype)


def tokens_with_neighbours(record: Record) -> Tensor:
    """The rows of the tokens that found at least one neighbour, ascending."""
    return (record.entries[:, 0] >= 0).nonzero().flatten()


def check(
    record: Record,
    keys: npt.NDArray[Any] | Tensor,
    num_neighbours: int,
    output_projection: nn.Linear,
) -> None:
    """Raises if the arguments do not belong together."""
    if record.queries is None:
        raise AnalysisError(
            "The record has no queries, which this analysis needs: record the pass again with "
            "keep_queries=True."
        )
    if not 1 <= num_neighbours <= record.max_neighbours:
        raise AnalysisError(
            f"k = {num_neighbours} cannot be analysed: {record.max_neighbours} neighbours were "
            f"recorded, so 1 to {record.max_neighbours} are allowed. Record more, or ask for fewer."
        )
    dims = (record.queries.shape[1], keys.shape[1], output_projection.in_features)
    if len(set(dims)) > 1:
        raise AnalysisError(
            f"The queries have {dims[0]} dimensions, the keys {dims[1]} and the output projection "
            f"takes {dims[2]}: all must be equal. Use the model and the datastore of the record."
        )
    last = int(record.entries.max()) if record.num_tokens else -1
    if last >= len(keys):
        raise AnalysisError(
            f"The record has entry {last:,}, but the datastore has "
            f"{len(keys):,} entries. Use the datastore of the record."
        )

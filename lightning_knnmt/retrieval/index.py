"""Indexes find the nearest keys. The exact one is matrix products in torch, on any device."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Metric = Literal["l2", "ip"]
METRICS: tuple[Metric, ...] = ("l2", "ip")

CPU_TILE_SCORES = 2**20  # scores held at once: 4 MiB, which stay in the cache
GPU_TILE_SCORES = 2**26
NORM_ROWS = 65536
GROUP = 64  # neighbouring scores that share one maximum
MARGIN = 8  # candidates beyond k whose distances are computed again


class Index(Protocol):
    """Finds the nearest keys; smaller distances are nearer for every metric."""

    @property
    def metric(self) -> Metric:
        """ "l2": squared Euclidean distance; "ip": negated inner product."""

    @property
    def description(self) -> str:
        """What it is, for reports."""

    @property
    def num_bytes(self) -> int:
        """Its approximate size in memory."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Finds the k nearest keys of each query.

        Args:
            queries: [N, D].
            k: Neighbours wanted.

        Returns:
            Distances, [N, k] float32 ascending, and entries, [N, k] int64. Where an approximate
            index found fewer than k, the rest have distance inf and entry -1.
        """


class FlatIndex:
    """Exact search: every query against every key.

    The keys are compared tile by tile. Within a tile the maximum of every 64 neighbouring scores
    is taken first: the k best scores lie in the k groups with the best maxima, so that `topk`,
    which is slow on long rows, sees only those. Scores stand as [rows, queries]: at 64 queries the
    product of this shape is up to twice as fast as its transpose.
    """

    def __init__(
        self,
        keys: npt.NDArray[Any] | Tensor,
        metric: Metric = "l2",
        device: torch.device | str = "cpu",
        storage_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copies the keys to the device.

        Args:
            keys: [M, D].
            metric: "l2" or "ip".
            device: Where the keys are kept and the search runs.
            storage_dtype: torch.float16 halves the memory and, on a CPU, makes the search slower.
        """
        check_metric(metric)
        self.metric: Metric = metric
        self.device = torch.device(device)
        self._keys = as_tensor(keys).to(self.device, storage_dtype)
        # the nearest key has the greatest q·k - |k|²/2: |q|² is the same for all keys of a query
        self._bias = torch.zeros(len(self._keys), dtype=torch.float32, device=self.device)
        if metric == "l2":
            for start in range(0, len(self._keys), NORM_ROWS):
                rows = slice(start, start + NORM_ROWS)
                self._bias[rows] = -0.5 * self._keys[rows].float().square().sum(dim=1)

    @property
    def description(self) -> str:
        return f"exact ({self.metric}, {self.device.type})"

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._bias.nbytes

    def __len__(self) -> int:
        return len(self._keys)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        check_k(k, len(self))
        with torch.autocast(self.device.type, enabled=False):
            scaled = queries.to(self.device, torch.float32)
            num_candidates = min(k + MARGIN, len(self))
            candidates = self._best_candidates(scaled, num_candidates)  # [N, k + margin]
            distances, order = self.distances(scaled, candidates).sort(dim=1)
            entries = candidates.gather(1, order)
        return distances[:, :k].to(queries.device), entries[:, :k].to(queries.device)

    def _best_candidates(self, queries: Tensor, num_candidates: int) -> Tensor:
        tile_scores = CPU_TILE_SCORES if self.device.type == "cpu" else GPU_TILE_SCORES
        num_queries = max(len(queries), 1)
        rows_per_tile = min(max(tile_scores // num_queries, 8 * GROUP * num_candidates), len(self))
        buffer = torch.empty(rows_per_tile * len(queries), dtype=torch.float32, device=self.device)
        scores, entries = [], []
        for start in range(0, len(self), rows_per_tile):
            keys = self._keys[start : start + rows_per_tile].float()
            bias = self._bias[start : start + rows_per_tile].unsqueeze(1)
            tile = buffer[: len(keys) * len(queries)].view(len(keys), len(queries))
            torch.addmm(bias, keys, queries.T, out=tile)
            best = top_of_columns(tile, min(num_candidates, len(keys)))
            scores.append(best.scores)
            entries.append(best.rows + start)
        merged = torch.cat(scores).topk(num_candidates, dim=0).indices
        return torch.cat(entries).gather(0, merged).T  # [N, candidates]

    def distances(self, queries: Tensor, entries: Tensor) -> Tensor:
        """Distances to given entries, without the cancellation of |q|² - 2 q·k + |k|².

        Args:
            queries: [N, D] float32.
            entries: [N, C].

        Returns:
            [N, C] float32.
        """
        keys = self._keys[entries].float()  # [N, C, D]
        if self.metric == "l2":
            return (keys - queries.unsqueeze(1)).square().sum(dim=2)
        return -(keys * queries.unsqueeze(1)).sum(dim=2)


class Best(NamedTuple):
    """The best scores of each column, [k, N], and the rows they stand in, [k, N]."""

    scores: Tensor
    rows: Tensor


def top_of_columns(scores: Tensor, k: int) -> Best:
    """The k best scores of every column, as `topk`, but faster on long columns.

    Args:
        scores: [R, N].
        k: At most R.
    """
    length, num_columns = scores.shape
    num_groups = length // GROUP
    if num_groups < 4 * k:
        return Best(*scores.topk(k, dim=0))
    grouped = scores[: num_groups * GROUP].view(num_groups, GROUP, num_columns)
    groups = grouped.amax(dim=1).topk(k, dim=0, sorted=False).indices  # [k, N]
    offsets = torch.arange(GROUP, device=scores.device)[:, None, None]
    rest = torch.arange(num_groups * GROUP, length, device=scores.device)
    rows = torch.cat(
        [(groups * GROUP + offsets).flatten(0, 1), rest[:, None].expand(-1, num_columns)]
    )
    best = scores.gather(0, rows).topk(k, dim=0)
    return Best(best.values, rows.gather(0, best.indices))


def check_metric(metric: str) -> None:
    """Rejects an unknown metric."""
    if metric not in METRICS:
        raise ValueError(f"The metric is {metric!r}, but it must be one of {', '.join(METRICS)}.")


def check_k(k: int, num_entries: int) -> None:
    """Rejects more neighbours than there are entries."""
    if k < 1:
        raise ValueError(f"The number of neighbours k is {k}, but it must be at least 1.")
    if k > num_entries:
        raise ValueError(
            f"The number of neighbours k is {k}, larger than the datastore, which has "
            f"{num_entries} entries. Choose a smaller k, or build the datastore from more text."
        )


def as_tensor(array: npt.NDArray[Any] | Tensor) -> Tensor:
    """Views an array as a tensor without copying, read-only memory maps included."""
    if isinstance(array, Tensor):
        return array
    with warnings.catch_warnings():  # nothing here writes into the tensor
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))

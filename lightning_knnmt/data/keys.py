"""The entries of a datastore as batches: what trains an output projection without its model.

M entries, D the model's width, n entries of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


class LabelledKeys(NamedTuple):
    """Some entries of a datastore.

    Attributes:
        keys: What the output projection sees, [n, D]; float16, as they are stored.
        labels: What it is to say, [n].
        entries: Their rows in the datastore, [n].
    """

    keys: Tensor
    labels: Tensor
    entries: Tensor


class KeyDataset(Dataset[LabelledKeys]):
    """Keys and values asked for whole batches: its items are named by arrays of rows.

    Args:
        keys: Hidden states, [M, D]; in memory, or memory-mapped.
        values: The tokens that followed, [M].
    """

    def __init__(self, keys: npt.NDArray[np.float16], values: npt.NDArray[np.int32]) -> None:
        self.keys = keys
        self.values = values

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> LabelledKeys:
        """The entries of the rows as one batch."""
        keys, labels = (torch.from_numpy(each[rows]) for each in (self.keys, self.values))
        return LabelledKeys(keys, labels.long(), torch.from_numpy(rows))

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.values)


class EntryBatchSampler(Sampler[npt.NDArray[np.int64]]):
    """Arrays of rows in an order that changes with every epoch; each entry comes once.

    It has what ``ResumableDataLoader`` and Lightning ask of a sampler. Batches differ by at most
    one entry, so that none weighs more than another.

    Args:
        num_entries: M.
        batch_size: Most entries in a batch.
        run_length: Entries that stay together, in their order: 1 shuffles single entries, more
            spares a disk that must seek for each.
        seed: Fixes the shuffling, together with the epoch.
    """

    def __init__(
        self, num_entries: int, batch_size: int, *, run_length: int = 1, seed: int = 1
    ) -> None:
        if batch_size < 1 or run_length < 1:
            raise ValueError(
                f"A batch of entries must hold at least one, in runs of at least one, but "
                f"batch_size is {batch_size} and run_length is {run_length}."
            )
        self.num_entries = num_entries
        self.run_length = run_length
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0
        self._num_batches = -(-num_entries // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Names the epoch, which decides the order; a new epoch begins at its first batch."""
        if epoch != self.epoch:
            self.first_batch = 0
        self.epoch = epoch

    def resume(self, epoch: int, first_batch: int) -> None:
        """Lets the next iteration begin in the middle of an epoch."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return self._num_batches

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        """The rows of the batches, from ``first_batch`` on."""
        random: Any = np.random.default_rng([self.seed, self.epoch])
        starts = random.permutation(np.arange(0, self.num_entries, self.run_length))
        rows = (starts[:, None] + np.arange(self.run_length)).ravel()
        rows = rows[rows < self.num_entries]
        yield from np.array_split(rows, self._num_batches)[self.first_batch :]

"""Loaders of batches for Lightning's loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from lightning_knnmt.data.batch import Batch, TokenBatchSampler
from lightning_knnmt.data.keys import EntryBatchSampler


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader that a checkpoint in the middle of an epoch can continue.

    Its sampler is a ``TokenBatchSampler`` or an ``EntryBatchSampler``. Lightning saves and restores
    loaders that have these two methods. Counted is what was handed out, not what worker processes
    have read ahead.
    """

    sampler: TokenBatchSampler | EntryBatchSampler
    _handed_out = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches, from the sampler's first one on."""
        self._handed_out = self.sampler.first_batch
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch
        self.sampler.first_batch = 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self.sampler.epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration go on where the saved one stood."""
        self.sampler.resume(state["epoch"], state["batches"])


def at_least_one(batches: DataLoader[Batch]) -> DataLoader[Any]:
    """A rank's batches of a text, or a single None where it has no batches.

    Lightning does not call the hooks of a rank without batches, for which the other ranks wait.
    """
    if len(batches):
        return batches
    nothing: Any = [None]
    alone: DistributedSampler[Any] = DistributedSampler(
        nothing, num_replicas=1, rank=0
    )  # else Lightning would divide it
    return DataLoader(nothing, batch_size=None, sampler=alone)

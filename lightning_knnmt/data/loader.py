"""A loader of batches that a checkpoint can continue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_knnmt.data.batch import TokenBatchSampler
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

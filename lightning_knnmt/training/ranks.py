"""Work that several processes share: nobody waits for one that has failed."""

from collections.abc import Callable
from typing import TypeVar

import pytorch_lightning as pl
import torch

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """This process stops because another one, which says itself why, cannot go on."""


def gathered(trainer: pl.Trainer, mine: T) -> list[T]:
    """Every rank's value, in the order of the ranks; every rank must call this."""
    values = [mine] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, mine)
    return values


def all_or_none(trainer: pl.Trainer, make: Callable[[], T]) -> T:
    """What each rank makes, as soon as all have made theirs; every rank must call this.

    Raises:
        OtherRankError: If `make` failed elsewhere; where it failed its own error is raised.
    """
    try:
        made = make()
    except Exception:
        gathered(trainer, False)
        raise
    if not all(gathered(trainer, True)):
        raise OtherRankError(f"Rank {trainer.global_rank} stops, because another rank has failed.")
    return made


def rank_zero_first(
    trainer: pl.Trainer, make: Callable[[], T], others: Callable[[], T] | None = None
) -> T:
    """Rank zero makes; then the others do, who find on the disk what it saved.

    Args:
        trainer: Knows the ranks; every rank must call this.
        make: What rank zero does.
        others: What the others do, if that is not the same.
    """
    if trainer.is_global_zero:
        made = all_or_none(trainer, make)
        return all_or_none(trainer, lambda: made)
    all_or_none(trainer, lambda: None)
    return all_or_none(trainer, others or make)

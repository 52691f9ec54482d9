"""Work that several processes share: nobody waits for one that has failed.

Everything here works in one process too, and with any launcher: torch.distributed knows the ranks.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """This process stops because another one, which reports the reason, cannot go on."""


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if _are_several() else 1


def rank() -> int:
    """This process's number."""
    return torch.distributed.get_rank() if _are_several() else 0


def gathered(mine: T) -> list[T]:
    """Every rank's value, in the order of the ranks; every rank must call this."""
    values = [mine] * world_size()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, mine)
    return values


def all_or_none(make: Callable[[], T]) -> T:
    """What each rank makes, as soon as all have made theirs; every rank must call this.

    Raises:
        OtherRankError: If `make` failed elsewhere; where it failed its own error is raised.
    """
    try:
        made = make()
    except Exception:
        gathered(False)
        raise
    if not all(gathered(True)):
        raise OtherRankError(f"Rank {rank()} stops, because another rank has failed.")
    return made


def rank_zero_first(make: Callable[[], T], others: Callable[[], T] | None = None) -> T:
    """Rank zero makes; then the others do, who find on the disk what it saved.

    Every rank must call this.

    Args:
        make: What rank zero does.
        others: What the others do, if that is not the same.
    """
    if rank() == 0:
        made = all_or_none(make)
        return all_or_none(lambda: made)
    all_or_none(lambda: None)
    return all_or_none(others or make)


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

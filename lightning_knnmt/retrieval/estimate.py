"""The size of a datastore and its index, computed before anything is built."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_knnmt.retrieval.errors import DatastoreTooLargeError

IndexKind = Literal["flat", "faiss", "auto"]

KEY_BYTES = 2  # float16
VALUE_BYTES = 4  # int32
MARK_BYTES = 1  # while building: one byte a row marks it as written
EXACT_KEY_BYTES = 4  # float32 in memory
CODE_BITS = 2  # a dimension: product quantisation of pairs of dimensions in 4 bits
LIST_ENTRY_BYTES = 8  # the row number in an inverted list
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class SizeEstimate:
    """Bytes that a datastore and its index will take.

    Attributes:
        disk_bytes: Keys, values and the saved index.
        memory_bytes: At the peak: while the index is built or chosen, the exact one included.
    """

    disk_bytes: int
    memory_bytes: int


def estimate_size(num_entries: int, key_dim: int, index: IndexKind = "auto") -> SizeEstimate:
    """Computes the bytes for a datastore of M entries of D dimensions.

    Keys are memory-mapped and count as disk alone; an index lives in memory.

    Args:
        num_entries: M.
        key_dim: D.
        index: "flat" (exact), "faiss" (codes and float16 keys for re-ranking), or "auto": exact and
            faiss at once, as measuring recall needs both.
    """
    store = num_entries * (key_dim * KEY_BYTES + VALUE_BYTES + MARK_BYTES)
    flat = num_entries * (key_dim * EXACT_KEY_BYTES + 4)
    codes = key_dim * CODE_BITS // 8 + LIST_ENTRY_BYTES
    faiss = num_entries * (codes + key_dim * KEY_BYTES)
    if index == "flat":
        return SizeEstimate(disk_bytes=store, memory_bytes=flat)
    if index == "faiss":
        return SizeEstimate(disk_bytes=store + faiss, memory_bytes=faiss)
    return SizeEstimate(disk_bytes=store + faiss, memory_bytes=flat + 2 * faiss)


def reject_if_too_large(
    directory: Path | str, num_entries: int, key_dim: int, index: IndexKind = "auto"
) -> SizeEstimate:
    """Raises if the datastore or its index would not fit, else returns their size.

    Args:
        directory: Where the datastore will be; it need not exist yet.
        num_entries: M.
        key_dim: D.
        index: The kind of index that will be used.
    """
    estimate = estimate_size(num_entries, key_dim, index)
    existing = Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if estimate.disk_bytes > free:
        raise DatastoreTooLargeError(
            f"A datastore of {num_entries:,} entries of {key_dim} dimensions with its index takes "
            f"{estimate.disk_bytes:,} bytes on the disk, but only {free:,} bytes are free in "
            f"{existing}. Free some space, choose another folder, or use less text."
        )
    memory = available_memory()
    if estimate.memory_bytes > memory:
        raise DatastoreTooLargeError(
            f"An index over {num_entries:,} entries of {key_dim} dimensions takes "
            f"{estimate.memory_bytes:,} bytes of memory (index: {index}), but only {memory:,} "
            "bytes are available. Use a machine with more memory, another index, or less text."
        )
    return estimate


def available_memory() -> int:
    """Bytes that this process may still take: the system's or, in a container, the container's."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    information = Path("/proc/meminfo")
    if information.exists():
        lines = dict(line.split(":", 1) for line in information.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available

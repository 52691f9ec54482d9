"""Remembers that files were verified, so that a large datastore is not read at every opening."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

STAMP_NAME = "verified.json"
SETTLED_SECONDS = 2.0  # a change within the clock's tick of the stamp would not show


def unchanged_since_verified(directory: Path, names: Sequence[str]) -> bool:
    """Whether these files are the very ones that were last verified.

    A file counts as changed when its inode, length or change time differs. The system sets the
    change time at every write and no program can set it back; a copy is another inode. What goes
    unseen is decay of the disk itself.
    """
    try:
        stamp = json.loads((directory / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == _identities(directory, names))


def remember_verified(directory: Path, names: Sequence[str]) -> None:
    """Notes that these files were read and found right; does nothing where it cannot write."""
    identities = _identities(directory, names)
    newest = max(changed for _, _, changed in identities.values())
    if time.time() - newest / 1e9 < SETTLED_SECONDS:
        return
    partial = directory / f".{STAMP_NAME}.{os.getpid()}"
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(identities), encoding="utf-8")
        partial.replace(directory / STAMP_NAME)


def _identities(directory: Path, names: Sequence[str]) -> dict[str, list[int]]:
    stats = {name: (directory / name).stat() for name in names}
    return {name: [each.st_ino, each.st_size, each.st_ctime_ns] for name, each in stats.items()}

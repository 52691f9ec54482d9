"""A datastore's files: reserved space, folders that are not ours, files already verified."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lightning_knnmt.files import write_atomically
from lightning_knnmt.retrieval.errors import DatastoreTooLargeError, ForeignFilesError

MANIFEST_NAME = "manifest.json"  # of a datastore, an index, a record: each has one, written last
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STAMP_NAME = "verified.json"
SETTLED_SECONDS = 2.0  # a change within one tick of the file system's clock would go unnoticed


def reserve(path: Path, num_bytes: int) -> None:
    """Grows a file to num_bytes and allocates its blocks now.

    A sparse file under a memory map would kill the process with SIGBUS when the disk fills up.
    """
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise explain_out_of_space(error, path, num_bytes) from error


def explain_out_of_space(error: OSError, path: Path, num_bytes: int) -> Exception:
    """Returns an error with the sizes if the disk is full, else the error itself."""
    if error.errno not in OUT_OF_SPACE:
        return error
    free = shutil.disk_usage(path.parent).free
    return DatastoreTooLargeError(
        f"The disk is full: {path} needs {num_bytes:,} bytes, but only {free:,} bytes are free "
        "there. Free some space, or choose another folder for the datastore."
    )


def reject_foreign_files(directory: Path, names: Collection[str]) -> None:
    """Raises if replacing a folder would lose files that are not ours.

    Args:
        directory: The folder to replace; it may be absent or empty.
        names: Patterns of the file names that we write there. They only count in a folder with a
            manifest, as we never leave one without.

    Raises:
        ForeignFilesError: If the folder holds anything else, or is no folder.
    """
    existing = directory
    while not os.path.lexists(existing):
        existing = existing.parent
    if directory.is_symlink() or not existing.is_dir():
        raise ForeignFilesError(
            f"{directory} cannot become a folder because {existing} is a file or a link, which is "
            "never replaced: name a new or empty folder, or an existing datastore."
        )
    found = sorted(each.name for each in directory.iterdir()) if existing == directory else []
    known = names if MANIFEST_NAME in found else ()
    foreign = [each for each in found if not any(fnmatchcase(each, name) for name in known)]
    if foreign:
        lacking = "" if known else f" and no {MANIFEST_NAME}"
        raise ForeignFilesError(
            f"{directory} holds {foreign[0]}{lacking}, so this program did not write it and does "
            "not replace it: name a new or empty folder, or an existing datastore, or move that "
            "file elsewhere."
        )


def unchanged_since_verified(directory: Path, names: Sequence[str]) -> bool:
    """Whether these files are the very ones that were last verified.

    A file counts as changed if its inode, size or change time differs. The system sets the change
    time at every write and no program can set it back; a copy is another inode. Only decay of the
    disk itself goes unseen.
    """
    try:
        stamp = json.loads((directory / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == _identities(directory, names))


def remember_verified(directory: Path, names: Sequence[str]) -> None:
    """Notes that these files were read in full and are intact, if the folder can be written to."""
    identities = _identities(directory, names)
    newest = max(changed for _, _, changed in identities.values())
    if time.time() - newest / 1e9 < SETTLED_SECONDS:
        return
    with contextlib.suppress(OSError):
        write_atomically(directory / STAMP_NAME, json.dumps(identities))


def _identities(directory: Path, names: Sequence[str]) -> dict[str, list[int]]:
    stats = {name: (directory / name).stat() for name in names}
    return {name: [each.st_ino, each.st_size, each.st_ctime_ns] for name, each in stats.items()}

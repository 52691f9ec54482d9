"""Files that are either whole or not there: reserved space, digests, folders replaced."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from lightning_knnmt.retrieval.errors import DatastoreTooLargeError, ForeignFilesError

MANIFEST_NAME = "manifest.json"  # of a datastore, an index, a record: each has one, written last
BLOCK_BYTES = 16 * 2**20
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def file_digest(path: Path) -> str:
    """Digests a file by blocks of 16 MiB, all cores at work.

    The result is the SHA-256 of the blocks' SHA-256 digests. Measured on a 2-core machine, one
    thread: SHA-256 1.4 GiB/s (the processor has instructions for it), BLAKE2b 0.7, CRC-32 2.6. The
    digest also names the keys for their indexes, so 32 bits would be too few, and on two cores
    this reads as fast as CRC-32 does on one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:

        def block_digest(offset: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), BLOCK_BYTES, offset)).digest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = b"".join(pool.map(block_digest, range(0, size, BLOCK_BYTES)))
    return hashlib.sha256(digests).hexdigest()


def reserve(path: Path, num_bytes: int) -> None:
    """Lets a file grow to num_bytes, its blocks taken from the disk now.

    A sparse file under a memory map would kill the process with SIGBUS when the disk fills up.
    """
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise explain_out_of_space(error, path, num_bytes) from error


def explain_out_of_space(error: OSError, path: Path, num_bytes: int) -> Exception:
    """Returns an error that has the numbers when the disk is full, else the error itself."""
    if error.errno not in OUT_OF_SPACE:
        return error
    free = shutil.disk_usage(path.parent).free
    return DatastoreTooLargeError(
        f"The disk is full: {path} needs {num_bytes:,} bytes, but only {free:,} bytes are free "
        "there. Free some space, or choose another folder for the datastore."
    )


def write_durably(path: Path, text: str) -> None:
    """Writes a text file and waits until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until the disk has this file's content or this folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def building_path(directory: Path) -> Path:
    """The hidden sibling in which a folder's next content is made."""
    return directory.with_name(f".{directory.name}.building")


def replaced_path(directory: Path) -> Path:
    """The hidden sibling that holds the old content where two folders cannot be exchanged."""
    return directory.with_name(f".{directory.name}.replaced")


def refuse_foreign_files(directory: Path, names: Collection[str]) -> None:
    """Raises if replacing a folder would lose what is not ours; absent and empty ones may be.

    Args:
        directory: What would be replaced.
        names: Patterns of the names that we write there. Without a manifest even these are someone
            else's, as we never leave a folder without one.

    Raises:
        ForeignFilesError: If there is anything else, or no folder.
    """
    existing = directory
    while not os.path.lexists(existing):
        existing = existing.parent
    if directory.is_symlink() or not existing.is_dir():
        raise ForeignFilesError(
            f"{directory} cannot become a folder, as {existing} is a file or a link and is not "
            "replaced: name a new or empty folder, or a datastore's own."
        )
    found = sorted(each.name for each in directory.iterdir()) if existing == directory else []
    known = names if MANIFEST_NAME in found else ()
    foreign = [each for each in found if not any(fnmatchcase(each, name) for name in known)]
    if foreign:
        lacking = "" if known else f" and no {MANIFEST_NAME}"
        raise ForeignFilesError(
            f"{directory} holds {foreign[0]}{lacking}, so it is not a folder that this program "
            "wrote, and nothing in it is replaced: name a new or empty folder, or a datastore's "
            "own, or move that file elsewhere."
        )


def replace_directory(directory: Path, names: Collection[str]) -> None:
    """Puts the finished building_path(directory) in the place of directory.

    At every instant a reader finds the old folder whole or the new one whole. Linux exchanges the
    two in one call; file systems that cannot (NFS) get two renames, and `recover` undoes the
    first one if the machine stops between them.

    Args:
        directory: The folder's final place.
        names: What it may hold now, see `refuse_foreign_files`.
    """
    refuse_foreign_files(directory, names)
    building = building_path(directory)
    sync(building)
    if not directory.exists():
        building.rename(directory)
    elif _exchange(building, directory):
        shutil.rmtree(building)
    else:
        replaced = replaced_path(directory)
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
        building.rename(directory)
        shutil.rmtree(replaced)
    sync(directory.parent)


def recover(directory: Path) -> None:
    """Puts the old folder back if a replacement stopped between its two renames."""
    replaced = replaced_path(directory)
    if replaced.exists() and not directory.exists():
        replaced.rename(directory)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders atomically; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # another C library than glibc
        return False
    arguments = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)

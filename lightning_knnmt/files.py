"""Files and folders that are whole or absent: atomic writes, locks, digests, the cache's place.

A file is written beside its place and renamed. A folder is filled as a hidden sibling, then
renamed; an older folder in its place is first moved aside, and `recover` puts it back if the
process stops between the two renames.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

BLOCK_BYTES = 16 * 2**20


def default_cache() -> Path:
    """The folder of downloads, encoded text and datastores, unless another one is named.

    LIGHTNING_KNNMT_CACHE, else lightning_knnmt in XDG_CACHE_HOME, else ~/.cache/lightning_knnmt.
    """
    if own := os.environ.get("LIGHTNING_KNNMT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lightning_knnmt"


@contextmanager
def locked(
    path: Path, *, wait: bool = True, waiting: Callable[[], None] | None = None
) -> Iterator[int]:
    """Holds the lock that belongs to a path.

    The system releases the lock when its holder dies, so a killed process blocks nobody. The lock
    is a hidden file beside the path, removed at the end.

    Args:
        path: What the lock is for; it need not exist.
        wait: Whether to wait while another process holds the lock.
        waiting: Called once before waiting; without it, a log line says so.

    Yields:
        The lock's file descriptor. A child process that inherits it holds the lock too.

    Raises:
        BlockingIOError: If the lock is held elsewhere and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(f".{path.name}.lock")
    descriptors: list[int] = []
    lock = FileLock(lock_path, thread_local=False, on_acquired=descriptors.append)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise BlockingIOError(
                errno.EWOULDBLOCK, "another process holds the lock", str(path)
            ) from None
        if waiting is None:
            log.info("Waiting for another process, which is preparing %s.", path)
        else:
            waiting()
        lock.acquire()
    try:
        yield descriptors[-1]
    finally:
        # While the lock is held: whoever opened this file meanwhile sees that it is gone and
        # opens the next one.
        lock_path.unlink(missing_ok=True)
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether the lock of a path may be held: its file exists."""
    return path.with_name(f".{path.name}.lock").exists()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes ``path`` if the block ends well, else vanishes.

    Two processes that write the same file do not disturb each other; the last one wins.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync(partial)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file, its folder included: readers see the old content or the new."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``path`` if the block ends well, else vanishes.

    Call it under ``locked(path)``: what a killed predecessor left is removed first. Whatever is at
    ``path`` stays until then and is replaced.
    """
    building = building_path(path)
    shutil.rmtree(building, ignore_errors=True)
    try:
        with _naming(path):
            building.mkdir(parents=True)
            yield building
            replace_directory(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def building_path(directory: Path) -> Path:
    """The hidden sibling in which a folder's next content is made."""
    return directory.with_name(f".{directory.name}.building")


def replaced_path(directory: Path) -> Path:
    """The hidden sibling that holds a folder's old content during a replacement."""
    return directory.with_name(f".{directory.name}.replaced")


def replace_directory(directory: Path) -> None:
    """Moves the finished ``building_path(directory)`` into place; the caller holds the lock."""
    building, replaced = building_path(directory), replaced_path(directory)
    sync(building)
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    building.rename(directory)
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(directory: Path) -> None:
    """Puts the old folder back if a replacement stopped between its two renames."""
    replaced = replaced_path(directory)
    if replaced.exists() and not directory.exists():
        with locked(directory):  # a replacement that is under way ends first
            if replaced.exists() and not directory.exists():
                replaced.rename(directory)


def sync(path: Path) -> None:
    """Waits until the disk has this file's content or this folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex: the digest that publishers state."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of the SHA-256 digests of a file's blocks of 16 MiB, computed on all cores.

    For our own large files. Measured on a 2-core machine, one thread: SHA-256 1.4 GiB/s (the
    processor has instructions for it), BLAKE2b 0.7, CRC-32 2.6. The digest also names the keys for
    their indexes, so 32 bits would be too few, and on two cores this is as fast as CRC-32 on one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:

        def block_digest(offset: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), BLOCK_BYTES, offset)).digest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = b"".join(pool.map(block_digest, range(0, size, BLOCK_BYTES)))
    return hashlib.sha256(digests).hexdigest()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to an error that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise

"""Files that several processes may ask for at once, and that are whole or not there at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 22


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock that belongs to ``path``, after waiting for another process that has it.

    The lock is released by the system when its holder dies, so a killed process blocks nobody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Waiting for another process, which is preparing %s.", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory that becomes ``path`` if the block ends well, else vanishes.

    Call it under ``locked(path)``: what a killed predecessor left is removed first.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _naming(path):
            partial.mkdir(parents=True)
            yield partial
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a whole file or none; two writers of the same content do not disturb each other."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with _naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the file to an error that does not name one, as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@dataclass(frozen=True)
class FileSummary:
    """What a cache key needs to know of a text file: the digest of its bytes and its line count."""

    sha256: str
    lines: int


def summarize_file(path: Path, cache_dir: Path) -> FileSummary:
    """Digest and line count of a file, remembered under ``cache_dir`` for its path, size and time.

    The digest is always of the contents; size and modification time only tell whether the
    remembered one still holds.
    """
    status = path.stat()
    stamp = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    note = cache_dir / "digests" / f"{hashlib.sha256(stamp.encode()).hexdigest()}.json"
    if note.exists():
        return FileSummary(**json.loads(note.read_text()))
    digest, lines, last = hashlib.sha256(), 0, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    summary = FileSummary(digest.hexdigest(), lines + (last not in (b"", b"\n")))
    write_atomically(note, json.dumps(asdict(summary)).encode())
    return summary


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

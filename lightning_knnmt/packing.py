"""A system with all its parts in one zip file: writing it, and unpacking it into the cache."""

from __future__ import annotations

import hashlib
import logging
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from lightning_knnmt.files import default_cache, locked, new_directory, replacing
from lightning_knnmt.retrieval import SavedSystemError, Settings

log = logging.getLogger(__name__)

NAME = "system.yaml"
LONGEST_SETTINGS = 1 << 20  # bytes
COPY_BYTES = 1 << 22
# Parts that become smaller: float32 copies of 8-bit weights, text. Keys and indexes hardly do.
COMPRESSED = (".ckpt", ".txt", ".yaml", ".json")

# What zipfile raises at missing or wrong bytes, encryption and unknown compression.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)

Write = Callable[[Any], object]  # writes into something with a `write`


def is_packed(path: Path) -> bool:
    """Whether a file is a packed system; other formats of models are zip files too."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return NAME in archive.namelist()
    except zipfile.BadZipFile:
        return False


def unpacked(path: Path) -> Path:
    """The folder in the cache that holds a packed system's parts, unpacked unless it is there.

    Raises:
        SavedSystemError: If the file is damaged, or holds what no packed system does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(NAME) as member:
                raw = member.read(LONGEST_SETTINGS)
            directory = default_cache() / "systems" / hashlib.sha256(raw).hexdigest()[:32]
            with locked(directory):
                if not directory.is_dir():
                    files = _members(archive, Settings.read(raw, path), path)
                    total = sum(size for size, _ in files.values())
                    log.info("Unpacking %s (%.0f MB) into %s.", path, total / 1e6, directory)
                    with new_directory(directory) as building:
                        _require_space(building, total)
                        for name, (size, sha256) in files.items():
                            _extract(archive, name, building / name, size, sha256)
                        (building / NAME).write_bytes(raw)
            return directory
    except DAMAGE as error:
        raise SavedSystemError(f"{path} is damaged ({error}): copy or pack it again.") from error


def _members(
    archive: zipfile.ZipFile, settings: Settings, path: Path
) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of the files of a packed system, whose names can do no harm."""
    listed = settings.table("files")
    found = [info.filename for info in archive.infolist()]
    expected = [*listed.names, NAME]
    if sorted(found) != sorted(expected):
        odd = sorted(set(found) ^ set(expected)) or sorted(found)
        raise SavedSystemError(
            f"{path} does not hold the files that its {NAME} lists, for example {odd[0]!r}: pack "
            "the system again."
        )
    files = {}
    for info in archive.infolist():
        pure = PurePosixPath(info.filename)
        plain = str(pure) == info.filename and not pure.is_absolute() and ".." not in pure.parts
        plain &= not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
        if not plain or "\\" in info.filename or ":" in info.filename:
            raise SavedSystemError(
                f"{path} holds {info.filename!r}, which is no file of a packed system. Nothing was "
                "unpacked; get the file from a source you trust."
            )
        if info.filename != NAME:
            about = listed.table(info.filename)
            files[info.filename] = (about.get("bytes", int), about.get("sha256", str))
            if info.file_size != files[info.filename][0]:
                raise SavedSystemError(
                    f"{path}: {info.filename} has {info.file_size:,} bytes, but {NAME} says "
                    f"{files[info.filename][0]:,}. Copy or pack it again."
                )
    return files


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise SavedSystemError(
            f"Unpacking takes {needed / 1e9:.1f} GB, but {directory.parent} has only "
            f"{free / 1e9:.1f} GB left. Free some, or set LIGHTNING_KNNMT_CACHE to a folder of "
            "another disk."
        )


def _extract(archive: zipfile.ZipFile, name: str, target: Path, size: int, sha256: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    sha, left = hashlib.sha256(), size
    with archive.open(name) as member, target.open("wb") as file:
        while chunk := member.read(COPY_BYTES):
            sha.update(chunk)
            left -= len(chunk)
            if left < 0:
                break
            file.write(chunk)
    if left or sha.hexdigest() != sha256:
        raise SavedSystemError(
            f"{archive.filename}: {name} is damaged (its SHA-256 is {sha.hexdigest()[:12]}, not "
            f"{sha256[:12]}). Copy or pack it again."
        )


def write_packed(
    path: Path, parts: Mapping[str, Path | Write], settings: Callable[[Any], str]
) -> None:
    """Writes a packed system, whole or not at all.

    Args:
        path: The file.
        parts: The files in it by name: what they are copied from, or a function that writes them.
        settings: The content of system.yaml, given `files`: size and SHA-256 of each part.
    """
    about = {}
    with (
        replacing(path) as unfinished,
        zipfile.ZipFile(unfinished, "w", compresslevel=1) as archive,
    ):
        for name, part in parts.items():
            write = partial(_copy, part) if isinstance(part, Path) else part
            about[name] = _add(archive, name, write)
        _add(archive, NAME, lambda member: member.write(settings(about).encode()))


class _Member:
    """A member of a zip file that is being written; counts and digests what goes through."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._sha, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._sha.update(data)
        self.bytes += len(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()


def _add(archive: zipfile.ZipFile, name: str, write: Write) -> dict[str, int | str]:
    """Adds a member; returns what system.yaml says about it."""
    compressed = name.endswith(COMPRESSED)
    archive.compression = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with archive.open(name, "w", force_zip64=True) as stream:
        member = _Member(stream)
        write(member)
    return {"bytes": member.bytes, "sha256": member.sha256}


def _copy(path: Path, member: _Member) -> None:
    with path.open("rb") as file:
        while chunk := file.read(COPY_BYTES):
            member.write(chunk)

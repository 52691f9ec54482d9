"""Aligned plain-text files: finding, reading and checking them."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_knnmt.files import write_atomically

_CHUNK_BYTES = 1 << 22


_LINE_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")


class TextError(ValueError):
    """Text files that cannot be used; the message names file, line and remedy."""


@dataclass(frozen=True)
class FileSummary:
    """What a cache key needs to know about a text file: its bytes' digest and its line count."""

    sha256: str
    lines: int


def summarize_file(path: Path, cache_dir: Path) -> FileSummary:
    """Digest and line count of a file, remembered under ``cache_dir`` for its path, size and time.

    The digest is always that of the contents; size and modification time only show whether the
    remembered one is still valid.
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
    write_atomically(note, json.dumps(asdict(summary)))
    return summary


@dataclass(frozen=True)
class TextPair:
    """Two files in which line n of one translates line n of the other."""

    source_path: Path
    target_path: Path

    def summarize(self, cache_dir: Path) -> tuple[FileSummary, FileSummary]:
        """Digests of both files; raises unless they have equally many lines, and at least one."""
        source, target = (
            summarize_file(p, cache_dir) for p in (self.source_path, self.target_path)
        )
        for path, summary in ((self.source_path, source), (self.target_path, target)):
            if summary.lines == 0:
                raise TextError(f"{path} is empty; it must hold at least one line of text.")
        if source.lines != target.lines:
            raise TextError(
                f"{self.source_path} has {source.lines:,} lines but {self.target_path} has "
                f"{target.lines:,}; line n of one must translate line n of the other, so make "
                "their line counts equal."
            )
        return source, target

    def read(self) -> Iterator[tuple[str, str]]:
        """The pairs of lines, in the files' order."""
        # summarize() compared the line counts; strict detects files that changed since.
        return zip(read_lines(self.source_path), read_lines(self.target_path), strict=True)


def find_text_pair(prefix: Path, source_lang: str, target_lang: str) -> TextPair:
    """The files ``PREFIX.SOURCE`` and ``PREFIX.TARGET``; lists the folder if one is missing."""
    paths = [prefix.with_name(f"{prefix.name}.{lang}") for lang in (source_lang, target_lang)]
    for path, lang in zip(paths, (source_lang, target_lang), strict=True):
        if not path.is_file():
            raise TextError(_missing(path, lang))
    return TextPair(*paths)


def _missing(path: Path, lang: str) -> str:
    if not path.parent.is_dir():
        return f"There is no {path}: the folder {path.parent} does not exist."
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    ending, split = f".{lang}", path.name.removesuffix(f".{lang}")
    others = [name.removesuffix(ending) for name in names if name.endswith(ending)]
    advice = "Name the languages by the files' endings."
    if others:
        advice = (
            f"With the ending {ending} it has {_listed(others)}, but not {split}: add {path.name}"
        )
        elsewhere = ", or name another test set (data.test, data.also_test)"
        advice += "." if split in ("train", "valid") else f"{elsewhere}."
    return (
        f"There is no {path} for the language {lang!r}; the folder holds "
        f"{_listed(names) or 'no files'}. {advice}"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def read_lines(path: Path) -> Iterator[str]:
    r"""The lines of a UTF-8 file, split only at \n, without a trailing \r and without a BOM.

    ``str.splitlines`` would also split at \x0b, \x85 or \u2028, which occur inside sentences and
    would shift one side against the other.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise TextError(
                    f"{path}, line {number}: byte {error.start + 1} (0x{raw[error.start]:02x}) is "
                    "not UTF-8; text files must be UTF-8, so convert the file or correct that line."
                ) from None


def one_line(text: str) -> str:
    """The text with a space in place of every character that some program takes for a line break.

    These are the characters at which ``str.splitlines`` splits; the length stays the same.
    """
    return text.translate(_LINE_BREAKS)

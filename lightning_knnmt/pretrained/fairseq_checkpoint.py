"""Reads fairseq's checkpoints (Ott et al., 2019, arXiv:1904.01038): settings and weights.

Up to version 0.10 the settings are a Namespace (`args`), later a nested dictionary (`cfg`), perhaps
of omegaconf's or fairseq's own classes. Nothing in the file is executed: it is read with
`weights_only=True`, and those classes are replaced by one that only stores its state.
"""

import pickle
import pickletools
import struct
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_knnmt.pretrained.tensor_file import read_outline

# Packages with objects beside the weights, whose behaviour is not needed.
REPLACED = ("fairseq.", "omegaconf.", "numpy.", "typing.")
# omegaconf's objects refer to the types of their values.
TYPES = ("bool", "int", "float", "str", "dict", "list", "tuple")
# These two only hold values.
HARMLESS = {"argparse.Namespace": Namespace, "collections.defaultdict": defaultdict}
# What torch and zipfile raise for missing or wrong bytes.
DAMAGE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, AttributeError),
    *(TypeError, struct.error, zipfile.BadZipFile),
)
# A file of torch < 1.6 begins with several pickles; the last one is the checkpoint.
_LEGACY_PICKLES = 4


class FairseqError(ValueError):
    """A fairseq checkpoint, or a file that belongs to it, that cannot be read."""


class Inert:
    """Stores the state of an object of another class, and does nothing."""

    def __init__(self, *_: Any) -> None:
        """Accepts and ignores any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keeps attributes and ignores other state."""
        if isinstance(state, dict):
            self.__dict__.update(state)


class Checkpoint(NamedTuple):
    """The settings and weights of a checkpoint.

    Attributes:
        settings: Of model and task, under the names of fairseq's options.
        weights: By fairseq's names, as returned by `read_outline`.
    """

    settings: dict[str, Any]
    weights: dict[str, Tensor]


def read_fairseq_checkpoint(path: Path) -> Checkpoint:
    """Reads a file of any version.

    Raises:
        FairseqError: If it is damaged, would run code, or is not from fairseq.
    """
    content = _read(path)
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise FairseqError(
            f"{path} is not a fairseq checkpoint: it holds no weights under 'model'; give a file "
            "that fairseq-train saved, such as checkpoint_best.pt."
        )
    settings = _settings(plain(content.get("args")), plain(content.get("cfg")))
    if not settings:
        raise FairseqError(
            f"{path} does not state its architecture: it has neither fairseq's 'args' nor its "
            "'cfg'; give the file as fairseq-train saved it."
        )
    return Checkpoint(settings, weights)


def plain(value: Any) -> Any:
    """Namespaces, and the contents of omegaconf's objects, as dictionaries and lists."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Inert):
        held = vars(value)
        return plain(held.get("_content", held.get("_val")))
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def _settings(args: Any, cfg: Any) -> dict[str, Any]:
    """One flat dictionary, from whichever of the two there is."""
    if isinstance(args, dict) and args:
        return args
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model"), dict):
        return {}
    model, task = cfg["model"], cfg.get("task")
    task = task if isinstance(task, dict) else {}
    # The names of the options: `encoder: {layers: 6}` was `encoder_layers=6`.
    nested = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        if isinstance(model.get(side), dict)
        for name, value in model[side].items()
    }
    names = {"task": task.get("_name"), "arch": model.get("arch") or model.get("_name")}
    return {**task, **nested, **model, **names}


def _read(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_replacements(path)):
            return read_outline(path)
    except pickle.UnpicklingError as error:
        raise FairseqError(
            f"{path} was not read: it is damaged, or holds more than a fairseq checkpoint and "
            "would run code. Nothing was run; get the file from a source you trust."
        ) from error
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FairseqError(
            f"{path} is damaged or incomplete ({reason}): {path.stat().st_size:,} bytes are there; "
            "get the file again."
        ) from error


def _replacements(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Replacements for the classes that the file names; those outside `REPLACED` stay rejected."""
    names: set[str] = set()
    with _pickles(path) as (file, count):
        for _ in range(count):
            names |= set(_names(file))
    replaced = [f"builtins.{name}" for name in TYPES]
    replaced += sorted(name for name in names if name.startswith(REPLACED))
    return [*((Inert, name) for name in replaced), *((c, name) for name, c in HARMLESS.items())]


@contextmanager
def _pickles(path: Path) -> Iterator[tuple[Any, int]]:
    """A file's pickles, and their number."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            yield BytesIO(archive.read(name)), 1
    else:
        with path.open("rb") as file:
            yield file, _LEGACY_PICKLES


def _names(file: Any) -> Iterator[str]:
    """The full names of the classes and functions in the next pickle."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
    except (MemoryError, OverflowError) as error:
        raise ValueError("it gives a length beyond its end") from error

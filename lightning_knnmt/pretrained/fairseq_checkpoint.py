"""What a checkpoint of fairseq holds (Ott et al., 2019, arXiv:1904.01038): settings and weights.

Up to version 0.10 the settings are a Namespace (`args`), later a nested table (`cfg`), perhaps of
omegaconf's or fairseq's own classes. Nothing in the file is executed: it is read with
`weights_only=True`, and those classes are replaced by one that only holds what it is given.
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

# Packages whose objects stand beside the weights; what they would do when read is not needed.
REPLACED = ("fairseq.", "omegaconf.", "numpy.", "typing.")
# omegaconf's objects name the types of their values.
TYPES = ("bool", "int", "float", "str", "dict", "list", "tuple")
# These two hold values and run nothing.
HARMLESS = {"argparse.Namespace": Namespace, "collections.defaultdict": defaultdict}
# What torch and zipfile raise where bytes are missing or wrong.
DAMAGE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, AttributeError),
    *(TypeError, struct.error, zipfile.BadZipFile),
)
# A file of torch < 1.6 begins with several pickles, the checkpoint last among them.
_LEGACY_PICKLES = 4


class FairseqError(ValueError):
    """A fairseq checkpoint, or a file that belongs to it, that cannot be read, and why."""


class Inert:
    """Holds what another class's object would hold, and does nothing."""

    def __init__(self, *_: Any) -> None:
        """Takes any arguments: what a function was called with is not needed."""

    def __setstate__(self, state: Any) -> None:
        """Keeps attributes; any other state is not needed."""
        if isinstance(state, dict):
            self.__dict__.update(state)


class Checkpoint(NamedTuple):
    """What matters of a checkpoint.

    Attributes:
        settings: Those of the model and of the task, under the names of fairseq's options.
        weights: By fairseq's names, as `read_outline` gives them.
    """

    settings: dict[str, Any]
    weights: dict[str, Tensor]


def read_fairseq_checkpoint(path: Path) -> Checkpoint:
    """Reads a file of any version.

    Raises:
        FairseqError: If it is damaged, would run code, or is not fairseq's.
    """
    content = _read(path)
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise FairseqError(
            f"{path} is no fairseq checkpoint, for it holds no weights as 'model'; give a file "
            "that fairseq-train saved, such as checkpoint_best.pt."
        )
    settings = _settings(plain(content.get("args")), plain(content.get("cfg")))
    if not settings:
        raise FairseqError(
            f"{path} says nothing of its architecture: it has neither 'args' nor 'cfg' of "
            "fairseq's; give the file as fairseq-train saved it."
        )
    return Checkpoint(settings, weights)


def plain(value: Any) -> Any:
    """Namespaces, and what omegaconf's objects held, as tables and lists."""
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
    """One flat table, whichever of the two there is."""
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
            f"{path} is refused: it is damaged, or holds more than a fairseq checkpoint and would "
            "run code when read. Nothing was run; get the file from a source you trust."
        ) from error
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FairseqError(
            f"{path} is damaged or incomplete ({reason}): {path.stat().st_size:,} bytes are there; "
            "get the file again."
        ) from error


def _replacements(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What stands for each class that the file names; others than `REPLACED` stay refused."""
    names: set[str] = set()
    with _pickles(path) as (file, count):
        for _ in range(count):
            names |= set(_names(file))
    replaced = [f"builtins.{name}" for name in TYPES]
    replaced += sorted(name for name in names if name.startswith(REPLACED))
    return [*((Inert, name) for name in replaced), *((c, name) for name, c in HARMLESS.items())]


@contextmanager
def _pickles(path: Path) -> Iterator[tuple[Any, int]]:
    """Where the pickles of a file are, and how many come one after the other."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            yield BytesIO(archive.read(name)), 1
    else:
        with path.open("rb") as file:
            yield file, _LEGACY_PICKLES


def _names(file: Any) -> Iterator[str]:
    """The full names of the classes and functions that the next pickle asks for."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
    except (MemoryError, OverflowError) as error:
        raise ValueError("it gives a length beyond its end") from error

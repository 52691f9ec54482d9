"""What is chosen once and kept beside the datastore, under a digest of all that it depends on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def kept_name(sources: Mapping[str, Any]) -> str:
    """A file's name without ending, another for other sources."""
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes JSON; the file is whole at every moment."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)


def read_report(path: Path, take: Callable[[Any], T]) -> T | None:
    """What `take` finds in a report; None if that is missing or damaged: then make it anew."""
    try:
        return take(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_numbers(path: Path, numbers: Tensor) -> None:
    """Writes a tensor as .npy; the file is whole at every moment."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, numbers.numpy(), allow_pickle=False)
    partial.replace(path)


def read_numbers(path: Path, length: int) -> Tensor | None:
    """A tensor of this length; None if it is missing or damaged: then make it anew."""
    try:
        numbers = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
    return numbers if len(numbers) == length else None

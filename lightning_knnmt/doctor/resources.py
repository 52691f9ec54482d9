"""Whether this machine can hold and search the datastore, and what runs here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lightning_knnmt.doctor.finding import Finding
from lightning_knnmt.retrieval import DatastoreTooLargeError, available_memory, refuse_if_too_large

PACKAGES = ("torch", "pytorch-lightning", "sentencepiece", "sacrebleu")
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")  # one of them has the library
TIGHT = 0.5  # of the available memory


def check_size(
    directory: Path, num_entries: int, key_dim: int, seconds_per_entry: float
) -> Finding:
    """What the datastore of the whole training text takes.

    Args:
        directory: Where datastores are kept.
        num_entries: Target tokens of the training text.
        key_dim: D.
        seconds_per_entry: Measured on a part of the text.
    """
    try:
        estimate = refuse_if_too_large(directory, num_entries, key_dim)
    except DatastoreTooLargeError as error:
        return Finding("size", "problem", str(error))
    memory = available_memory()
    text = (
        f"the whole training text gives {num_entries:,} entries of {key_dim} numbers: "
        f"{_bytes(estimate.disk_bytes)} on the disk, at most {_bytes(estimate.memory_bytes)} of "
        f"the {_bytes(memory)} of memory available, about "
        f"{_duration(num_entries * seconds_per_entry)} to build"
    )
    if estimate.memory_bytes > TIGHT * memory:
        return Finding("size", "warning", f"{text}: close the other programs first.")
    return Finding("size", "ok", f"{text}.")


def describe_speed(num_tokens: int, seconds: float) -> Finding:
    """How fast the greedy translations came."""
    return Finding("speed", "ok", f"{num_tokens / seconds:,.0f} tokens a second, greedily.")


def describe_machine(device: torch.device) -> Finding:
    """Where it runs, and whether there is something faster."""
    text = f"device {device}, {torch.get_num_threads()} threads, {platform.platform(terse=True)}"
    if torch.cuda.is_available() and device.type == "cpu":
        name = torch.cuda.get_device_name()
        return Finding("device", "warning", f"{text}; a {name} stands idle: --device cuda uses it.")
    return Finding("device", "ok", f"{text}.")


def describe_versions() -> Finding:
    """Python and the libraries that results depend on."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{package} {version(package)}" for package in PACKAGES]
    faiss = next(filter(None, map(_version_if_there, FAISS_PACKAGES)), None)
    if faiss is None:
        listed = ", ".join(versions)
        return Finding("versions", "warning", f"{listed}; without faiss, search is exact alone.")
    return Finding("versions", "ok", ", ".join([*versions, faiss]) + ".")


def _version_if_there(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"

"""Our own checkpoints, which hold the architecture and the tokenizer besides the weights.

Both are plain types and tensors, so that a checkpoint is read without unpickling code
(`torch.load(weights_only=True)`).
"""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lightning_knnmt.data import Tokenizer, tokenizer_from_state
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.tensor_file import fill, read_outline, read_tensors

ENTRY = "lightning_knnmt"
FORMAT_VERSION = 1
PREFIX = "model."  # of the weights' names, as an attribute of the LightningModule


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


def checkpoint_entry(model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entry of a checkpoint from which `load_checkpoint` rebuilds model and tokenizer."""
    return {
        ENTRY: {
            "format_version": FORMAT_VERSION,
            "architecture": model.config,
            "tokenizer": tokenizer.state(),
        }
    }


def save_checkpoint(model: Transformer, tokenizer: Tokenizer, file: Path | BinaryIO) -> None:
    """Writes a checkpoint for `load_checkpoint`, without optimizer state.

    Args:
        model: Any model; its adapters are included.
        tokenizer: The model's.
        file: A path, or a file opened for writing.
    """
    weights = {f"{PREFIX}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, **checkpoint_entry(model, tokenizer)}, file)


def check_fits(checkpoint: dict[str, Any], model: Transformer, tokenizer: Tokenizer) -> None:
    """Raises if the weights have another vocabulary or architecture, naming what differs.

    Raises:
        CheckpointError: With both vocabularies, or every setting that differs.
    """
    entry = _entry(checkpoint, "this checkpoint")
    vocabulary = tokenizer_from_state(entry["tokenizer"])
    if vocabulary.digest != tokenizer.digest:
        raise CheckpointError(
            f"The checkpoint's weights have another vocabulary ({vocabulary.vocabulary.size:,} "
            f"tokens, digest {vocabulary.digest[:12]}) than this run's "
            f"({tokenizer.vocabulary.size:,} tokens, digest {tokenizer.digest[:12]}): their rows "
            "would mean other tokens. Give the data and the model that it was trained with, "
            "load it with model=pretrained model.path=..., which brings its vocabulary, or start "
            "a new run."
        )
    theirs = entry["architecture"]
    differing = differences(theirs, model.config)
    if differing:
        raise CheckpointError(
            f"The checkpoint holds another architecture: {differing}. "
            f"Give the settings it was trained with, or start a new run."
        )


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Every setting in which two architectures differ, as text; empty if there is none."""
    return "; ".join(
        f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
        for name in {**ours, **theirs}
        if theirs.get(name) != ours.get(name)
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of one of our checkpoints, its tensors as returned by `read_outline`.

    Raises:
        CheckpointError: If the file is damaged, or was not written by this package.
    """
    try:
        checkpoint = read_outline(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}): it is damaged, "
            f"or not one of ours. Use another copy, or train again."
        ) from error
    _entry(checkpoint, str(path))
    content: dict[str, Any] = checkpoint
    return content


def load_checkpoint(path: Path) -> tuple[Transformer, Tokenizer]:
    """Rebuilds model and tokenizer from one of our checkpoints.

    Raises:
        CheckpointError: If the file is damaged, or was not written by this package.
    """
    checkpoint = read_checkpoint(path)
    entry = _entry(checkpoint, str(path))
    outlines = {
        name.removeprefix(PREFIX): outline
        for name, outline in checkpoint["state_dict"].items()
        if name.startswith(PREFIX)
    }
    try:
        model = Transformer.assemble(entry["architecture"], read_tensors(path, outlines))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model, tokenizer_from_state(fill(path, entry["tokenizer"]))


def _entry(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(checkpoint, dict) or ENTRY not in checkpoint:
        raise CheckpointError(
            f"{name} was not written by lightning_knnmt: it does not state its architecture. Give "
            "a checkpoint of `train.py`, or another supported model."
        )
    entry: dict[str, Any] = checkpoint[ENTRY]
    if entry["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{name} has checkpoint format {entry['format_version']}, but this version of "
            f"lightning_knnmt reads format {FORMAT_VERSION}."
        )
    return entry

"""Adapters (or LoRA's updates) without their model: a few MB that fit only that model.

The file is safetensors; its metadata describe the adapters and hold the digest of their base.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_knnmt.files import replacing
from lightning_knnmt.models import Transformer, digest
from lightning_knnmt.pretrained.checkpoint import differences

FORMAT = "lightning_knnmt adapters 1"
# Not settings of the base: the adapters themselves, and ties, which untying a copy changes.
NOT_OF_THE_BASE = ("adapters", "tied_embeddings")


class AdapterError(ValueError):
    """Adapters that cannot be saved or loaded."""


def save_adapters(model: Transformer, path: Path | str) -> None:
    """Writes a model's adapters without the model.

    Raises:
        AdapterError: If the model has none.
    """
    if "adapters" not in model.config:
        raise AdapterError(
            "The model has no adapters to save: train some with module=adapter or module=lora."
        )
    metadata = {
        "format": FORMAT,
        "adapters": json.dumps(model.config["adapters"]),
        "architecture": json.dumps(_base_settings(model)),
        "base": _base_digest(model),
    }
    tensors = {name: tensor.contiguous() for name, tensor in _adapters(model).items()}
    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata)


def load_adapters(model: Transformer, path: Path | str) -> None:
    """Inserts saved adapters into their base; on an error the model stays unchanged.

    Args:
        model: The model that they were trained on, without adapters.
        path: A file of `save_adapters`.

    Raises:
        AdapterError: If the file is damaged or holds no adapters, or they belong to another model.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    if "adapters" in model.config:
        raise AdapterError(
            f"The model already has adapters ({model.config['adapters']}): load {path} onto the "
            f"model without them."
        )
    base = _base_settings(model)
    try:
        architecture = dict(json.loads(metadata["architecture"]))
        adapters: dict[str, Any] = dict(json.loads(metadata["adapters"]))
        digest_of_base = metadata["base"]
    except (KeyError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{path} is damaged: its metadata do not describe the adapters and their base "
            f"({type(error).__name__}). Use another copy, or train again."
        ) from error
    differing = differences(architecture, base)
    if differing:
        raise AdapterError(
            f"The adapters in {path} were trained on another architecture: {differing}. Give the "
            f"model they were trained on."
        )
    ours = _base_digest(model)
    if digest_of_base != ours:
        raise AdapterError(
            f"The adapters in {path} were trained on weights with digest {digest_of_base[:12]}, "
            f"but this model's have {ours[:12]}. Give the model they were trained on, or train "
            f"adapters for this one."
        )
    try:
        with torch.device("meta"):  # shapes only
            expected = _adapters(Transformer(**(model.config | {"adapters": adapters})))
    except (KeyError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{path} is damaged: adapters {adapters} are impossible ({error}). Use another copy, "
            "or train again."
        ) from error
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise AdapterError(
            f"{path} is damaged: its tensors are not those of adapters {adapters} on this model. "
            f"Use another copy, or train again."
        )
    model.insert(adapters)
    model.load_state_dict(tensors, strict=False)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of `save_adapters`."""
    if not path.is_file():
        raise AdapterError(f"There is no file of adapters at {path}.")
    if path.suffix == ".ckpt":
        raise AdapterError(
            f"{path} is a whole checkpoint, with the model that its adapters belong to: load it "
            "with model.path, without model.adapters."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors ({error}): it is damaged, or another kind of "
            "file. Use another copy, or train again."
        ) from error
    if metadata.get("format") != FORMAT:
        raise AdapterError(
            f"{path} holds {metadata.get('format', 'something unnamed')!r}, but only "
            f"{FORMAT!r} can be loaded: give a file that save_adapters wrote."
        )
    return metadata, tensors


def _adapters(model: Transformer) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if ".adapter." in name}


def _base_settings(model: Transformer) -> dict[str, Any]:
    return {name: value for name, value in model.config.items() if name not in NOT_OF_THE_BASE}


def _base_digest(model: Transformer) -> str:
    """Unlike a datastore's fingerprint, with the output projection, which the adapters fit."""
    adapters = _adapters(model)
    base = {name: t for name, t in model.state_dict().items() if name not in adapters}
    return digest(_base_settings(model), base)

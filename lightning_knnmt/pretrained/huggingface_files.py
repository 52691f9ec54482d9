"""The files of a Hugging Face model directory: settings in JSON, weights in one file or shards.

Nothing in them is executed: safetensors holds only tensors, and pytorch_model.bin, a pickle, is
read with `weights_only=True`.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_knnmt.pretrained.tensor_file import read_outline, read_tensor

CONFIG = "config.json"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
# Bytes to read through one memory map, whose pages stay in memory as long as it is open.
MAPPED = 64 << 20


class HuggingFaceError(ValueError):
    """A Hugging Face model that cannot be read."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        HuggingFaceError: If the file is absent or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HuggingFaceError(
            f"{path.parent} has no {path.name}; copy it there from where the model came from."
        ) from error
    except (ValueError, RecursionError) as error:
        raise HuggingFaceError(f"{path} is not JSON ({error}); get the file again.") from error
    if not isinstance(content, dict):
        raise HuggingFaceError(f"{path} holds no JSON object; get the file again.")
    return content


class Weights:
    """The weights by name, each read on request as a new float32 tensor.

    Attributes:
        unused: Names that were not taken yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = _files_of_weights(directory)
        self._loaded: dict[Path, Mapping[str, Tensor]] = {}  # the pickles only
        self._mapped: tuple[Path, Any] | None = None  # a file of safetensors
        self._mapped_bytes = 0
        self.unused = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, *names: str) -> Tensor:
        """One tensor, or several concatenated along their first dimension.

        Raises:
            HuggingFaceError: If the files lack one.
        """
        tensors = [self._read(name) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _read(self, name: str) -> Tensor:
        if name not in self._files:
            raise HuggingFaceError(
                f"The weights in {self.directory} lack {name}, which its {CONFIG} needs; get the "
                "files again."
            )
        self.unused.discard(name)
        path = self._files[name]
        if path.suffix == ".safetensors":
            return self._read_safetensors(path, name)
        if path not in self._loaded:
            self._loaded[path] = _read_pickle(path)
        return read_tensor(path, self._loaded[path][name])

    def _read_safetensors(self, path: Path, name: str) -> Tensor:
        if self._mapped is None or self._mapped[0] != path or self._mapped_bytes > MAPPED:
            self._mapped, self._mapped_bytes = (path, _open_safetensors(path)), 0
        mapped: Tensor = self._mapped[1].get_tensor(name)
        self._mapped_bytes += mapped.nbytes
        return mapped.to(torch.float32, copy=True)


def _files_of_weights(directory: Path) -> dict[str, Path]:
    """The file of each name: safetensors if there are some, else pickles; whole or in shards."""
    for name in (SAFETENSORS, PICKLE):
        path, index = directory / name, directory / f"{name}.index.json"
        if path.is_file():
            return dict.fromkeys(_names(path), path)
        if index.is_file():
            return _files_of_shards(index)
    raise HuggingFaceError(
        f"{directory} has a {CONFIG} but no weights: it needs {SAFETENSORS} or {PICKLE}, whole or "
        "in shards with their .index.json."
    )


def _files_of_shards(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HuggingFaceError(f"{index} names no weights (weight_map); get the file again.")
    files = {name: index.parent / Path(str(shard)).name for name, shard in weight_map.items()}
    for shard in sorted(set(files.values())):
        if not shard.is_file():
            raise HuggingFaceError(
                f"{index} names the shard {shard.name}, but there is no such file; get "
                "that file too."
            )
        absent = {name for name, file in files.items() if file == shard} - set(_names(shard))
        if absent:
            raise HuggingFaceError(
                f"{index} says that {shard.name} holds {min(absent)}, but it does not; get both "
                "files again, from the same version of the model."
            )
    return files


def _names(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(_read_pickle(path))
    with _open_safetensors(path) as file:
        return list(file.keys())


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise HuggingFaceError(
            f"{path} is damaged or incomplete ({error}): it has {path.stat().st_size:,} bytes; get "
            "the file again."
        ) from error


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    """The outlines of a pickle's tensors; nothing in it is executed."""
    try:
        content = read_outline(path)
    except pickle.UnpicklingError as error:
        raise HuggingFaceError(
            f"{path} was not read: it is damaged, or holds more than tensors and would run code. "
            "Nothing was run; get the file from a source you trust, or as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise HuggingFaceError(
            f"{path} is damaged or incomplete ({str(error).splitlines()[0]}); get the file again."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(tensor, Tensor) for tensor in content.values()
    ):
        raise HuggingFaceError(f"{path} does not hold a dictionary of tensors; get the file again.")
    return content

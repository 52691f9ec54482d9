"""Files of `torch.save`: first their outline, then one tensor at a time.

A memory map would be less code, but every page that is copied out of it stays in memory until the
whole file is closed, and what is not copied changes with the file.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor


def read_outline(path: Path) -> Any:
    """The content without the tensors' values, which `read_tensor` reads.

    Its tensors are on the meta device, or loaded already if the file is from torch < 1.6. Nothing
    in the file is executed.

    Raises:
        Exception: Whatever `torch.load` raises if the file is damaged or contains code.
    """
    device = "meta" if zipfile.is_zipfile(path) else "cpu"
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except EOFError as error:  # torch's has no message
        raise EOFError("it ends too early") from error


def read_tensors(path: Path, outlines: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Several tensors, as `read_tensor` reads them; one with several names is read once."""
    read: dict[tuple[object, ...], Tensor] = {}
    tensors = {}
    for name, outline in outlines.items():
        storage = outline.untyped_storage()
        where = storage._checkpoint_offset if outline.is_meta else storage.data_ptr()
        place = (where, outline.storage_offset(), outline.shape, outline.stride())
        if place not in read:
            read[place] = read_tensor(path, outline)
        tensors[name] = read[place]
    return tensors


def read_tensor(path: Path, outline: Tensor) -> Tensor:
    """One tensor, or a view of one, as a new float32 tensor.

    Args:
        path: The file.
        outline: The tensor in its `read_outline`.

    Raises:
        EOFError: If the file ends before the tensor does.
    """
    return _read(path, outline).float()


def fill(path: Path, outline: Any) -> Any:
    """Dictionaries and lists with their tensors read, in their own types."""
    if isinstance(outline, Tensor):
        return _read(path, outline)
    if isinstance(outline, Mapping):
        return {key: fill(path, value) for key, value in outline.items()}
    if isinstance(outline, list):
        return [fill(path, value) for value in outline]
    return outline


def _read(path: Path, outline: Tensor) -> Tensor:
    if not outline.is_meta:
        return outline.clone()
    steps = zip(outline.shape, outline.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps) if outline.numel() else 0
    values = torch.empty(span, dtype=outline.dtype)
    buffer = values.view(torch.uint8).numpy().data
    # Where torch.load found the storage: see "Layout Control" in torch's documentation.
    begin: int = cast(Any, outline.untyped_storage())._checkpoint_offset
    with path.open("rb") as file:
        file.seek(begin + int(outline.storage_offset()) * outline.itemsize)
        if file.readinto(buffer) != len(buffer):
            raise EOFError(
                f"{path} ends within a tensor of shape {list(outline.shape)}; copy it again."
            )
    return values.as_strided(outline.shape, outline.stride(), 0).contiguous()

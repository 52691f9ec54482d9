"""The container of Marian's binary models: named arrays, float32 or 8-bit integers.

Little endian: version and number of items (u64 each); for each item the length of its name, its
type, rank and number of bytes (u64 each); then all names (zero-terminated), all shapes (i32), a
padding (u64 and that many bytes), and the items' data. An int8 item ends with one float32
multiplier: the weight is the integer divided by it. Int8 matrices are stored transposed, except
embeddings.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VERSION = 1
FLOAT32, INT8 = 0x404, 0x4101
EMBEDDING = "Wemb"  # the end of an embedding's name


class MarianError(ValueError):
    """A Marian model that cannot be read."""


class Item(NamedTuple):
    """One named array of the file, not yet decoded."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    data: memoryview


def read_items(path: Path) -> dict[str, Item]:
    """Reads the table of contents; every size is checked against the file before its use."""
    reader = _Reader(path)
    version, count = reader.numbers("Q", 2, "the header")
    if version != VERSION:
        raise MarianError(
            f"{path} is not a Marian binary of version {VERSION}: its first value, the version, is "
            f"{version}."
        )
    headers = [reader.numbers("Q", 4, f"the header of item {i} of {count}") for i in range(count)]
    raw_names = [bytes(reader.take(h[0], f"the name of item {i}")) for i, h in enumerate(headers)]
    names = [raw.rstrip(b"\0").decode(errors="replace") for raw in raw_names]
    shapes = [
        reader.numbers("i", rank, f"the shape of {name}")
        for name, (_, _, rank, _) in zip(names, headers, strict=True)
    ]
    (padding,) = reader.numbers("Q", 1, "the padding before the data")
    reader.take(padding, "the padding before the data")
    items = {}
    for name, shape, (_, type_, _, num_bytes) in zip(names, shapes, headers, strict=True):
        offset = reader.offset
        items[name] = Item(
            name, type_, shape, offset, reader.take(num_bytes, f"the data of {name}")
        )
    return items


class _Reader:
    """Reads a file sequentially; raises where it ends too early."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._data = memoryview(path.read_bytes())

    def take(self, num_bytes: int, what: str) -> memoryview:
        left = len(self._data) - self.offset
        if num_bytes > left:
            raise MarianError(
                f"{self.path} is damaged or incomplete: {what}, at byte {self.offset:,}, needs "
                f"{num_bytes:,} bytes, but the file ends after {left:,} more; get the file again."
            )
        part = self._data[self.offset : self.offset + num_bytes]
        self.offset += num_bytes
        return part

    def numbers(self, code: str, count: int, what: str) -> tuple[int, ...]:
        size = struct.calcsize(f"<{code}")
        data = self.take(
            count * size, what
        )  # before building the format string, which may be huge too
        return struct.unpack(f"<{count}{code}", data)


class Weights:
    """Decodes items into float32 arrays."""

    def __init__(self, items: Mapping[str, Item], path: Path) -> None:
        self._items = items
        self._path = path

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """One item in Marian's own layout: matrices [inputs, outputs], vectors [1, d]."""
        item = self._item(name)
        rows, columns = item.shape if len(item.shape) == 2 else (0, 0)
        size = rows * columns
        needed = size + 4 if item.type == INT8 else 4 * size
        if min(rows, columns) < 1 or needed > len(item.data):
            shape, num_bytes = list(item.shape), len(item.data)
            raise self._damaged(item, f"has shape {shape}, which {num_bytes:,} bytes do not hold")
        if item.type == FLOAT32:
            array = np.frombuffer(item.data, "<f4", size).astype(np.float32).reshape(rows, columns)
        else:
            integers = np.frombuffer(item.data, np.int8, size).astype(np.float32)
            (multiplier,) = struct.unpack_from("<f", item.data, size)
            if not 0 < multiplier < float("inf"):
                raise self._damaged(item, f"has the multiplier {multiplier}, not a positive one")
            array = integers / np.float32(multiplier)
            if name.endswith(EMBEDDING):
                array = array.reshape(rows, columns)
            else:
                array = array.reshape(columns, rows).T
        if not np.isfinite(array).all():
            raise self._damaged(item, "holds values that are not finite")
        return array

    def embedding(self, name: str) -> Tensor:
        """One row for each piece of a vocabulary, [pieces, D]."""
        return torch.from_numpy(self.array(name))

    def vectors(self, *names: str) -> Tensor:
        """Biases or layer norms, concatenated, [sum of widths]."""
        return torch.cat([torch.from_numpy(self.array(name)).flatten() for name in names])

    def matrices(self, *names: str) -> Tensor:
        """Matrices as one nn.Linear weight, [sum of outputs, inputs]."""
        parts = [torch.from_numpy(self.array(name)).T for name in names]
        if len({part.shape[1] for part in parts}) > 1:
            item, others = self._item(names[0]), ", ".join(names[1:])
            raise self._damaged(item, f"differs in width from {others}")
        return torch.cat(parts)

    def _item(self, name: str) -> Item:
        if name not in self._items:
            raise MarianError(
                f"{self._path} lacks {name}, which its own configuration needs; get the file again."
            )
        item = self._items[name]
        if item.type not in (FLOAT32, INT8):
            raise MarianError(
                f"{self._path}: {name} has the type {item.type:#x}; supported are float32 "
                f"({FLOAT32:#x}) and unpacked 8-bit integers ({INT8:#x})."
            )
        return item

    def _damaged(self, item: Item, reason: str) -> MarianError:
        return MarianError(
            f"{self._path} is damaged: {item.name}, at byte {item.offset:,}, {reason}; get the "
            "file again."
        )

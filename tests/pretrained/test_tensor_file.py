"""Tensors read one at a time, against torch.load's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_knnmt.pretrained.tensor_file import fill, read_outline, read_tensor, read_tensors


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 5, generator=generator)
    return {
        "matrix": matrix,
        "the same": matrix,
        "tied": matrix.detach(),
        "rows": matrix[2:4],
        "transposed": matrix[:, 1:3].T,
        "half": torch.randn(3, 2, generator=generator).half(),
        "bfloat16": torch.randn(7, generator=generator).bfloat16(),
        "double": torch.randn(2, 3, dtype=torch.float64, generator=generator),
        "number": torch.tensor(4.5),
        "nothing": torch.empty(0, 3),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_values_are_those_of_torch_load(zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(tensors(), file, _use_new_zipfile_serialization=zipped)
    read = read_tensors(file, read_outline(file))
    loaded = torch.load(file, weights_only=True)
    assert list(read) == list(loaded)
    for name, expected in loaded.items():
        assert read[name].dtype == torch.float32
        torch.testing.assert_close(read[name], expected.float(), rtol=0, atol=0)
    assert read["matrix"] is read["the same"] is read["tied"]
    # Parts have memory of their own: to change one changes no other.
    read["rows"].zero_()
    torch.testing.assert_close(read["matrix"], loaded["matrix"], rtol=0, atol=0)


def test_an_outline_divides_as_its_tensor_does(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(tensors(), file)
    parts = read_outline(file)["matrix"].chunk(3)
    read = torch.cat([read_tensor(file, part) for part in parts])
    torch.testing.assert_close(read, tensors()["matrix"], rtol=0, atol=0)


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(tensors(), file)
    read = read_tensors(file, read_outline(file))
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    torch.testing.assert_close(read["matrix"], tensors()["matrix"], rtol=0, atol=0)


def test_says_that_the_file_ended(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(tensors(), file)
    outline = read_outline(file)
    with file.open("r+b") as stream:
        stream.truncate(40)
    with pytest.raises(EOFError, match=r"file\.pt .*\[6, 5\]"):
        read_tensor(file, outline["matrix"])


@pytest.mark.parametrize("zipped", [True, False])
def test_tables_are_filled_in_their_own_types(zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    model = torch.tensor([3, 0, 255], dtype=torch.uint8)
    content = {"kind": "pieces", "sides": [{"model": model, "size": 3}]}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    filled = fill(file, read_outline(file))
    read = filled["sides"][0].pop("model")
    assert read.dtype == torch.uint8
    assert read.tolist() == [3, 0, 255]
    assert filled == {"kind": "pieces", "sides": [{"size": 3}]}

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_knnmt.data import DataBinError, IndexedIds

SENTENCES = [[5, 9, 2], [2], [7, 7, 7, 6, 2], [100, 2]]
Write = Callable[..., None]


@pytest.mark.parametrize(
    ("code", "letter"),
    [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H"), (9, "I"), (10, "Q")],
)
def test_every_type_of_ids_is_read_in_place(
    write_indexed: Write, tmp_path: Path, code: int, letter: str
) -> None:
    write_indexed(tmp_path / "train.de-en.de", SENTENCES, code, letter)
    side = IndexedIds(tmp_path / "train.de-en.de")
    assert [side[i].tolist() for i in range(len(side))] == SENTENCES
    assert side.offsets.tolist() == [0, 3, 4, 9, 11]
    assert isinstance(side.ids, np.memmap)
    assert np.shares_memory(side[2], side.ids)
    assert side.ids.dtype.itemsize == struct.calcsize(letter)


@pytest.fixture
def prefix(write_indexed: Write, tmp_path: Path) -> Path:
    write_indexed(tmp_path / "test.de-en.en", SENTENCES)
    return tmp_path / "test.de-en.en"


def damage(path: Path, at: int, content: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + content + whole[at + len(content) :])


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (0, b"TNTIDX\0\0", r"en\.idx .*TNTIDX.*--dataset-impl mmap"),
        (0, b"PK", r"en\.idx .*b'PKIDIDX.*--dataset-impl mmap"),
        (9, b"\2", r"version 2 .*version 1 .*1, 2, 3, 4, 5"),
        (17, b"\6", r"type code 6\b"),
        (18, b"\5", r"\b74 bytes.*\b5 sentences.*\b86\b"),
        (18, b"\0", r"\b74 bytes.*\b0 sentences.*\b26\b"),
        (26, b"\4", r"en\.idx is damaged"),
        (30, b"\0", r"en\.idx is damaged"),
        (38, b"\3", r"en\.bin .*\b22\b.*en\.idx .*\b24\b"),
    ],
)
def test_a_damaged_index_is_refused(prefix: Path, at: int, content: bytes, message: str) -> None:
    damage(prefix.with_name(f"{prefix.name}.idx"), at, content)
    with pytest.raises(DataBinError, match=message):
        IndexedIds(prefix)


@pytest.mark.parametrize("size", [9, 25])
def test_an_index_that_ends_in_its_header_is_refused(prefix: Path, size: int) -> None:
    path = prefix.with_name(f"{prefix.name}.idx")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataBinError, match=r"en\.idx .*header.*\b26\b"):
        IndexedIds(prefix)


def test_truncated_ids_are_refused(prefix: Path) -> None:
    path = prefix.with_name(f"{prefix.name}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataBinError, match=r"en\.bin .*\b20\b.*en\.idx"):
        IndexedIds(prefix)


def test_an_index_without_sentences_is_refused(write_indexed: Write, tmp_path: Path) -> None:
    write_indexed(tmp_path / "valid.de-en.en", [])
    with pytest.raises(DataBinError, match=r"en\.idx holds no sentence"):
        IndexedIds(tmp_path / "valid.de-en.en")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_file_is_named_with_those_there(prefix: Path, ending: str) -> None:
    prefix.with_name(f"{prefix.name}.{ending}").unlink()
    present = "no .idx file" if ending == "idx" else r"test\.de-en\.en\.idx"
    message = rf"test\.de-en\.en\.{ending}\b.*{present}"
    with pytest.raises(DataBinError, match=message):
        IndexedIds(prefix)


def test_a_sentence_without_its_end_is_refused(prefix: Path) -> None:
    side = IndexedIds(prefix)
    side.check_ends(2)
    damage(prefix.with_name(f"{prefix.name}.bin"), 16, b"\6")
    with pytest.raises(DataBinError, match=r"en\.idx: sentence 3 .*id 6\b.*</s>, id 2\b"):
        IndexedIds(prefix).check_ends(2)

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
        (0, b"TNTIDX\0\0", r"en\.idx is of fairseq's old format TNTIDX.*--dataset-impl mmap"),
        (0, b"PK", r"en\.idx begins with b'PKIDIDX.*--dataset-impl mmap"),
        (9, b"\2", r"version 2 and type code 8; readable are version 1 with codes 1, 2, 3, 4, 5"),
        (17, b"\6", r"version 1 and type code 6; readable .* \(whole numbers\)"),
        (18, b"\5", r"has 74 bytes, but its 5 sentences take 86; copy it anew"),
        (18, b"\0", r"has 74 bytes, but its 0 sentences take 26"),
        (26, b"\4", r"sentences do not follow one another without gaps"),
        (30, b"\0", r"sentences do not follow one another without gaps"),
        (
            38,
            b"\3",
            r"en\.bin has 22 bytes, but test\.de-en\.en\.idx promises 24: one of them is tru",
        ),
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
    with pytest.raises(DataBinError, match="ends within its header of 26 bytes; copy it anew"):
        IndexedIds(prefix)


def test_truncated_ids_are_refused(prefix: Path) -> None:
    path = prefix.with_name(f"{prefix.name}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataBinError, match=r"en\.bin has 20 bytes, but test\.de-en\.en\.idx prom"):
        IndexedIds(prefix)


def test_an_index_without_sentences_is_refused(write_indexed: Write, tmp_path: Path) -> None:
    write_indexed(tmp_path / "valid.de-en.en", [])
    with pytest.raises(DataBinError, match=r"en\.idx holds no sentence; it must hold at least one"):
        IndexedIds(tmp_path / "valid.de-en.en")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_file_is_named_with_those_there(prefix: Path, ending: str) -> None:
    prefix.with_name(f"{prefix.name}.{ending}").unlink()
    present = "no .idx file" if ending == "idx" else r"test\.de-en\.en\.idx"
    message = rf"There is no .*test\.de-en\.en\.{ending}; the folder holds {present}\. A split has"
    with pytest.raises(DataBinError, match=message):
        IndexedIds(prefix)


def test_a_sentence_without_its_end_is_refused(prefix: Path) -> None:
    side = IndexedIds(prefix)
    side.check_ends(2)
    damage(prefix.with_name(f"{prefix.name}.bin"), 16, b"\6")
    with pytest.raises(DataBinError, match=r"en\.idx: sentence 3 ends with id 6, .*</s>, id 2"):
        IndexedIds(prefix).check_ends(2)

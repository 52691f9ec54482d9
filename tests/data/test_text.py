from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_knnmt.data import TextError, TextPair, find_text_pair, read_lines


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffum\x0bdois\r\ntrês\u2028quatro\x85\n\ncinco".encode())
    assert list(read_lines(path)) == ["um\x0bdois", "três\u2028quatro\x85", "", "cinco"]


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    path = tmp_path / "train.pt"
    path.write_bytes(b"ol\xc3\xa1\nn\xe3o\n")
    with pytest.raises(TextError, match=r"train\.pt, line 2: byte 2 \(0xe3\)"):
        list(read_lines(path))


def test_line_counts_must_be_equal(write_pair: Callable[..., TextPair], tmp_path: Path) -> None:
    text = write_pair(["a", "b", "c"], ["a", "b"])
    with pytest.raises(TextError, match=r"train\.pt .*\b3\b.*train\.en .*\b2\b"):
        text.summarize(tmp_path)


def test_an_empty_file_is_refused(write_pair: Callable[..., TextPair], tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"train\.en is empty"):
        write_pair(["a"], []).summarize(tmp_path)


def test_a_last_line_without_a_newline_counts(tmp_path: Path) -> None:
    text = TextPair(tmp_path / "t.pt", tmp_path / "t.en")
    text.source_path.write_text("a\nb")
    text.target_path.write_text("a\nb\n")
    assert [summary.lines for summary in text.summarize(tmp_path)] == [2, 2]


def test_a_changed_file_is_digested_anew(
    write_pair: Callable[..., TextPair], tmp_path: Path
) -> None:
    before = write_pair(["a"], ["b"]).summarize(tmp_path)
    assert write_pair(["a"], ["b"]).summarize(tmp_path) == before
    after = write_pair(["aa"], ["b"]).summarize(tmp_path)
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_missing_language_is_named_beside_those_there(
    write_pair: Callable[..., TextPair], tmp_path: Path
) -> None:
    write_pair(["a"], ["b"])
    with pytest.raises(TextError, match=r"train\.de\b.*'de'.*train\.en, train\.pt"):
        find_text_pair(tmp_path / "train", "de", "en")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"folder \S*nowhere\b"):
        find_text_pair(tmp_path / "nowhere" / "train", "pt", "en")


def test_of_a_missing_split_the_others_are_named_instead_of_the_endings(
    write_pair: Callable[..., TextPair], tmp_path: Path
) -> None:
    write_pair(["a"], ["b"])
    said = {}
    for split in ("valid", "test"):
        with pytest.raises(TextError) as raised:
            find_text_pair(tmp_path / split, "pt", "en")
        said[split] = str(raised.value)
    assert f"{tmp_path}/valid.pt" in said["valid"]
    assert "add valid.pt" in said["valid"]
    assert "data.test" not in said["valid"]
    assert "add test.pt" in said["test"]
    assert "data.test, data.also_test" in said["test"]

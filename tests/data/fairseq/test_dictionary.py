"""fairseq's dictionaries."""

from pathlib import Path

import pytest

from lightning_knnmt.data.fairseq.dictionary import FairseqDictionary
from lightning_knnmt.data.text import TextError


def write(directory: Path, text: str) -> Path:
    path = directory / "dict.de.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_lines_are_numbered_after_four_specials(tmp_path: Path) -> None:
    dictionary = FairseqDictionary.read(write(tmp_path, ". 9\nHaus@@ 4\nmadeupword0000 0\n"))
    assert dictionary.symbols == ("<s>", "<pad>", "</s>", "<unk>", ".", "Haus@@", "madeupword0000")
    assert len(dictionary) == 7
    assert dictionary.encode(["Haus@@", ".", "Tor", "</s>"]) == [5, 4, 3, 2]
    assert dictionary.decode([5, 3, 2]) == ["Haus@@", "<unk>", "</s>"]


def test_a_symbol_may_hold_any_character_but_a_space_before_its_count(tmp_path: Path) -> None:
    dictionary = FairseqDictionary.read(write(tmp_path, "a\xa0b 3\n\u2028 2\n7 1\n#x 1\r\n"))
    assert dictionary.symbols[4:] == ("a\xa0b", "\u2028", "7", "#x")


def test_a_symbol_that_overwrites_takes_the_later_id(tmp_path: Path) -> None:
    text = "a 9\nb 4\na 2 #fairseq:overwrite\n<s> 1 #fairseq:overwrite\n"
    dictionary = FairseqDictionary.read(write(tmp_path, text))
    assert len(dictionary) == 8
    assert dictionary.encode(["a", "b", "<s>"]) == [6, 5, 7]
    assert dictionary.decode([4, 6]) == ["a", "a"]


@pytest.mark.parametrize("line", ["Haus", "Haus viele", "", " 3", "Haus 3.5", "Haus -1"])
def test_a_line_without_symbol_and_count_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, f". 9\n{line}\n")
    with pytest.raises(TextError, match=r"dict\.de\.txt, line 2\b") as error:
        FairseqDictionary.read(path)
    assert repr(line) in str(error.value)


@pytest.mark.parametrize("symbol", ["a", "<pad>"])
def test_a_symbol_that_occurs_twice_is_refused(tmp_path: Path, symbol: str) -> None:
    path = write(tmp_path, f"a 9\nb 4\n{symbol} 2\n")
    with pytest.raises(TextError, match=r"dict\.de\.txt, line 3\b.*#fairseq:overwrite"):
        FairseqDictionary.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"dict\.fr\.txt"):
        FairseqDictionary.read(tmp_path / "dict.fr.txt")


def test_the_digest_tells_symbols_and_order_apart() -> None:
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    tables = [("a", "b"), ("b", "a"), ("a",), ("a", "b", "c")]
    digests = {FairseqDictionary((*specials, *table)).digest for table in tables}
    assert len(digests) == 4
    assert FairseqDictionary((*specials, "a", "b")).digest in digests


def test_symbols_without_the_specials_are_refused() -> None:
    with pytest.raises(ValueError, match="<s> <pad> </s> <unk>"):
        FairseqDictionary(("a", "b"))

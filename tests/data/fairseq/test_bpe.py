"""Byte-pair encoding by the codes of subword-nmt and fastBPE."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from lightning_knnmt.data import TokenizerError
from lightning_knnmt.data.fairseq.tokenizer import BytePairEncoding, join_pieces

MERGES = ["l o", "lo w", "e r</w>", "low er</w>", "n e", "ne w", "e s", "es t</w>"]


def read(directory: Path, text: str) -> BytePairEncoding:
    path = directory / "bpecodes"
    path.write_text(text, encoding="utf-8")
    return BytePairEncoding.read(path)


def lines(*merges: str) -> str:
    return "".join(f"{merge}\n" for merge in merges)


FORMATS = {
    "subword-nmt 0.2": "#version: 0.2\n" + lines(*MERGES),
    "fastBPE": lines(*(f"{merge} {900 - i}" for i, merge in enumerate(MERGES))),
    "first line cut off": lines(*MERGES),
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=list(FORMATS))
def test_words_are_cut_as_the_merges_say(tmp_path: Path, text: str) -> None:
    codes = read(tmp_path, text)
    expected = {
        "lower": ["lower"],
        "low": ["lo@@", "w"],  # the last w is w</w>, which no merge has
        "lowest": ["low@@", "est"],
        "newer": ["new@@", "er"],
        "o": ["o"],
        "Öl": ["Ö@@", "l"],
    }
    for word, pieces in expected.items():
        assert codes.encode([word]) == pieces
    assert codes.encode(["newer", "o"]) == ["new@@", "er", "o"]


def test_in_the_oldest_codes_a_words_end_is_a_symbol(tmp_path: Path) -> None:
    merges = ["l o", "lo w", "low </w>", "e r", "er </w>"]
    for text in ("#version: 0.1\n" + lines(*merges), lines(*merges)):
        codes = read(tmp_path, text)
        assert codes.end_stands_alone
        assert codes.encode(["low", "lower", "erlow"]) == ["low", "low@@", "er", "er@@", "low"]


def slowly(word: str, merges: list[str]) -> list[str]:
    """Sennrich et al.'s algorithm as they print it: every merge in turn, over the whole word."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    for merge in merges:
        a, b = merge.split()
        i = 0
        while i < len(symbols) - 1:
            if symbols[i] == a and symbols[i + 1] == b:
                symbols[i : i + 2] = [a + b]
            i += 1
    symbols = [symbol.replace("</w>", "") for symbol in symbols]
    return [f"{symbol}@@" for symbol in symbols[:-1]] + symbols[-1:]


def test_random_words_are_cut_as_by_every_merge_in_turn(tmp_path: Path) -> None:
    """Learned merges join what earlier ones made, as these do."""
    generator = np.random.default_rng(0)
    symbols = ["a", "b", "c", "a</w>", "b</w>", "c</w>"]
    merges: list[str] = []
    while len(merges) < 25:
        a = str(generator.choice([s for s in symbols if not s.endswith("</w>")]))
        b = str(generator.choice(symbols))
        if f"{a} {b}" not in merges and a + b not in symbols:
            merges.append(f"{a} {b}")
            symbols.append(a + b)
    codes = read(tmp_path, lines("#version: 0.2", *merges))
    words = ["".join(generator.choice(list("abc"), size=n)) for n in range(1, 30) for _ in "1234"]
    cut = [codes.encode([word]) for word in words]
    assert cut == [slowly(word, merges) for word in words]
    assert sum(map(len, cut)) < 0.8 * sum(map(len, words))


def test_a_merge_that_occurs_twice_has_its_first_place() -> None:
    twice = BytePairEncoding([("a", "b"), ("b", "c</w>"), ("b", "c</w>"), ("a", "b")])
    assert twice.encode(["abc"]) == ["ab@@", "c"]


def test_pieces_are_joined() -> None:
    assert join_pieces(["new@@", "er", "o", "a@@"]) == "newer o a"
    assert join_pieces(["@@", "x@@y", "."]) == "x@@y ."
    assert join_pieces([]) == ""


def test_it_travels_to_other_processes() -> None:
    codes = BytePairEncoding([("a", "b</w>")])
    again = pickle.loads(pickle.dumps(codes))
    assert again.encode(["ab"]) == ["ab"]
    assert again.digest == codes.digest
    assert BytePairEncoding([("a", "b</w>")], end_stands_alone=True).digest != codes.digest
    assert BytePairEncoding([("a", "c</w>")]).digest != codes.digest


@pytest.mark.parametrize("line", ["a", "a b c", "a b 1 2", " b", "", "a  b"])
def test_a_line_that_is_no_merge_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(TokenizerError, match=r"bpecodes, line 3\b") as error:
        read(tmp_path, f"#version: 0.2\na b\n{line}\n")
    assert repr(line) in str(error.value)


def test_files_without_merges_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="bpecodes"):
        read(tmp_path, "#version: 0.2\n")
    with pytest.raises(TokenizerError, match=r"codes\.de"):
        BytePairEncoding.read(tmp_path / "codes.de")

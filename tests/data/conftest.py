"""A few lines of parallel text, and a small SentencePiece model of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lightning_knnmt.data import SentencePieceTokenizer, TextPair

WORDS = {
    "casa": "house",
    "porta": "door",
    "janela": "window",
    "luz": "light",
    "vermelha": "red",
    "grande": "large",
    "é": "is",
    "não": "not",
}


def sentences(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Word-by-word translations of one to twelve words."""
    chooser = random.Random(seed)
    sources = [" ".join(chooser.choices(list(WORDS), k=1 + i % 12)) for i in range(count)]
    return sources, [" ".join(WORDS[word] for word in line.split()) for line in sources]


@pytest.fixture
def write_pair(tmp_path: Path) -> Callable[..., TextPair]:
    """Writes two files of lines: ``write_pair(sources, targets, split)``."""

    def write(sources: Sequence[str], targets: Sequence[str], split: str = "train") -> TextPair:
        text = TextPair(tmp_path / f"{split}.pt", tmp_path / f"{split}.en")
        for path, lines in ((text.source_path, sources), (text.target_path, targets)):
            path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        return text

    return write


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A model of 40 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for path, lines in zip((folder / "a", folder / "b"), sentences(200), strict=True):
        path.write_text("\n".join(lines), encoding="utf-8")
    return SentencePieceTokenizer.train([folder / "a", folder / "b"], 40, cache_dir=folder)


@pytest.fixture
def toy_root(tmp_path: Path, write_pair: Callable[..., TextPair]) -> Path:
    """A folder of 200 training, 20 validation and 30 test pairs."""
    for seed, (split, count) in enumerate((("train", 200), ("valid", 20), ("test", 30))):
        write_pair(*sentences(count, seed), split)
    return tmp_path

"""What many tests share: one thread, a toy language pair, a tiny model of it."""

import os

# Before torch is imported anywhere: busy cores make OpenMP crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_knnmt.data import FairseqDictionary, ParallelDataModule, Vocabulary
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import save_checkpoint
from lightning_knnmt.retrieval import (
    DatastorePlan,
    FlatChoice,
    Retrieval,
    RetrievalPlan,
    TunedCombiner,
)
from lightning_knnmt.system import System

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def toy_pair(rng: random.Random) -> tuple[str, str]:
    """A sentence of made-up words, and the same words backwards with another ending."""
    words = ["".join(rng.choices(SYLLABLES, k=2)) for _ in range(rng.randint(2, 6))]
    return " ".join(words), " ".join(word + "x" for word in reversed(words))


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder {train,valid,test}.{xx,yy}."""
    folder = tmp_path_factory.mktemp("toy") / "text"
    folder.mkdir()
    rng = random.Random(1)
    for split, size in {"train": 300, "valid": 30, "test": 40}.items():
        pairs = [toy_pair(rng) for _ in range(size)]
        for lang, side in (("xx", 0), ("yy", 1)):
            lines = "".join(pair[side] + "\n" for pair in pairs)
            (folder / f"{split}.{lang}").write_text(lines)
    return folder


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def toy_datamodule(toy_text: Path, toy_cache: Path) -> ParallelDataModule:
    return ParallelDataModule(
        toy_text,
        "xx",
        "yy",
        cache_dir=toy_cache,
        vocab_size=100,
        max_tokens=400,
        eval_max_tokens=400,
    )


@pytest.fixture
def tiny_model(toy_datamodule: ParallelDataModule) -> Transformer:
    """Fresh seeded weights: small enough for a test, odd enough to notice a mixed-up dimension."""
    vocabulary = toy_datamodule.tokenizer.vocabulary
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Transformer(
            vocab_size=vocabulary.size,
            pad_id=vocabulary.pad_id,
            start_id=vocabulary.start_id,
            eos_id=vocabulary.eos_id,
            model_dim=24,
            num_heads=2,
            encoder_layers=2,
            decoder_layers=1,
            encoder_ffn_dim=40,
            decoder_ffn_dim=32,
            dropout=0.1,
        )
    return model.eval()


def records(stored: bytes) -> Iterator[bytes]:
    """The records of a *.wandb file: LevelDB's log format after a header of seven bytes."""
    parts, place = b"", 7
    while place + 7 <= len(stored):
        left = -place % 32768  # in this block
        if 0 < left < 7:  # no room for a record's head: the block is padded
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", stored[place : place + 7])
        parts += stored[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.fixture
def wandb_run() -> Callable[[Path], dict[str, list[Any]]]:
    """What the one offline run below a folder keeps: its metrics and config, by name."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    def read(folder: Path) -> dict[str, list[Any]]:
        (path,) = folder.glob("wandb/offline-run-*/*.wandb")
        kept: dict[str, list[Any]] = {}
        for each in records(path.read_bytes()):
            record = Record.FromString(each)
            for item in (*record.history.item, *record.config.update, *record.run.config.update):
                name = item.key or "/".join(item.nested_key)
                kept.setdefault(name, []).append(json.loads(item.value_json))
        return kept

    return read


class CharacterSide:
    """Every character is a symbol of a fairseq dictionary; a space is written `_`."""

    def __init__(self, dictionary: FairseqDictionary) -> None:
        self.dictionary = dictionary

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.dictionary.decode(ids)).replace("_", " ")


class CharacterTokenizer:
    """As that of a fairseq model, without its preprocessing of text."""

    def __init__(self, dictionary: FairseqDictionary) -> None:
        self.source = self.target = CharacterSide(dictionary)
        self.vocabulary = Vocabulary(len(dictionary), pad_id=1, start_id=2, eos_id=2, unk_id=3)
        self.digest = dictionary.digest
        self.unk_ids = (3, 3)

    def encode_source(self, lines: Sequence[str]) -> list[list[int]]:
        return [[*self.source.dictionary.encode(line.replace(" ", "_")), 2] for line in lines]

    def encode_target(self, lines: Sequence[str]) -> list[list[int]]:
        return self.encode_source(lines)

    def decode(self, ids: Sequence[int]) -> str:
        return self.target.decode([i for i in ids if i not in (1, 2)])

    def unknown_symbols(self, line: str, side: str) -> list[str]:
        return [c for c in line.replace(" ", "_") if c not in self.source.dictionary.ids]

    def state(self) -> dict[str, Any]:
        return {"kind": "characters"}


WriteIndexed = Callable[..., None]


@pytest.fixture(scope="session")
def write_indexed() -> WriteIndexed:
    """Writes `PREFIX.idx` and `PREFIX.bin` number by number, as fairseq's layout is described."""

    def write(prefix: Path, sentences: list[list[int]], code: int = 8, letter: str = "H") -> None:
        index = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, code, len(sentences))
        index += b"".join(struct.pack("<i", len(sentence)) for sentence in sentences)
        content = b""
        for sentence in sentences:
            index += struct.pack("<q", len(content))
            content += b"".join(struct.pack(f"<{letter}", i) for i in sentence)
        prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
        prefix.with_name(f"{prefix.name}.bin").write_bytes(content)

    return write


@pytest.fixture
def toy_data_bin(
    toy_text: Path, write_indexed: WriteIndexed, tmp_path: Path
) -> tuple[Path, CharacterTokenizer]:
    """The toy text as fairseq-preprocess would leave it, and the tokenizer that made its ids."""
    folder = tmp_path / "data-bin"
    folder.mkdir()
    symbols = [*sorted({*"".join(SYLLABLES), "x", "_"}), "madeupword0000"]
    for lang in ("xx", "yy"):
        content = "".join(f"{symbol} 1\n" for symbol in symbols)
        (folder / f"dict.{lang}.txt").write_text(content)
    tokenizer = CharacterTokenizer(FairseqDictionary.read(folder / "dict.xx.txt"))
    for split in ("train", "valid", "test"):
        for lang in ("xx", "yy"):
            lines = (toy_text / f"{split}.{lang}").read_text().splitlines()
            write_indexed(folder / f"{split}.xx-yy.{lang}", tokenizer.encode_source(lines))
    return folder, tokenizer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def toy_retrieval(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> Retrieval:
    """kNN-MT over the toy training text, with exact search and given values."""
    plan = RetrievalPlan(
        DatastorePlan(tmp_path / "datastores"),
        FlatChoice(),
        TunedCombiner.of("fixed", tune=False, num_neighbours=4, knn_weight=0.6, temperature=5.0),
    )
    return Retrieval.prepare(
        tiny_model,
        toy_datamodule.tokenizer,
        toy_datamodule.train_corpus,
        None,
        plan,
    )


@pytest.fixture
def plain_model(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> Path:
    """A checkpoint of the tiny model."""
    path = tmp_path / "model.ckpt"
    save_checkpoint(tiny_model, toy_datamodule.tokenizer, path)
    return path


@pytest.fixture
def toy_system(
    plain_model: Path,
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    toy_retrieval: Retrieval,
    tmp_path: Path,
) -> Path:
    """The folder of a run that left a system with retrieval: `system` in it, and a model."""
    tokenizer, search = toy_datamodule.tokenizer, BeamSearch(beam_size=2)
    system = System.of({"path": plain_model}, tiny_model, tokenizer, search, toy_retrieval)
    system.save(tmp_path / "run" / "system")
    return tmp_path / "run"

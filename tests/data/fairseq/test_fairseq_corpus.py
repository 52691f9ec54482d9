from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_knnmt.data import (
    Corpus,
    DataBinError,
    FairseqCorpus,
    ParallelDataModule,
    SentencePieceTokenizer,
    TextError,
)

ToyDataBin = tuple[Path, Any]  # the folder, and the tokenizer of its dictionaries
SPLITS = ("train", "valid", "test")


def datamodule(root: Path, tokenizer: Any, *languages: str, **settings: Any) -> ParallelDataModule:
    return ParallelDataModule(
        root,
        *(languages or ("xx", "yy")),
        tokenizer=tokenizer,
        max_tokens=400,
        eval_max_tokens=400,
        cache_dir=settings.pop("cache_dir", root.parent / "cache"),
        **settings,
    )


def assert_same(ours: Corpus, theirs: Corpus) -> None:
    assert len(ours) == len(theirs)
    for name in ("source_lengths", "target_lengths", "target_offsets"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for i in range(len(ours)):
        assert [side.tolist() for side in ours[i]] == [side.tolist() for side in theirs[i]]
    np.testing.assert_array_equal(ours.target_tokens, theirs.target_tokens)
    assert ours.line_numbers(range(len(ours))) == theirs.line_numbers(range(len(theirs)))
    assert ours.source_lines() == theirs.source_lines()
    assert ours.target_lines() == theirs.target_lines()


@pytest.mark.parametrize("languages", [("xx", "yy"), ("yy", "xx")])
def test_it_is_what_encoding_the_text_makes(
    toy_text: Path, toy_data_bin: ToyDataBin, languages: tuple[str, str]
) -> None:
    root, tokenizer = toy_data_bin
    binarised = datamodule(root, tokenizer, *languages)
    encoded = datamodule(toy_text, tokenizer, *languages)
    for split in SPLITS:
        assert_same(getattr(binarised, f"{split}_corpus"), getattr(encoded, f"{split}_corpus"))
    for ours, theirs in zip(
        binarised.datastore_dataloader(), encoded.datastore_dataloader(), strict=True
    ):
        assert torch.equal(ours.source_ids, theirs.source_ids)
        assert torch.equal(ours.target_ids, theirs.target_ids)


@pytest.mark.parametrize("long_lines", ["cut", "skip"])
def test_long_and_empty_sentences_are_treated_as_in_text(
    write_indexed: Callable[..., None], toy_data_bin: ToyDataBin, long_lines: str, tmp_path: Path
) -> None:
    root, tokenizer = toy_data_bin
    lines = {
        "xx": ["bafe", "do", "babababababa", "gefe", "", "kaka", "bobobobobobobo"],
        "yy": ["bafex", "dododododo", "ba", "", "x", "kakax", "bobobobobobo"],
    }
    for lang, side in lines.items():
        (tmp_path / f"train.{lang}").write_text("".join(f"{line}\n" for line in side))
        write_indexed(root / f"train.xx-yy.{lang}", tokenizer.encode_source(side))
    policy: dict[str, Any] = {"max_length": 9, "long_lines": long_lines, "empty_lines": "skip"}
    ours = datamodule(root, tokenizer, **policy).train_corpus
    theirs = datamodule(tmp_path, tokenizer, **policy).train_corpus
    assert len(ours) == (5 if long_lines == "cut" else 2)
    assert max(ours.source_lengths.max(), ours.target_lengths.max()) == (9 if len(ours) == 5 else 6)
    assert_same(ours, theirs)
    message = r"train\.xx-yy\.yy, sentence 4 .*empty_lines"
    with pytest.raises(DataBinError, match=message):
        _ = datamodule(root, tokenizer, max_length=9).train_corpus
    nothing = policy | {"max_length": 2, "long_lines": "skip"}
    with pytest.raises(DataBinError, match=r" all 7 .*max_length"):
        _ = datamodule(root, tokenizer, **nothing).train_corpus


def test_another_split_may_be_the_test_set(toy_data_bin: ToyDataBin) -> None:
    root, tokenizer = toy_data_bin
    for path in root.glob("valid.*"):
        path.rename(path.with_name(path.name.replace("valid", "test1")))
    data = datamodule(root, tokenizer, test="test1")
    assert len(data.test_corpus) == 30
    assert data.test_corpus.name == "data-bin.xx-yy/test1"


def test_plain_text_may_be_the_test_set(toy_text: Path, toy_data_bin: ToyDataBin) -> None:
    root, tokenizer = toy_data_bin
    data = datamodule(root, tokenizer, test=str(toy_text / "valid"))
    assert data.references("test") == (toy_text / "valid.yy").read_text().splitlines()
    assert_same(data.test_corpus, data.valid_corpus)


def test_references_are_read_from_the_text_if_it_is_given(
    toy_text: Path, toy_data_bin: ToyDataBin, tmp_path: Path
) -> None:
    root, tokenizer = toy_data_bin
    for lang in ("xx", "yy"):
        text = (toy_text / f"test.{lang}").read_text().upper()
        (tmp_path / f"raw.{lang}").write_text(text)
    data = datamodule(root, tokenizer, test_text=tmp_path / "raw")
    assert data.references("test")[0].isupper()
    assert data.source_lines("test")[0].isupper()
    assert data.references("valid")[0].islower()
    assert_same(
        datamodule(root, tokenizer).test_corpus, datamodule(toy_text, tokenizer).test_corpus
    )
    with pytest.raises(DataBinError, match=r"valid\.yy .*\b30\b.*/test .*\b40\b"):
        datamodule(root, tokenizer, test_text=toy_text / "valid").references("test")
    with pytest.raises(TextError, match=r"dev\.xx"):
        _ = datamodule(root, tokenizer, test_text=toy_text / "dev").test_corpus
    with pytest.raises(DataBinError, match="test_text"):
        _ = datamodule(toy_text, tokenizer, test_text=tmp_path / "raw").test_corpus


def test_unknown_symbols_in_decoded_references_are_told(
    write_indexed: Callable[..., None], toy_data_bin: ToyDataBin, caplog: pytest.LogCaptureFixture
) -> None:
    root, tokenizer = toy_data_bin
    for lang in ("xx", "yy"):
        write_indexed(root / f"test.xx-yy.{lang}", [[5, 2], [3, 3, 2]])
    assert datamodule(root, tokenizer).references("test")[1] == "<unk><unk>"
    assert "2 are <unk>" in caplog.text


def test_the_digest_follows_ids_and_policy(
    write_indexed: Callable[..., None], toy_data_bin: ToyDataBin
) -> None:
    root, tokenizer = toy_data_bin

    def digest(**settings: Any) -> str:
        return datamodule(root, tokenizer, **settings).train_corpus.digest

    first = digest()
    assert digest() == first
    assert digest(max_length=20) != first
    assert datamodule(root, tokenizer, "yy", "xx").train_corpus.digest != first
    content = (root / "train.xx-yy.yy.bin").read_bytes()
    assert content[0] != 7
    (root / "train.xx-yy.yy.bin").write_bytes(b"\7" + content[1:])
    assert digest() != first


def test_a_corpus_travels_to_workers_without_its_ids(toy_data_bin: ToyDataBin) -> None:
    root, tokenizer = toy_data_bin
    corpus = datamodule(root, tokenizer).train_corpus
    assert isinstance(corpus, FairseqCorpus)
    function, arguments = corpus.__reduce__()
    assert not any(isinstance(argument, np.ndarray) for argument in arguments)
    assert_same(function(*arguments), corpus)
    alone = list(datamodule(root, tokenizer).train_dataloader())
    helped = list(datamodule(root, tokenizer, num_workers=1).train_dataloader())
    assert [b.target_ids.tolist() for b in helped] == [b.target_ids.tolist() for b in alone]


# What is refused


def test_a_missing_side_is_named(toy_data_bin: ToyDataBin) -> None:
    root, tokenizer = toy_data_bin
    for path in root.glob("valid.xx-yy.yy.*"):
        path.unlink()
    message = r"valid\.xx-yy\.yy\.idx\b.*test\.xx-yy\.xx\.idx, .*valid"
    with pytest.raises(DataBinError, match=message):
        datamodule(root, tokenizer).references("valid")


def test_sides_of_other_length_are_refused(
    write_indexed: Callable[..., None], toy_data_bin: ToyDataBin
) -> None:
    root, tokenizer = toy_data_bin
    write_indexed(root / "valid.xx-yy.yy", [[5, 2]] * 29)
    with pytest.raises(DataBinError, match=r"xx .*\b30\b.*yy .*\b29\b"):
        datamodule(root, tokenizer).references("valid")


def test_sentences_end_with_the_models_eos(
    write_indexed: Callable[..., None], toy_data_bin: ToyDataBin
) -> None:
    root, tokenizer = toy_data_bin
    write_indexed(root / "valid.xx-yy.yy", [[5, 2]] * 7 + [[5, 6]] + [[5, 2]] * 22)
    with pytest.raises(DataBinError, match=r"yy\.idx: sentence 8 .*id 6\b"):
        datamodule(root, tokenizer).references("valid")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["_ 1", "q 1", *lines[2:]], r"line 2\b.*'q'.*'a'"),
        (lambda lines: lines[:-1], r"\b19\b.*\b20; line 20\b.*'madeup"),
        (lambda lines: [*lines, "q 1"], r"\b21\b.*\b20; line 21\b.*'q'"),
    ],
)
def test_other_dictionaries_are_refused(
    toy_data_bin: ToyDataBin, change: Callable[[list[str]], list[str]], message: str
) -> None:
    root, tokenizer = toy_data_bin
    path = root / "dict.yy.txt"
    lines = sorted(path.read_text().splitlines(), key=lambda line: line.startswith("madeup"))
    path.write_text("".join(f"{line}\n" for line in change(lines)))
    with pytest.raises(DataBinError, match=rf"dict\.yy\.txt .*{message}.*--srcdict, --tgtdict"):
        datamodule(root, tokenizer).references("valid")


def test_a_model_without_dictionaries_is_refused(
    toy_data_bin: ToyDataBin, tokenizer: SentencePieceTokenizer
) -> None:
    root, _ = toy_data_bin
    with pytest.raises(DataBinError, match="SentencePieceTokenizer"):
        datamodule(root, tokenizer).references("valid")
    with pytest.raises(DataBinError, match=r"model\.path"):
        _ = datamodule(root, None).tokenizer

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_knnmt.data import (
    Batch,
    ParallelDataModule,
    SentencePieceTokenizer,
    TextError,
    TextPair,
)


def _datamodule(root: Path, **settings: Any) -> ParallelDataModule:
    settings = {"vocab_size": 40, "max_tokens": 200, "eval_max_tokens": 150, **settings}
    return ParallelDataModule(root, "pt", "en", cache_dir=root / "cache", **settings)


def test_it_works_without_a_trainer(toy_root: Path) -> None:
    data = _datamodule(toy_root)
    assert data.tokenizer.vocabulary.size == 40
    for loader, count in (
        (data.train_dataloader(), 200),
        (data.datastore_dataloader(), 200),
        (data.val_dataloader(), 20),
        (data.test_dataloader(), 30),
    ):
        batches = list(loader)
        assert len(batches) == len(loader)
        rows = torch.cat([batch.index for batch in batches])
        assert rows.sort().values.tolist() == list(range(count))


def test_batches_hold_the_text_of_their_rows(toy_root: Path) -> None:
    data = _datamodule(toy_root)
    sources, references = data.source_lines("test"), data.references("test")
    assert references == (toy_root / "test.en").read_text().splitlines()
    for batch in data.test_dataloader():
        for source_ids, labels, row in zip(
            batch.source_ids, batch.labels, batch.index, strict=True
        ):
            assert data.tokenizer.decode(source_ids.tolist()) == sources[row]
            assert data.tokenizer.decode(labels.tolist()) == references[row]


def test_datastore_rows_fill_the_offsets(toy_root: Path) -> None:
    data = _datamodule(toy_root)
    offsets = torch.from_numpy(data.train_corpus.target_offsets)
    filled = torch.zeros(int(offsets[-1]), dtype=torch.long)
    for batch in data.datastore_dataloader():
        lengths = batch.label_mask.sum(dim=1)
        assert torch.equal(lengths, offsets[batch.index + 1] - offsets[batch.index])
        for first, length in zip(offsets[batch.index], lengths, strict=True):
            filled[first : first + length] += 1
    assert (filled == 1).all()


def test_only_the_first_pairs_are_used_on_request(toy_root: Path) -> None:
    data = _datamodule(toy_root, max_pairs=25)
    sizes = [len(each) for each in (data.train_corpus, data.valid_corpus, data.test_corpus)]
    assert sizes == [25, 20, 25]  # there are 20 validation pairs
    assert data.references("test") == (toy_root / "test.en").read_text().splitlines()[:25]
    rows = torch.cat([batch.index for batch in data.train_dataloader()])
    assert rows.sort().values.tolist() == list(range(25))
    assert data.train_corpus.digest != _datamodule(toy_root).train_corpus.digest
    with pytest.raises(ValueError, match="max_pairs is 0"):
        _datamodule(toy_root, max_pairs=0)


def test_a_given_tokenizer_is_used(toy_root: Path, tokenizer: SentencePieceTokenizer) -> None:
    data = _datamodule(toy_root, tokenizer=tokenizer)
    assert data.tokenizer is tokenizer
    assert data.test_corpus.digest != _datamodule(toy_root, vocab_size=36).test_corpus.digest


def test_workers_make_the_same_batches(toy_root: Path) -> None:
    alone = list(_datamodule(toy_root).train_dataloader())
    helped = list(_datamodule(toy_root, num_workers=1).train_dataloader())
    assert [b.index.tolist() for b in helped] == [b.index.tolist() for b in alone]


def test_the_test_set_may_lie_elsewhere(toy_root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "office"
    elsewhere.mkdir()
    for language, line in (("pt", "porta grande"), ("en", "large door")):
        (elsewhere / f"help.{language}").write_text(f"{line}\n")
    data = _datamodule(toy_root, test=str(elsewhere / "help"))
    assert data.references("test") == ["large door"]
    assert data.test_corpus.name.endswith("/help")
    assert _datamodule(toy_root, test="valid").references("test") == data.references("valid")


def test_all_test_sets_are_open_at_once(toy_root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "general"
    for language, line in (("pt", "porta"), ("en", "door")):
        elsewhere.with_name(f"general.{language}").write_text(f"{line}\n")
    data = _datamodule(toy_root, also_test={"general": str(elsewhere), "again": "valid"})
    corpora = data.test_corpora()
    assert list(corpora) == [f"{data.name}/test", "general", "again"]
    assert [len(corpus) for corpus in corpora.values()] == [30, 1, 20]
    assert corpora["general"].target_lines() == ["door"]
    assert corpora["again"].target_lines() == data.references("valid")
    assert data.test_corpus is corpora[f"{data.name}/test"]
    for corpus in corpora.values():
        rows = torch.cat([batch.index for batch in data.loader(corpus)])
        assert rows.sort().values.tolist() == list(range(len(corpus)))


def test_a_loader_may_divide_a_corpus_among_ranks(toy_root: Path) -> None:
    data = _datamodule(toy_root)
    whole = [batch.index.tolist() for batch in data.loader(data.valid_corpus)]
    parts = [
        [b.index.tolist() for b in data.loader(data.valid_corpus, rank=rank, world_size=2)]
        for rank in (0, 1)
    ]
    assert parts == [whole[::2], whole[1::2]]


def test_it_says_which_splits_are_there(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "train.pt").write_text("porta\n")  # a side is enough: the other is an error
    data = _datamodule(tmp_path, tokenizer=tokenizer)
    assert [data.has(split) for split in ("train", "valid", "test")] == [True, False, False]


def test_testing_needs_no_training_text(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "test.pt").write_text("porta\n")
    (tmp_path / "test.en").write_text("door\n")
    data = _datamodule(tmp_path, tokenizer=tokenizer)
    data.setup("test")
    with pytest.raises(TextError, match=r"train\.pt.*test\.en, test"):
        data.setup("fit")


@pytest.mark.parametrize("split", ["valid", "test"])
def test_lines_of_evaluation_text_are_never_skipped(toy_root: Path, split: str) -> None:
    lines = (toy_root / f"{split}.pt").read_text().splitlines()
    lines[4] = "casa " * 10_000
    (toy_root / f"{split}.pt").write_text("\n".join(lines))
    data = _datamodule(toy_root, long_lines="skip", empty_lines="skip")
    corpus = data.test_corpus if split == "test" else data.valid_corpus
    assert len(corpus) == len(lines)
    assert corpus.source_lengths[4] == 256
    lines[4] = ""
    (toy_root / f"{split}.pt").write_text("\n".join(lines))
    with pytest.raises(TextError, match=rf"{split}\.pt, line 5\b"):
        _datamodule(toy_root, empty_lines="skip").source_lines(split)


def test_an_unknown_split_is_refused(toy_root: Path) -> None:
    with pytest.raises(ValueError, match=r"'dev'.*train, valid and test"):
        _datamodule(toy_root).references("dev")


def test_empty_training_text_is_refused_before_a_tokenizer_is_trained(tmp_path: Path) -> None:
    for path in (text := TextPair(tmp_path / "train.pt", tmp_path / "train.en")).__dict__.values():
        path.touch()
    with pytest.raises(TextError, match=r"train\.pt\b"):
        _datamodule(text.source_path.parent).prepare_data()


class _Recorder(pl.LightningModule):
    """Notes the rows of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, list[int]]] = []
        self.tested: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained.append((self.current_epoch, batch.index.tolist()))
        return self.weight * batch.label_mask.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.tested.append(batch.index.tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(tmp_path: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("stop", [3, 13])
def test_resumed_training_sees_the_batches_it_would_have_seen(
    toy_root: Path, tmp_path: Path, stop: int
) -> None:
    whole = _Recorder()
    _trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(whole, _datamodule(toy_root))
    per_epoch = len(_datamodule(toy_root).train_dataloader())
    assert len(whole.trained) == 3 * per_epoch
    assert whole.trained[0][1] != whole.trained[per_epoch][1]

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *arguments: object) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                trainer.should_stop = True
                trainer.limit_val_batches = 0

    first = _Recorder()
    _trainer(tmp_path, max_epochs=3, callbacks=[Stop()], enable_checkpointing=False).fit(
        first, _datamodule(toy_root)
    )
    second = _Recorder()
    _trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(
        second, _datamodule(toy_root), ckpt_path=tmp_path / "mid.ckpt", weights_only=True
    )
    assert whole.trained[:stop] == first.trained[:stop]
    assert whole.trained[stop:] == second.trained


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_trainer_tests_every_sentence_once(toy_root: Path, tmp_path: Path) -> None:
    recorder = _Recorder()
    _trainer(tmp_path).test(recorder, _datamodule(toy_root), verbose=False)
    assert sorted(chain.from_iterable(recorder.tested)) == list(range(30))

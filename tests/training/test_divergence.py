"""A loss that is no number stops training, and says where it came from."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import (
    EntryBatchSampler,
    KeyDataset,
    ParallelDataModule,
    ResumableDataLoader,
)
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.training import (
    AdapterFineTuner,
    FullFineTuner,
    LoRAFineTuner,
    NMTModule,
    NonFiniteLossError,
    OPLFineTuner,
)
from lightning_knnmt.training.divergence import check_validation_loss, origin, overflow_told

BAD_STEP = 7


class Spoil(pl.Callback):
    """Makes one weight NaN before a step, and keeps the batch that meets it."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == BAD_STEP:
            self.batch, self.batch_idx, self.epoch = batch, batch_idx, trainer.current_epoch
            with torch.no_grad():
                module.model.output_projection.weight.view(-1)[0] = self.value


def stopped(
    module: NMTModule, datamodule: ParallelDataModule, spoil: Spoil, folder: Path
) -> pytest.ExceptionInfo[NonFiniteLossError]:
    keep = pl.callbacks.ModelCheckpoint(folder, filename="last", every_n_train_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
        default_root_dir=folder, max_steps=20, callbacks=[spoil, keep],
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError) as raised:
        trainer.fit(module, datamodule=datamodule)
    assert trainer.global_step == BAD_STEP
    return raised


@pytest.fixture
def new_module(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> Callable[..., NMTModule]:
    def make(kind: type[NMTModule]) -> NMTModule:
        return kind(
            tiny_model, toy_datamodule.tokenizer, BeamSearch(), optimizer=torch.optim.Adam,
            bleu_every=0,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "nan")])
def test_the_error_names_step_batch_and_lines_and_the_checkpoint_stays(
    new_module: Callable[..., NMTModule], toy_datamodule: ParallelDataModule, tmp_path: Path,
    value: float, shown: str,
) -> None:  # fmt: skip
    spoil = Spoil(value)
    said = str(stopped(new_module(NMTModule), toy_datamodule, spoil, tmp_path).value)
    # The text has no line that was left out: line n is row n - 1.
    lines = sorted(row + 1 for row in spoil.batch.index.tolist())
    assert len(lines) > 5
    for fact in (
        *(f"loss is {shown}", f"step {BAD_STEP}", f"epoch {spoil.epoch}"),
        *(f"batch {spoil.batch_idx}", f"lines {', '.join(map(str, lines[:5]))}"),
        *(f"{len(lines) - 5} more", f"{toy_datamodule.root}/train.xx"),
        *("module.optimizer.lr", "module.warmup_steps", "resume=true"),
    ):
        assert fact in said
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == BAD_STEP
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_sentences_of_a_data_bin_are_named_too(
    new_module: Callable[..., NMTModule], toy_data_bin: tuple[Path, Any], tmp_path: Path
) -> None:
    root, tokenizer = toy_data_bin
    binarised = ParallelDataModule(
        root, "xx", "yy", tokenizer=tokenizer, max_tokens=400, cache_dir=tmp_path / "cache"
    )
    batch = next(iter(binarised.train_dataloader()))
    said = origin(batch, binarised.train_corpus)
    numbers = sorted(row + 1 for row in batch.index.tolist())
    assert said.startswith(f"lines {', '.join(map(str, numbers[:5]))} and {len(numbers) - 5} more")
    assert said.endswith(f"more of {root}/train.xx-yy.xx and its translation")


def test_entries_of_a_datastore_are_traced_to_their_lines(
    new_module: Callable[..., NMTModule], toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    corpus = toy_datamodule.train_corpus
    tokens = np.array(corpus.target_tokens, dtype=np.int32)
    keys = np.ones((len(tokens), 24), dtype=np.float16)

    class SpoiltEntries(Spoil):
        def training_batches(self, trainer: pl.Trainer) -> ResumableDataLoader:
            sampler = EntryBatchSampler(len(tokens), 3)
            return ResumableDataLoader(KeyDataset(keys, tokens), batch_size=None, sampler=sampler)

    spoil = SpoiltEntries(float("nan"))
    said = str(stopped(new_module(OPLFineTuner), toy_datamodule, spoil, tmp_path).value)
    line_of = [line for line in range(1, 301) for _ in corpus[line - 1][1]]
    lines = sorted({line_of[entry] for entry in spoil.batch.entries.tolist()})
    assert f"on lines {', '.join(map(str, lines))} of" in said


# Validation

KINDS: dict[str, Any] = {
    "nmt": NMTModule,
    "full": FullFineTuner,
    "adapter": functools.partial(AdapterFineTuner, bottleneck_dim=5),
    "lora": functools.partial(LoRAFineTuner, rank=3),
    "opl": OPLFineTuner,
    "opl_seen": functools.partial(OPLFineTuner, rows="seen"),
}


def fit_one_step(
    name: str, lr: float, model: Transformer, datamodule: ParallelDataModule, folder: Path
) -> str:
    """What is said after one step of a learning rate that is far too high."""
    module = KINDS[name](
        model, datamodule.tokenizer, BeamSearch(), warmup_steps=0, bleu_every=0,
        optimizer=functools.partial(torch.optim.Adam, lr=lr),
    )  # fmt: skip
    keep = pl.callbacks.ModelCheckpoint(folder, filename="best", monitor="val_loss")
    stop = pl.callbacks.EarlyStopping("val_loss", strict=False)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, limit_train_batches=1,
        default_root_dir=folder, max_epochs=3, callbacks=[keep, stop],
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError) as raised:
        trainer.fit(module, datamodule=datamodule)
    assert not list(folder.glob("*.ckpt")), "weights without a finite loss were saved"
    return str(raised.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_validation_loss_that_is_not_finite_ends_training_before_it_is_saved(
    name: str, tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    said = fit_one_step(name, 1e37, tiny_model, toy_datamodule, tmp_path)
    assert re.search(
        r"loss is (nan|inf).*step 1\b.*epoch 0.*module\.optimizer\.lr.*resume=true", said
    )


def test_an_update_that_overflows_is_explained(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    said = fit_one_step("full", 1e38, tiny_model, toy_datamodule, tmp_path)
    assert re.search(r"step 0\b.*1e\+38.*module\.optimizer\.lr", said)


def test_another_runtime_error_stays_what_it_is() -> None:
    trainer: Any = SimpleNamespace(global_step=0)
    with pytest.raises(RuntimeError, match="out of memory"), overflow_told(trainer, None):
        raise RuntimeError("out of memory")


def facts(**others: Any) -> Any:
    return SimpleNamespace(
        global_step=3, current_epoch=1,
        **({"sanity_checking": False, "state": SimpleNamespace(fn="fit"), "is_global_zero": True}
           | others),
    )  # fmt: skip


@pytest.mark.parametrize("loss", [torch.nan, torch.inf, -torch.inf])
def test_every_rank_stops_and_one_of_them_explains(loss: float) -> None:
    with pytest.raises(NonFiniteLossError, match=rf"loss is {loss}.*step 3"):
        check_validation_loss(facts(), loss)
    with pytest.raises(NonFiniteLossError, match="rank stops"):
        check_validation_loss(facts(is_global_zero=False), loss)


def test_only_the_validations_of_a_training_end_it() -> None:
    check_validation_loss(facts(), 2.5)
    check_validation_loss(facts(sanity_checking=True), torch.nan)
    check_validation_loss(facts(state=SimpleNamespace(fn="validate")), torch.inf)

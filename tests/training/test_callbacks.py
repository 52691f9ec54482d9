"""Checkpoints of a run that was moved, and the report of what training took."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.pretrained import CheckpointError, load_pretrained
from lightning_knnmt.training import ModelCheckpoint, NMTModule, ProgressBar, TrainingReport
from lightning_knnmt.training.trainable import train_output_projection


def test_parameters_and_steps_are_counted(
    tmp_path: Path,
    module: NMTModule,
    toy_datamodule: ParallelDataModule,
    new_trainer: Callable[..., pl.Trainer],
) -> None:
    train_output_projection(module.model)
    report = TrainingReport(tmp_path / "training.json")
    new_trainer(report, max_steps=2).fit(module, datamodule=toy_datamodule)
    cost = json.loads((tmp_path / "training.json").read_text())
    projection = module.model.output_projection
    assert cost["trained_parameters"] == sum(p.numel() for p in projection.parameters())
    assert cost["parameters"] == sum(p.numel() for p in module.model.parameters())
    assert cost["steps"] == 2
    assert 0 < cost["seconds"] <= report.seconds[0]
    assert 0 < cost["cpu_seconds"] <= report.seconds[1]
    assert cost["best_score"] is None


def test_a_resumed_run_adds_its_seconds(tmp_path: Path) -> None:
    before = TrainingReport(tmp_path / "training.json")
    before.load_state_dict({"seconds": [1000.0, 900.0], "best": {"val_loss": 2.0}})
    resumed = TrainingReport(tmp_path / "training.json")
    resumed.load_state_dict(before.state_dict())
    assert resumed.state_dict() == {"seconds": (1000.0, 900.0), "best": {"val_loss": 2.0}}


def test_the_scores_are_those_of_the_best_validation(tmp_path: Path) -> None:
    report = TrainingReport(tmp_path / "training.json")
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.state.fn = TrainerFn.FITTING
    for loss, bleu in ((3.0, 10.0), (2.0, 20.0), (2.5, 30.0)):
        trainer.callback_metrics.update(val_loss=torch.tensor(loss), val_bleu=torch.tensor(bleu))
        report.on_validation_end(trainer, pl.LightningModule())
    assert report.state_dict()["best"] == {"val_loss": 2.0, "val_bleu": 20.0}


def checkpoints(folder: Path) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    return (
        ModelCheckpoint(
            folder, "best", "val_loss", save_weights_only=True, enable_version_counter=False
        ),
        ModelCheckpoint(folder, "last", enable_version_counter=False),
    )


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_moved_run_knows_its_best_checkpoint(
    tmp_path: Path, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: Callable[..., pl.Trainer],
) -> None:  # fmt: skip
    """Lightning would forget the score, and the next validation would be the best one."""

    def fit(folder: Path, **options: Any) -> ModelCheckpoint:
        best, last = checkpoints(folder)
        trainer = new_trainer(best, last, enable_checkpointing=True, max_steps=2)
        trainer.fit(module, datamodule=toy_datamodule, **options)
        return best

    before = fit(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    after = fit(tmp_path / "new", ckpt_path=tmp_path / "new" / "last.ckpt")
    path = str(tmp_path / "new" / "best.ckpt")
    assert (after.best_model_path, after.best_k_models) == (path, {path: before.best_model_score})
    assert after.best_model_score == before.best_model_score


def test_a_checkpoint_of_weights_stands_alone_and_says_its_score(
    tmp_path: Path, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: Callable[..., pl.Trainer],
) -> None:  # fmt: skip
    best, last = checkpoints(tmp_path)
    trainer = new_trainer(best, last, enable_checkpointing=True, max_steps=1)
    trainer.fit(module, datamodule=toy_datamodule)
    weights, whole = (
        torch.load(tmp_path / name, weights_only=True) for name in ("best.ckpt", "last.ckpt")
    )
    assert "optimizer_states" in whole
    assert "optimizer_states" not in weights
    assert weights["callbacks"][best.state_key]["current_score"] == best.best_model_score
    model, _ = load_pretrained(tmp_path / "best.ckpt")
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_another_text_cannot_be_trained_on_from_a_checkpoint(
    tmp_path: Path, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: Callable[..., pl.Trainer],
) -> None:  # fmt: skip
    trainer = new_trainer(max_steps=1)
    trainer.fit(module, datamodule=toy_datamodule)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    moved = Path(shutil.copytree(toy_datamodule.root, tmp_path / "moved"))
    data = {"cache_dir": tmp_path / "cache", "tokenizer": toy_datamodule.tokenizer}
    same = ParallelDataModule(moved, "xx", "yy", max_tokens=400, **data)
    new_trainer(max_steps=2).fit(module, same, ckpt_path=tmp_path / "one.ckpt")

    lines = (moved / "train.yy").read_text().splitlines()
    (moved / "train.yy").write_text("\n".join(lines[::-1]) + "\n")
    other = ParallelDataModule(moved, "xx", "yy", max_tokens=400, **data)
    with pytest.raises(CheckpointError, match="another text"):
        new_trainer(max_steps=3).fit(module, other, ckpt_path=tmp_path / "one.ckpt")


def test_the_progress_bar_shows_no_version_of_the_logger(
    tmp_path: Path, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shown: list[set[str]] = []

    class Bar(ProgressBar):
        def get_metrics(self, *parts: Any) -> dict[str, Any]:
            metrics = super().get_metrics(*parts)
            shown.append(set(metrics))
            return metrics

    logger = pl.loggers.CSVLogger(tmp_path)
    new_trainer(Bar(), enable_progress_bar=True, logger=logger, max_steps=1).fit(
        module, datamodule=toy_datamodule
    )
    assert set().union(*shown) == {"train_loss", "val_loss"}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("limit", [{"max_steps": 2}, {"max_epochs": 1, "limit_train_batches": 2}])
def test_a_run_that_died_before_its_report_writes_it_when_resumed(
    limit: dict[str, Any], tmp_path: Path, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: Callable[..., pl.Trainer],
) -> None:  # fmt: skip
    path = tmp_path / "training.json"

    def fit(**options: Any) -> dict[str, Any]:
        report, kept = TrainingReport(path), checkpoints(tmp_path / "checkpoints")
        trainer = new_trainer(report, *kept, enable_checkpointing=True, **limit)
        trainer.fit(module, datamodule=toy_datamodule, **options)
        cost: dict[str, Any] = json.loads(path.read_text())
        return cost

    before = fit()
    path.unlink()
    after = fit(ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert after.pop("seconds") > 0
    assert after.pop("cpu_seconds") > 0
    assert after == {name: before[name] for name in after}
    assert after["best_score"] > 0
    assert after["steps"] == 2


def test_a_report_that_is_there_stays_when_nothing_is_left_to_train(
    tmp_path: Path, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: Callable[..., pl.Trainer],
) -> None:  # fmt: skip
    path = tmp_path / "training.json"
    path.write_text("{}")
    new_trainer(TrainingReport(path), max_steps=0).fit(module, datamodule=toy_datamodule)
    assert path.read_text() == "{}"


@pytest.mark.parametrize("score", [torch.inf, torch.nan])
def test_a_score_that_is_no_number_is_left_out(
    score: float, tmp_path: Path, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: Callable[..., pl.Trainer],
) -> None:  # fmt: skip
    class Unlucky(pl.callbacks.ModelCheckpoint):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.best_model_score = torch.tensor(score)

    class Report(TrainingReport, pl.callbacks.Checkpoint):  # type: ignore[misc]
        """Lightning calls checkpoints last: after the score has come."""

    path = tmp_path / "training.json"
    trainer = new_trainer(
        Unlucky(tmp_path), Report(path), max_steps=1, enable_checkpointing=True, limit_val_batches=0
    )
    trainer.fit(module, datamodule=toy_datamodule)
    assert json.loads(path.read_text())["best_score"] is None
    assert not {"NaN", "Infinity"} & set(path.read_text().replace(",", " ").split())

"""The report says what training took, over interruptions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.training import NMTModule, TrainingReport
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
    before.load_state_dict({"seconds": [1000.0, 900.0]})
    resumed = TrainingReport(tmp_path / "training.json")
    resumed.load_state_dict(before.state_dict())
    assert resumed.state_dict() == {"seconds": (1000.0, 900.0)}


def checkpoints(folder: Path) -> tuple[pl.callbacks.ModelCheckpoint, ...]:
    return (
        pl.callbacks.ModelCheckpoint(folder, "best", "val_loss", enable_version_counter=False),
        pl.callbacks.ModelCheckpoint(folder, "last", enable_version_counter=False),
    )


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

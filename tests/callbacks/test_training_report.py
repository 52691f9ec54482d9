"""The report says what training took, over interruptions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl

from lightning_knnmt.callbacks import TrainingReport
from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.finetuning import train_output_projection
from lightning_knnmt.modules import NMTModule


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

"""Learning-rate schedules, and settings that are rejected before training starts."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.training import NMTModule
from lightning_knnmt.training.settings import inverse_sqrt, linear


def module_of(model: Transformer, datamodule: ParallelDataModule, **settings: Any) -> NMTModule:
    defaults: dict[str, Any] = {"optimizer": torch.optim.Adam}
    return NMTModule(model, datamodule.tokenizer, BeamSearch(), **(defaults | settings))


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("warmup_steps", (-5, 2.5, "abc", None)),
        ("label_smoothing", (2, 1, -1, "abc", torch.nan)),
        ("bleu_every", (-1, 0.5, "abc", True)),
        ("decay", ("cosine", None)),
    ],
)
def test_an_invalid_value_is_rejected(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, setting: str,
    values: tuple[Any, ...],
) -> None:  # fmt: skip
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{setting} is {value!r}")):
            module_of(tiny_model, toy_datamodule, **{setting: value})


def test_the_smallest_values_are_accepted(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    given = {"warmup_steps": 0, "label_smoothing": 0, "bleu_every": 0}
    module = module_of(tiny_model, toy_datamodule, **given)
    assert {name: getattr(module, name) for name in given} == given


@pytest.mark.parametrize("rate", [0, 0.0, -1e-3, "abc", torch.inf, torch.nan, None])
def test_an_invalid_learning_rate_is_rejected(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path, rate: Any
) -> None:
    module = module_of(
        tiny_model, toy_datamodule, optimizer=functools.partial(torch.optim.Adam, lr=rate)
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, max_steps=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(f"module.optimizer.lr, is {rate!r}")):
        trainer.fit(module, datamodule=toy_datamodule)


# Schedules


def test_inverse_sqrt_rises_then_falls() -> None:
    factor = inverse_sqrt(5)
    assert [factor(step) for step in (0, 4, 19)] == pytest.approx([1 / 5, 1.0, math.sqrt(5 / 20)])


def test_inverse_sqrt_without_warm_up_is_constant() -> None:
    assert [inverse_sqrt(0)(step) for step in (0, 1000)] == [1.0, 1.0]


def test_linear_rises_to_the_peak_and_falls_to_zero() -> None:
    factor = linear(2, 6)
    assert [factor(step) for step in range(8)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    )


def test_linear_without_warm_up_begins_at_the_peak() -> None:
    assert [linear(0, 4)(step) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_linear_survives_a_warm_up_that_outlasts_the_training() -> None:
    assert [linear(8, 4)(step) for step in (0, 3, 9)] == pytest.approx([1 / 8, 4 / 8, 0.0])

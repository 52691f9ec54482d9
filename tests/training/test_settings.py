"""Settings that cannot be are refused in one sentence before a step is made with them."""

import functools
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


def module_of(model: Transformer, datamodule: ParallelDataModule, **settings: Any) -> NMTModule:
    defaults: dict[str, Any] = {"optimizer": torch.optim.Adam}
    return NMTModule(model, datamodule.tokenizer, BeamSearch(), **(defaults | settings))


@pytest.mark.parametrize(
    ("setting", "values", "message"),
    [
        ("warmup_steps", (-5, 2.5, "abc", None), "but must be a whole number, 0 (none) or more."),
        ("label_smoothing", (2, 1, -1, "abc", torch.nan), "but must be a number from 0 (none) up"),
        ("bleu_every", (-1, 0.5, "abc", True), "but must be a whole number: 0 for never, n for e"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, setting: str,
    values: tuple[Any, ...], message: str,
) -> None:  # fmt: skip
    for value in values:
        said = re.escape(f"{setting} is {value!r}, {message}")
        with pytest.raises(ValueError, match=said):
            module_of(tiny_model, toy_datamodule, **{setting: value})


def test_the_smallest_values_are_taken(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    given = {"warmup_steps": 0, "label_smoothing": 0, "bleu_every": 0}
    module = module_of(tiny_model, toy_datamodule, **given)
    assert {name: getattr(module, name) for name in given} == given


@pytest.mark.parametrize("rate", [0, 0.0, -1e-3, "abc", torch.inf, torch.nan, None])
def test_nothing_trains_at_an_impossible_rate(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path, rate: Any
) -> None:
    module = module_of(
        tiny_model, toy_datamodule, optimizer=functools.partial(torch.optim.Adam, lr=rate)
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, max_steps=1,
    )  # fmt: skip
    said = f"module.optimizer.lr, is {rate!r}, but must be a number above 0."
    with pytest.raises(ValueError, match=re.escape(said)):
        trainer.fit(module, datamodule=toy_datamodule)

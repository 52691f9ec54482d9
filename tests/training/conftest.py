"""A tiny module, its trainer and its callback."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import FlatChoice
from lightning_knnmt.training import KNNCallback, NMTModule, knn_callback


@pytest.fixture
def module(tiny_model: Transformer, toy_datamodule: ParallelDataModule) -> NMTModule:
    return NMTModule(
        tiny_model,
        toy_datamodule.tokenizer,
        BeamSearch(beam_size=2, max_length_ratio=1.0, max_length_offset=5),
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3),
        warmup_steps=5,
        bleu_every=0,
    )


@pytest.fixture
def new_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "max_epochs": -1,
        }
        return pl.Trainer(callbacks=list(callbacks), **(defaults | options))

    return make


@pytest.fixture
def translated(toy_datamodule: ParallelDataModule) -> Callable[..., list[list[int]]]:
    """The test set's translations as token ids, in the corpus's order."""

    def translate(
        trainer: pl.Trainer, module: NMTModule, datamodule: ParallelDataModule = toy_datamodule
    ) -> list[list[int]]:
        batches: Any = trainer.predict(module, datamodule=datamodule)
        rows = sorted(pair for batch in batches for pair in batch)
        assert [row for row, _ in rows] == list(range(len(datamodule.test_corpus)))
        return [tokens for _, tokens in rows]

    return translate


@pytest.fixture
def new_callback(tmp_path: Path) -> Callable[..., KNNCallback]:
    def make(**options: Any) -> KNNCallback:
        defaults: dict[str, Any] = {"tune": False, "num_neighbours": 4, "temperature": 10.0}
        defaults["index"] = FlatChoice()
        return knn_callback("fixed", tmp_path / "datastores", **(defaults | options))

    return make

"""A finished run's system, ready to be asked: model, text, and retrieval where the run had it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import NextTokenDistribution
from lightning_knnmt.pretrained import load_pretrained
from lightning_knnmt.study.plan import Run, StudyError
from lightning_knnmt.study.process import BEST
from lightning_knnmt.training import KNNCallback, NMTModule, Retrieval, with_retrieval


@dataclass(frozen=True)
class System:
    """What a run tested.

    Attributes:
        module: With the best checkpoint's weights, in evaluation mode.
        datamodule: The domain's text.
        retrieval: None where the run had none.
        distribution: What decodes: the model's own, or mixed with the datastore's.
        num_sentences: How many of a text it is asked about, at most, where that takes time.
    """

    name: str
    module: NMTModule
    datamodule: ParallelDataModule
    trainer: pl.Trainer
    retrieval: Retrieval | None
    distribution: NextTokenDistribution
    num_sentences: int


def load_system(run: Run, num_sentences: int) -> System:
    """Builds a finished run's system from the configuration that the run left.

    Datastore, index and combiner are found where the run left them.

    Raises:
        StudyError: If the folder holds no configuration, or its keys are of another layer.
    """
    config = _configuration(run.directory)
    checkpoint = run.directory / BEST
    source: Any = load_pretrained(checkpoint) if checkpoint.exists() else instantiate(config.model)
    model, tokenizer = source
    datamodule = instantiate(config.data, _partial_=True)(tokenizer=tokenizer)
    search = instantiate(config.decoding)
    module = NMTModule(model, tokenizer, search, optimizer=partial(torch.optim.Adam, lr=0.0)).eval()
    trainer = pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        precision=config.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # What a callback asks the trainer for; Lightning would set it at the start of a loop.
    trainer.strategy.connect(module)
    trainer.strategy.model_to_device()
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    knn: KNNCallback | None = instantiate(config.knn) or None
    if knn is None:
        own = module.nmt_distribution
        return System(run.method, module, datamodule, trainer, None, own, num_sentences)
    retrieval = knn.prepare(trainer, module)
    mixed = with_retrieval(
        module.nmt_distribution,
        retrieval.datastore,
        retrieval.measured_index.index,
        retrieval.ready.combiner,
    )
    return System(run.method, module, datamodule, trainer, retrieval, mixed, num_sentences)


def _configuration(directory: Path) -> DictConfig:
    path = directory / ".hydra" / "config.yaml"
    if not path.exists():
        raise StudyError(f"{directory} holds no {path.name} of a run: delete it and run again.")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    key_layer = OmegaConf.select(config, "knn.key_layer", default="opl_input")
    if key_layer != "opl_input":
        raise StudyError(
            f"The keys of {directory} are those of knn.key_layer={key_layer}, but the analyses "
            "compare retrieval with the output projection, so keys must be its inputs: delete it "
            "and run again with knn.key_layer=opl_input."
        )
    config.paths.output_dir = os.fspath(directory)
    return config

"""bfloat16 products while training, and nowhere else."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.modules import NMTModule, TrainingAutocast


def test_only_training_steps_have_bfloat16_products(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    seen: dict[str, set[torch.dtype]] = {"train": set(), "other": set()}

    def look(_: Any, __: Any, output: torch.Tensor) -> None:
        seen["train" if torch.is_grad_enabled() else "other"].add(output.dtype)

    tiny_model.encoder_layers[0].ffn.up.register_forward_hook(look)
    module = NMTModule(
        tiny_model, toy_datamodule.tokenizer, BeamSearch(beam_size=1), optimizer=torch.optim.Adam
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, enable_checkpointing=False, default_root_dir=tmp_path,
        max_epochs=1, plugins=TrainingAutocast(),
    )  # fmt: skip
    trainer.fit(module, datamodule=toy_datamodule)
    trainer.test(module, datamodule=toy_datamodule, verbose=False)
    assert seen == {"train": {torch.bfloat16}, "other": {torch.float32}}
    assert {each.dtype for each in tiny_model.parameters()} == {torch.float32}
    assert trainer.precision == "32-true"  # fingerprints name it

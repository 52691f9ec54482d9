"""bfloat16 products while training, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.training import NMTModule, TrainingAutocast


@pytest.mark.parametrize("has_bf16", [True, False])
def test_only_training_steps_have_bfloat16_products_where_the_processor_has_them(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_bf16: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
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
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert seen == {"train": {expected}, "other": {torch.float32}}
    assert ("training stays in float32" in caplog.text) != has_bf16
    assert {each.dtype for each in tiny_model.parameters()} == {torch.float32}
    assert trainer.precision == "32-true"  # fingerprints name it

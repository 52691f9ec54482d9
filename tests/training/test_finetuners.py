import functools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import CheckpointError, load_pretrained
from lightning_knnmt.retrieval import fingerprint
from lightning_knnmt.training import (
    AdapterFineTuner,
    FullFineTuner,
    LoRAFineTuner,
    NMTModule,
    OPLFineTuner,
)

ADAM = functools.partial(torch.optim.Adam, lr=3e-3, betas=(0.9, 0.98))
TUNERS: dict[str, Any] = {
    "full": FullFineTuner,
    "opl": OPLFineTuner,
    "adapter": functools.partial(AdapterFineTuner, bottleneck_dim=5),
    "lora": functools.partial(LoRAFineTuner, rank=3, alpha=6.0),
}


def tuner(name: str, model: Transformer, datamodule: ParallelDataModule) -> NMTModule:
    module: NMTModule = TUNERS[name](
        model, datamodule.tokenizer, BeamSearch(beam_size=1), optimizer=ADAM, warmup_steps=0,
        bleu_every=0,
    )  # fmt: skip
    return module


def trainer_of(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        default_root_dir=folder, **options,
    )  # fmt: skip


def copy_of(model: Transformer) -> Transformer:
    other = Transformer(**model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", TUNERS)
def test_only_what_was_selected_moves_and_the_loss_falls(
    name: str, tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    number = fingerprint(tiny_model)
    module = tuner(name, tiny_model, toy_datamodule)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer = trainer_of(tmp_path, max_epochs=2)
    losses = [trainer.validate(module, datamodule=toy_datamodule, verbose=False)[0]["val_loss"]]
    trainer.fit(module, datamodule=toy_datamodule)
    losses.append(trainer.validate(module, datamodule=toy_datamodule, verbose=False)[0]["val_loss"])
    assert losses[1] < losses[0]
    for parameter_name, parameter in module.named_parameters():
        moved = not torch.equal(before[parameter_name], parameter)
        assert moved == parameter.requires_grad, parameter_name
        selected = {"full": "", "opl": "model.output_projection."}.get(name, ".adapter.")
        assert parameter.requires_grad == (selected in parameter_name), parameter_name
    assert (fingerprint(tiny_model) == number) == (name == "opl")


@pytest.mark.parametrize("name", TUNERS)
def test_a_checkpoint_stands_alone_and_training_goes_on_from_it(
    name: str, tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    base = copy_of(tiny_model)
    module = tuner(name, tiny_model, toy_datamodule)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.fit(module, datamodule=toy_datamodule)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")

    model, _ = load_pretrained(tmp_path / "tuned.ckpt")
    assert model.config == tiny_model.config
    for weight, tensor in model.state_dict().items():
        assert torch.equal(tensor, tiny_model.state_dict()[weight]), weight
    assert fingerprint(model) == fingerprint(tiny_model)

    # As train.py resumes: the base is built again, then the checkpoint is put into it.
    resumed = tuner(name, base, toy_datamodule)
    trainer_of(tmp_path, max_steps=4).fit(
        resumed, datamodule=toy_datamodule, ckpt_path=tmp_path / "tuned.ckpt"
    )
    assert resumed.trainer.global_step == 4
    trainer_of(tmp_path).test(
        resumed, datamodule=toy_datamodule, ckpt_path=tmp_path / "tuned.ckpt", verbose=False
    )
    for weight, tensor in base.state_dict().items():
        assert torch.equal(tensor, tiny_model.state_dict()[weight]), weight


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        ("adapter", "full", "adapters.*{'bottleneck_dim': 5.*}.*None"),
        ("lora", "adapter", "adapters.*{'rank': 3.*}.*{'bottleneck_dim': 5.*}"),
        ("full", "adapter", "adapters.*None.*{'bottleneck_dim': 5.*}"),
        ("full", "opl", "tied_embeddings.*'all'.*'embeddings'"),
    ],
)
def test_another_ways_checkpoint_is_refused_with_the_difference(
    saved: str, resumed: str, message: str, tiny_model: Transformer,
    toy_datamodule: ParallelDataModule, tmp_path: Path,
) -> None:  # fmt: skip
    base = copy_of(tiny_model)
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(tuner(saved, tiny_model, toy_datamodule), datamodule=toy_datamodule)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(CheckpointError, match=message):
        trainer_of(tmp_path, max_steps=2).fit(
            tuner(resumed, base, toy_datamodule),
            datamodule=toy_datamodule,
            ckpt_path=tmp_path / "saved.ckpt",
        )


def test_output_projection_tuning_sees_the_datastores_keys(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    """No dropout, in training too: what W_O is trained on is what a datastore would hold."""
    module = tuner("opl", tiny_model, toy_datamodule)
    batch = next(iter(toy_datamodule.train_dataloader()))
    modes: list[bool] = []

    class Mode(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            modes.append(any(part.training for part in module.model.modules()))

    with torch.inference_mode():
        before = tiny_model(batch.source_ids, batch.decoder_input).hidden
    trainer_of(tmp_path, max_epochs=2, callbacks=[Mode()]).fit(module, datamodule=toy_datamodule)
    assert modes
    assert not any(modes)
    with torch.inference_mode():
        assert torch.equal(tiny_model(batch.source_ids, batch.decoder_input).hidden, before)


@pytest.mark.parametrize("name", ["full", "adapter", "lora"])
def test_dropout_is_on_in_the_other_ways(
    name: str, tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    module = tuner(name, tiny_model, toy_datamodule)
    assert all(part.training for part in module.modules())

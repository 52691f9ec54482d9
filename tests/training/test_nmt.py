import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from sacrebleu.metrics.bleu import BLEU

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import CheckpointError, load_pretrained
from lightning_knnmt.training import NMTModule

ADAM = functools.partial(torch.optim.Adam, lr=3e-3, betas=(0.9, 0.98))


def new_module(model: Transformer, datamodule: ParallelDataModule, **options: Any) -> NMTModule:
    search = BeamSearch(beam_size=1)
    return NMTModule(model, datamodule.tokenizer, search, optimizer=ADAM, warmup_steps=5, **options)


def new_trainer(folder: Path, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "max_epochs": -1,
    }
    return pl.Trainer(**(defaults | options))


class LossCurve(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.factors: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.factors.append(trainer.optimizers[0].param_groups[0]["lr"] / 3e-3)


class StopAfter(pl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.steps


def test_smoothed_loss_is_torchs_cross_entropy(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    module = new_module(tiny_model, toy_datamodule, label_smoothing=0.1)
    hidden, labels = torch.randn(7, 24), torch.arange(7)
    expected = torch.nn.functional.cross_entropy(
        tiny_model.output_projection(hidden), labels, label_smoothing=0.1
    )
    assert module._smoothed_loss(hidden, labels).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("resumed_after", [None, 4])
def test_linear_decay_reaches_zero_after_the_last_step_of_an_interrupted_training_too(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    tmp_path: Path,
    resumed_after: int | None,
) -> None:
    rates = Rates()
    checkpoint = None
    if resumed_after is not None:
        module = new_module(tiny_model, toy_datamodule, decay="linear", bleu_every=0)
        first = new_trainer(tmp_path, max_steps=10, callbacks=[rates, StopAfter(resumed_after)])
        first.fit(module, datamodule=toy_datamodule)
        checkpoint = tmp_path / "interrupted.ckpt"
        first.save_checkpoint(checkpoint)
    module = new_module(tiny_model, toy_datamodule, decay="linear", bleu_every=0)
    trainer = new_trainer(tmp_path, max_steps=10, callbacks=[rates])
    trainer.fit(module, datamodule=toy_datamodule, ckpt_path=checkpoint)
    assert rates.factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("max_steps", "validated"), [(7, [5, 7]), (10, [5, 10])])
def test_the_last_step_is_validated(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    tmp_path: Path,
    max_steps: int,
    validated: list[int],
) -> None:
    steps: list[int] = []

    class Validations(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    module = new_module(tiny_model, toy_datamodule, bleu_every=0)
    trainer = new_trainer(
        tmp_path, max_steps=max_steps, val_check_interval=5, check_val_every_n_epoch=None,
        callbacks=[Validations()],
    )  # fmt: skip
    trainer.fit(module, datamodule=toy_datamodule)
    assert (trainer.global_step, steps) == (max_steps, validated)


def test_linear_decay_needs_a_last_step(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    module = new_module(tiny_model, toy_datamodule, decay="linear")
    with pytest.raises(ValueError, match=r"decay=linear.*trainer\.max_steps"):
        new_trainer(tmp_path, max_epochs=-1).fit(module, datamodule=toy_datamodule)


def test_training_lowers_the_loss_and_every_weight_moves(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    before = {n: p.detach().clone() for n, p in tiny_model.named_parameters()}
    module = new_module(tiny_model, toy_datamodule, bleu_every=0)
    curve = LossCurve()
    trainer = new_trainer(tmp_path, max_epochs=4, callbacks=[curve])
    trainer.fit(module, datamodule=toy_datamodule)
    assert sum(curve.losses[-10:]) < 0.9 * sum(curve.losses[:10])
    for name, parameter in tiny_model.named_parameters():
        assert not torch.equal(before[name], parameter), f"{name} did not move"


@pytest.mark.parametrize(
    ("scale", "smoothing", "warns"), [(0.1, 0.1, 0), (300, 0.1, 1), (300, 0, 0)]
)
def test_label_smoothing_of_a_model_that_was_trained_without_it_is_warned_of(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    scale: float,
    smoothing: float,
    warns: int,
) -> None:
    with torch.no_grad():
        tiny_model.output_projection.weight.mul_(scale)  # logits far apart
    module = new_module(tiny_model, toy_datamodule, bleu_every=0, label_smoothing=smoothing)
    trainer = new_trainer(tmp_path, max_steps=3, limit_val_batches=0)
    trainer.fit(module, datamodule=toy_datamodule)
    assert caplog.text.count("Set module.label_smoothing=0") == warns


def test_validation_reports_loss_and_bleu(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    module = new_module(tiny_model, toy_datamodule)
    metrics = new_trainer(tmp_path).validate(module, datamodule=toy_datamodule, verbose=False)[0]
    module.eval()
    losses, count = 0.0, 0
    for batch in toy_datamodule.val_dataloader():
        mask = batch.label_mask
        hidden = tiny_model(batch.source_ids, batch.decoder_input).hidden[mask]
        logits = tiny_model.output_projection(hidden)
        losses += torch.nn.functional.cross_entropy(
            logits, batch.labels[mask], reduction="sum"
        ).item()
        count += int(mask.sum())
    assert metrics["val_loss"] == pytest.approx(losses / count, rel=1e-5)
    assert 0 <= metrics["val_bleu"] <= 100


def test_a_validation_that_was_asked_for_has_bleu_whatever_the_interval(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    for every, scored in ((3, True), (0, False)):
        module = new_module(tiny_model, toy_datamodule, bleu_every=every)
        (logged,) = new_trainer(tmp_path).validate(module, toy_datamodule, verbose=False)
        assert ("val_bleu" in logged) == scored


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_in_the_middle_of_an_epoch_continues_the_loss_curve(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    weights = {n: t.clone() for n, t in tiny_model.state_dict().items()}

    def train(folder: Path, **options: Any) -> list[float]:
        curve = LossCurve()
        keep = pl.callbacks.ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
        )
        trainer = new_trainer(
            tmp_path,
            max_steps=60,
            max_epochs=-1,
            callbacks=[curve, keep],
            enable_checkpointing=True,
        )
        data = ParallelDataModule(
            toy_datamodule.root, "xx", "yy", cache_dir=toy_datamodule.cache_dir,
            vocab_size=100, max_tokens=400,
        )  # fmt: skip
        module = new_module(tiny_model, data, bleu_every=0)
        trainer.fit(module, datamodule=data, **options)
        return curve.losses

    whole = train(tmp_path / "whole")  # an epoch has fewer than 40 steps
    tiny_model.load_state_dict(weights)
    resumed = train(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "step=45.ckpt")
    assert len(set(whole)) == 60
    assert resumed == whole[45:]


class DropoutMasks(NMTModule):
    """Records a dropout mask of every training step."""

    masks: list[list[float]]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mask = torch.nn.functional.dropout(torch.ones(64))
        self.masks = [*getattr(self, "masks", []), mask.tolist()]
        return super().training_step(batch, batch_idx)


def test_dropout_depends_on_the_seed_and_on_every_batch_of_an_accumulated_step(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    search = BeamSearch(beam_size=1)

    def masks(seed: int, **options: Any) -> list[list[float]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.manual_seed(0)
        module = DropoutMasks(
            tiny_model, toy_datamodule.tokenizer, search, optimizer=ADAM, bleu_every=0
        )
        trainer = new_trainer(tmp_path, max_steps=2, accumulate_grad_batches=3, **options)
        trainer.fit(module, datamodule=toy_datamodule)
        return module.masks

    first, second = masks(1), masks(2)
    assert len(first) == 6
    assert all(one != other for one, other in itertools.combinations(first + second, 2))
    assert masks(1) == first


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_in_the_middle_of_an_accumulated_epoch_repeats_its_dropout(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    search = BeamSearch(beam_size=1)

    def masks(folder: str, **options: Any) -> list[list[float]]:
        keep = pl.callbacks.ModelCheckpoint(
            tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
        )
        trainer = new_trainer(
            tmp_path, max_steps=6, accumulate_grad_batches=2, callbacks=[keep],
            enable_checkpointing=True,
        )  # fmt: skip
        data = ParallelDataModule(
            toy_datamodule.root, "xx", "yy", cache_dir=toy_datamodule.cache_dir,
            vocab_size=100, max_tokens=400,
        )  # fmt: skip
        module = DropoutMasks(tiny_model, data.tokenizer, search, optimizer=ADAM, bleu_every=0)
        trainer.fit(module, datamodule=data, **options)
        return module.masks

    whole = masks("whole")
    assert len(whole) == 12
    assert masks("resumed", ckpt_path=tmp_path / "whole" / "step=4.ckpt") == whole[8:]


def test_a_checkpoint_stands_alone(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    module = new_module(tiny_model, toy_datamodule)
    trainer = new_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=toy_datamodule)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    model, tokenizer = load_pretrained(tmp_path / "one.ckpt")
    assert tokenizer.digest == toy_datamodule.tokenizer.digest
    assert model.config == tiny_model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tiny_model.state_dict()[name])


def test_weights_of_another_architecture_are_refused_with_the_difference(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    trainer = new_trainer(tmp_path, max_steps=1)
    trainer.fit(new_module(tiny_model, toy_datamodule), datamodule=toy_datamodule)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = Transformer(**(tiny_model.config | {"decoder_ffn_dim": 48}))
    with pytest.raises(CheckpointError, match=r"decoder_ffn_dim\b.*32.*48"):
        new_trainer(tmp_path, max_steps=2).fit(
            new_module(other, toy_datamodule),
            datamodule=toy_datamodule,
            ckpt_path=tmp_path / "one.ckpt",
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a checkpoint", "damaged"), (None, "architecture")],
)
def test_files_that_are_no_checkpoints_of_ours_are_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "x.ckpt"
    if content is None:
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(path)


def test_a_test_translates_every_sentence_once_in_the_corpus_order(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    module = new_module(tiny_model, toy_datamodule)
    trainer = new_trainer(tmp_path)
    (metrics,) = trainer.test(module, datamodule=toy_datamodule, verbose=False)
    predicted: Any = trainer.predict(module, datamodule=toy_datamodule)
    token_ids = [ids for _, ids in sorted(pair for batch in predicted for pair in batch)]
    assert len(token_ids) == 40
    texts = [module.tokenizer.decode(ids) for ids in token_ids]
    witness = BLEU().corpus_score(texts, [toy_datamodule.references("test")]).score
    assert metrics["test_bleu"] == pytest.approx(witness)
    # the third sentence alone gives what the third place holds
    batch = next(b for b in toy_datamodule.test_dataloader() if 3 in b.index.tolist())
    row = batch.index.tolist().index(3)
    one = slice(row, row + 1)
    alone = batch._replace(
        source_ids=batch.source_ids[one], target_ids=batch.target_ids[one], index=batch.index[one]
    )
    module.eval()
    best = module.translate(alone, module.search, module.distribution)[0]
    assert token_ids[3] == best.tokens


def test_weights_of_another_vocabulary_are_refused(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    """Also where both have the same size, so that every weight would fit."""
    trainer = new_trainer(tmp_path, max_steps=1)
    trainer.fit(new_module(tiny_model, toy_datamodule), datamodule=toy_datamodule)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    root = toy_datamodule.root
    other = ParallelDataModule(
        root, "yy", "yy", cache_dir=toy_datamodule.cache_dir, vocab_size=100, max_tokens=400
    )
    assert other.tokenizer.vocabulary.size == toy_datamodule.tokenizer.vocabulary.size
    with pytest.raises(CheckpointError, match=r"another vocabulary \(100 tokens"):
        new_trainer(tmp_path, max_steps=2).fit(
            new_module(tiny_model, other), datamodule=other, ckpt_path=tmp_path / "one.ckpt"
        )

"""Tuning of the output projection through the model and on its datastore's entries: one optimum."""

import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_knnmt.data import (
    EntryBatchSampler,
    KeyDataset,
    LabelledKeys,
    ParallelDataModule,
    ResumableDataLoader,
)
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.training import OPLFineTuner, projection_loss

Rows = Literal["all", "seen"]


def copy_of(model: Transformer) -> Transformer:
    other = Transformer(**model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def tuner(
    model: Transformer, datamodule: ParallelDataModule, rows: Rows = "all", **options: Any
) -> OPLFineTuner:
    defaults: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=2.0)}
    return OPLFineTuner(
        copy_of(model), datamodule.tokenizer, BeamSearch(beam_size=1), rows=rows,
        label_smoothing=0.1, bleu_every=0, **(defaults | options),
    )  # fmt: skip


def fit(module: OPLFineTuner, datamodule: ParallelDataModule, folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {"max_epochs": 6, "limit_val_batches": 0}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        default_root_dir=folder, **(defaults | options),
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule)
    return trainer


@pytest.fixture
def one_batch(toy_text: Path, toy_cache: Path) -> ParallelDataModule:
    """The toy text, all of it in one batch: then a step is the whole gradient."""
    return ParallelDataModule(
        toy_text, "xx", "yy", cache_dir=toy_cache, vocab_size=100, max_tokens=10**6
    )


@torch.no_grad()
def hidden_and_labels(model: Transformer, datamodule: ParallelDataModule) -> tuple[Tensor, Tensor]:
    (batch,) = datamodule.train_dataloader()
    mask = batch.label_mask
    return model(batch.source_ids, batch.decoder_input).hidden[mask], batch.labels[mask]


def entries_of(model: Transformer, datamodule: ParallelDataModule) -> LabelledKeys:
    hidden, labels = hidden_and_labels(model, datamodule)
    return LabelledKeys(hidden.half(), labels, torch.arange(len(labels)))


class Entries(pl.Callback):
    """Gives entries to train on, in place of the text."""

    def __init__(self, entries: LabelledKeys, batch_size: int) -> None:
        self.dataset = KeyDataset(entries.keys.numpy(), entries.labels.int().numpy())
        self.batch_size = batch_size

    def training_batches(self, trainer: pl.Trainer) -> ResumableDataLoader:
        sampler = EntryBatchSampler(len(self.dataset), self.batch_size)
        return ResumableDataLoader(self.dataset, batch_size=None, sampler=sampler)


def test_the_whole_gradient_is_the_same_up_to_the_rounding_of_keys(
    tiny_model: Transformer, one_batch: ParallelDataModule
) -> None:
    """float16 keeps 11 bits: a key is off by 2^-11 at most, relative to each of its numbers."""
    module = tuner(tiny_model, one_batch)
    weight = module.model.output_projection.weight
    hidden, labels = hidden_and_labels(module.model, one_batch)
    (expected,) = torch.autograd.grad(module._smoothed_loss(hidden, labels), weight)

    def gradient(keys: Tensor) -> Tensor:
        loss = projection_loss(keys, labels, weight, None, label_smoothing=0.1)
        return torch.autograd.grad(loss, weight)[0]

    assert (gradient(hidden) - expected).norm() < 1e-5 * expected.norm()
    rounded = (gradient(hidden.half().float()) - expected).norm() / expected.norm()
    assert 1e-5 < rounded < 2**-11


def test_both_ways_converge_to_the_same_loss_and_weights(
    tiny_model: Transformer, one_batch: ParallelDataModule
) -> None:
    hidden, labels = hidden_and_labels(tiny_model, one_batch)
    hidden, labels = hidden[::20], labels[::20]
    hidden, keys = hidden.double(), hidden.half().double()
    start = tiny_model.output_projection.weight.detach().double()

    def optimum(loss_of: Any) -> tuple[Tensor, float]:
        weight = start.clone().requires_grad_()
        newton = torch.optim.LBFGS(
            [weight], max_iter=300, history_size=50, tolerance_grad=1e-9,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> float:
            newton.zero_grad()
            loss = loss_of(weight)
            loss.backward()
            return float(loss.detach())

        newton.step(closure)  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert weight.grad.norm() < 1e-3
        return weight.detach(), loss_of(weight).item()

    def through_model(weight: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden @ weight.T, labels, label_smoothing=0.1)

    text, text_loss = optimum(through_model)
    stored, stored_loss = optimum(
        lambda weight: projection_loss(keys, labels, weight, None, label_smoothing=0.1)
    )
    assert float(through_model(start)) - text_loss > 0.5  # it was far from there
    assert stored_loss == pytest.approx(text_loss, abs=1e-4)
    assert float(through_model(stored)) == pytest.approx(text_loss, abs=1e-4)
    assert (stored - text).norm() < 0.02 * (text - start).norm()


@pytest.mark.parametrize("rows", ["all", "seen"])
@pytest.mark.parametrize("bias", [False, True])
def test_training_on_text_and_on_entries_goes_the_same_way(
    rows: Rows, bias: bool, tiny_model: Transformer, one_batch: ParallelDataModule, tmp_path: Path
) -> None:
    model = Transformer(**(tiny_model.config | {"output_bias": bias})).eval()
    before = model.output_projection.weight.detach().clone()
    on_text, on_entries = (tuner(model, one_batch, rows) for _ in range(2))
    fit(on_text, one_batch, tmp_path)
    entries_source = Entries(entries_of(model, one_batch), batch_size=10**6)
    fit(on_entries, one_batch, tmp_path, callbacks=[entries_source])
    text, entries = (each.model.output_projection for each in (on_text, on_entries))
    moved = (text.weight - before).norm()
    assert moved > 1
    assert (text.weight - entries.weight).norm() < 1e-3 * moved
    if bias:
        assert (text.bias - entries.bias).norm() < 1e-3 * text.bias.norm()

    seen = np.unique(one_batch.train_corpus.target_tokens)
    unseen = np.setdiff1d(np.arange(len(before)), seen)
    assert len(unseen) > 0
    for projection in (text, entries):
        rows_moved = (projection.weight != before).any(1)
        assert rows_moved[seen].all()
        assert rows_moved[unseen].all() == (rows == "all")


def test_what_frozen_rows_add_is_computed_once_and_stays_right(
    tiny_model: Transformer, one_batch: ParallelDataModule, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lightning_knnmt.training import opl

    entries = entries_of(tiny_model, one_batch)
    module = tuner(tiny_model, one_batch, "seen", optimizer=torch.optim.Adam)
    computed: list[int] = []
    log_mass = opl.SeenRows.log_mass

    def counted(rows: opl.SeenRows, hidden: Tensor) -> Tensor:
        computed.append(len(hidden))
        return log_mass(rows, hidden)

    monkeypatch.setattr(opl.SeenRows, "log_mass", counted)
    losses: list[tuple[float, float]] = []

    class Compare(pl.Callback):
        """The reported loss, and the definition's on the same batch."""

        def on_train_batch_start(self, trainer: Any, _: Any, batch: Any, *__: Any) -> None:
            with torch.no_grad():
                self.expected = module._smoothed_loss(batch.keys.float(), batch.labels)

        def on_train_batch_end(self, trainer: Any, _: Any, outputs: Any, *__: Any) -> None:
            losses.append((float(outputs["loss"]), float(self.expected)))

    fit(
        module,
        one_batch,
        tmp_path,
        max_epochs=3,
        callbacks=[Entries(entries, batch_size=100), Compare()],
    )
    assert sum(computed) == len(entries.labels)
    assert len(losses) == 3 * -(-len(entries.labels) // 100)
    for loss, expected in losses:
        assert loss == pytest.approx(expected, rel=1e-5)
    assert losses[-1][0] < losses[0][0]


def test_validation_runs_the_body_once_and_reports_the_same_loss(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    module = tuner(tiny_model, toy_datamodule)
    forward = module.model.forward
    calls: list[int] = []

    def counted(source_ids: Tensor, decoder_input: Tensor) -> Tensor:
        calls.append(len(source_ids))
        return forward(source_ids, decoder_input)

    module.model.forward = counted  # type: ignore[method-assign]
    whole = ParallelDataModule(
        toy_datamodule.root, "xx", "yy", cache_dir=toy_datamodule.cache_dir, vocab_size=100,
        max_tokens=10**6,
    )  # fmt: skip
    trainer = fit(
        module, toy_datamodule, tmp_path, max_epochs=3, limit_val_batches=1.0,
        callbacks=[Entries(entries_of(tiny_model, whole), batch_size=500)],
    )  # fmt: skip
    assert len(calls) == len(toy_datamodule.val_dataloader())
    recorded = float(trainer.callback_metrics["val_loss"])
    again = trainer.validate(module, datamodule=toy_datamodule, verbose=False)[0]["val_loss"]
    assert len(calls) == 2 * len(toy_datamodule.val_dataloader())
    assert recorded == pytest.approx(again, rel=1e-6)


def test_an_unknown_choice_of_rows_is_refused(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    with pytest.raises(ValueError, match=r"rows is 'some'.*all, seen"):
        tuner(tiny_model, toy_datamodule, "some")  # type: ignore[arg-type]

"""TrainOnDatastore: which datastore trains the output projection, and which it refuses."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import LabelledKeys, ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import Datastore, StaleDatastoreError, fingerprint
from lightning_knnmt.training import (
    KNNCallback,
    NMTModule,
    OPLFineTuner,
    TrainOnDatastore,
)

NewTrainer = Callable[..., pl.Trainer]


@pytest.fixture
def tuner(tiny_model: Transformer, toy_datamodule: ParallelDataModule) -> OPLFineTuner:
    return OPLFineTuner(
        tiny_model,
        toy_datamodule.tokenizer,
        BeamSearch(beam_size=1),
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3),
        rows="seen",
        warmup_steps=0,
        bleu_every=0,
    )


class Steps(pl.Callback):
    def __init__(self) -> None:
        self.batches: list[LabelledKeys] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int
    ) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))


def test_it_trains_on_the_datastore_that_retrieval_uses(
    tuner: OPLFineTuner, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: Callable[..., KNNCallback],
) -> None:  # fmt: skip
    stores, steps = tmp_path / "datastores", Steps()
    number = fingerprint(tuner.model)
    trainer = new_trainer(
        TrainOnDatastore(stores, batch_size=500), steps, new_callback(), max_epochs=4
    )
    trainer.fit(tuner, datamodule=toy_datamodule)
    (folder,) = stores.iterdir()  # one: retrieval found it after training
    store = Datastore.open(folder)
    assert store.manifest.model_fingerprint == number == fingerprint(tuner.model)
    for batch in steps.batches:
        rows = batch.entries.numpy()
        assert torch.equal(batch.keys, torch.from_numpy(store.keys[rows]))
        assert batch.labels.tolist() == store.values[rows].tolist()
    per_epoch = -(-len(store) // 500)
    assert len(steps.batches) == 4 * per_epoch
    first, second = (
        torch.cat([b.entries for b in steps.batches[i * per_epoch : (i + 1) * per_epoch]])
        for i in (0, 1)
    )
    assert first.sort().values.tolist() == list(range(len(store)))
    assert not torch.equal(first, second)
    assert steps.losses[-1] < 0.9 * steps.losses[0]

    stamp = (folder / "keys.npy").stat().st_mtime_ns
    new_trainer(TrainOnDatastore(stores, batch_size=500), max_epochs=1).fit(
        tuner, datamodule=toy_datamodule
    )
    assert (folder / "keys.npy").stat().st_mtime_ns == stamp


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_goes_on_in_the_middle_of_an_epoch(
    tuner: OPLFineTuner, toy_datamodule: ParallelDataModule, tmp_path: Path, new_trainer: NewTrainer
) -> None:
    weights = {name: tensor.clone() for name, tensor in tuner.model.state_dict().items()}

    def train(name: str, **options: Any) -> list[float]:
        steps = Steps()
        keep = pl.callbacks.ModelCheckpoint(
            tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1
        )
        source = TrainOnDatastore(tmp_path / "datastores", batch_size=2000)
        trainer = new_trainer(source, keep, steps, max_steps=10, enable_checkpointing=True)
        trainer.fit(tuner, datamodule=toy_datamodule, **options)
        return steps.losses

    whole = train("whole")
    after = {name: tensor.clone() for name, tensor in tuner.model.state_dict().items()}
    tuner.model.load_state_dict(weights)
    resumed = train("resumed", ckpt_path=tmp_path / "whole" / "step=6.ckpt")
    assert len(set(whole)) == 10
    assert resumed == whole[6:]
    for name, tensor in tuner.model.state_dict().items():
        assert torch.equal(tensor, after[name]), name


def test_keys_that_memory_cannot_hold_stay_on_the_disk(
    tuner: OPLFineTuner, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "lightning_knnmt.training.datastore_training.available_memory", lambda: 1000
    )
    steps = Steps()
    source = TrainOnDatastore(tmp_path / "datastores", batch_size=640)
    new_trainer(source, steps, max_epochs=1).fit(tuner, datamodule=toy_datamodule)
    entries = torch.cat([batch.entries for batch in steps.batches])
    assert entries.sort().values.tolist() == list(range(len(entries)))
    assert ((entries[1:] - entries[:-1]) == 1).float().mean() > 0.9


def test_a_datastore_of_other_text_is_refused(
    tuner: OPLFineTuner, toy_datamodule: ParallelDataModule, toy_cache: Path, tmp_path: Path,
    new_trainer: NewTrainer,
) -> None:  # fmt: skip
    other = tmp_path / "other"
    other.mkdir()
    for path in toy_datamodule.root.iterdir():
        (other / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    datamodule = ParallelDataModule(
        other, "xx", "yy", cache_dir=toy_cache, tokenizer=toy_datamodule.tokenizer
    )
    source = TrainOnDatastore(tmp_path, directory=tmp_path / "mine")
    new_trainer(source, max_steps=1).fit(tuner, datamodule=datamodule)
    with pytest.raises(StaleDatastoreError, match="other_text"):
        new_trainer(source, max_steps=1).fit(tuner, datamodule=toy_datamodule)


def test_a_module_that_trains_more_is_refused(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path, new_trainer: NewTrainer
) -> None:
    with pytest.raises(TypeError, match=r"NMTModule.*opl_datastore"):
        new_trainer(TrainOnDatastore(tmp_path), max_steps=1).fit(module, datamodule=toy_datamodule)


def test_several_processes_are_refused(tuner: OPLFineTuner, tmp_path: Path) -> None:
    class TwoRanks:
        world_size = 2
        lightning_module = tuner

    with pytest.raises(ValueError, match=r"\b2\b.*trainer\.devices=1"):
        TrainOnDatastore(tmp_path).training_batches(TwoRanks())  # type: ignore[arg-type]


def test_a_batch_of_nothing_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        TrainOnDatastore(tmp_path, batch_size=0)

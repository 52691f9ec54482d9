from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.retrieval import (
    Datastore,
    DatastoreTooLargeError,
    FaissChoice,
    FlatChoice,
    KNNDistribution,
    StaleDatastoreError,
    building,
    estimate_size,
    fingerprint,
)
from lightning_knnmt.retrieval.errors import DatastoreBusyError
from lightning_knnmt.training import KNNCallback, NMTModule

NewTrainer = Callable[..., pl.Trainer]
NewCallback = Callable[..., KNNCallback]


class Spy(pl.Callback):
    """Notes which distribution each test and validation step uses; listed after KNNCallback."""

    def __init__(self) -> None:
        self.seen: list[type] = []
        self.state_dict_keys: list[str] = []

    def on_test_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(type(pl_module.distribution))
        self.state_dict_keys = list(pl_module.state_dict())

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(type(pl_module.distribution))


def test_keys_are_the_hidden_states_before_each_target_token(
    module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    knn = new_callback()
    new_trainer(knn).test(module, datamodule=toy_datamodule, verbose=False)
    assert knn.retrieval is not None
    store = knn.retrieval.datastore
    corpus = toy_datamodule.train_corpus
    assert len(store) == int(corpus.target_lengths.sum())
    module.eval()
    for sentence in (0, 17, 299):
        source_ids, target_ids = (torch.tensor(side.astype("int64")) for side in corpus[sentence])
        decoder_input = torch.cat([torch.tensor([module.model.start_id]), target_ids[:-1]])
        with torch.no_grad():
            hidden = module.model(source_ids[None], decoder_input[None]).hidden[0]
        rows = slice(*corpus.target_offsets[sentence : sentence + 2])
        assert store.values[rows].tolist() == target_ids.tolist()  # EOS included, start id not
        torch.testing.assert_close(
            torch.from_numpy(store.keys[rows].astype("float32")), hidden, atol=2e-3, rtol=1e-3
        )


def test_retrieval_is_on_during_the_test_and_gone_afterwards(
    module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    spy, keys = Spy(), list(module.state_dict())
    new_trainer(new_callback(), spy).test(module, datamodule=toy_datamodule, verbose=False)
    assert set(spy.seen) == {KNNDistribution}
    assert spy.state_dict_keys == keys == list(module.state_dict())
    assert isinstance(module.distribution, SoftmaxDistribution)


def test_an_exception_in_the_middle_detaches(
    module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    class Trip(pl.Callback):
        def on_test_batch_end(self, *_: Any) -> None:
            raise RuntimeError("tripped")

    with pytest.raises(RuntimeError, match="tripped"):
        new_trainer(new_callback(), Trip()).test(module, datamodule=toy_datamodule)
    assert isinstance(module.distribution, SoftmaxDistribution)


def test_with_weight_zero_the_translations_are_the_models_own(
    module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback, translated: Callable[..., Any],
) -> None:  # fmt: skip
    alone = translated(new_trainer(), module)
    assert translated(new_trainer(new_callback(knn_weight=0.0)), module) == alone
    assert translated(new_trainer(new_callback(knn_weight=0.9)), module) != alone


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_datastore_that_another_run_began_in_the_same_moment_is_shared(
    module: NMTModule, toy_datamodule: ParallelDataModule, new_trainer: NewTrainer,
    new_callback: NewCallback, monkeypatch: pytest.MonkeyPatch, *, rebuild: bool,
) -> None:  # fmt: skip
    build, builders = building.build, []

    def build_while_another_does(*arguments: Any) -> Datastore:
        builders.append(arguments[3])
        build(*arguments)
        raise DatastoreBusyError("Another process is building.")

    monkeypatch.setattr(building, "build", build_while_another_does)
    knn = new_callback(rebuild=rebuild)
    trainer = new_trainer(knn)
    if rebuild:  # the other run's is not the one that was asked for
        with pytest.raises(DatastoreBusyError):
            trainer.test(module, datamodule=toy_datamodule, verbose=False)
    else:
        trainer.test(module, datamodule=toy_datamodule, verbose=False)
        assert knn.retrieval is not None
        assert knn.retrieval.datastore.directory == builders[0]
    assert len(builders) == 1


def test_a_datastore_that_fits_is_used_again_and_new_weights_get_their_own(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: NewCallback, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def folders() -> dict[str, int]:
        return {
            f.name: (f / "keys.npy").stat().st_mtime_ns for f in (tmp_path / "datastores").iterdir()
        }

    test = {"datamodule": toy_datamodule, "verbose": False}
    new_trainer(new_callback()).test(module, **test)
    first = folders()
    assert len(first) == 1
    new_trainer(new_callback()).test(module, **test)
    assert folders() == first
    with torch.no_grad():
        module.model.output_projection.weight = torch.nn.Parameter(
            module.model.output_projection.weight + 1
        )  # unties; the body stays
    new_trainer(new_callback()).test(module, **test)
    assert folders() == first, "the output projection comes after the key"
    with torch.no_grad():
        module.model.decoder_layers[0].ffn.up.bias[0] += 1e-3
    new_trainer(new_callback()).test(module, **test)
    assert len(folders()) == 2


def test_after_training_the_datastore_is_that_of_the_best_weights(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    class Worsen(pl.Callback):
        """Makes the first of three validations the best."""

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.callback_metrics["val_loss"] = torch.tensor(float(trainer.current_epoch))

    class Last(pl.Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.weights = {n: t.clone() for n, t in pl_module.state_dict().items()}
            self.fingerprint = fingerprint(pl_module.model)

    best = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="val_loss")
    last, knn, spy = Last(), new_callback(), Spy()
    trainer = new_trainer(knn, Worsen(), last, spy, best, max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, datamodule=toy_datamodule)
    assert set(spy.seen) == {SoftmaxDistribution}, "the weights move during training"
    (folder,) = (tmp_path / "datastores").iterdir()
    built_for = Datastore.open(folder).manifest.model_fingerprint
    assert built_for != last.fingerprint
    assert all(torch.equal(t, last.weights[n]) for n, t in module.state_dict().items())
    trainer.test(module, datamodule=toy_datamodule, ckpt_path="best", verbose=False)
    assert fingerprint(module.model) == built_for
    assert len(list((tmp_path / "datastores").iterdir())) == 1, "the test built nothing"


def test_a_given_folder_of_another_model_is_refused(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    test = {"datamodule": toy_datamodule, "verbose": False}
    new_trainer(new_callback(directory=tmp_path / "mine")).test(module, **test)
    with torch.no_grad():
        module.model.decoder_layers[0].ffn.up.bias[0] += 1
    with pytest.raises(StaleDatastoreError, match="built by a model with fingerprint"):
        new_trainer(new_callback(directory=tmp_path / "mine")).test(module, **test)
    new_trainer(new_callback(directory=tmp_path / "mine", rebuild=True)).test(module, **test)
    manifest = Datastore.open(tmp_path / "mine").manifest
    assert manifest.model_fingerprint == fingerprint(module.model)


def test_the_tuned_setting_is_the_best_candidate_and_is_remembered(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: NewCallback, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import json

    from lightning_knnmt.retrieval import TuningText

    knn = new_callback(tune=True, num_neighbours=None, temperature=None, max_neighbours=8)
    new_trainer(knn).test(module, datamodule=toy_datamodule, verbose=False)
    assert knn.retrieval is not None
    (saved,) = (tmp_path / "datastores").glob("*/tuning/*.json")
    values = json.loads(saved.read_text())["values"]
    assert values == vars(knn.retrieval.fitted.combiner)

    def fail(*_: Any, **__: Any) -> float:
        raise AssertionError("what is kept needs no record")

    monkeypatch.setattr(TuningText, "record", fail)
    again = new_callback(tune=True, num_neighbours=None, temperature=None, max_neighbours=8)
    new_trainer(again).test(module, datamodule=toy_datamodule, verbose=False)
    assert again.retrieval is not None
    assert repr(again.retrieval.fitted) == repr(knn.retrieval.fitted)

    # another output projection shares the datastore, but has to be tuned anew
    module.model.untie_output_projection()
    with torch.no_grad():
        module.model.output_projection.weight += 1
    with pytest.raises(AssertionError, match="needs no record"):
        new_trainer(again).test(module, datamodule=toy_datamodule, verbose=False)
    assert len(list((tmp_path / "datastores").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knn_weight": 1.5}, "kNN weight λ is 1.5"),
        ({"temperature": 0.0}, "temperature T is 0.0"),
        ({"num_neighbours": 0}, "neighbours k is 0"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(
    options: dict[str, Any], message: str, new_callback: NewCallback
) -> None:
    with pytest.raises(ValueError, match=message):
        new_callback(**options)


def test_more_neighbours_than_entries_are_refused(
    module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match="larger than the datastore"):
        new_trainer(new_callback(num_neighbours=10**6)).test(
            module, datamodule=toy_datamodule, verbose=False
        )


def test_a_datastore_that_will_not_fit_is_refused_before_anything_starts(
    module: NMTModule, toy_datamodule: ParallelDataModule, monkeypatch: pytest.MonkeyPatch,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    monkeypatch.setattr("lightning_knnmt.retrieval.estimate.available_memory", lambda: 1000)
    knn, spy = new_callback(), Spy()
    with pytest.raises(DatastoreTooLargeError, match="only 1,000 bytes are available"):
        new_trainer(knn, spy, max_epochs=1).fit(module, datamodule=toy_datamodule)
    knn.enabled = False  # the test without retrieval comes before the one that builds
    with pytest.raises(
        DatastoreTooLargeError, match=r"\(index: flat\), but only 1,000 bytes are av"
    ):
        new_trainer(knn, spy).test(module, datamodule=toy_datamodule, verbose=False)
    assert spy.seen == []


def test_a_datastore_that_is_there_needs_no_room(
    module: NMTModule, toy_datamodule: ParallelDataModule, monkeypatch: pytest.MonkeyPatch,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    test = {"datamodule": toy_datamodule, "verbose": False}
    new_trainer(new_callback()).test(module, **test)
    asked: list[str] = []
    monkeypatch.setattr(
        "lightning_knnmt.retrieval.building.reject_if_too_large", lambda *_: asked.append("it")
    )
    new_trainer(new_callback()).test(module, **test)
    # Training the output projection alone leaves it as it is, any other training does not.
    for name, parameter in module.model.named_parameters():
        parameter.requires_grad = name == "output_projection.weight"
    module.model.untie_output_projection()
    new_trainer(new_callback(), max_steps=1).fit(module, datamodule=toy_datamodule)
    assert not asked
    module.model.requires_grad_(True)
    new_trainer(new_callback(), max_steps=1).fit(module, datamodule=toy_datamodule)
    assert asked


@pytest.mark.parametrize("kind", ["flat", "faiss"])
def test_what_must_fit_depends_on_the_index(
    kind: str, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    index = FaissChoice("IVF4,SQfp16") if kind == "faiss" else FlatChoice()
    knn = new_callback(index=index)
    entries = int(toy_datamodule.train_corpus.target_lengths.sum())
    needs = {name: estimate_size(entries, 24, name).memory_bytes for name in ("flat", "faiss")}
    assert needs["faiss"] < needs["flat"]
    monkeypatch.setattr(
        "lightning_knnmt.retrieval.estimate.available_memory", lambda: needs["faiss"]
    )
    expected = nullcontext() if kind == "faiss" else pytest.raises(DatastoreTooLargeError)
    with expected:
        new_trainer(knn).test(module, datamodule=toy_datamodule, verbose=False)

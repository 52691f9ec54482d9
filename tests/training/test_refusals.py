"""What a run's settings cannot be is said before anything is trained, built or replaced."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.retrieval import (
    AutoChoice,
    DatastorePlan,
    FaissChoice,
    FlatChoice,
    IndexChoice,
    LearnedCombiner,
    RetrievalPlan,
    TunedCombiner,
    ensure_datastore,
)
from lightning_knnmt.retrieval.errors import CombinerError, ForeignFilesError, IndexFactoryError
from lightning_knnmt.training import KNNCallback, NMTModule, TrainOnDatastore, knn_callback

NewTrainer = Callable[..., pl.Trainer]
NewCallback = Callable[..., KNNCallback]


class Untouched(pl.Callback):
    """Fails when anything is trained."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise AssertionError("the mistake should have been told by now")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "train.de").write_text("years of work")
    return tmp_path / "precious"


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "below"])
def test_files_in_the_datastores_place_survive_and_are_told_before_training(
    module: NMTModule, toy_datamodule: ParallelDataModule, precious: Path, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: NewCallback, kind: str, *, rebuild: bool,
) -> None:  # fmt: skip
    directory = precious
    if kind == "file":
        directory = precious / "train.de"
    if kind == "below":
        directory = precious / "train.de" / "store"
    if kind == "link":
        directory = tmp_path / "link"
        directory.symlink_to(precious)
    knn = new_callback(directory=directory, rebuild=rebuild)
    with pytest.raises(ForeignFilesError, match="precious"):
        new_trainer(knn, Untouched(), max_epochs=1).fit(module, datamodule=toy_datamodule)
    with pytest.raises(ForeignFilesError, match=str(precious)):
        ensure_datastore(
            module.model, module.tokenizer, toy_datamodule.train_corpus, knn.plan.datastore
        )
    assert (precious / "train.de").read_text() == "years of work"
    assert [each.name for each in precious.iterdir()] == ["train.de"]


def test_files_beside_a_datastore_are_no_obstacle_unless_it_is_rebuilt(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    store = tmp_path / "store"
    test: dict[str, Any] = {"datamodule": toy_datamodule, "verbose": False}
    new_trainer(new_callback(directory=store)).test(module, **test)
    (store / "notes.txt").write_text("mine")
    new_trainer(new_callback(directory=store)).test(module, **test)
    with pytest.raises(ForeignFilesError, match=r"notes\.txt"):
        new_trainer(new_callback(directory=store, rebuild=True)).test(module, **test)
    assert (store / "notes.txt").read_text() == "mine"
    (store / "notes.txt").unlink()
    (tmp_path / "link").symlink_to(store)
    new_trainer(new_callback(directory=tmp_path / "link", rebuild=True)).test(module, **test)
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*"))


def test_training_on_a_datastore_replaces_no_files(
    tiny_model: Any, toy_datamodule: ParallelDataModule, precious: Path, tmp_path: Path,
    new_trainer: NewTrainer,
) -> None:  # fmt: skip
    import functools

    from lightning_knnmt.decoding import BeamSearch
    from lightning_knnmt.training import OPLFineTuner

    tuner = OPLFineTuner(
        tiny_model, toy_datamodule.tokenizer, BeamSearch(beam_size=1),
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3), warmup_steps=0, bleu_every=0,
    )  # fmt: skip
    for directory in (precious, precious / "train.de", precious / "train.de" / "store"):
        source = TrainOnDatastore(tmp_path / "datastores", directory=directory)
        with pytest.raises(ForeignFilesError, match="precious"):
            new_trainer(source, Untouched(), max_steps=1).fit(tuner, datamodule=toy_datamodule)
    assert (precious / "train.de").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"batch_size is 1\.5, but it must be an integer"):
        TrainOnDatastore(tmp_path, batch_size=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosine"}, "metric is 'cosine', but it must be one of l2, ip"),
        ({"num_neighbours": 1.5}, r"neighbours k is 1\.5, but it must be an integer"),
        ({"num_neighbours": "abc"}, "neighbours k is abc, but it must be an integer"),
        ({"temperature": "abc"}, "temperature T is abc, but it must be a number"),
        ({"max_neighbours": 0}, r"knn\.max_neighbours is 0, but it must be an integer from 1 to 2"),
        ({"max_neighbours": 8192}, r"knn\.max_neighbours is 8192, but it must be an integer from"),
    ],
)
def test_settings_of_fixed_numbers(
    options: dict[str, Any], message: str, new_callback: NewCallback
) -> None:
    with pytest.raises(ValueError, match=message):
        new_callback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_neighbours": 0}, "max_neighbours is 0, but it must be an integer from 1 to 2048"),
        ({"max_neighbours": 8192}, "max_neighbours is 8192, but it must be an integer from 1"),
        ({"max_neighbours": "abc"}, "max_neighbours is abc, but it must be an integer from 1"),
        ({"temperature": "abc"}, "temperature T is abc, but it must be a number greater than 0"),
    ],
)
@pytest.mark.parametrize("variant", ["adaptive", "robust"])
def test_settings_of_a_network(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedCombiner(variant, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "ip"}, r"leave out knn\.metric=ip, or choose knn=adaptive"),
        ({"key_layer": "ffn_input"}, r"leave out knn\.key_layer=ffn_input, or choose knn=adapt"),
    ],
)
def test_a_robust_combiner_of_other_keys(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CombinerError, match=message):
        knn_callback("robust", tmp_path, FlatChoice(), max_neighbours=8, **options)
    knn_callback("adaptive", tmp_path, FlatChoice(), max_neighbours=8, **options)


@pytest.mark.parametrize(
    ("index", "combiner", "message"),
    [
        (
            FaissChoice("Foo"),
            TunedCombiner("fixed"),
            "There is no index 'Foo' over keys of 24 dimensions",
        ),
        (
            FaissChoice("IVF65536,Flat"),
            TunedCombiner("fixed"),
            "has 65,536 lists, more than the datastore",
        ),
        (
            FlatChoice(),
            TunedCombiner.of("fixed", tune=False, num_neighbours=10**5),
            "k is 100000, larger than the datastore, w",
        ),
        (FlatChoice(), LearnedCombiner(max_neighbours=2048), None),
    ],
)
def test_what_the_datastore_cannot_have_is_told_before_training(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path, index: IndexChoice,
    combiner: Any, message: str | None, new_trainer: NewTrainer,
) -> None:  # fmt: skip
    if message is None:  # a datastore that is there counts, not the text
        tiny = Path(shutil.copytree(toy_datamodule.root, tmp_path / "tiny"))
        for path in tiny.iterdir():
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
        toy_datamodule = ParallelDataModule(
            tiny, "xx", "yy", cache_dir=tmp_path / "cache", tokenizer=toy_datamodule.tokenizer
        )
        message = "k is 2048, larger than the datastore, which has"
    plan = DatastorePlan(tmp_path / "datastores", index=index.kind)
    knn = KNNCallback(RetrievalPlan(plan, index, combiner))
    with pytest.raises((ValueError, IndexFactoryError), match=message):
        new_trainer(knn, Untouched(), max_epochs=1).fit(module, datamodule=toy_datamodule)
    assert not (tmp_path / "datastores").exists()


@pytest.mark.parametrize("index", [AutoChoice(), FaissChoice("Flat")])
def test_without_validation_text_an_index_is_measured_on_held_out_training_text(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path, index: IndexChoice,
    new_trainer: NewTrainer,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(toy_datamodule.root, tmp_path / "text"))
    for path in folder.glob("valid.*"):
        path.unlink()
    datamodule = ParallelDataModule(
        folder, "xx", "yy", cache_dir=tmp_path / "cache", tokenizer=toy_datamodule.tokenizer
    )
    test: dict[str, Any] = {"datamodule": datamodule, "verbose": False}
    knn = knn_callback("fixed", tmp_path / "datastores", index, tune=False, num_neighbours=4)
    new_trainer(knn).test(module, **test)
    assert knn.retrieval is not None
    held_out = len(datamodule.train_corpus) - knn.retrieval.datastore.manifest.num_sentences
    assert 0 < held_out < 0.2 * len(datamodule.train_corpus)

    exact = knn_callback("fixed", tmp_path / "datastores", FlatChoice(), tune=False)
    new_trainer(exact).test(module, **test)  # nothing is chosen, so nothing is held out
    assert exact.retrieval is not None
    stored = exact.retrieval.datastore.manifest.num_sentences
    assert stored == len(datamodule.train_corpus)


def test_half_a_validation_text_is_an_error(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path, new_trainer: NewTrainer
) -> None:
    folder = Path(shutil.copytree(toy_datamodule.root, tmp_path / "text"))
    (folder / "valid.xx").unlink()
    datamodule = ParallelDataModule(
        folder, "xx", "yy", cache_dir=tmp_path / "cache", tokenizer=toy_datamodule.tokenizer
    )
    knn = knn_callback("fixed", tmp_path / "datastores", FlatChoice())
    with pytest.raises(ValueError, match=r"valid\.xx"):
        new_trainer(knn).test(module, datamodule=datamodule, verbose=False)
    assert not (tmp_path / "datastores").exists()


def test_what_is_kept_and_damaged_is_made_anew(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    from lightning_knnmt.retrieval import CombinerTrainer

    recipe = CombinerTrainer(max_updates=2, first_validation=1, validate_every=1)
    test: dict[str, Any] = {"datamodule": toy_datamodule, "verbose": False}

    def robust() -> KNNCallback:
        stores = tmp_path / "datastores"
        knn = knn_callback("robust", stores, FlatChoice(), max_neighbours=4, trainer=recipe)
        new_trainer(knn).test(module, **test)
        return knn

    def tuned() -> KNNCallback:
        knn = new_callback(tune=True, num_neighbours=None, temperature=None, max_neighbours=4)
        new_trainer(knn).test(module, **test)
        return knn

    made = [each.retrieval for each in (robust(), tuned())]
    (store,) = (tmp_path / "datastores").iterdir()
    kept = [*store.glob("combiners/*.json"), *store.glob("tuning/*"), *store.glob("label_log*/*")]
    assert len(kept) == 3
    for damage in (b"", b"{", b"[]", b"{}", None):
        for path in kept:
            path.unlink() if damage is None else path.write_bytes(damage)
        again = [each.retrieval for each in (robust(), tuned())]
        for one, other in zip(made, again, strict=True):
            assert one is not None
            assert other is not None
            for name in ("k", "temperature", "knn_weight"):
                assert one.fitted.report.get(name) == other.fitted.report.get(name)
        assert again[0] is not None
        seconds = json.loads(kept[0].read_text())["seconds"]
        assert seconds == again[0].fitted.report["combiner_seconds"]

"""train.py module=full|opl|adapter on a pretrained model, and evaluate.py on what comes out."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_knnmt import load_pretrained
from lightning_knnmt.pretrained import save_adapters
from lightning_knnmt.retrieval import fingerprint
from lightning_knnmt.terminal import quieten_libraries
from lightning_knnmt.translator import Translator

Run = Callable[..., Path]
Tune = Callable[..., Path]


def best(folder: Path) -> str:
    return f"model.path={folder}/checkpoints/best.ckpt"


@pytest.fixture
def tune(
    trained: Path, tmp_path: Path, composed: Callable[..., Any], entry_point: ModuleType
) -> Tune:
    """Fine-tunes the trained model: tune(*overrides) -> folder."""

    def call(*overrides: str) -> Path:
        quieten_libraries()
        folder = tmp_path / "tuned"
        given = ("model=pretrained", best(trained), "trainer.max_epochs=1", "module.bleu_every=0")
        entry_point.run(composed("train", folder, *given, *overrides))
        return folder

    return call


@pytest.mark.parametrize(
    ("module", "method"),
    [
        ("full", "full fine-tuning"),
        ("opl", "OPL"),
        ("adapter", "adapters"),
        ("lora", "LoRA"),
    ],
)
def test_a_tuned_model_is_tested_beside_its_base_and_again_with_the_same_result(
    module: str,
    method: str,
    trained: Path,
    tune: Tune,
    evaluate: Run,
    tmp_path: Path,
    words: Path,
    read: Any,
) -> None:
    folder = tune(f"module={module}")
    base, tuned = read.rows(folder).values()
    assert (base["method"], tuned["method"]) == ("NMT", method)
    assert base == read.rows(trained)["NMT"] | {"seconds": base["seconds"]}
    again = read.rows(evaluate(tmp_path / "again", best(folder)))["NMT"]
    assert again == tuned | {"method": "NMT", "seconds": again["seconds"]}
    translations = read.translations(folder)
    assert translations["NMT"] == read.translations(trained)["NMT"]
    assert translations[method.replace(" ", "-")] == read.translations(tmp_path / "again")["NMT"]
    lines = (words / "test.pt").read_text().splitlines()
    system = Translator.load(folder)
    tested = translations[method.replace(" ", "-")]
    assert [each.text for each in system.translate(lines)] == tested
    before, after = (load_pretrained(f / "checkpoints" / "best.ckpt") for f in (trained, folder))
    assert (fingerprint(after.model) == fingerprint(before.model)) == (module == "opl")


@pytest.mark.parametrize(
    ("module", "method"), [("opl", "OPL"), ("opl_datastore", "OPL"), ("adapter", "adapters")]
)
def test_an_interrupted_tuning_is_resumed(module: str, method: str, tune: Tune, read: Any) -> None:
    tune(f"module={module}", "test=false")
    folder = tune(f"module={module}", "trainer.max_epochs=2", "resume=true", "test_base=false")
    assert list(read.rows(folder)) == [method]


def test_results_of_a_training_that_went_on_are_gone(
    tune: Tune, given: tuple[str, ...], tmp_path: Path, read: Any
) -> None:
    options = ("module=adapter", f"knn.datastores={tmp_path}/stores", "module.optimizer.lr=0.01")
    folder = tune(*options, *given)
    first = read.rows(folder)
    assert list(first) == ["NMT", "adapters", "adapters + kNN-MT"]
    tune("module=adapter", "module.optimizer.lr=0.01", "trainer.max_epochs=2", "resume=true")
    rows = read.rows(folder)
    assert list(rows) == ["NMT", "adapters"]  # a row with retrieval would be of other weights
    assert rows["NMT"]["bleu"] == first["NMT"]["bleu"]
    assert rows["adapters"]["model_digest"] != first["adapters"]["model_digest"]
    assert read.translations(folder).keys() == {"NMT", "adapters"}


def test_adapters_then_datastore_then_combiner_in_one_command(
    trained: Path, tune: Tune, tmp_path: Path, read: Any
) -> None:
    options = (
        *("module=adapter", "module.bottleneck_dim=8", "knn=adaptive", "index=flat"),
        *(f"knn.datastores={tmp_path}/stores", "knn.max_neighbours=4"),
        *("knn.trainer.max_updates=20", "resume=true"),
    )
    folder = tune(*options)
    rows = read.rows(folder)
    assert rows["adapters + AK-MT"]["combiner_parameters"] > 0
    (store,) = (tmp_path / "stores").iterdir()
    model, _ = load_pretrained(folder / "checkpoints" / "best.ckpt")
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["model_fingerprint"] == fingerprint(model)  # the adapted model's keys
    kept = [folder / "checkpoints" / "best.ckpt", *(p for p in store.rglob("*") if p.is_file())]
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    again = read.rows(tune(*options))
    assert {path: path.stat().st_mtime_ns for path in kept} == stamps
    assert again["adapters + AK-MT"]["bleu"] == rows["adapters + AK-MT"]["bleu"]


def test_output_projection_tuning_keeps_the_datastore(
    trained: Path, tune: Tune, given: tuple[str, ...], read: Any
) -> None:
    before = read.datastore(trained / "datastore")
    stamp = (trained / "datastore" / "keys.npy").stat().st_mtime_ns
    folder = tune("module=opl", *given, f"knn.directory={trained}/datastore")
    assert list(read.rows(folder)) == ["NMT", "OPL", "OPL + kNN-MT"]
    assert read.datastore(trained / "datastore") == before
    assert (trained / "datastore" / "keys.npy").stat().st_mtime_ns == stamp


def test_output_projection_tuning_from_the_datastore_of_the_base_model(
    trained: Path, tune: Tune, given: tuple[str, ...], evaluate: Run, tmp_path: Path, read: Any
) -> None:
    """Trains on the one that kNN-MT is given, and the tuned model's kNN-MT uses it as well."""
    stamp = (trained / "datastore" / "keys.npy").stat().st_mtime_ns
    folder = tune("module=opl_datastore", *given, f"knn.directory={trained}/datastore")
    rows = read.rows(folder)
    assert list(rows) == ["NMT", "OPL", "OPL + kNN-MT"]
    assert (trained / "datastore" / "keys.npy").stat().st_mtime_ns == stamp
    before, after = (load_pretrained(f / "checkpoints" / "best.ckpt") for f in (trained, folder))
    assert fingerprint(after.model) == fingerprint(before.model)
    moved = after.model.output_projection.weight != before.model.output_projection.weight
    assert moved.any(1).sum() > 10
    again = read.rows(evaluate(tmp_path / "again", best(folder)))["NMT"]
    assert again["bleu"] == rows["OPL"]["bleu"]


def test_an_adapted_models_keys_are_refused_to_the_base_models_datastore(
    trained: Path, mistake: Callable[..., str], given: tuple[str, ...], tune: Tune
) -> None:
    folder = tune("module=adapter", "test=false")
    store = f"knn.directory={trained}/datastore"
    assert "fingerprint" in mistake(best(folder), *given, store, config="evaluate")


def test_adapters_travel_alone(
    trained: Path, tune: Tune, evaluate: Run, mistake: Callable[..., str], tmp_path: Path, read: Any
) -> None:
    folder = tune("module=adapter", "module.bottleneck_dim=8", "module.placement=ffn")
    file = tmp_path / "adapters.safetensors"
    save_adapters(load_pretrained(folder / "checkpoints" / "best.ckpt").model, file)
    again = evaluate(tmp_path / "again", best(trained), f"model.adapters={file}")
    assert read.translations(again)["NMT"] == read.translations(folder)["adapters"]
    other = tmp_path / "other"
    other.mkdir()
    said = mistake(best(folder), f"model.adapters={file}", config="evaluate", folder=other)
    assert "already has adapters" in said


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("module.bottleneck_dim=0", ("bottleneck_dim is 0", "1")),
        ("module.placement=attention", ("placement is 'attention'", "all, ffn")),
    ],
)
def test_wrong_settings_end_in_one_sentence(
    mistake: Callable[..., str], override: str, facts: tuple[str, ...]
) -> None:
    said = mistake("module=adapter", override)
    assert all(fact in said for fact in facts)

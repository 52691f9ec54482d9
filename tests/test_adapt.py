"""Adapting a model in a few lines of Python, without a Trainer."""

from pathlib import Path

import pytest

from lightning_knnmt import Datastore, Translator, build_datastore, prepare_retrieval
from lightning_knnmt.data import ParallelDataModule, read_lines
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import Pretrained
from lightning_knnmt.retrieval import FlatIndex, StaleDatastoreError
from lightning_knnmt.retrieval.errors import DatastoreError

LINES = 30


@pytest.fixture
def model(tiny_model: Transformer, toy_datamodule: ParallelDataModule) -> Pretrained:
    return Pretrained(tiny_model.eval(), toy_datamodule.tokenizer)


@pytest.fixture
def text(toy_datamodule: ParallelDataModule) -> tuple[Path, Path]:
    source, target = (toy_datamodule.root / f"train.{lang}" for lang in ("xx", "yy"))
    return source, target


@pytest.fixture
def valid(toy_datamodule: ParallelDataModule) -> tuple[Path, Path]:
    source, target = (toy_datamodule.root / f"valid.{lang}" for lang in ("xx", "yy"))
    return source, target


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_KNNMT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("text_for_choices", [False, True])
def test_two_files_become_a_system_that_translates(
    model: Pretrained, text: tuple[Path, Path], valid: tuple[Path, Path], tmp_path: Path,
    *, text_for_choices: bool,
) -> None:  # fmt: skip
    datastore = build_datastore(model, *text, tmp_path / "memory")
    assert datastore.pair(3) == tuple(list(read_lines(path))[3] for path in text)
    values = {"num_neighbours": 4, "knn_weight": 0.9}
    retrieval = prepare_retrieval(
        model, datastore, *(valid if text_for_choices else ()), combiner="fixed", values=values
    )
    assert {**retrieval.fitted.report, "temperature": 1} == {
        "k": 4, "knn_weight": 0.9, "temperature": 1,
    }  # fmt: skip
    assert isinstance(retrieval.measured_index.index, FlatIndex)  # small enough for exact search
    lines = list(read_lines(valid[0]))[:LINES]
    alone = [each.text for each in Translator(*model).translate(lines)]
    mixed = [each.text for each in Translator(*model, retrieval).translate(lines)]
    assert mixed != alone
    none = prepare_retrieval(model, datastore, combiner="fixed", values={"knn_weight": 0.0})
    assert [each.text for each in Translator(*model, none).translate(lines)] == alone


def test_a_datastore_is_found_again_and_other_text_is_rejected(
    model: Pretrained, text: tuple[Path, Path], valid: tuple[Path, Path], tmp_path: Path
) -> None:
    first = build_datastore(model, *text, tmp_path / "memory")
    stamp = (first.directory / "keys.npy").stat().st_mtime_ns
    again = build_datastore(model, *text, tmp_path / "memory")
    assert (again.directory / "keys.npy").stat().st_mtime_ns == stamp
    with pytest.raises(StaleDatastoreError, match="other_text"):
        build_datastore(model, *valid, tmp_path / "memory")
    used = build_datastore(model, *valid, tmp_path / "memory", other_text="use")
    assert used.manifest == first.manifest
    replaced = build_datastore(model, *valid, tmp_path / "memory", other_text="rebuild")
    assert len(replaced) < len(first)
    assert Datastore.open(tmp_path / "memory").manifest == replaced.manifest


def test_another_model_is_rejected(
    model: Pretrained, text: tuple[Path, Path], tmp_path: Path
) -> None:
    datastore = build_datastore(model, *text, tmp_path / "memory")
    other = Pretrained(Transformer(**model.model.config).eval(), model.tokenizer)
    with pytest.raises(StaleDatastoreError, match="fingerprint"):
        prepare_retrieval(other, datastore, combiner="fixed")


def test_a_choice_needs_text(
    model: Pretrained, text: tuple[Path, Path], valid: tuple[Path, Path], tmp_path: Path
) -> None:
    datastore = build_datastore(model, *text, tmp_path / "memory")
    with pytest.raises(ValueError, match="adaptive"):
        prepare_retrieval(model, datastore, combiner="adaptive")
    with pytest.raises(ValueError, match="target"):
        prepare_retrieval(model, datastore, valid[0], combiner="fixed")


def test_pairs_with_an_empty_side_are_left_out_of_a_datastore(
    model: Pretrained, text: tuple[Path, Path], tmp_path: Path
) -> None:
    lines = [list(read_lines(path))[:5] for path in text]
    lines[0][1] = "  "
    lines[1][3] = ""
    for name, side in zip(("a", "b"), lines, strict=True):
        (tmp_path / name).write_text("\n".join(side) + "\n", encoding="utf-8")
    datastore = build_datastore(model, tmp_path / "a", tmp_path / "b", tmp_path / "memory")
    kept = [datastore.pair(i) for i in range(datastore.manifest.num_sentences)]
    assert kept == [(lines[0][i], lines[1][i]) for i in (0, 2, 4)]


def test_a_folder_of_other_files_is_rejected(
    model: Pretrained, text: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DatastoreError, match=r"notes\.txt"):
        build_datastore(model, *text, tmp_path / "mine")

"""evaluate.py on a checkpoint of train.py."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Path]


def best(folder: Path) -> str:
    return f"model.path={folder}/checkpoints/best.ckpt"


def test_it_gives_what_train_gave(
    trained: Path, evaluate: Run, tmp_path: Path, given: tuple[str, ...], read: Any
) -> None:
    folder = evaluate(tmp_path, best(trained), *given, f"knn.directory={trained}/datastore")
    assert read.translations(folder) == read.translations(trained)
    for method, row in read.rows(trained).items():
        assert read.rows(folder)[method] == row | {"seconds": read.rows(folder)[method]["seconds"]}
    assert not (folder / "checkpoints").exists()
    assert not (folder / "logs").exists()


def test_without_retrieval_there_is_one_row_and_a_later_run_adds_the_other(
    trained: Path, evaluate: Run, tmp_path: Path, given: tuple[str, ...], read: Any
) -> None:
    evaluate(tmp_path, best(trained))
    assert list(read.rows(tmp_path)) == ["NMT"]
    evaluate(tmp_path, best(trained), *given, f"knn.directory={trained}/datastore")
    assert list(read.rows(tmp_path)) == ["NMT", "kNN-MT"]


def test_with_weight_zero_the_translations_are_the_models_own(
    trained: Path, evaluate: Run, tmp_path: Path, given: tuple[str, ...], read: Any
) -> None:
    store = f"knn.directory={trained}/datastore"
    evaluate(tmp_path, best(trained), *given, store, "knn.knn_weight=0", "decoding.beam_size=3")
    both = read.translations(tmp_path)
    assert both["kNN-MT"] == both["NMT"]
    one, other = read.rows(tmp_path).values()
    assert (one["bleu"], one["chrf"]) == (other["bleu"], other["chrf"])


def test_numbers_are_chosen_on_the_validation_set(
    trained: Path, evaluate: Run, tmp_path: Path, tuned: tuple[str, ...], read: Any
) -> None:
    chosen = f"knn.datastores={tmp_path}/datastores"
    row = read.rows(evaluate(tmp_path / "run", best(trained), *tuned, chosen))["kNN-MT"]
    assert row["k"] <= 8
    (saved,) = (tmp_path / "datastores").glob("*/tuning/*.json")
    stamp = saved.stat().st_mtime_ns
    again = read.rows(evaluate(tmp_path / "again", best(trained), *tuned, chosen))["kNN-MT"]
    assert again == row | {"seconds": again["seconds"]}
    assert saved.stat().st_mtime_ns == stamp


def test_validation_on_request_scores_what_is_tested(
    trained: Path, evaluate: Run, tmp_path: Path, given: tuple[str, ...], read: Any
) -> None:
    evaluate(
        tmp_path, best(trained), *given, f"knn.directory={trained}/datastore", "logger=csv",
        "validate=true", "module.bleu_every=5", "data.test=valid", "decoding=greedy",
        "data.bleu_tokenizer=char",
    )  # fmt: skip
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        logged = {k: float(v) for row in csv.DictReader(file) for k, v in row.items() if v}
    rows = read.rows(tmp_path)
    assert logged["val_bleu"] == pytest.approx(rows["kNN-MT"]["bleu"], abs=1e-4)
    assert abs(rows["kNN-MT"]["bleu"] - rows["NMT"]["bleu"]) > 1  # so it was with retrieval
    for method, row in rows.items():
        assert logged[f"test_bleu/{method}"] == row["bleu"]
        assert "tok:char|" in row["bleu_signature"]


@pytest.mark.parametrize(
    ("choice", "method"),
    [("adaptive", "AK-MT"), ("adaptive_knnbox", "AK-MT"), ("robust", "robust kNN-MT")],
)
def test_a_network_is_trained_on_the_validation_set(
    trained: Path, evaluate: Run, tmp_path: Path, read: Any, choice: str, method: str
) -> None:
    options = (
        *(f"knn={choice}", "index=flat", f"knn.datastores={tmp_path}/datastores"),
        *("knn.max_neighbours=4", "knn.trainer.max_updates=30"),
    )
    row = read.rows(evaluate(tmp_path / "run", best(trained), *options))[method]
    assert row["k"] == 4
    assert row["temperature"] > 0
    assert "knn_weight" not in row
    assert row["combiner_parameters"] > 4 * 32
    again = read.rows(evaluate(tmp_path / "again", best(trained), *options))[method]
    assert again == row | {"seconds": again["seconds"]}, "of the training, too"


@pytest.mark.parametrize(
    ("index", "described"),
    [
        (("index=faiss", "index.factory=Flat", "index.parameters=''"), "Flat"),
        (("index=auto",), "exact"),
    ],
    ids=["faiss", "auto"],
)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_every_index_and_metric_works(
    trained: Path, evaluate: Run, tmp_path: Path, given: tuple[str, ...], read: Any,
    index: tuple[str, ...], described: str, metric: str,
) -> None:  # fmt: skip
    shutil.copytree(trained / "datastore", tmp_path / "datastore")
    folder = evaluate(
        tmp_path, best(trained), *given, *index,
        f"knn.metric={metric}", f"knn.directory={tmp_path}/datastore",
    )  # fmt: skip
    row = read.rows(folder)["kNN-MT"]
    assert row["metric"] == metric
    assert described in row["index"]
    assert row["recall_at_k"] > 0.99
    if metric == "l2":
        assert read.translations(folder) == read.translations(trained)


def test_other_test_files_have_their_own_rows(
    trained: Path, evaluate: Run, tmp_path: Path, words: Path, read: Any
) -> None:
    for lang in ("pt", "en"):
        lines = (words / f"test.{lang}").read_text().splitlines(keepends=True)
        (tmp_path / f"few.{lang}").write_text("".join(lines[:7]))
    folder = evaluate(tmp_path / "run", best(trained), f"data.test={tmp_path}/few")
    assert read.rows(folder)["NMT"]["test_set"] == "words.pt-en/few"
    assert read.translations(folder)["NMT"] == read.translations(trained)["NMT"][:7]


def test_several_test_sets_and_retrieval_alone(
    trained: Path, evaluate: Run, tmp_path: Path, words: Path, given: tuple[str, ...]
) -> None:
    for lang in ("pt", "en"):
        lines = (words / f"test.{lang}").read_text().splitlines(keepends=True)
        (tmp_path / f"few.{lang}").write_text("".join(lines[:7]))
    store = f"knn.directory={trained}/datastore"
    other = f"+data.also_test.other={tmp_path}/few"
    folder = evaluate(
        tmp_path / "run", best(trained), *given, store, other, "test_without_retrieval=false"
    )
    rows = json.loads((folder / "results.json").read_text())
    assert [(row["method"], row["test_set"]) for row in rows] == [
        ("kNN-MT", "words.pt-en/test"),
        ("kNN-MT", "other"),
    ]
    whole = (folder / "hypotheses.words.pt-en-test.kNN-MT.txt").read_text().splitlines()
    assert (folder / "hypotheses.other.kNN-MT.txt").read_text().splitlines() == whole[:7]


def test_the_text_decides_which_datastore_is_used(
    trained: Path, evaluate: Run, tmp_path: Path, given: tuple[str, ...], words: Path
) -> None:
    other = shutil.copytree(words, tmp_path / "other")
    for lang in ("pt", "en"):
        lines = (other / f"train.{lang}").read_text().splitlines(keepends=True)
        (other / f"train.{lang}").write_text("".join(lines[:100]))
    stores = tmp_path / "datastores"
    for root in (words, other, words):
        options = (best(trained), *given, f"knn.datastores={stores}", f"data.root={root}")
        evaluate(tmp_path / "run", *options)
    names = sorted(folder.name.split("-")[0] for folder in stores.iterdir())
    assert names == ["other.pt", "words.pt"]


def test_another_text_of_the_same_name_leaves_no_old_rows(
    trained: Path, evaluate: Run, tmp_path: Path, words: Path, given: tuple[str, ...], read: Any
) -> None:
    other = shutil.copytree(words, tmp_path / "words")
    store = f"knn.directory={trained}/datastore"
    evaluate(tmp_path / "run", best(trained), *given, store)
    before = read.rows(tmp_path / "run")
    lines = (other / "test.en").read_text().splitlines(keepends=True)
    (other / "test.en").write_text("".join(["house\n", *lines[1:]]))
    evaluate(tmp_path / "run", best(trained), f"data.root={other}")
    (row,) = read.rows(tmp_path / "run").values()
    assert row["test_set"] == before["NMT"]["test_set"]
    assert row["text_digest"] != before["NMT"]["text_digest"]
    assert read.translations(tmp_path / "run").keys() == {"NMT"}


def test_a_wrong_datastore_and_damaged_results_are_found_before_decoding(
    trained: Path, train: Run, mistake: Callable[..., str], given: tuple[str, ...], tmp_path: Path
) -> None:
    other = train(tmp_path / "other", "trainer.max_epochs=1", "test=false", "seed=2")
    store = f"knn.directory={trained}/datastore"
    assert "fingerprint" in mistake(best(other), *given, store, config="evaluate")
    assert not list((tmp_path / "run").glob("hypotheses*"))
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "results.json").write_text("[{]")
    assert "results.json" in mistake(best(trained), config="evaluate")
    assert "results.json" in mistake("trainer.max_epochs=1")  # nor is anything trained
    assert not list((tmp_path / "run").glob("*s.*.txt")) + list((tmp_path / "run").glob("check*"))


@pytest.mark.slow
def test_ranks_without_a_batch_wait_for_the_others(
    trained: Path, start: Callable[..., Any], evaluate: Run, tmp_path: Path, read: Any
) -> None:
    few = ("data.test=valid", "data.eval_max_tokens=4000", "validate=true", "logger=csv")
    three = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3")
    answered = start("evaluate", tmp_path / "three", best(trained), *few, *three)
    assert answered.returncode == 0, answered.stderr
    evaluate(tmp_path / "one", best(trained), *few)
    assert read.translations(tmp_path / "three") == read.translations(tmp_path / "one")
    logged = [
        (tmp_path / name / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[:2]
        for name in ("three", "one")
    ]
    for values in zip(*(csv.DictReader(lines) for lines in logged), strict=True):
        three_ranks, one = ({k: float(v) for k, v in row.items() if v} for row in values)
        assert three_ranks["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
        assert three_ranks["val_bleu"] == pytest.approx(one["val_bleu"], abs=1e-4)


@pytest.mark.slow
def test_the_command_gives_what_train_gave(
    trained: Path, start: Callable[..., Any], tmp_path: Path, given: tuple[str, ...], read: Any
) -> None:
    store = f"knn.directory={trained}/datastore"
    answered = start("evaluate", tmp_path, best(trained), *given, store)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.count("│ kNN-MT │") == 1
    assert answered.stderr == ""
    assert read.translations(tmp_path) == read.translations(trained)

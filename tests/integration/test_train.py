"""train.py on toy text: what it leaves behind, and what a second start does."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_knnmt import load_pretrained
from lightning_knnmt.retrieval import Datastore, fingerprint

ABOUT_EVERY_ROW = {
    *("method", "test_set", "bleu", "bleu_signature", "chrf", "chrf_signature"),
    *("sentences", "target_tokens", "seconds", "text_digest", "model_digest", "decoding"),
    "bleu_tokenizer",
}
ABOUT_KNN = {
    *("k", "knn_weight", "temperature", "metric", "index", "recall_at_k"),
    *("datastore_entries", "datastore_bytes", "datastore_digest"),
}
Run = Callable[..., Path]


def metrics(folder: Path, version: int = 0) -> list[dict[str, str]]:
    with (folder / "logs" / f"version_{version}" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def curve(folder: Path, version: int = 0, name: str = "train_loss") -> dict[int, str]:
    """A metric as it was written, by step."""
    return {int(row["step"]): row[name] for row in metrics(folder, version) if row[name]}


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def manifest_of(folder: Path) -> Any:
    return Datastore.open(folder).manifest


def test_a_run_leaves_checkpoints_metrics_results_and_translations(trained: Path) -> None:
    names = {path.name for path in (trained / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt"}
    losses = [float(value) for value in curve(trained).values()]
    assert len(losses) == 64
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert len(curve(trained, name="val_loss")) == len(curve(trained, name="val_bleu")) == 4
    results = json.loads((trained / "results.json").read_text())
    assert [row["method"] for row in results] == ["NMT", "kNN-MT"]
    assert results[0].keys() == ABOUT_EVERY_ROW
    assert results[1].keys() == ABOUT_EVERY_ROW | ABOUT_KNN
    assert 0 < results[0]["bleu"] < results[1]["bleu"] <= 100
    for method in ("NMT", "kNN-MT"):
        path = trained / f"hypotheses.words.pt-en-test.{method}.txt"
        assert len(path.read_text().splitlines()) == 40


def test_given_numbers_are_kept(trained: Path) -> None:
    row = json.loads((trained / "results.json").read_text())[1]
    assert (row["k"], row["knn_weight"], row["temperature"]) == (4, 0.7, 1.5)
    assert row["recall_at_k"] == 1
    assert not (trained / "datastore" / "tuning").exists()


def test_the_datastore_holds_the_best_weights_keys(trained: Path) -> None:
    model, tokenizer = load_pretrained(trained / "checkpoints" / "best.ckpt")
    manifest = manifest_of(trained / "datastore")
    assert manifest.model_fingerprint == fingerprint(model)
    assert manifest.tokenizer_digest == tokenizer.digest


def test_a_folder_with_a_run_is_not_written_over(
    trained: Path, mistake: Callable[..., str]
) -> None:
    before = (trained / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    said = mistake(folder=trained)
    assert all(fact in said for fact in (str(trained), "resume=true", "name="))
    assert (trained / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


@pytest.mark.parametrize("more", [(), ("trainer.accumulate_grad_batches=2",)], ids=str)
def test_a_resumed_run_is_an_uninterrupted_one(
    train: Run, tmp_path: Path, more: tuple[str, ...]
) -> None:
    whole = train(tmp_path / "whole", "test=false", "trainer.max_epochs=3", *more)
    parts = train(tmp_path / "parts", "test=false", "trainer.max_epochs=1", *more)
    train(parts, "test=false", "trainer.max_epochs=3", "resume=true", *more)
    for name in ("train_loss", "lr-Adam", "val_loss", "val_bleu"):
        joined = curve(parts, 0, name) | curve(parts, 1, name)
        assert joined == curve(whole, name=name), name
    assert len(set(curve(whole).values())) == (24 if more else 48)
    one, other = (weights(folder / "checkpoints" / "last.ckpt") for folder in (whole, parts))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    both_best = [(f / "checkpoints" / "best.ckpt") for f in (whole, parts)]
    one, other = map(weights, both_best)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_callback_that_is_null_is_left_out(train: Run, tmp_path: Path) -> None:
    off = [f"callbacks.{name}=null" for name in ("early_stopping", "learning_rate", "best")]
    train(tmp_path, "test=false", "trainer.max_steps=1", "module.bleu_every=0", *off)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert "lr-Adam" not in metrics(tmp_path)[0]


def test_resuming_a_finished_run_only_tests_it(train: Run, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", "trainer.max_epochs=1")
    first = (folder / "hypotheses.words.pt-en-test.NMT.txt").read_text()
    last = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    (folder / "results.json").unlink()
    train(folder, "trainer.max_epochs=1", "resume=true")
    assert (folder / "results.json").exists()
    assert (folder / "hypotheses.words.pt-en-test.NMT.txt").read_text() == first
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == last


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_another_precision_works_and_has_its_own_fingerprint(
    train: Run, trained: Path, tmp_path: Path, given: tuple[str, ...], precision: str
) -> None:
    store = f"knn.directory={tmp_path}/datastore"
    train(tmp_path, *given, store, f"trainer.precision={precision}", "trainer.max_epochs=4")
    losses = [float(value) for value in curve(tmp_path).values()]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    model, _ = load_pretrained(tmp_path / "checkpoints" / "best.ckpt")
    made = manifest_of(tmp_path / "datastore").model_fingerprint
    model = model.bfloat16() if precision == "bf16-true" else model  # as Lightning converts it
    assert made == fingerprint(model, precision) != fingerprint(model)


def test_a_pretrained_model_trains_on_and_keeps_its_tokenizer(
    train: Run, trained: Path, tmp_path: Path, composed: Callable[..., Any],
    entry_point: ModuleType,
) -> None:  # fmt: skip
    config = composed(
        "train",
        tmp_path / "tuned",
        "model=pretrained",
        f"model.path={trained}/checkpoints/best.ckpt",
        "trainer.max_epochs=1",
        "data.vocab_size=30",  # of no effect: the model brings its own
        "test=false",
    )
    entry_point.run(config)
    before = load_pretrained(trained / "checkpoints" / "best.ckpt")
    after = load_pretrained(tmp_path / "tuned" / "checkpoints" / "best.ckpt")
    assert after.tokenizer.digest == before.tokenizer.digest
    assert after.model.config == before.model.config
    assert fingerprint(after.model) != fingerprint(before.model)


# The command line


def test_nothing_asked_for_is_the_demo(entry_point: ModuleType) -> None:
    assert entry_point.with_demo(["train.py"]) == ["train.py", "experiment=demo"]
    asked = ["train.py", "--help"]
    assert entry_point.with_demo(asked) == asked


def test_the_demo_is_what_the_issue_says(start: Callable[..., Any]) -> None:
    shown = start("train", None, "experiment=demo", "--cfg", "job").stdout
    for line in (
        "name: bergamot_pt_en",
        "name: smarthome_pt_en",
        "name: demo",
        "fit: false",
        "tune: true",
        "_target_: lightning_knnmt.retrieval.AutoChoice",
    ):
        assert line in shown


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_help_is_quick_and_lists_the_choices(script: str, start: Callable[..., Any]) -> None:
    answered = start(script, None, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert answered.returncode == 0
    choices = next(line for line in answered.stdout.splitlines() if line.startswith("knn: "))
    assert {"adaptive", "fixed", "none", "robust"} <= {*choices.replace(",", "").split()}
    assert "root: ???" in answered.stdout
    imported = {line.split("|")[-1].strip() for line in answered.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "pytorch_lightning", "faiss"}


@pytest.mark.slow
def test_the_command_prints_a_readable_report(start: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "a folder with a long name so that its path is longer than a line of 80"
    answered = start("train", folder, "trainer.max_epochs=1", "knn=fixed", "index=flat")
    assert answered.returncode == 0, answered.stderr
    printed = answered.stdout + answered.stderr
    assert f": {folder}\n" in answered.stdout
    assert answered.stdout.count("│ kNN-MT │") == 1
    noises = ("Warning", "GPU available", "litlogger", "\x1b[", "\r", "deprecated", "`", "FLOPs")
    for noise in (*noises, "_bleu ", "v_num"):
        assert noise not in printed


@pytest.mark.slow
def test_several_runs_in_one_command(
    start: Callable[..., Any], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = command("train", tmp_path, "seed=1,2", "trainer.max_epochs=1")
    answered = start("train", None, "-m", *arguments)
    assert answered.returncode == 0, answered.stderr
    for job in ("0", "1"):
        assert (tmp_path / job / "results.json").exists()
    one, other = (weights(tmp_path / job / "checkpoints" / "best.ckpt") for job in ("0", "1"))
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_wandb_works_without_an_account_and_keeps_config_metrics_and_results(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    wandb_run: Callable[[Path], dict[str, list[Any]]],
) -> None:  # fmt: skip
    monkeypatch.delenv("WANDB_MODE", raising=False)
    overrides = ("logger=wandb", "trainer.max_epochs=1", "name=words")
    answered = start("train", tmp_path, *overrides, WANDB_API_KEY="")
    assert answered.returncode == 0, answered.stderr
    kept = wandb_run(tmp_path)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert (len(kept["train_loss"]), len(kept["val_bleu"])) == (16, 1)
    assert kept["test_bleu/NMT"] == [row["bleu"]]
    assert kept["model"][0]["encoder_ffn_dim"] == 64
    assert kept["logger"][0]["name"] == "words"  # resolved
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/results_*.table.json")
    assert json.loads(table.read_text())["data"][0][0] == "NMT"

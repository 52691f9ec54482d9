"""Runs that are resumed, swept over, tried out (debug) and that fail: what their folders hold."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from safetensors import safe_open

Run = Callable[..., Path]
Mistake = Callable[..., str]
SHORT = ("test=false", "module.bleu_every=0", "trainer.max_epochs=-1")


@pytest.fixture(scope="module")
def started(train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two steps; tests copy it."""
    return train(tmp_path_factory.mktemp("runs") / "started", *SHORT, "trainer.max_steps=2")


@pytest.fixture
def stopped(started: Path, tmp_path: Path) -> Path:
    """The same training, moved."""
    return Path(shutil.copytree(started, tmp_path / "stopped"))


def recorded(folder: Path, name: str = "config.yaml") -> Any:
    return yaml.safe_load((folder / ".hydra" / name).read_text())


@pytest.mark.parametrize(
    ("override", "both"),
    [
        ("module.optimizer.lr=1e-6", ("module.optimizer.lr", "0.005", "1e-06")),
        ("data.max_tokens=300", ("data.max_tokens", "400", "300")),
        ("data.vocab_size=38", ("data.vocab_size", "40", "38")),
        ("model.model_dim=48", ("model.model_dim", "32", "48")),
        ("trainer.accumulate_grad_batches=2", ("trainer.accumulate_grad_batches", "1", "2")),
        ("module=full", ("module._target_", "NMTModule", "FullFineTuner")),
        ("seed=2", ("seed", "1", "2")),
    ],
)
def test_another_optimisation_is_rejected_with_both_values(
    mistake: Mistake, stopped: Path, override: str, both: tuple[str, ...]
) -> None:
    before = recorded(stopped)
    said = mistake(*SHORT, override, "trainer.max_steps=4", "resume=true", folder=stopped)
    assert all(each in said for each in both)
    assert recorded(stopped) == before


def test_settings_that_may_change_are_applied_and_recorded(train: Run, stopped: Path) -> None:
    train(stopped, *SHORT, "trainer.max_steps=4", "trainer.log_every_n_steps=2", "resume=true")
    config = recorded(stopped)
    assert (config["trainer"]["max_steps"], config["trainer"]["log_every_n_steps"]) == (4, 2)
    with (stopped / "logs" / "version_1" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == [3]


def test_another_text_is_rejected_and_the_same_text_elsewhere_accepted(
    train: Run, mistake: Mistake, stopped: Path, words: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(words, tmp_path / "moved"))
    more = (*SHORT, "resume=true", f"data.root={moved}")
    train(stopped, *more, "trainer.max_steps=3")
    for lang in ("pt", "en"):
        lines = (moved / f"train.{lang}").read_text().splitlines(keepends=True)
        (moved / f"train.{lang}").write_text("".join(lines[1:] + lines[:1]))
    # The vocabulary that is trained on the text is another one too, and is compared first.
    assert "digest" in mistake(*more, "trainer.max_steps=4", folder=stopped)


def test_resuming_what_is_finished_says_so(
    train: Run, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lightning_knnmt"):
        train(stopped, *SHORT, "trainer.max_steps=2", "resume=true")
    assert any("trainer.max_steps" in message for message in caplog.messages)


def test_a_training_needs_no_logger(train: Run, tmp_path: Path) -> None:
    train(tmp_path, *SHORT, "trainer.max_steps=1", "logger=none")
    assert not (tmp_path / "logs").exists()
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_an_evaluation_keeps_the_trainings_record(
    evaluate: Run, trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))  # other tests use the original
    before = recorded(folder)
    evaluate(folder, f"model.path={folder}")
    assert recorded(folder) == before
    assert recorded(folder, "evaluate.yaml")["fit"] is False


def test_a_tiny_try_goes_through_everything(
    train: Run, tmp_path: Path, given: tuple[str, ...], read: Any
) -> None:
    folder = train(tmp_path, "debug=fast", *given, f"knn.directory={tmp_path}/datastore")
    assert [row["sentences"] for row in read.rows(folder).values()] == [40, 40]
    assert recorded(folder)["data"]["max_pairs"] == 64


def test_one_batch_can_be_learnt_by_heart(train: Run, tmp_path: Path) -> None:
    train(tmp_path, "debug=overfit", "model.dropout=0")
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert losses[-1] < 0.1 < losses[0]


def test_adapters_are_written_alone(
    entry_point: ModuleType, composed: Callable[..., Any], evaluate: Run, trained: Path,
    tmp_path: Path, read: Any,
) -> None:  # fmt: skip
    base = ("model=pretrained", f"model.path={trained}", "trainer.max_epochs=1")
    more = ("module=adapter", "module.bottleneck_dim=4", "module.optimizer.lr=0.01")
    folder = tmp_path / "run"
    entry_point.run(composed("train", folder, *base, *more, "module.bleu_every=0"))
    file = folder / "adapters.safetensors"
    with safe_open(file, framework="pt") as tensors:
        assert all(".adapter." in name for name in tensors.keys())  # noqa: SIM118
    evaluate(tmp_path / "again", f"model.path={trained}", f"model.adapters={file}")
    again, tuned = read.translations(tmp_path / "again"), read.translations(folder)
    assert again["NMT"] == tuned["adapters"]


def test_a_failed_command_leaves_no_folder(mistake: Mistake, tmp_path: Path, words: Path) -> None:
    (tmp_path / "run").mkdir()  # as Hydra does
    assert "-1" in mistake(*SHORT, "module.optimizer.lr=-1")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_several_runs_end_with_a_table(
    start: Callable[..., Any], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = command("train", tmp_path / "sweep", "trainer.max_epochs=2", "logger=none")
    answered = start("train", None, "-m", *arguments, "module.optimizer.lr=1e-3,-1,5e-3")
    assert answered.returncode == 1  # one of them failed
    assert "Traceback" not in answered.stderr
    table = [line.split() for line in answered.stdout.splitlines() if line.startswith("│")]
    rows = {row[1]: row for row in table if row[1].isdigit()}
    assert rows["0"][3] == "module.optimizer.lr=0.001"
    assert rows["2"][3] == "module.optimizer.lr=0.005"
    assert float(rows["2"][5]) < float(rows["0"][5])  # val_loss
    assert rows["1"][3] == "error:"
    folders = {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert folders == {"0", "2"}
    assert "parameters train" in (tmp_path / "sweep" / "0" / "train.log").read_text()

"""Two processes on one machine (gloo) give what one process gives, byte for byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")

Run = Callable[..., Path]
Start = Callable[..., Any]


def best(folder: Path) -> str:
    return f"model.path={folder}/checkpoints/best.ckpt"


def without_time(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {method: row | {"seconds": None} for method, row in rows.items()}


def test_two_ranks_train_build_and_test_like_one(
    start: Start, evaluate: Run, tmp_path: Path, tuned: tuple[str, ...], read: Any
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    answered = start(
        "train", two, *TWO, *tuned, f"knn.directory={two}/datastore", "trainer.max_epochs=4"
    )
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.count("│ kNN-MT │") == 1, "each rank printed the results"
    assert answered.stdout.count(f": {two}\n") == 1
    assert "Warning" not in answered.stderr
    evaluate(one, best(two), *tuned, f"knn.directory={one}/datastore")
    assert read.datastore(one / "datastore") == read.datastore(two / "datastore")
    assert read.translations(one) == read.translations(two)
    assert without_time(read.rows(one)) == without_time(read.rows(two))
    assert read.rows(two)["kNN-MT"]["bleu"] > 0


def test_two_ranks_evaluate_like_one(
    start: Start, trained: Path, tmp_path: Path, given: tuple[str, ...], read: Any
) -> None:
    store = f"knn.directory={tmp_path}/datastore"
    answered = start("evaluate", tmp_path / "two", best(trained), *TWO, *given, store)
    assert answered.returncode == 0, answered.stderr
    assert read.datastore(tmp_path / "datastore") == read.datastore(trained / "datastore")
    assert read.translations(tmp_path / "two") == read.translations(trained)
    assert without_time(read.rows(tmp_path / "two")) == without_time(read.rows(trained))


def test_a_resumed_run_of_two_ranks_is_an_uninterrupted_one(start: Start, tmp_path: Path) -> None:
    import torch

    for folder, epochs, resume in (
        ("whole", 2, "false"),
        ("parts", 1, "false"),
        ("parts", 2, "true"),
    ):
        answered = start(
            "train", tmp_path / folder, *TWO, "test=false",
            f"trainer.max_epochs={epochs}", f"resume={resume}",
        )  # fmt: skip
        assert answered.returncode == 0, answered.stderr
    one, other = (
        torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in ("whole", "parts")
    )
    assert one["global_step"] == other["global_step"] == 16
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name


def test_more_ranks_than_batches_train_and_validate(start: Start, tmp_path: Path) -> None:
    """One batch of each text: Lightning alone would wait for ever on the ranks without one."""
    import torch

    few = ("data.max_pairs=8", "data.max_tokens=4000", "data.eval_max_tokens=4000")
    answered = start(
        "train", tmp_path, *TWO, "trainer.devices=3", *few, "trainer.max_epochs=2", "test=false"
    )
    assert answered.returncode == 0, answered.stderr
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["val_loss"] > 0
    assert report["val_bleu"] is not None


def test_when_rank_zero_fails_the_other_stops_without_a_word(
    start: Start, trained: Path, tmp_path: Path, given: tuple[str, ...], sentence: Any
) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = f"knn.directory={tmp_path}/file/datastore"
    answered = start("evaluate", tmp_path / "run", best(trained), *TWO, *given, store)
    assert answered.returncode == 1
    assert str(tmp_path / "file") in sentence(answered.stderr)
    assert answered.stderr.count("error: ") == 1
    assert "Traceback" not in answered.stderr

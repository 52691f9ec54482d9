"""The table at the end of a sweep."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lightning_knnmt.evaluation.sweep import print_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> dict[Path, str]:
    """Two runs that ended, of which one has no BLEU, and one that failed."""
    runs = {tmp_path / str(number): "" for number in range(3)}
    for number, rate in enumerate(("1e-3", "3e-3")):
        folder = tmp_path / str(number)
        (folder / ".hydra").mkdir(parents=True)
        overrides = f"[data=text, module.optimizer.lr={rate}, seed=1]"
        (folder / ".hydra" / "overrides.yaml").write_text(overrides)
        scores = {"val_loss": 2.5 - number, "val_bleu": None if number else 31.25}
        (folder / "training.json").write_text(json.dumps({"steps": 3, **scores}))
    runs[tmp_path / "2"] = "error: the learning rate is -1"
    return runs


def printed(runs: dict[Path, str]) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    print_sweep(console, runs)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_line_says_what_is_different_in_a_run_and_its_scores(sweep: dict[Path, str]) -> None:
    lines = printed(sweep)
    header, first, second, failed = (
        next(line.split() for line in lines if key in line)
        for key in ("val_loss", "lr=1e-3", "lr=3e-3", "error")
    )
    assert header[1:] == ["run", "┃", "settings", "┃", "val_loss", "┃", "val_bleu", "┃"]
    assert first == ["│", "0", "│", "module.optimizer.lr=1e-3", "│", "2.500", "│", "31.2", "│"]
    assert second == ["│", "1", "│", "module.optimizer.lr=3e-3", "│", "1.500", "│", "│"]
    assert failed[:5] == ["│", "2", "│", "error:", "the"]


def test_a_single_run_shows_all_its_settings(sweep: dict[Path, str]) -> None:
    only = next(iter(sweep))
    assert any("seed=1" in line for line in printed({only: ""}))

"""The results of a sweep, several runs of one command (-m), in one table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lightning_knnmt.evaluation.results import RESULTS_NAME, read_results

COST_NAME = "training.json"


def print_sweep(console: Console, runs: Mapping[Path, str]) -> None:
    """Prints a line for each run: what is different in it, validation scores and test BLEU.

    Args:
        console: Where to print.
        runs: The runs' folders, and why a run failed; empty if it did not.
    """
    overrides = {folder: _overrides(folder) for folder in runs}
    kept = [each for each in overrides.values() if each]
    common = set.intersection(*map(set, kept)) if len(kept) > 1 else set()
    scores = {folder: _scores(folder) for folder in runs}
    columns = list(dict.fromkeys(name for each in scores.values() for name in each))
    best = {
        name: (min if name == "val_loss" else max)(
            each[name] for each in scores.values() if name in each
        )
        for name in columns
    }
    table = Table(title=f"{len(runs)} runs in {_parent(runs)}")
    table.add_column("run")
    table.add_column("settings", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    for folder, error in runs.items():
        told = error or " ".join(each for each in overrides[folder] if each not in common)
        found = [_cell(name, scores[folder].get(name), best[name]) for name in columns]
        table.add_row(folder.name, told, *found)
    console.print(table)


def _overrides(folder: Path) -> list[str]:
    path = folder / ".hydra" / "overrides.yaml"
    return [str(each) for each in yaml.safe_load(path.read_text())] if path.exists() else []


def _scores(folder: Path) -> dict[str, float]:
    """The best validation's scores and BLEU on the test sets, as far as there are any."""
    scores: dict[str, float] = {}
    if (folder / COST_NAME).exists():
        cost: dict[str, Any] = json.loads((folder / COST_NAME).read_text())
        for name in ("val_loss", "val_bleu"):
            if cost.get(name) is not None:
                scores[name] = cost[name]
    if (folder / RESULTS_NAME).exists():
        rows = read_results(folder)
        several = len({row.test_set for row in rows}) > 1
        for row in rows:
            where = f" on {row.test_set}" if several else ""
            scores[f"BLEU {row.method}{where}"] = row.bleu
    return scores


def _cell(name: str, value: float | None, best: float) -> str:
    if value is None:
        return ""
    text = f"{value:.3f}" if name == "val_loss" else f"{value:.1f}"
    return f"[bold]{text}[/bold]" if value == best else text


def _parent(runs: Mapping[Path, str]) -> Path:
    return next(iter(runs)).parent

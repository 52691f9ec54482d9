"""Runs of the sweeps of sweeps/, started by W&B's own agent: only its server is left out."""

import json
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from wandb.wandb_agent import Agent

ROOT = Path(__file__).parents[2]


def drawn(parameter: dict[str, Any], rng: random.Random) -> Any:
    """A value of a parameter, as the server suggests one."""
    if "values" in parameter:
        return rng.choice(parameter["values"])
    least, largest = parameter["min"], parameter["max"]
    if parameter["distribution"] == "uniform":
        return rng.uniform(least, largest)
    return math.exp(rng.uniform(math.log(least), math.log(largest)))


def started_by_the_agent(sweep: dict[str, Any], run_id: str, suggestion: dict[str, Any]) -> int:
    """What Agent does when the server answers with a run; returns the command's exit status."""
    agent = Agent(api=SimpleNamespace(), queue=None)
    agent._sweep_command = sweep["command"]
    agent._command_run(  # type: ignore[no-untyped-call]
        {
            "run_id": run_id,
            "program": sweep["program"],
            "args": {name: {"value": value} for name, value in suggestion.items()},
        }
    )
    process = agent._run_processes[run_id]._popen
    status: int = process.wait(timeout=150)
    return status


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "adapter"])
def test_the_agents_commands_run_and_log_the_metric(
    name: str, trained: Path, command: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, wandb_run: Callable[[Path], dict[str, list[Any]]],
) -> None:  # fmt: skip
    toy = command(
        "evaluate", tmp_path / "${name}", "model=pretrained", "index=flat",
        f"model.path={trained}/checkpoints/best.ckpt", "trainer.max_epochs=1",
        f"paths.cache={tmp_path}/cache",
    )  # fmt: skip
    sweep = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    before_drawn = sweep["command"].index("${args_no_hyphens}")
    sweep["command"][before_drawn:before_drawn] = toy
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the agent writes into it
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "agent"))
    rng = random.Random(3)
    losses = set()
    for run_id in ("first", "second"):
        suggestion = {key: drawn(parameter, rng) for key, parameter in sweep["parameters"].items()}
        assert started_by_the_agent(sweep, run_id, suggestion) == 0
        folder = tmp_path / f"sweep_{run_id}"
        kept = wandb_run(folder)
        assert 0 <= kept[sweep["metric"]["name"]][-1] <= 100
        losses.add(kept["val_loss"][-1])
        rows = json.loads((folder / "results.json").read_text())
        assert kept["test_bleu/NMT"] == [rows[0]["bleu"]]
        group = name if name == "knn" else "module"
        for key, value in suggestion.items():
            assert kept[key] == [value]  # the agent's word on it
            logged = kept[group][0]
            for part in key.split(".")[1:]:
                logged = logged[part]
            assert logged == value  # and what the run did
        if name == "knn":
            assert (rows[1]["k"], rows[1]["temperature"]) == (
                suggestion["knn.num_neighbours"],
                suggestion["knn.temperature"],
            )
    assert len(losses) == 2  # what was swept reaches validation

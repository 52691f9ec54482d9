"""The files of sweeps/ are sweeps of Weights & Biases whose every command Hydra accepts."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
# https://docs.wandb.ai/guides/sweeps/sweep-config-keys, which wandb itself checks on the server.
KEYS = {"name", "project", "program", "method", "metric", "run_cap", "parameters", "command"}
MACROS = {f"${{{name}}}" for name in ("env", "program", "args_no_hyphens")}

each_sweep = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    sweep: dict[str, Any] = yaml.safe_load(path.read_text())
    return sweep


def ends(parameter: dict[str, Any]) -> list[Any]:
    """All values, or the ends of a range."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def composed(sweep: dict[str, Any], *overrides: str) -> DictConfig:
    fixed = [word for word in sweep["command"] if "=" in word]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*fixed, *overrides])


def test_there_are_the_promised_sweeps() -> None:
    assert [path.stem for path in FILES] == ["adapter", "knn"]


@each_sweep
def test_a_sweep_has_the_keys_and_words_that_wandb_knows(path: Path) -> None:
    sweep = read(path)
    assert sweep.keys() == KEYS
    assert sweep["method"] == "bayes"
    assert sweep["metric"] == {"name": "val_bleu", "goal": "maximize"}
    assert sweep["run_cap"] > 1
    assert (ROOT / sweep["program"]).is_file()
    for name, parameter in sweep["parameters"].items():
        kinds = ({"values"}, {"distribution", "min", "max"})
        assert set(parameter) in kinds, name
        if "distribution" in parameter:
            assert parameter["distribution"] in ("uniform", "log_uniform_values")
            assert 0 < parameter["min"] < parameter["max"]
        else:
            assert len(set(parameter["values"])) > 1
    logger = yaml.safe_load((ROOT / "conf" / "logger" / "wandb.yaml").read_text())
    assert sweep["project"] == logger["project"]


@each_sweep
def test_the_agent_fills_its_own_words_and_leaves_hydras(path: Path) -> None:
    command = read(path)["command"]
    # The agent replaces a word that is one macro; of an unknown one nothing would be left.
    assert {word for word in command if re.fullmatch(r"\$\{.*\}", word)} == MACROS
    assert [command[0], command[2], command[-1]] == ["${env}", "${program}", "${args_no_hyphens}"]
    assert wandb_sweeps.create_sweep_command(list(command)) == command  # no ${envvar:...}


@each_sweep
def test_hydra_accepts_the_least_and_the_largest_values(path: Path) -> None:
    sweep = read(path)
    before = composed(sweep)
    for end in (min, max):
        drawn = {name: end(ends(parameter)) for name, parameter in sweep["parameters"].items()}
        given = {"args": {name: {"value": value} for name, value in drawn.items()}}
        words = wandb_sweeps.create_sweep_command_args(given)["args_no_hyphens"]
        config = composed(sweep, *words)
        for name, value in drawn.items():
            assert OmegaConf.select(config, name) == value
            default = OmegaConf.select(before, name, throw_on_missing=False)
            assert default is None or type(value) is type(default)


@each_sweep
def test_all_runs_of_a_sweep_validate_and_have_folders_of_their_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = composed(read(path))
    assert config.validate
    assert config.name == "sweep_abc123"
    assert config.logger.mode == "online"
    assert config.fit == (path.stem == "adapter")
    if path.stem == "knn":
        assert config.knn.tune is False  # or the swept numbers would be of no effect
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert config.logger.mode == "offline"


@each_sweep
def test_the_head_says_how_to_start_it(path: Path) -> None:
    head = path.read_text().split("name:")[0]
    assert f"wandb sweep sweeps/{path.name}" in head
    assert "wandb agent NAME" in head


@each_sweep
def test_no_setting_is_both_fixed_and_swept(path: Path) -> None:
    sweep = read(path)
    parser = OverridesParser.create()
    fixed = parser.parse_overrides([word for word in sweep["command"] if "=" in word])
    names = [each.key_or_group for each in fixed]
    assert len(set(names)) == len(names)
    assert not {*names} & sweep["parameters"].keys()

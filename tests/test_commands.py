"""The commands in README.md and docs/models.md: all of them compose."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_knnmt.doctor.__main__ import parser

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/models.md")
DOCTOR = ["-m", "lightning_knnmt.doctor"]


def commands_of(page: str) -> Iterator[list[str]]:
    """Arguments of every `python ...` line in a page's blocks of code."""
    for block in re.findall(
        r"^```\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    ):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("python "):
                yield shlex.split(line, comments=True)[1:]


def name_of(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)[:60]


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]
OURS = [(page, c) for page, c in COMMANDS if c[0] in ("train.py", "evaluate.py")]
EXAMINATIONS = [(page, c) for page, c in COMMANDS if c[:2] == DOCTOR]


def test_the_pages_have_commands() -> None:
    found = [sum(page == each for page, _ in OURS) for each in PAGES]
    assert found[0] >= 4
    assert found[1] >= 15
    assert len(EXAMINATIONS) >= 5


@pytest.mark.parametrize(("page", "command"), OURS, ids=name_of)
def test_a_command_composes(page: str, command: list[str]) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(command[0].removesuffix(".py"), command[1:])
    # Hydra fills in the run's folder, a user everything else.
    config.paths.output_dir = "run"
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(("page", "command"), EXAMINATIONS, ids=name_of)
def test_the_doctor_is_called_as_it_can_be(page: str, command: list[str]) -> None:
    assert parser().parse_args(command[2:]).model

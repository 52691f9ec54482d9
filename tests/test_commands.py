"""The commands in README.md and docs/: all of them compose, and all options exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_knnmt import cli
from lightning_knnmt.doctor.__main__ import parser

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/*.md"))))


def lines_of(page: str) -> Iterator[str]:
    """The lines of a page's blocks of commands, continued ones joined."""
    text = (ROOT / page).read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if not language:
            yield from block.replace("\\\n", " ").splitlines()


def commands_of(page: str, program: str) -> Iterator[list[str]]:
    """The arguments of every call of a program, at the head of a line or after a pipe."""
    for line in lines_of(page):
        if found := re.search(rf"(?:^|\| )(?:\.venv/bin/)?{program} ([^<>|]*)", line):
            yield shlex.split(found[1], comments=True)


def name_of(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)[:60]


def overrides_of(command: list[str]) -> list[str]:
    """A command's overrides; of a local sweep (-m), those of its first run."""
    if command[1] != "-m":
        return command[1:]
    return [re.sub(r"=([^,\[{]*),.*", r"=\1", override) for override in command[2:]]


PYTHON = [(page, command) for page in PAGES for command in commands_of(page, "python")]
OURS = [(page, c) for page, c in PYTHON if c[0] in ("train.py", "evaluate.py")]
CONSOLE = [(page, command) for page in PAGES for command in commands_of(page, "lightning-knnmt")]


def test_the_pages_have_commands() -> None:
    found = {page: sum(page == each for each, _ in OURS) for page in PAGES}
    assert found["README.md"] >= 1
    assert found["docs/own-data.md"] >= 4
    assert found["docs/models.md"] >= 15
    assert {command[0] for _, command in CONSOLE} >= {"translate", "explain", "pack", "doctor"}


@pytest.mark.parametrize(("page", "command"), OURS, ids=name_of)
def test_a_command_composes(page: str, command: list[str]) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(command[0].removesuffix(".py"), overrides_of(command))
    # Hydra fills in the run's folder, a user everything else.
    config.paths.output_dir = "run"
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(("page", "command"), CONSOLE, ids=name_of)
def test_a_console_command_is_called_as_it_can_be(page: str, command: list[str]) -> None:
    if command[0] == "study":
        assert (ROOT / command[1]).is_file()
    elif command[0] == "doctor":
        assert parser().parse_args(command[1:]).model
    else:
        assert cli.parser().parse_args(command).command == command[0]

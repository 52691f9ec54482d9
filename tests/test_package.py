"""The package's public face: names that are imported on first use, and the version."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import lightning_knnmt

ROOT = Path(__file__).parents[1]
# Each takes a good part of a second to import.
HEAVY = {"faiss", "numpy", "pytorch_lightning", "sentencepiece", "torch"}


def test_importing_the_package_loads_no_library() -> None:
    code = f"import sys, lightning_knnmt; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", lightning_knnmt.__all__)
def test_a_public_name_exists(name: str) -> None:
    assert getattr(lightning_knnmt, name) is not None
    assert name in dir(lightning_knnmt)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Datastor'"):
        getattr(lightning_knnmt, "Datastor")  # noqa: B009


def test_type_checkers_and_users_see_the_same_names() -> None:
    tree = ast.parse(Path(lightning_knnmt.__file__).read_text())
    declared = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_knnmt.")
        for alias in node.names
    }
    assert declared == lightning_knnmt._MODULES
    assert {*declared, "__version__"} == set(lightning_knnmt.__all__)


def test_the_changelog_has_the_version() -> None:
    assert f"## [{lightning_knnmt.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_on_the_pythons_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    declared = [c.removeprefix(prefix) for c in project["classifiers"] if c.startswith(prefix)]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["ci"]["strategy"]["matrix"]["python-version"] == declared

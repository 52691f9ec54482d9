import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_knnmt.doctor import checks
from lightning_knnmt.doctor.__main__ import main
from lightning_knnmt.pretrained import checkpoint_entry
from lightning_knnmt.retrieval import faiss_index


@pytest.fixture
def checkpoint(healthy: Any, tmp_path: Path) -> Path:
    weights = {f"model.{name}": tensor for name, tensor in healthy.model.state_dict().items()}
    entry = checkpoint_entry(healthy.model, healthy.data.tokenizer)
    torch.save({"state_dict": weights, **entry}, tmp_path / "healthy.ckpt")
    return tmp_path / "healthy.ckpt"


def run(*arguments: object) -> Any:
    """The exit status, or the sentence that ends the program."""
    try:
        return main([*map(str, arguments)])
    except SystemExit as ended:
        return ended.code


def test_it_prints_findings_and_returns_their_verdict(
    healthy: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (checkpoint, "--data", healthy.data.root, "--cache", tmp_path, "--sentences", 10)
    assert run(*given, "--source", "pt", "--target", "en") == 0
    printed = capsys.readouterr().out
    assert "ok      translation     BLEU" in printed
    assert "0 problems" in printed
    assert run(*given, "--source", "en", "--target", "pt") == 1
    assert "PROBLEM direction" in capsys.readouterr().out
    run(*given, "--source", "pt", "--target", "en", "--max-length", 5)
    assert f"gives {400 * 5:,} entries" in capsys.readouterr().out  # no sentence is shorter


def test_a_mistake_ends_in_one_sentence(healthy: Any, checkpoint: Path, tmp_path: Path) -> None:
    given = ("--data", healthy.data.root, "--cache", tmp_path, "--source", "pt", "--target", "en")
    assert "nowhere" in run("nowhere", *given)
    assert str(tmp_path) in run(checkpoint, *given, "--datastore", tmp_path)


def test_options_go_to_the_model(
    healthy: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--data", healthy.data.root, "--cache", tmp_path, "--source", "pt", "--target", "en")
    assert "source_lang" in run(checkpoint, *given, "--model-option", "source_lang=pt")
    for option in ("langue=pt", "source_lang"):
        assert run(checkpoint, *given, "--model-option", option) == 2
        said = capsys.readouterr().err
        assert f"'{option}'" in said
        assert "adapters" in said


def test_help_names_every_option_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for word in ("--datastore", "--temperature", "--sentences", "--model-option", "example:"):
        assert word in printed


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from lightning_knnmt.doctor.__main__ import parser\n"
        "parser().format_help()\n"
        "print([n for n in ('torch', 'numpy', 'rich', 'sacrebleu') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


def test_a_missing_faiss_is_said(
    healthy: Any,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def version_without_faiss(package: str) -> str:
        if package.startswith("faiss"):
            raise metadata.PackageNotFoundError(package)
        return metadata.version(package)

    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    monkeypatch.setattr(faiss_index, "faiss", faiss_index._FaissOnFirstUse())
    monkeypatch.setattr(checks, "version", version_without_faiss)
    given = (checkpoint, "--data", healthy.data.root, "--cache", tmp_path, "--sentences", 10)
    assert run(*given, "--source", "pt", "--target", "en") == 0
    (versions,) = [line for line in capsys.readouterr().out.splitlines() if "torch 2" in line]
    assert versions.startswith("warning")
    assert "faiss" in versions
    assert "index=flat" in versions

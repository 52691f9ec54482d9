import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_knnmt.doctor.__main__ import main
from lightning_knnmt.pretrained import checkpoint_entry


@pytest.fixture
def checkpoint(healthy: Any, tmp_path: Path) -> Path:
    weights = {f"model.{name}": tensor for name, tensor in healthy.model.state_dict().items()}
    entry = checkpoint_entry(healthy.model, healthy.data.tokenizer)
    torch.save({"state_dict": weights, **entry}, tmp_path / "healthy.ckpt")
    return tmp_path / "healthy.ckpt"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """The exit status, or the sentence that ends the program."""
    monkeypatch.setattr(sys, "argv", ["doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_it_prints_findings_and_ends_with_their_verdict(
    healthy: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = (checkpoint, "--data", healthy.data.root, "--cache", tmp_path, "--sentences", 10)
    assert run(monkeypatch, *given, "--source", "pt", "--target", "en") == 0
    printed = capsys.readouterr().out
    assert "ok      translation     BLEU" in printed
    assert "0 problems" in printed
    assert run(monkeypatch, *given, "--source", "en", "--target", "pt") == 1
    assert "PROBLEM direction" in capsys.readouterr().out
    run(monkeypatch, *given, "--source", "pt", "--target", "en", "--max-length", 5)
    assert f"gives {400 * 5:,} entries" in capsys.readouterr().out  # no sentence is shorter


def test_a_mistake_ends_in_one_sentence(
    healthy: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--data", healthy.data.root, "--cache", tmp_path, "--source", "pt", "--target", "en")
    assert "There is nothing at nowhere" in run(monkeypatch, "nowhere", *given)
    said = run(monkeypatch, checkpoint, *given, "--datastore", tmp_path)
    assert "There is no finished datastore" in said


def test_options_go_to_the_model(
    healthy: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ("--data", healthy.data.root, "--cache", tmp_path, "--source", "pt", "--target", "en")
    said = run(monkeypatch, checkpoint, *given, "--model-option", "source_lang=pt")
    assert "source_lang" in said
    assert run(monkeypatch, checkpoint, *given, "--model-option", "langue=pt") == 2
    assert "'langue=pt' is not KEY=VALUE with a KEY of ['adapters'," in capsys.readouterr().err


def test_help_tells_every_option_and_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for word in ("--datastore", "--temperature", "--sentences", "--model-option", "example:"):
        assert word in printed

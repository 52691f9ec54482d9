"""What train.py and evaluate.py leave translates as it was tested."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lightning_knnmt.translator import Translator


def texts(folder: Path, words: Path) -> list[str]:
    """A system's translations of the test set."""
    lines = (words / "test.pt").read_text().splitlines()
    return [each.text for each in Translator.load(folder).translate(lines)]


def test_a_trained_system_translates_as_it_was_tested(
    trained: Path, words: Path, read: Callable[..., object]
) -> None:
    tested = read.translations(trained)  # type: ignore[attr-defined]
    assert texts(trained, words) == tested["kNN-MT"]
    content = yaml.safe_load((trained / "system" / "system.yaml").read_text())
    assert content["model"]["path"].startswith("../checkpoints/")
    assert content["retrieval"]["datastore"]["path"] == "../datastore"


def test_an_evaluated_model_without_retrieval_is_a_system(
    trained: Path,
    words: Path,
    evaluate: Callable[..., Path],
    read: Callable[..., object],
    tmp_path: Path,
) -> None:
    folder = evaluate(tmp_path / "run", f"model.path={trained}/checkpoints/best.ckpt")
    tested = read.translations(folder)  # type: ignore[attr-defined]
    assert texts(folder, words) == tested["NMT"]


def test_a_datastore_is_built_and_left_as_a_system_without_a_test(
    trained: Path,
    words: Path,
    given: tuple[str, ...],
    evaluate: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="lightning_knnmt"):
        folder = evaluate(
            tmp_path / "run",
            *(f"model.path={trained}/checkpoints/best.ckpt", "test=false", *given),
            f"knn.directory={tmp_path}/built",
        )
    assert (tmp_path / "built" / "manifest.json").is_file()
    assert any("translate" in message and "run" in message for message in caplog.messages)
    assert texts(folder, words) == texts(trained, words)

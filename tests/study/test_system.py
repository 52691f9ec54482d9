"""What the analyses of a study are computed from."""

from pathlib import Path

import pytest

from lightning_knnmt.study.plan import Run, StudyError
from lightning_knnmt.study.system import load_system


def test_keys_of_another_layer_cannot_be_analysed(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("knn: {key_layer: ffn_input}\npaths: {}\n")
    run = Run("it", "kNN-MT", "it", (), tmp_path, None)
    with pytest.raises(
        StudyError, match=r"knn.key_layer=ffn_input, but the analyses compare .*del"
    ):
        load_system(run, 10)

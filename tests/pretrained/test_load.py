import re
from pathlib import Path

import pytest

from lightning_knnmt.pretrained import UnknownFormatError, load_pretrained
from lightning_knnmt.pretrained.marian_binary import MarianError


def test_what_was_found_and_what_is_supported_are_said(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"12345")
    cases = {
        tmp_path / "absent": "There is nothing at",
        tmp_path: "is a directory without a known model: it holds weights.npz.",
        tmp_path / "weights.npz": "is a file of 5 bytes in no known format.",
    }
    for path, message in cases.items():
        with pytest.raises(UnknownFormatError, match=re.escape(message)) as error:
            load_pretrained(path)
        assert str(path) in str(error.value)
        assert "Supported are: a checkpoint of train.py" in str(error.value)
        assert "a Bergamot / Firefox Translations model" in str(error.value)


def test_a_recognised_format_is_read_by_its_own_reader(tmp_path: Path) -> None:
    (tmp_path / "model.xxyy.bin").write_bytes(b"short")
    (tmp_path / "vocab.xxyy.spm").write_bytes(b"")
    with pytest.raises(MarianError, match="is damaged or incomplete: the header"):
        load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="leaves no choice of target_lang: leave it out"):
        load_pretrained(tmp_path, target_lang="de")

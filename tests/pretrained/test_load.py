import re
from pathlib import Path

import pytest
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import UnknownFormatError, checkpoint_entry, load_pretrained
from lightning_knnmt.pretrained.marian_binary import MarianError


def test_what_was_found_and_what_is_supported_are_said(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"12345")
    cases = {
        tmp_path / "absent": "nothing at",
        tmp_path: "weights.npz",
        tmp_path / "weights.npz": "5 bytes",
    }
    for path, message in cases.items():
        with pytest.raises(UnknownFormatError, match=re.escape(message)) as error:
            load_pretrained(path)
        assert str(path) in str(error.value)
        for format_ in (".ckpt", "model.*.bin", "config.json", "dict.*.txt"):
            assert format_ in str(error.value)


def test_a_runs_folder_stands_for_its_best_checkpoint(
    tmp_path: Path, tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    run = tmp_path / "outputs" / "demo"
    (run / "checkpoints").mkdir(parents=True)
    weights = {f"model.{name}": tensor for name, tensor in tiny_model.state_dict().items()}
    content = {"state_dict": weights, **checkpoint_entry(tiny_model, toy_datamodule.tokenizer)}
    torch.save(content, run / "checkpoints" / "best.ckpt")
    loaded = load_pretrained(run)
    assert loaded.tokenizer.digest == toy_datamodule.tokenizer.digest
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, tiny_model.state_dict()[name])


@pytest.mark.parametrize("name", ["Helsinki-NLP/opus-mt-de-en", "facebook/m2m100_418M"])
def test_a_name_of_the_hub_is_told_from_a_missing_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownFormatError, match=rf"hf download {name}\b"):
        load_pretrained(name)
    (tmp_path / "outputs").mkdir()
    for missing in ("outputs/demo", "a/b/c", str(tmp_path / "a" / "b")):
        with pytest.raises(UnknownFormatError) as raised:
            load_pretrained(missing)
        assert "download" not in str(raised.value)


def test_a_recognised_format_is_read_by_its_own_reader(tmp_path: Path) -> None:
    (tmp_path / "model.xxyy.bin").write_bytes(b"short")
    (tmp_path / "vocab.xxyy.spm").write_bytes(b"")
    with pytest.raises(MarianError, match="header"):
        load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="target_lang"):
        load_pretrained(tmp_path, target_lang="de")

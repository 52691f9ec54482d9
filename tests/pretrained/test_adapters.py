import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import AdapterError, load_adapters, save_adapters
from lightning_knnmt.retrieval import fingerprint

SOURCE = torch.tensor([[5, 6, 7, 3], [8, 9, 3, 0]])
TARGET = torch.tensor([[2, 9, 8, 7], [2, 6, 5, 4]])


def copy_of(model: Transformer) -> Transformer:
    other = Transformer(**model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture
def adapted(tiny_model: Transformer) -> Transformer:
    model = copy_of(tiny_model)
    model.insert_adapters(5, "ffn", "decoder", init="plain")
    return model


@pytest.fixture
def saved(adapted: Transformer, tmp_path: Path) -> Path:
    save_adapters(adapted, tmp_path / "new" / "a.safetensors")
    return tmp_path / "new" / "a.safetensors"


def test_they_come_back_onto_their_base(
    tiny_model: Transformer, adapted: Transformer, saved: Path
) -> None:
    load_adapters(tiny_model, saved)
    assert tiny_model.config == adapted.config
    assert fingerprint(tiny_model) == fingerprint(adapted)
    with torch.no_grad():
        assert torch.equal(tiny_model(SOURCE, TARGET).hidden, adapted(SOURCE, TARGET).hidden)


def test_loras_updates_come_back_onto_their_base_and_no_other(
    tiny_model: Transformer, tmp_path: Path
) -> None:
    model, path = copy_of(tiny_model), tmp_path / "lora.safetensors"
    model.insert_lora(rank=3, alpha=6)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter)
    save_adapters(model, path)
    assert set(load_file(path)) == set(model.state_dict()) - set(tiny_model.state_dict())
    other = copy_of(tiny_model)
    with torch.no_grad():
        other.encoder_layers[0].attention.output.weight[0, 0] += 1e-3
    assert re.search(r"digest \w{12}\b", refusal(other, path))
    load_adapters(tiny_model, path)
    assert tiny_model.config == model.config
    assert fingerprint(tiny_model) == fingerprint(model)
    with torch.no_grad():
        assert torch.equal(tiny_model(SOURCE, TARGET).hidden, model(SOURCE, TARGET).hidden)
    assert "{'rank': 3, 'alpha': 6.0}" in refusal(model, path)


def test_the_file_holds_nothing_else(adapted: Transformer, saved: Path) -> None:
    tensors = load_file(saved)
    assert sum(t.numel() for t in tensors.values()) == 2 * 24 * 5 + 5 + 24
    assert saved.stat().st_size < 4 * (2 * 24 * 5 + 5 + 24) + 2000
    assert [each.name for each in saved.parent.iterdir()] == [saved.name]


def test_an_untied_copy_is_the_same_base(
    tiny_model: Transformer, adapted: Transformer, saved: Path
) -> None:
    tiny_model.untie_output_projection()
    load_adapters(tiny_model, saved)
    with torch.no_grad():
        assert torch.equal(tiny_model(SOURCE, TARGET).hidden, adapted(SOURCE, TARGET).hidden)


def refusal(model: Transformer, path: Path) -> str:
    """The sentence of the refusal, which leaves the model as it was."""
    config, number = model.config, fingerprint(model)
    with pytest.raises(AdapterError) as raised:
        load_adapters(model, path)
    assert (model.config, fingerprint(model)) == (config, number)
    return str(raised.value)


@pytest.mark.parametrize("weight", ["encoder_layers.0.ffn.up.bias", "output_projection.weight"])
def test_another_base_is_refused(tiny_model: Transformer, saved: Path, weight: str) -> None:
    tiny_model.untie_output_projection()
    with torch.no_grad():
        tiny_model.get_parameter(weight).view(-1)[30] += 1e-3
    assert re.search(rf"{saved} .*digest \w{{12}}\b.* \w{{12}}\b", refusal(tiny_model, saved))


def test_another_architecture_is_refused_with_the_difference(
    tiny_model: Transformer, saved: Path
) -> None:
    other = Transformer(**(tiny_model.config | {"decoder_ffn_dim": 48}))
    assert "decoder_ffn_dim is 32 there and 48 here" in refusal(other, saved)


def test_a_model_with_adapters_takes_no_others(adapted: Transformer, saved: Path) -> None:
    assert "{'bottleneck_dim': 5" in refusal(adapted, saved)


def test_a_model_without_adapters_saves_none(tiny_model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="module=adapter"):
        save_adapters(tiny_model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_of_adapters_is_refused(
    tiny_model: Transformer, saved: Path, tmp_path: Path
) -> None:
    assert str(tmp_path / "absent") in refusal(tiny_model, tmp_path / "absent")
    (tmp_path / "best.ckpt").write_bytes(b"")
    assert "model.path" in refusal(tiny_model, tmp_path / "best.ckpt")
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(2)}, other)
    assert re.search(f"{other} .*'lightning_knnmt adapters 1'", refusal(tiny_model, other))
    for size in (0, 20, saved.stat().st_size - 1):
        other.write_bytes(saved.read_bytes()[:size])
        assert str(other) in refusal(tiny_model, other)


def test_tensors_that_the_metadata_does_not_promise_are_refused(
    tiny_model: Transformer, saved: Path
) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    for spoilt in (
        {name: t for name, t in tensors.items() if ".up." in name},
        tensors | {"output_projection.weight": torch.zeros(100, 24)},
        {name: torch.zeros(3) for name in tensors},
    ):
        save_file(spoilt, saved, metadata)
        assert f"{saved} is damaged" in refusal(tiny_model, saved)


def test_damaged_metadata_are_told(tiny_model: Transformer, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    for name in ("adapters", "architecture", "base"):
        save_file(tensors, saved, {key: each for key, each in metadata.items() if key != name})
        assert f"{saved} is damaged" in refusal(tiny_model, saved)
    for name in ("adapters", "architecture"):
        for damage in ("{", "3", '"x"', "null"):
            save_file(tensors, saved, metadata | {name: damage})
            assert f"{saved} is damaged" in refusal(tiny_model, saved)
    for damage in ("{}", '{"rank": "x", "alpha": 1}', '{"depth": 3}'):
        save_file(tensors, saved, metadata | {"adapters": damage})
        assert f"{saved} is damaged" in refusal(tiny_model, saved)

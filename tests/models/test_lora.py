from typing import Any

import numpy as np
import pytest
import torch

from lightning_knnmt.models import LowRankUpdate, Transformer
from lightning_knnmt.models.linear import Linear

SOURCE = torch.tensor([[5, 6, 7, 8, 3], [8, 9, 3, 0, 0]])
TARGET = torch.tensor([[2, 9, 8, 7, 11], [2, 6, 5, 4, 3]])
# Of the tiny model's projections, by their module: D = 24 to 1, 2 or 3 times as much.
ENCODER = {"attention.query_key_value": 72, "attention.output": 24}
CROSS = {"query": 24, "key_value": 48, "output": 24}
CELLS = {
    "attention": {"cell.query_key_value": 72, "cell.output": 24},
    "ssru": {"cell.candidate_forget": 48},
}


def updated(model: Transformer, cell: str = "attention", norm: str = "post") -> Transformer:
    """A model with updates that are not zero."""
    adapters = {"rank": 3, "alpha": 5.0}
    changes = {"decoder_cell": cell, "norm": norm, "adapters": adapters}
    model = Transformer(**(model.config | changes)).eval()
    for name, parameter in model.named_parameters():
        if ".adapter.up." in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_equation(bias: bool) -> None:
    """Against NumPy in float64, with gradients, without them, and after a step of training."""
    layer, x = Linear(6, 9, bias=bias), torch.randn(2, 3, 6)
    layer.adapter = LowRankUpdate(6, 9, rank=2, alpha=5.0)
    for _ in range(2):
        w, a, b = (
            part.weight.detach().double().numpy()
            for part in (layer, layer.adapter.down, layer.adapter.up)
        )
        constant = layer.bias.detach().double().numpy() if bias else 0.0
        expected = x.double().numpy() @ (w + 5 / 2 * b @ a).T + constant
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-5, atol=1e-5)
        layer(x).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert b.any()  # the second time around


@pytest.mark.parametrize("cell", ["attention", "ssru"])
def test_every_projection_of_the_attentions_and_ssrus_has_one(
    tiny_model: Transformer, cell: str
) -> None:
    expected = {
        **{f"encoder_layers.{i}.{name}": rows for i in (0, 1) for name, rows in ENCODER.items()},
        **{f"decoder_layers.0.{name}": rows for name, rows in CELLS[cell].items()},
        **{f"decoder_layers.0.cross_attention.{name}": rows for name, rows in CROSS.items()},
    }
    found = {
        name.removesuffix(".adapter"): module
        for name, module in updated(tiny_model, cell).named_modules()
        if isinstance(module, LowRankUpdate)
    }
    assert {name: module.up.weight.shape for name, module in found.items()} == {
        name: (rows, 3) for name, rows in expected.items()
    }
    assert {module.down.weight.shape for module in found.values()} == {(3, 24)}


@pytest.mark.parametrize("cell", ["attention", "ssru"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_model_without_it_but_with_the_updated_weights_has_the_same_hidden_states(
    tiny_model: Transformer, cell: str, norm: str
) -> None:
    model = updated(tiny_model, cell, norm)
    state = model.state_dict()
    merged = {name: tensor.clone() for name, tensor in state.items() if ".adapter." not in name}
    for name in state:
        if name.endswith(".adapter.down.weight"):
            place = name.removesuffix("adapter.down.weight")
            a, b = state[name].double(), state[f"{place}adapter.up.weight"].double()
            merged[f"{place}weight"] += (5 / 3 * b @ a).float()
    plain = Transformer(**{k: v for k, v in model.config.items() if k != "adapters"}).eval()
    plain.load_state_dict(merged)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(SOURCE, TARGET).hidden, plain(SOURCE, TARGET).hidden, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("cell", ["attention", "ssru"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_cached_steps_give_the_hidden_states_of_full_decoding(
    tiny_model: Transformer, cell: str, norm: str
) -> None:
    model = updated(tiny_model, cell, norm)
    with torch.inference_mode():
        full = model(SOURCE, TARGET).hidden
        cache = model.start(model.encode(SOURCE), beam_size=1)
        steps = [model.decode_step(TARGET[:, i], cache).hidden for i in range(5)]
    torch.testing.assert_close(torch.stack(steps, dim=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (0, 16, r"rank is 0\b.*model_dim 24\b"),
        (25, 16, r"rank is 25\b.*1 to 24\b"),
        (1.5, 16, r"rank is 1\.5\b"),
        ("abc", 16, "rank is 'abc'"),
        (8, "abc", "alpha is 'abc'"),
        (8, 0, r"alpha is 0\b"),
        (8, float("nan"), "alpha is nan"),
    ],
)
def test_settings_that_do_not_exist_are_refused(
    tiny_model: Transformer, rank: Any, alpha: Any, message: str
) -> None:
    before = list(tiny_model.state_dict())
    with pytest.raises(ValueError, match=message):
        tiny_model.insert_lora(rank, alpha)
    assert "adapters" not in tiny_model.config
    assert list(tiny_model.state_dict()) == before

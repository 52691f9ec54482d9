"""The packed layer computes what `nn.Linear` does, with the weight that it has at that moment."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.models.linear import BFLOAT16, PACKED, Linear, linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_is_linear(layer: Linear, x: Tensor) -> None:
    """Against NumPy in float64."""
    weight, inputs = layer.weight.detach().double().numpy(), x.double().numpy()
    expected = inputs @ weight.T
    if layer.bias is not None:
        expected = expected + layer.bias.detach().double().numpy()
    with torch.inference_mode():
        found = layer(x)
    assert found.dtype == layer.weight.dtype
    tolerance = TOLERANCE[layer.weight.dtype]
    torch.testing.assert_close(
        found.double(), torch.from_numpy(expected), rtol=tolerance, atol=tolerance
    )


def queries(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 20), (7, 20), (33, 20), (3, 5, 20), (0, 20), (20,)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product(shape: tuple[int, ...], bias: bool) -> None:
    assert_is_linear(Linear(20, 13, bias=bias), queries(*shape))


def test_inputs_need_not_be_contiguous() -> None:
    assert_is_linear(Linear(20, 13), queries(20, 6).T)
    assert_is_linear(Linear(20, 13), queries(6, 40)[:, ::2])


@pytest.mark.skipif(not BFLOAT16, reason="oneDNN has no bfloat16 products on this processor")
def test_bfloat16() -> None:
    assert_is_linear(Linear(20, 13).bfloat16(), queries(7, 20).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_the_function_takes_weights_of_any_strides(
    dtype: torch.dtype, bias: bool, strided: bool
) -> None:
    x, weight = queries(7, 20).to(dtype), queries(20, 13).T if strided else queries(13, 20)
    weight, offset = weight.to(dtype), queries(13).to(dtype) if bias else None
    assert weight.is_contiguous() != strided
    expected = x.double().numpy() @ weight.double().numpy().T
    if offset is not None:
        expected = expected + offset.double().numpy()
    found = linear(x, weight, offset)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def step(layer: Linear) -> None:
    layer(queries(4, 20)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def replace(layer: Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def load(layer: Linear) -> None:
    layer.load_state_dict(Linear(20, 13).state_dict())


def assign(layer: Linear) -> None:
    layer.load_state_dict(Linear(20, 13).state_dict(), assign=True)


def write_into_a_part(layer: Linear) -> None:
    with torch.no_grad():
        layer.weight[3].zero_()


@pytest.mark.parametrize("change", [step, replace, load, assign, write_into_a_part])
def test_it_follows_every_change_of_the_weight(change: Callable[[Linear], None]) -> None:
    layer, x = Linear(20, 13), queries(5, 20)
    assert_is_linear(layer, x)
    before = layer.weight.detach().clone()
    change(layer)
    assert not torch.equal(layer.weight, before)
    assert_is_linear(layer, x)


def test_it_follows_a_change_of_precision() -> None:
    layer, x = Linear(20, 13), queries(5, 20)
    assert_is_linear(layer, x)
    assert_is_linear(layer.bfloat16(), x.bfloat16())
    assert_is_linear(layer.float(), x)


def test_copies_and_files_hold_the_weight_alone() -> None:
    layer, x = Linear(20, 13), queries(5, 20)
    assert_is_linear(layer, x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.add_(1)
    assert_is_linear(twin, x)
    assert_is_linear(layer, x)
    assert list(layer.state_dict()) == ["weight", "bias"]
    file = io.BytesIO()
    torch.save(layer, file)


@pytest.mark.skipif(not PACKED, reason="this torch has no oneDNN")
def test_an_unchanged_weight_is_arranged_once() -> None:
    layer, x = Linear(20, 13), queries(5, 20)
    with torch.inference_mode():
        layer(x)
        first = layer._packed
        layer(x)
    assert first is not None
    assert layer._packed is first


def test_gradients_and_autocast_are_those_of_linear() -> None:
    layer, x = Linear(20, 13), queries(5, 20)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(13, -1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16

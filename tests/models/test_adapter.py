import pytest
import torch

from lightning_knnmt.models import BottleneckAdapter, Transformer


def test_it_is_the_equation() -> None:
    adapter = BottleneckAdapter(6, 4, zero_init=False)
    x = torch.randn(2, 3, 6)
    inner = torch.clamp(x @ adapter.down.weight.T + adapter.down.bias, min=0)
    expected = x + inner @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapter(x), expected)
    assert not torch.equal(adapter(x), x)


def test_it_may_begin_as_the_identity_and_leaves_it_with_the_first_gradient() -> None:
    adapter = BottleneckAdapter(6, 4)
    x = torch.randn(5, 6)
    assert torch.equal(adapter(x), x)
    adapter(x).square().sum().backward()
    assert adapter.up.weight.grad is not None
    assert adapter.up.weight.grad.any()
    assert adapter.down.weight.any()  # else neither could ever move


def test_dropout_is_inside_the_adapter_not_on_what_passes_by() -> None:
    adapter = BottleneckAdapter(6, 4, dropout=1.0, zero_init=False).train()
    x = torch.randn(5, 6)
    assert torch.equal(adapter(x), x)
    inner = BottleneckAdapter(6, 4, activation_dropout=1.0, zero_init=False).train()
    torch.testing.assert_close(inner(x), x + inner.up.bias)


def test_it_sees_the_sublayers_output_before_the_residual_connection(
    tiny_model: Transformer,
) -> None:
    tiny_model.insert_adapters(5, init="plain")
    residual = tiny_model.encoder_layers[0].ffn_residual
    x, branch = torch.randn(3, 24), torch.randn(3, 24)
    expected = residual.norm(x + residual.adapter(branch))
    torch.testing.assert_close(residual(x, lambda _: branch), expected)


@pytest.mark.parametrize("cell", ["attention", "ssru"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_cached_steps_give_the_hidden_states_of_full_decoding(
    tiny_model: Transformer, cell: str, norm: str
) -> None:
    adapters = {"bottleneck_dim": 5, "placement": "all", "stacks": "both"}
    changes = {"decoder_cell": cell, "norm": norm, "adapters": adapters}
    model = Transformer(**(tiny_model.config | changes)).eval()
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter)
    source, target = torch.randint(4, 20, (3, 7)), torch.randint(4, 20, (3, 6))
    with torch.inference_mode():
        full = model(source, target).hidden
        cache = model.start(model.encode(source), beam_size=1)
        steps = [model.decode_step(target[:, i], cache).hidden for i in range(6)]
    torch.testing.assert_close(torch.stack(steps, dim=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_dim": 0}, r"bottleneck_dim is 0\b.* 1\b"),
        ({"bottleneck_dim": 2.5}, r"bottleneck_dim is 2\.5\b"),
        ({"bottleneck_dim": "abc"}, "bottleneck_dim is 'abc'"),
        ({"placement": "attention"}, "placement is 'attention'.*all, ffn"),
        ({"stacks": "none"}, "stacks is 'none'.*both, encoder, decoder"),
        ({"init": "zero"}, "init is 'zero'.*identity, plain"),
    ],
)
def test_settings_that_do_not_exist_are_refused(
    tiny_model: Transformer, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model.insert_adapters(**({"bottleneck_dim": 5} | settings))
    assert "adapters" not in tiny_model.config

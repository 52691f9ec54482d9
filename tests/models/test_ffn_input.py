"""The last feed-forward network's input as a key, beside the hidden state."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_knnmt.models import Transformer

PAD, START, D = 0, 2, 16
ADAPTERS = {"bottleneck_dim": 4, "placement": "all", "stacks": "both", "init": "plain"}
variants = pytest.mark.parametrize(
    ("norm", "cell", "adapters"),
    [(n, c, a) for n in ("post", "pre") for c in ("attention", "ssru") for a in (None, ADAPTERS)],
)


def tiny(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        vocab_size=20, pad_id=PAD, start_id=START, eos_id=3, model_dim=D, num_heads=4,
        encoder_layers=1, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=32,
        **changes,
    ).eval()  # fmt: skip
    with torch.no_grad():  # a norm that has learnt nothing hides which of two was used
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Sources [3, 7], one of them padded; decoder inputs [3, 9]."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(4, 20, (3, 7), generator=generator)
    source[1, 4:] = PAD
    target = torch.randint(4, 20, (3, 9), generator=generator)
    target[:, 0] = START
    return source, target


@contextmanager
def captured(model: Transformer) -> Iterator[list[Tensor]]:
    """What enters the first linear map of the last decoder layer's feed-forward network."""
    inputs: list[Tensor] = []
    last: Any = model.decoder_layers[-1]
    handle = last.ffn.up.register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].clone()),
    )
    yield inputs
    handle.remove()


@variants
@torch.inference_mode()
def test_keys_are_what_the_last_feed_forward_network_reads(
    norm: str, cell: str, adapters: dict[str, Any] | None
) -> None:
    model = tiny(norm=norm, decoder_cell=cell, adapters=adapters)
    source, target = batch()
    alone = model(source, target)
    assert alone.shape == (3, 9, D)
    model.key_layer = "ffn_input"
    with captured(model) as inputs:
        both = model(source, target)
    assert both.shape == (3, 9, 2 * D)
    assert torch.equal(both[..., D:], inputs[0])
    assert torch.equal(both[..., :D], alone)
    assert not torch.allclose(both[..., D:], alone, atol=0.1)


@variants
@torch.inference_mode()
def test_cached_decoding_shows_the_keys_of_full_decoding(
    norm: str, cell: str, adapters: dict[str, Any] | None
) -> None:
    model = tiny(norm=norm, decoder_cell=cell, adapters=adapters)
    model.key_layer = "ffn_input"
    source, _ = batch()
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(4, 20, (6, 5), generator=generator)  # 3 sentences, 2 beams each
    second = torch.randint(4, 20, (6, 4), generator=generator)
    rows = torch.tensor([1, 0, 3, 3, 4, 4])  # that go on
    history = torch.cat([first[rows], second], dim=1)
    full = model(source.repeat_interleave(2, dim=0), history)  # [6, 9, 2 D]
    cache = model.start(model.encode(source), beam_size=2)
    with captured(model) as inputs:
        before = [model.decode_step(tokens, cache) for tokens in first.T]
        cache.reorder(rows)
        after = [model.decode_step(tokens, cache) for tokens in second.T]
    assert all(torch.equal(s[:, D:], i) for s, i in zip(before + after, inputs, strict=True))
    steps = torch.cat([torch.stack(before, 1)[rows], torch.stack(after, 1)], dim=1)
    torch.testing.assert_close(steps, full, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_steps_give_the_hidden_states_of_the_default_bit_for_bit() -> None:
    model = tiny()
    source, target = batch()

    def steps() -> Tensor:
        cache = model.start(model.encode(source), beam_size=1)
        return torch.stack([model.decode_step(tokens, cache) for tokens in target.T])

    alone = steps()
    model.key_layer = "ffn_input"
    assert torch.equal(steps()[..., :D], alone)


def test_it_is_no_part_of_architecture_or_weights() -> None:
    model = tiny()
    config, names = dict(model.config), list(model.state_dict())
    model.key_layer = "ffn_input"
    assert (model.config, list(model.state_dict())) == (config, names)
    assert Transformer(**model.config).key_layer == "opl_input"


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], object]) -> Counter[str]:
    seen = Operations()
    with torch.no_grad(), seen:
        call()
    return seen.counts


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_only_who_asks_pays(norm: str) -> None:
    """The default computes what it did: a norm for each residual connection, nothing joined."""
    model = tiny(norm=norm, decoder_cell="ssru")
    source, target = batch()
    memory = model.encode(source)
    operations(lambda: model.decode(target, memory))  # arranges the weights
    default = operations(lambda: model.decode(target, memory))
    norms = sum(count for name, count in default.items() if "layer_norm" in name)
    assert norms == 6 + (norm == "pre")
    assert not any("cat" in name for name in default)
    model.key_layer = "ffn_input"
    more = operations(lambda: model.decode(target, memory))
    assert more - default == Counter({"aten.cat.default": 1})
    assert not default - more

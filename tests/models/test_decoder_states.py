"""What the decoder returns: the hidden state, and the last feed-forward network's input."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_knnmt.models import KEY_LAYERS, DecoderStates, Transformer

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
def test_ffn_input_is_what_the_last_feed_forward_network_reads(
    norm: str, cell: str, adapters: dict[str, Any] | None
) -> None:
    model = tiny(norm=norm, decoder_cell=cell, adapters=adapters)
    source, target = batch()
    with captured(model) as inputs:
        states = model(source, target)
    assert states.ffn_input is not None
    assert states.hidden.shape == states.ffn_input.shape == (3, 9, D)
    assert torch.equal(states.ffn_input, inputs[0])
    assert not torch.allclose(states.ffn_input, states.hidden, atol=0.1)


@variants
@torch.inference_mode()
def test_cached_decoding_gives_the_states_of_full_decoding(
    norm: str, cell: str, adapters: dict[str, Any] | None
) -> None:
    model = tiny(norm=norm, decoder_cell=cell, adapters=adapters)
    source, _ = batch()
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(4, 20, (6, 5), generator=generator)  # 3 sentences, 2 beams each
    second = torch.randint(4, 20, (6, 4), generator=generator)
    rows = torch.tensor([1, 0, 3, 3, 4, 4])  # that go on
    history = torch.cat([first[rows], second], dim=1)
    full = model(source.repeat_interleave(2, dim=0), history)  # [6, 9, D] each
    cache = model.start(model.encode(source), beam_size=2)
    with captured(model) as inputs:
        before = [model.decode_step(tokens, cache) for tokens in first.T]
        cache.reorder(rows)
        after = [model.decode_step(tokens, cache) for tokens in second.T]
    for step, read in zip(before + after, inputs, strict=True):
        assert torch.equal(step.of("ffn_input"), read)
    before = [step.select(rows) for step in before]
    for layer in KEY_LAYERS:
        steps = torch.stack([step.of(layer) for step in before + after], dim=1)
        torch.testing.assert_close(steps, full.of(layer), rtol=1e-4, atol=1e-5)


HIDDEN, READ = torch.arange(24.0).view(2, 3, 4), -torch.arange(24.0).view(2, 3, 4)


def test_a_layer_is_asked_for_by_name() -> None:
    states = DecoderStates(HIDDEN, READ)
    assert states.of("opl_input") is HIDDEN
    assert states.of("ffn_input") is READ
    alone = DecoderStates(HIDDEN)  # as a datastore's keys are
    assert alone.of("opl_input") is HIDDEN
    with pytest.raises(ValueError, match="ffn_input"):
        alone.of("ffn_input")


MASK = torch.tensor([[True, False, True], [False, True, False]])


@pytest.mark.parametrize(
    ("index", "places"),
    [
        (MASK, [(0, 0), (0, 2), (1, 1)]),
        (torch.tensor([1, 0, 1]), [(1,), (0,), (1,)]),
        (slice(1, None), [(1,)]),
    ],
    ids=["mask", "rows", "slice"],
)
def test_selecting_takes_both_layers_in_step(index: Any, places: list[tuple[int, ...]]) -> None:
    selected = DecoderStates(HIDDEN, READ).select(index)
    assert selected.hidden.tolist() == [HIDDEN[place].tolist() for place in places]
    assert selected.of("ffn_input").tolist() == [READ[place].tolist() for place in places]
    alone = DecoderStates(HIDDEN).select(index)
    assert alone.hidden.tolist() == selected.hidden.tolist()
    assert alone.ffn_input is None

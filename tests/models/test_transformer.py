from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_knnmt.models import Transformer

PAD, START, EOS = 0, 2, 3


def tiny(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 20,
        "pad_id": PAD,
        "start_id": START,
        "eos_id": EOS,
        "model_dim": 16,
        "num_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 32,
        "max_positions": 32,
    }
    return Transformer(**(settings | changes)).eval()


def batch(num_targets: int = 20) -> tuple[Tensor, Tensor]:
    """Sources [3, 7] of lengths 7, 4 and 5, padded on the right; decoder inputs [3, targets]."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(4, 20, (3, 7), generator=generator)
    source[1, 4:] = PAD
    source[2, 5:] = PAD
    target = torch.randint(4, 20, (3, num_targets), generator=generator)
    target[:, 0] = START
    return source, target


@pytest.mark.parametrize("cell", ["attention", "ssru"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_cached_steps_give_the_hidden_states_of_full_decoding(
    cell: str, norm: str, positions: str
) -> None:
    model = tiny(decoder_cell=cell, norm=norm, positions=positions, position_offset=1)
    source, target = batch()
    with torch.inference_mode():
        full = model(source, target).hidden  # [3, T, D]
        cache = model.start(model.encode(source), beam_size=2)
        rows = target.repeat_interleave(2, dim=0)
        steps = [model.decode_step(rows[:, i], cache).hidden for i in range(target.shape[1])]
    steps = torch.stack(steps, dim=1)
    torch.testing.assert_close(steps, full.repeat_interleave(2, dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["attention", "ssru"])
def test_cache_follows_reordered_rows_and_kept_sentences(cell: str) -> None:
    model = tiny(decoder_cell=cell)
    source, _ = batch()
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(4, 20, (6, 3), generator=generator)  # 3 sentences, 2 beams each
    second = torch.randint(4, 20, (4, 3), generator=generator)
    sentences = torch.tensor([0, 2])
    rows = torch.tensor([1, 1, 5, 4])
    with torch.inference_mode():
        cache = model.start(model.encode(source), beam_size=2)
        for tokens in first.T:
            model.decode_step(tokens, cache)
        cache.keep(sentences)
        cache.reorder(rows)
        for tokens in second.T:
            hidden = model.decode_step(tokens, cache).hidden
        history = torch.cat([first[rows], second], dim=1)
        full = model(source[sentences].repeat_interleave(2, dim=0), history).hidden
    torch.testing.assert_close(hidden, full[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["attention", "ssru"])
def test_padding_and_companions_change_nothing(cell: str) -> None:
    model = tiny(decoder_cell=cell)
    source, target = batch()
    alone = model(source[1:2, :4], target[1:2]).hidden
    together = model(source, target).hidden[1:2]
    left_padded = model(source[1:2].roll(3, dims=1), target[1:2]).hidden
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left_padded, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["attention", "ssru"])
def test_a_hidden_state_sees_no_later_target(cell: str) -> None:
    model = tiny(decoder_cell=cell)
    source, target = batch()
    changed = target.clone()
    changed[:, 10:] = 5
    before, after = model(source, target).hidden, model(source, changed).hidden
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("cell", ["attention", "ssru"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients_flow_to_every_weight(cell: str, norm: str) -> None:
    model = tiny(decoder_cell=cell, norm=norm, positions="learned", tied_embeddings="none").train()
    source, target = batch()
    logits = model.output_projection(model(source, target).hidden)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.roll(-1, 1).flatten()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_embeddings_are_tied_as_asked() -> None:
    for tied, distinct in {"all": 1, "decoder": 2, "embeddings": 2, "none": 3}.items():
        model = tiny(tied_embeddings=tied)
        matrices = (model.source_embedding, model.target_embedding, model.output_projection)
        assert len({id(each.weight) for each in matrices}) == distinct
        source, target, output = (each.weight for each in matrices)
        assert (source is target) == (tied in ("all", "embeddings"))
        assert (output is target) == (tied in ("all", "decoder"))


def test_padding_starts_at_zero_and_gets_no_gradient_from_the_inputs() -> None:
    model = tiny(tied_embeddings="none")
    source, target = batch()
    model(source, target).hidden.sum().backward()
    assert not model.source_embedding.weight[PAD].any()
    assert model.source_embedding.weight.grad is not None
    assert not model.source_embedding.weight.grad[PAD].any()


def test_config_rebuilds_the_architecture() -> None:
    model = tiny(norm="pre", decoder_cell="ssru", output_bias=True, activation="silu")
    copy = Transformer(**model.config).eval()
    copy.load_state_dict(model.state_dict())
    source, target = batch()
    assert torch.equal(copy(source, target).hidden, model(source, target).hidden)
    assert copy.config == model.config
    assert all(v is None or isinstance(v, str | int | float | bool) for v in model.config.values())


def test_bfloat16_conversion_stays_near_float32() -> None:
    for cell in ("attention", "ssru"):
        model = tiny(decoder_cell=cell)
        source, target = batch()
        exact = model(source, target).hidden
        rough = model.bfloat16()(source, target).hidden
        cache = model.start(model.encode(source), beam_size=1)
        step = model.decode_step(target[:, 0], cache).hidden
        assert rough.dtype == step.dtype == torch.bfloat16
        torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.15)
        torch.testing.assert_close(step.float(), exact[:, 0], rtol=0.1, atol=0.15)


def test_an_adapter_can_take_its_place_after_every_sublayer() -> None:
    model = tiny()
    source, target = batch()
    before = model(source, target).hidden
    places = [name for name, _ in model.named_modules() if name.endswith(".adapter")]
    assert len(places) == 2 * 2 + 2 * 3
    for name in places:
        parent = model.get_submodule(name.removesuffix(".adapter"))
        parent.adapter = torch.nn.Linear(16, 16)
    assert not torch.allclose(model(source, target).hidden, before)
    cache = model.start(model.encode(source), beam_size=1)
    step = model.decode_step(target[:, 0], cache).hidden
    torch.testing.assert_close(step, model(source, target).hidden[:, 0], rtol=1e-4, atol=1e-5)


def test_dropout_is_active_in_training_only() -> None:
    model = tiny(dropout=0.3)
    source, target = batch()
    assert torch.equal(model(source, target).hidden, model(source, target).hidden)
    model.train()
    assert not torch.equal(model(source, target).hidden, model(source, target).hidden)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "middle"}, "norm is 'middle'.*post, pre"),
        ({"activation": "tanh"}, "activation is 'tanh'.*relu, gelu, silu"),
        ({"num_heads": 3}, r"model_dim 16\b.*\b3\b"),
        ({"decoder_layers": 0}, r"decoder_layers is 0\b"),
        ({"source_vocab_size": 9}, r"source_vocab_size is 9\b.*tied_embeddings 'all'"),
        (
            {"source_vocab_size": 5, "tied_embeddings": "none", "pad_id": 6},
            r"pad_id 6\b.*source.*\b5\b",
        ),
        ({"eos_id": 20}, r"eos_id 20\b.*\b20\b"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_sequences_beyond_the_positions_are_refused() -> None:
    model = tiny(max_positions=6)
    source, target = batch()
    with pytest.raises(ValueError, match=r"source of 7\b.*\b6\b"):
        model.encode(source)
    with pytest.raises(ValueError, match=r"target of 20\b"):
        model(source[:, :6], target)
    cache = model.start(model.encode(source[:, :6]), beam_size=1)
    for _ in range(6):
        model.decode_step(target[:, 0], cache)
    with pytest.raises(ValueError, match=r"target of 7\b"):
        model.decode_step(target[:, 0], cache)

"""Attention and whole layers against torch's own implementations, with copied weights."""

import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.models.attention import CrossAttention, SelfAttention
from lightning_knnmt.models.layers import DecoderLayer, EncoderLayer, LayerSettings

DIM, HEADS, FFN = 16, 4, 40
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 5 + [False]])  # [3, 6]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 6, DIM, generator=generator), torch.randn(3, 5, DIM, generator=generator)


def shaken(module: nn.Module) -> nn.Module:
    """All weights random: zero biases and unit norms would hide mistakes."""
    torch.manual_seed(4)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def copy_attention(ours: SelfAttention | CrossAttention, theirs: nn.MultiheadAttention) -> None:
    with torch.no_grad():
        if isinstance(ours, SelfAttention):
            ours.query_key_value.weight.copy_(theirs.in_proj_weight)
            ours.query_key_value.bias.copy_(theirs.in_proj_bias)
        else:
            ours.query.weight.copy_(theirs.in_proj_weight[:DIM])
            ours.query.bias.copy_(theirs.in_proj_bias[:DIM])
            ours.key_value.weight.copy_(theirs.in_proj_weight[DIM:])
            ours.key_value.bias.copy_(theirs.in_proj_bias[DIM:])
        ours.output.load_state_dict(theirs.out_proj.state_dict())


def settings(norm: str, activation: str) -> LayerSettings:
    return LayerSettings(
        model_dim=DIM,
        num_heads=HEADS,
        ffn_dim=FFN,
        activation=activation,
        norm=norm,
        layer_norm_eps=1e-5,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )


def test_self_attention() -> None:
    theirs = shaken(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    ours = SelfAttention(DIM, HEADS, dropout=0.0).eval()
    copy_attention(ours, theirs)
    x, _ = inputs()
    expected, _ = theirs(x, x, x, key_padding_mask=~MASK)
    torch.testing.assert_close(ours(x, MASK[:, None, None]), expected, rtol=1e-5, atol=1e-5)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    expected, _ = theirs(x, x, x, attn_mask=causal)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_cross_attention() -> None:
    theirs = shaken(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    ours = CrossAttention(DIM, HEADS, dropout=0.0).eval()
    copy_attention(ours, theirs)
    states, x = inputs()
    expected, _ = theirs(x, states, states, key_padding_mask=~MASK)
    actual = ours(x, states, MASK[:, None, None])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer(norm: str, activation: str) -> None:
    theirs = nn.TransformerEncoderLayer(
        DIM, HEADS, FFN, 0.0, activation, batch_first=True, norm_first=norm == "pre"
    )
    shaken(theirs)
    ours = EncoderLayer(settings(norm, activation)).eval()
    copy_attention(ours.attention, theirs.self_attn)
    ours.attention_residual.norm.load_state_dict(theirs.norm1.state_dict())
    ours.ffn.up.load_state_dict(theirs.linear1.state_dict())
    ours.ffn.down.load_state_dict(theirs.linear2.state_dict())
    ours.ffn_residual.norm.load_state_dict(theirs.norm2.state_dict())
    x, _ = inputs()
    expected = theirs(x, src_key_padding_mask=~MASK)
    actual = ours(x, MASK[:, None, None])
    torch.testing.assert_close(actual[MASK], expected[MASK], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_decoder_layer(norm: str) -> None:
    theirs = nn.TransformerDecoderLayer(
        DIM, HEADS, FFN, 0.0, "relu", batch_first=True, norm_first=norm == "pre"
    )
    shaken(theirs)
    ours = DecoderLayer(settings(norm, "relu"), "attention").eval()
    copy_attention(ours.cell, theirs.self_attn)
    copy_attention(ours.cross_attention, theirs.multihead_attn)
    ours.cell_residual.norm.load_state_dict(theirs.norm1.state_dict())
    ours.cross_residual.norm.load_state_dict(theirs.norm2.state_dict())
    ours.ffn.up.load_state_dict(theirs.linear1.state_dict())
    ours.ffn.down.load_state_dict(theirs.linear2.state_dict())
    ours.ffn_residual.norm.load_state_dict(theirs.norm3.state_dict())
    states, x = inputs()
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    expected = theirs(x, states, tgt_mask=causal, memory_key_padding_mask=~MASK)
    actual, _ = ours(x, states, MASK[:, None, None])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

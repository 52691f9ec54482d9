"""The layers of encoder and decoder, and their caches between decoding steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_knnmt.models.attention import (
    CrossAttention,
    CrossCache,
    KeyValueCache,
    SelfAttention,
)
from lightning_knnmt.models.linear import Linear
from lightning_knnmt.models.ssru import SSRU, RecurrentState

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,  # in place: the only one whose gradient does not need its input
    "gelu": F.gelu,
    "silu": F.silu,  # Marian calls it swish
}


@dataclass(frozen=True)
class LayerSettings:
    """Settings that all layers of a stack share; `Transformer` explains them."""

    model_dim: int
    num_heads: int
    ffn_dim: int
    activation: str
    norm: str
    layer_norm_eps: float
    dropout: float
    attention_dropout: float
    activation_dropout: float


class Residual(nn.Module):
    """What surrounds a sub-layer: normalisation, dropout, `adapter` and residual connection.

    An adapter replaces the identity. Its input is the sub-layer's output, before that is added to
    the residual stream, both in decoding steps and over whole sequences.
    """

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.model_dim, eps=settings.layer_norm_eps)
        self.dropout = nn.Dropout(settings.dropout)
        self.adapter: nn.Module = nn.Identity()
        self._norm_first = settings.norm == "pre"

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return self.after(x, sublayer(self.before(x)))

    def before(self, x: Tensor) -> Tensor:
        """The sub-layer's input, [..., D]."""
        read: Tensor = self.norm(x) if self._norm_first else x
        return read

    def after(self, x: Tensor, branch: Tensor) -> Tensor:
        """Adds the sub-layer's output, [..., D]."""
        x = x + self.adapter(self.dropout(branch))
        return x if self._norm_first else self.norm(x)


class FeedForward(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.up = Linear(settings.model_dim, settings.ffn_dim)
        self.down = Linear(settings.ffn_dim, settings.model_dim)
        self.dropout = nn.Dropout(settings.activation_dropout)
        self._activation = ACTIVATIONS[settings.activation]
        for projection in (self.up, self.down):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.dropout(self._activation(self.up(x))))
        return output


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward layer."""

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.attention = SelfAttention(
            settings.model_dim, settings.num_heads, settings.attention_dropout
        )
        self.attention_residual = Residual(settings)
        self.ffn = FeedForward(settings)
        self.ffn_residual = Residual(settings)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, S, D], mask [B, 1, 1, S] (True at tokens) -> [B, S, D]."""
        x = self.attention_residual(x, lambda h: self.attention(h, mask))
        output: Tensor = self.ffn_residual(x, self.ffn)
        return output


class LayerCache(NamedTuple):
    """One decoder layer's cache between steps."""

    cell: KeyValueCache | RecurrentState  # of each row
    cross: CrossCache  # of each sentence


class DecoderLayer(nn.Module):
    """The cell (causal self-attention or SSRU), cross-attention, then the feed-forward layer.

    Returns its output and the feed-forward layer's input, which may be a datastore's key.
    """

    cell: Any  # SelfAttention or SSRU: the same three methods, with different caches

    def __init__(self, settings: LayerSettings, cell: str) -> None:
        super().__init__()
        dim, heads, dropout = settings.model_dim, settings.num_heads, settings.attention_dropout
        self.cell = SSRU(dim) if cell == "ssru" else SelfAttention(dim, heads, dropout)
        self.cell_residual = Residual(settings)
        self.cross_attention = CrossAttention(dim, heads, dropout)
        self.cross_residual = Residual(settings)
        self.ffn = FeedForward(settings)
        self.ffn_residual = Residual(settings)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D], the encoder's states [B, S, D] and mask [B, 1, 1, S] -> 2 x [B, T, D]."""
        x = self.cell_residual(x, self.cell)
        x = self.cross_residual(x, lambda h: self.cross_attention(h, states, mask))
        return self._feed_forward(x)

    def start(self, states: Tensor, mask: Tensor, beam_size: int) -> LayerCache:
        return LayerCache(
            self.cell.start(len(states) * beam_size, states),
            self.cross_attention.start(states, mask),
        )

    def step(self, x: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """One position of each row, [N, D] -> 2 x [N, D]."""
        x = self.cell_residual(x, lambda h: self.cell.step(h, cache.cell))
        x = self.cross_residual(x, lambda h: self.cross_attention.step(h, cache.cross))
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        read = self.ffn_residual.before(x)
        return self.ffn_residual.after(x, self.ffn(read)), read


class DecoderCache:
    """The decoder's cache between steps; N = B * beam_size rows, a sentence's beams adjacent.

    When sentences leave the batch, call `keep` with the remaining sentences and `reorder` with the
    remaining rows before the next step.
    """

    def __init__(self, layers: list[LayerCache]) -> None:
        self.position = 0  # of the token that the next step reads
        self.layers = layers

    def reorder(self, rows: Tensor) -> None:
        """Row i continues row rows[i]; rows [N'] may repeat or omit some."""
        for layer in self.layers:
            layer.cell.reorder(rows)

    def keep(self, sentences: Tensor) -> None:
        """Drops the memory of all but the given sentences, [B']."""
        for layer in self.layers:
            layer.cross.keep(sentences)

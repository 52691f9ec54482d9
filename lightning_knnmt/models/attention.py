"""Multi-head attention (Vaswani et al., 2017, arXiv:1706.03762, section 3.2).

The projections of one input are one matrix product: queries, keys and values in self-attention,
keys and values in cross-attention. Each class has a `forward` over whole sequences
and a `step` that continues from a cache.

Shapes: B sentences, N = B * beam rows, L positions, S source length, D model_dim, H heads,
d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_knnmt.models.linear import Linear


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H * d] -> [B, H, L, d]."""
    return x.view(*x.shape[:2], num_heads, x.shape[2] // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, d] -> [B, L, H * d]."""
    return x.transpose(1, 2).flatten(2)


class KeyValueCache:
    """The keys and values of the positions decoded so far, for each row.

    Attributes:
        length: Number of positions.
    """

    ROOM = 8  # positions to allocate at a time

    def __init__(self, num_rows: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.length = 0
        self._store = like.new_zeros(2, num_rows, num_heads, self.ROOM, head_dim)

    def append(self, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds one position.

        Args:
            key_value: The position's key and value for each row, [2, N, H, d].

        Returns:
            All keys and all values so far, then zeros up to the allocated room, [N, H, room, d]
            each.
        """
        if self.length == self._store.shape[3]:
            room = self._store.new_zeros(*self._store.shape[:3], self.ROOM, self._store.shape[4])
            self._store = torch.cat([self._store, room], dim=3)
        self._store[:, :, :, self.length] = key_value
        self.length += 1
        keys, values = self._store.unbind(0)
        return keys, values

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; rows [N']."""
        self._store = self._store.index_select(1, rows)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, model_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = Linear(model_dim, 3 * model_dim)
        self.output = Linear(model_dim, model_dim)
        _initialise(self.query_key_value, self.output)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends over whole sequences.

        Args:
            x: [B, L, D].
            mask: True at positions to attend to, [B, 1, 1, L]; None for causal attention, where
                only padding follows the end of a sequence.

        Returns:
            [B, L, D].
        """
        projected = self.query_key_value(x).chunk(3, dim=-1)
        query, key, value = (
            split_heads(part, self.num_heads) for part in projected
        )  # [B, H, L, d]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        output: Tensor = self.output(merge_heads(attended))
        return output

    def start(self, num_rows: int, like: Tensor) -> KeyValueCache:
        """An empty cache for `num_rows` rows, of the dtype and on the device of `like`."""
        return KeyValueCache(num_rows, self.num_heads, like.shape[-1] // self.num_heads, like)

    def step(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """Attends from a new position of each row, [N, D], to it and those before; [N, D]."""
        projected = self.query_key_value(x).view(len(x), 3, self.num_heads, -1)  # [N, 3, H, d]
        keys, values = cache.append(projected[:, 1:].transpose(0, 1))  # [N, H, room, d]
        query = projected[:, 0].unsqueeze(2)  # [N, H, 1, d]
        # Includes the zeros of the unused room: in bfloat16, slicing them off first would copy the
        # keys, which takes longer.
        scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)  # [N, H, 1, room]
        weights = torch.softmax(scores[..., : cache.length], dim=-1)  # [N, H, 1, length]
        attended = weights @ values[:, :, : cache.length]  # [N, H, 1, d]
        output: Tensor = self.output(attended.flatten(1))
        return output


class CrossCache:
    """The memory's keys and values, stored once per sentence, however many beams attend to it."""

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor) -> None:
        self.keys = keys  # [B, H, d, S], scaled
        self.values = values  # [B, H, S, d]
        self.bias = bias  # [B, 1, 1, S], 0 at tokens and -inf at padding

    def keep(self, sentences: Tensor) -> None:
        self.keys = self.keys.index_select(0, sentences)
        self.values = self.values.index_select(0, sentences)
        self.bias = self.bias.index_select(0, sentences)


class CrossAttention(nn.Module):
    """Attention of the decoder to the encoder's states."""

    def __init__(self, model_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = Linear(model_dim, model_dim)
        self.key_value = Linear(model_dim, 2 * model_dim)
        self.output = Linear(model_dim, model_dim)
        _initialise(self.query, self.key_value, self.output)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Attends over whole sequences.

        Args:
            x: [B, T, D].
            states: The encoder's, [B, S, D].
            mask: True at source tokens, [B, 1, 1, S].

        Returns:
            [B, T, D].
        """
        query = split_heads(self.query(x), self.num_heads)  # [B, H, T, d]
        projected = self.key_value(states).chunk(2, dim=-1)
        key, value = (split_heads(part, self.num_heads) for part in projected)  # [B, H, S, d]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout
        )
        output: Tensor = self.output(merge_heads(attended))
        return output

    def start(self, states: Tensor, mask: Tensor) -> CrossCache:
        """Computes keys and values of a memory: states [B, S, D], mask [B, 1, 1, S]."""
        projected = self.key_value(states).chunk(2, dim=-1)
        key, value = (split_heads(part, self.num_heads) for part in projected)  # [B, H, S, d]
        keys = (key * key.shape[-1] ** -0.5).transpose(-1, -2).contiguous()
        bias = torch.zeros_like(mask, dtype=keys.dtype).masked_fill(~mask, float("-inf"))
        return CrossCache(keys, value.contiguous(), bias)

    def step(self, x: Tensor, cache: CrossCache) -> Tensor:
        """Attends from a new position of each row, [N, D], the beams of a sentence together."""
        beams = self.query(x).view(len(cache.keys), -1, x.shape[-1])  # [B, beam, D]
        query = split_heads(beams, self.num_heads)  # [B, H, beam, d]
        scores = query @ cache.keys + cache.bias  # [B, H, beam, S]
        attended = torch.softmax(scores, dim=-1) @ cache.values  # [B, H, beam, d]
        output: Tensor = self.output(merge_heads(attended).view_as(x))
        return output


def _initialise(*projections: nn.Linear) -> None:
    """Xavier, as in fairseq: the inputs' square matrices, fused or not, at gain 1 / sqrt(2).

    Args:
        projections: The inputs' projections, fused or not, then the output's.
    """
    for projection in projections:
        gain = 1.0 if projection is projections[-1] else 2**-0.5
        for matrix in projection.weight.view(-1, *[projection.in_features] * 2):
            nn.init.xavier_uniform_(matrix, gain=gain)
        nn.init.zeros_(projection.bias)

"""Position vectors, sinusoidal or learned."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_table(num_positions: int, dim: int, kind: str = "sinusoidal") -> Tensor:
    """A fixed table: all sines, then all cosines (Vaswani et al., 2017, section 3.5, interleave).

    Wavelengths grow in equal ratios from 2 π: to 10000 * 2 π at the last pair of dimensions in
    fairseq and Marian ("sinusoidal"), and just short of it, as in the paper's formula
    10000 ** (2 i / dim), in Hugging Face's MarianMT ("sinusoidal_paper").

    Returns:
        [num_positions, dim], on the CPU even where a device context says otherwise.
    """
    half = dim // 2
    intervals = half if kind == "sinusoidal_paper" else max(half - 1, 1)
    pairs = torch.arange(half, dtype=torch.float64, device="cpu")
    rates = torch.exp(-math.log(10000) / intervals * pairs)
    positions = torch.arange(num_positions, dtype=torch.float64, device="cpu")
    angles = positions.unsqueeze(1) * rates  # [L, dim / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class Positions(nn.Module):
    """A table of position vectors whose first used row is `offset`."""

    table: Tensor

    def __init__(self, kind: str, num_positions: int, dim: int, offset: int) -> None:
        super().__init__()
        self.offset = offset
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(offset + num_positions, dim))
            draw_normal(self.table, dim**-0.5)
        else:
            # Computed, so not part of a checkpoint.
            table = sinusoidal_table(offset + num_positions, dim, kind)
            self.register_buffer("table", table, persistent=False)

    def of_tokens(self, mask: Tensor) -> Tensor:
        """Vectors of padded sequences; left and right padding give the same.

        Args:
            mask: True at tokens, [B, L].

        Returns:
            [B, L, D].
        """
        count = mask.long().cumsum(-1)  # 1 at the first token
        return self.table[(count - 1).clamp(min=0) + self.offset]

    def first(self, length: int) -> Tensor:
        """Vectors of positions 0 to length - 1, [length, D]."""
        return self.table[self.offset : self.offset + length]

    def at(self, position: int) -> Tensor:
        """The vector of one position, [D]."""
        return self.table[self.offset + position]


def draw_normal(weight: Tensor, std: float) -> None:
    """Draws initial numbers, but on the meta device, which has none."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)

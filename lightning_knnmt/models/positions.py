"""Position vectors, sinusoidal or learned."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_table(num_positions: int, dim: int) -> Tensor:
    """The fixed table in the layout of fairseq and Marian: all sines, then all cosines.

    Wavelengths grow from 2 π to 10000 * 2 π in dim / 2 equal ratios. (Vaswani et al., 2017, section
    3.5, write them interleaved, which is the same up to the order of dimensions.)

    Returns:
        [num_positions, dim].
    """
    half = dim // 2
    step = math.log(10000) / max(half - 1, 1)
    rates = torch.exp(-step * torch.arange(half, dtype=torch.float64))
    angles = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1) * rates  # [L, dim / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class Positions(nn.Module):
    """A table of position vectors whose first used row is `offset`."""

    table: Tensor

    def __init__(self, kind: str, num_positions: int, dim: int, offset: int) -> None:
        super().__init__()
        self.offset = offset
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(offset + num_positions, dim))
            nn.init.normal_(self.table, std=dim**-0.5)
        else:
            # Computed, hence not part of a checkpoint.
            table = sinusoidal_table(offset + num_positions, dim)
            self.register_buffer("table", table, persistent=False)

    def of_tokens(self, mask: Tensor) -> Tensor:
        """Vectors of padded sequences: tokens are counted, so left and right padding give the same.

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

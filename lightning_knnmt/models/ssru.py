"""The simpler simple recurrent unit, in place of the decoder's self-attention.

Kim et al. (2019), "From Research to Production and Back: Ludicrously Fast Neural Machine
Translation":

    f_t = sigmoid(W_f x_t + b_f)
    c_t = f_t * c_{t-1} + (1 - f_t) * (W x_t)
    output_t = relu(c_t)

Its state is one vector, so a decoding step costs the same at every position.
"""

import torch
from torch import Tensor, nn

from lightning_knnmt.models.linear import Linear


class RecurrentState:
    """The cell's state c of each row, [N, D]."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def reorder(self, rows: Tensor) -> None:
        self.value = self.value.index_select(0, rows)


class SSRU(nn.Module):
    """The cell, over whole sequences and step by step; the state is float32 in every precision."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.candidate_forget = Linear(model_dim, 2 * model_dim, bias=False)
        self.forget_bias = nn.Parameter(torch.zeros(model_dim))
        for matrix in self.candidate_forget.weight.chunk(2):
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Runs over whole sequences from a zero state: one product, then one operation per step.

        Args:
            x: [B, T, D].

        Returns:
            [B, T, D].
        """
        candidates, forgets = self._gates(x)
        state = torch.zeros_like(candidates[:, 0])
        states = []
        for candidate, forget in zip(candidates.unbind(1), forgets.unbind(1), strict=True):
            state = torch.lerp(candidate, state, forget)
            states.append(state)
        return torch.relu(torch.stack(states, dim=1)).to(x.dtype)

    def start(self, num_rows: int, like: Tensor) -> RecurrentState:
        """The zero state for `num_rows` rows, as wide as `like` and on its device."""
        return RecurrentState(like.new_zeros(num_rows, like.shape[-1], dtype=torch.float32))

    def step(self, x: Tensor, cache: RecurrentState) -> Tensor:
        """Continues by one position of each row, [N, D] -> [N, D]."""
        candidate, forget = self._gates(x)
        cache.value = torch.lerp(candidate, cache.value, forget)
        return torch.relu(cache.value).to(x.dtype)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The candidate W x and the forget gate f, [..., D] each."""
        candidate, forget = self.candidate_forget(x).chunk(2, dim=-1)
        return candidate.float(), torch.sigmoid(forget.float() + self.forget_bias.float())

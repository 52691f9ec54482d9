"""LoRA (Hu et al., 2022, arXiv:2106.09685): low-rank updates of a frozen model's projections.

y = W x + b + (alpha / r) B A x in the attentions' projections, and in the SSRU's. Where one weight
makes queries, keys and values (or keys and values), B has rows for each of them, and A is theirs
in common. The product of B and A is never formed, so that W stays as it was, bit for bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_knnmt.models.adapter import check_none_yet
from lightning_knnmt.models.attention import CrossAttention, SelfAttention
from lightning_knnmt.models.linear import Linear
from lightning_knnmt.models.ssru import SSRU


class LowRankUpdate(nn.Module):
    """(alpha / r) B A x: zero at first, because B is.

    A begins with `nn.Linear`'s own numbers, as in the paper's code.

    Attributes:
        down: A, [r, inputs].
        up: B, [outputs, r].
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = Linear(in_features, rank, bias=False)
        self.up = Linear(rank, out_features, bias=False)
        self.scale = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        update: Tensor = self.up(self.scale * self.down(x))
        return update


def insert_low_rank(model: nn.Module, rank: int, alpha: float) -> None:
    """Puts an update beside every projection of the model's attentions and SSRUs."""
    for module in model.modules():
        if not isinstance(module, SelfAttention | CrossAttention | SSRU):
            continue
        for layer in module.children():
            if isinstance(layer, Linear):
                update = LowRankUpdate(layer.in_features, layer.out_features, rank, alpha)
                layer.adapter = update.to(layer.weight).train(layer.training)


def check_low_rank(config: dict[str, Any], rank: int, alpha: float) -> None:
    """Says in one sentence why a model of these settings takes no such updates."""
    model_dim = config["model_dim"]
    if type(rank) is not int or not 1 <= rank <= model_dim:
        raise ValueError(
            f"rank is {rank!r}, but LoRA in a model of model_dim {model_dim} takes 1 to "
            f"{model_dim}, a whole number."
        )
    if type(alpha) not in (int, float) or not 0 < alpha < torch.inf:
        raise ValueError(f"alpha is {alpha!r}, but LoRA needs a positive number.")
    check_none_yet(config)

"""Small trainable parts of a frozen model: adapters and LoRA's low-rank updates.

Adapters (Houlsby et al., 2019, arXiv:1902.00751; for translation Bapna and Firat, 2019) are small
maps inside the residual branches: serial, without a layer norm of their own, as in the code of Gao
et al. (2023, arXiv:2305.13034).

LoRA (Hu et al., 2022, arXiv:2106.09685) is y = W x + b + (alpha / r) B A x in the attentions'
projections, and in the SSRU's. Where one weight makes queries, keys and values (or keys and
values), B has rows for each of them and A is shared. The product of B and A is never formed, so W
stays as it was, bit for bit.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_knnmt.models.attention import CrossAttention, SelfAttention
from lightning_knnmt.models.layers import Residual
from lightning_knnmt.models.linear import Linear
from lightning_knnmt.models.ssru import SSRU

CHOICES = {
    "placement": ("all", "ffn"),
    "stacks": ("both", "encoder", "decoder"),
    "init": ("identity", "plain"),
}


class BottleneckAdapter(nn.Module):
    """x + up(relu(down(x))), with the model's dropout after the ReLU and after `up`."""

    def __init__(
        self,
        model_dim: int,
        bottleneck_dim: int,
        *,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        zero_init: bool = True,
    ) -> None:
        """
        Args:
            dropout: Of the output of `up`.
            activation_dropout: After the ReLU.
            zero_init: Begin as the identity (`up` is zero); otherwise with `nn.Linear`'s own
                initialisation, as in the paper's code.
        """
        super().__init__()
        self.down = Linear(model_dim, bottleneck_dim)
        self.up = Linear(bottleneck_dim, model_dim)
        self.activation_dropout = nn.Dropout(activation_dropout)
        self.dropout = nn.Dropout(dropout)
        if zero_init:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        inner = self.activation_dropout(torch.relu_(self.down(x)))  # [..., r]
        output: Tensor = x + self.dropout(self.up(inner))
        return output


def residuals(layers: Iterable[nn.Module], placement: str) -> Iterator[Residual]:
    """The residual branches that get an adapter: all, or only those of feed-forward layers."""
    for layer in layers:
        for name, child in layer.named_children():
            if isinstance(child, Residual) and (placement == "all" or name == "ffn_residual"):
                yield child


def check_none_yet(config: dict[str, Any]) -> None:
    """Raises if a model with these settings already has adapters of any kind."""
    if "adapters" in config:
        raise ValueError(
            f"The model already has adapters ({config['adapters']}) and cannot have more: give the "
            "model without them, or the same settings to continue their training."
        )


def check_adapters(config: dict[str, Any], bottleneck_dim: int, **choices: Any) -> None:
    """Raises if a model with these settings cannot have these adapters."""
    if type(bottleneck_dim) is not int or bottleneck_dim < 1:
        raise ValueError(
            f"bottleneck_dim is {bottleneck_dim!r}, but must be an integer of at least 1."
        )
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(CHOICES[name])}.")
    check_none_yet(config)


class LowRankUpdate(nn.Module):
    """(alpha / r) B A x; zero at first, because B is.

    A has `nn.Linear`'s own initialisation, as in the paper's code.

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
    """Adds an update to every projection of the model's attentions and SSRUs."""
    for module in model.modules():
        if not isinstance(module, SelfAttention | CrossAttention | SSRU):
            continue
        for layer in module.children():
            if isinstance(layer, Linear):
                update = LowRankUpdate(layer.in_features, layer.out_features, rank, alpha)
                layer.adapter = update.to(layer.weight).train(layer.training)


def check_low_rank(config: dict[str, Any], rank: int, alpha: float) -> None:
    """Raises if a model with these settings cannot have such updates."""
    model_dim = config["model_dim"]
    if type(rank) is not int or not 1 <= rank <= model_dim:
        raise ValueError(
            f"rank is {rank!r}, but with model_dim {model_dim} LoRA takes an integer from 1 to "
            f"{model_dim}."
        )
    if type(alpha) not in (int, float) or not 0 < alpha < torch.inf:
        raise ValueError(f"alpha is {alpha!r}, but must be positive.")
    check_none_yet(config)

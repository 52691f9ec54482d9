"""Fine-tuning methods: functions of a model that decide which of its parameters train.

Each sets `requires_grad` on exactly the parameters it names. None of them changes the model's
output, except plain adapters.
"""

from collections.abc import Callable
from typing import Literal

from torch import nn

from lightning_knnmt.models import BottleneckAdapter, LowRankUpdate, Transformer

Trainable = Callable[[Transformer], list[str]]
Placement = Literal["all", "ffn"]
Stacks = Literal["both", "encoder", "decoder"]
AdapterInit = Literal["identity", "plain"]


def train_all(model: Transformer) -> list[str]:
    """Trains every weight.

    Returns:
        The names of the trained parameters; a tied one appears once.
    """
    model.requires_grad_(True)
    return _trained(model)


def train_output_projection(model: Transformer) -> list[str]:
    """Trains the output projection alone, with its bias if it has one.

    The projection is untied from the embeddings first: training tied embeddings would change the
    keys of every datastore.

    Returns:
        The names of the trained parameters.
    """
    model.untie_output_projection()
    model.requires_grad_(False)
    model.output_projection.requires_grad_(True)
    return _trained(model)


def train_adapters(
    bottleneck_dim: int = 64,
    placement: Placement = "all",
    stacks: Stacks = "both",
    init: AdapterInit = "identity",
) -> Trainable:
    """Trains adapters in a frozen model (Bapna and Firat, 2019, arXiv:1909.08478).

    The returned function inserts the adapters. If the model already has adapters of these settings
    it trains those, whatever `init` is; it raises a ValueError if the model has other adapters or a
    setting is invalid.

    Args:
        bottleneck_dim: r, the adapters' inner dimension.
        placement: After every sub-layer (as Gao et al., 2023), or after the feed-forward layers.
        stacks: Which stacks have adapters.
        init: Start as the identity, or from `nn.Linear`'s initialisation as in the paper's code.
    """

    def select(model: Transformer) -> list[str]:
        settings = {"bottleneck_dim": bottleneck_dim, "placement": placement, "stacks": stacks}
        if model.config.get("adapters") != settings:
            model.insert_adapters(bottleneck_dim, placement, stacks, init)
        return _train_only(model, BottleneckAdapter)

    return select


def train_lora(rank: int = 8, alpha: float = 16.0) -> Trainable:
    """Trains low-rank updates of a frozen model (Hu et al., 2022, arXiv:2106.09685).

    The returned function inserts the updates, or trains those that the model has if they have these
    settings; it raises a ValueError if the model has other adapters or a setting is invalid.

    Args:
        rank: r, at most the model's width.
        alpha: The updates are scaled by alpha / r.
    """

    def select(model: Transformer) -> list[str]:
        if model.config.get("adapters") != {"rank": rank, "alpha": alpha}:
            model.insert_lora(rank, alpha)
        return _train_only(model, LowRankUpdate)

    return select


def _train_only(model: Transformer, kind: type[nn.Module]) -> list[str]:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, kind):
            module.requires_grad_(True)
    return _trained(model)


def _trained(model: Transformer) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

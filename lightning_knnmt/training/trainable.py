"""Fine-tuning methods: functions that decide which parameters train.

Each leaves `requires_grad` set on exactly the parameters that it names and changes no output (plain
adapters excepted). `modules/finetuners.py` gives them to Lightning.
"""

from typing import Literal

from torch import nn

from lightning_knnmt.models import BottleneckAdapter, LowRankUpdate, Transformer


def train_all(model: Transformer) -> list[str]:
    """Full fine-tuning.

    Returns:
        The names of the parameters that train; a tied one appears once.
    """
    model.requires_grad_(True)
    return _trainable(model)


def train_output_projection(model: Transformer) -> list[str]:
    """The output projection alone, with its bias where it has one; unties it from the embeddings.

    Tied, the embeddings would move with it, and with them the keys of every datastore.

    Returns:
        The names of the parameters that train.
    """
    model.untie_output_projection()
    model.requires_grad_(False)
    model.output_projection.requires_grad_(True)
    return _trainable(model)


def train_adapters(
    model: Transformer,
    bottleneck_dim: int,
    placement: Literal["all", "ffn"] = "all",
    stacks: Literal["both", "encoder", "decoder"] = "both",
    init: Literal["identity", "plain"] = "identity",
) -> list[str]:
    """Adapters in a frozen model (Bapna and Firat, 2019, arXiv:1909.08478), inserted if need be.

    A model that has adapters of these settings trains them on, whatever `init`.

    Args:
        bottleneck_dim: r, the adapters' inner dimension.
        placement: After every sub-layer (as Gao et al., 2023), or after the feed-forward layers.
        stacks: Where.
        init: Begin as the identity, or with `nn.Linear`'s own numbers as the paper's code does.

    Returns:
        The names of the parameters that train.

    Raises:
        ValueError: If the model has other adapters, or there is no such choice.
    """
    settings = {"bottleneck_dim": bottleneck_dim, "placement": placement, "stacks": stacks}
    if model.config.get("adapters") != settings:
        model.insert_adapters(bottleneck_dim, placement, stacks, init)
    return _train_only(model, BottleneckAdapter)


def train_lora(model: Transformer, rank: int, alpha: float) -> list[str]:
    """Low-rank updates in a frozen model (Hu et al., 2022, arXiv:2106.09685), inserted if need be.

    A model that has updates of these settings trains them on.

    Args:
        rank: r, at most the model's width.
        alpha: The updates are scaled by alpha / r.

    Returns:
        The names of the parameters that train.

    Raises:
        ValueError: If the model has other adapters, or the numbers are impossible.
    """
    if model.config.get("adapters") != {"rank": rank, "alpha": alpha}:
        model.insert_lora(rank, alpha)
    return _train_only(model, LowRankUpdate)


def _train_only(model: Transformer, kind: type[nn.Module]) -> list[str]:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, kind):
            module.requires_grad_(True)
    return _trainable(model)


def _trainable(model: Transformer) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

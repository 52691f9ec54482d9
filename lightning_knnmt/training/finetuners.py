"""Fine-tuning methods as LightningModules: `NMTModule` with other trainable parameters.

Their defaults are those of fine-tuning: no warm-up and no label smoothing.
"""

from typing import Unpack

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.training.nmt import NMTModule
from lightning_knnmt.training.settings import Settings, for_fine_tuning
from lightning_knnmt.training.trainable import (
    AdapterInit,
    Placement,
    Stacks,
    train_adapters,
    train_all,
    train_lora,
)


class FullFineTuner(NMTModule):
    """Trains every weight."""

    method = "full fine-tuning"

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        **settings: Unpack[Settings],
    ) -> None:
        """
        Args:
            settings: Passed on to `NMTModule`.
        """
        settings = for_fine_tuning(settings)
        super().__init__(model, tokenizer, search, trainable=train_all, **settings)


class AdapterFineTuner(NMTModule):
    """Trains adapters in a frozen model."""

    method = "adapters"

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        *,
        bottleneck_dim: int = 64,
        placement: Placement = "all",
        stacks: Stacks = "both",
        init: AdapterInit = "identity",
        **settings: Unpack[Settings],
    ) -> None:
        """
        Args:
            bottleneck_dim: r; this, `placement`, `stacks` and `init` are described in
                `train_adapters`.
            settings: Passed on to `NMTModule`.
        """
        trainable = train_adapters(bottleneck_dim, placement, stacks, init)
        settings = for_fine_tuning(settings)
        super().__init__(model, tokenizer, search, trainable=trainable, **settings)


class LoRAFineTuner(NMTModule):
    """Trains low-rank updates of a frozen model's projections."""

    method = "LoRA"

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        **settings: Unpack[Settings],
    ) -> None:
        """
        Args:
            rank: r; this and `alpha` are described in `train_lora`.
            settings: Passed on to `NMTModule`.
        """
        settings = for_fine_tuning(settings)
        super().__init__(model, tokenizer, search, trainable=train_lora(rank, alpha), **settings)

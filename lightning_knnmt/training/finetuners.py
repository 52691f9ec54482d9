"""Ways of fine-tuning: `NMTModule` with other trainable parameters."""

from typing import Literal

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.training.nmt import NMTModule
from lightning_knnmt.training.settings import Decay, Optimizer
from lightning_knnmt.training.trainable import train_adapters, train_all, train_lora


class FullFineTuner(NMTModule):
    """Trains every weight."""

    def select_trainable(self) -> None:
        train_all(self.model)


class AdapterFineTuner(NMTModule):
    """Trains adapters in a frozen model."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        *,
        optimizer: Optimizer,
        bottleneck_dim: int = 64,
        placement: Literal["all", "ffn"] = "all",
        stacks: Literal["both", "encoder", "decoder"] = "both",
        init: Literal["identity", "plain"] = "identity",
        warmup_steps: int = 4000,
        decay: Decay = "inverse_sqrt",
        label_smoothing: float = 0.1,
        bleu_every: int = 1,
    ) -> None:
        """
        Args:
            bottleneck_dim: r; this, `placement`, `stacks` and `init` are `train_adapters`'
                arguments, the rest are `NMTModule`'s.
        """
        # Before NMTModule's constructor, which calls `select_trainable`.
        self.bottleneck_dim = bottleneck_dim
        self.placement = placement
        self.stacks = stacks
        self.init = init
        super().__init__(
            model,
            tokenizer,
            search,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            decay=decay,
            label_smoothing=label_smoothing,
            bleu_every=bleu_every,
        )

    def select_trainable(self) -> None:
        train_adapters(self.model, self.bottleneck_dim, self.placement, self.stacks, self.init)


class LoRAFineTuner(NMTModule):
    """Trains low-rank updates of a frozen model's projections."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        *,
        optimizer: Optimizer,
        rank: int = 8,
        alpha: float = 16.0,
        warmup_steps: int = 4000,
        decay: Decay = "inverse_sqrt",
        label_smoothing: float = 0.1,
        bleu_every: int = 1,
    ) -> None:
        """
        Args:
            rank: r; this and `alpha` are `train_lora`'s arguments, the rest are `NMTModule`'s.
        """
        # Before NMTModule's constructor, which calls `select_trainable`.
        self.rank = rank
        self.alpha = alpha
        super().__init__(
            model,
            tokenizer,
            search,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            decay=decay,
            label_smoothing=label_smoothing,
            bleu_every=bleu_every,
        )

    def select_trainable(self) -> None:
        train_lora(self.model, self.rank, self.alpha)

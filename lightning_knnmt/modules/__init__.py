"""LightningModules: steps, logging and optimizers around a `Transformer`."""

from lightning_knnmt.modules.divergence import NonFiniteLossError
from lightning_knnmt.modules.finetuners import AdapterFineTuner, FullFineTuner, LoRAFineTuner
from lightning_knnmt.modules.nmt import NMTModule, Translations
from lightning_knnmt.modules.opl import OPLFineTuner
from lightning_knnmt.modules.precision import TrainingAutocast
from lightning_knnmt.modules.projection_loss import FrozenMass, projection_loss

__all__ = [
    "AdapterFineTuner",
    "FrozenMass",
    "FullFineTuner",
    "LoRAFineTuner",
    "NMTModule",
    "NonFiniteLossError",
    "OPLFineTuner",
    "TrainingAutocast",
    "Translations",
    "projection_loss",
]

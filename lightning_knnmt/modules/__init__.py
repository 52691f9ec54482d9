"""LightningModules: steps, logging and optimizers around a `Transformer`."""

from lightning_knnmt.modules.finetuners import AdapterFineTuner, FullFineTuner, OPLFineTuner
from lightning_knnmt.modules.nmt import NMTModule, Translations

__all__ = ["AdapterFineTuner", "FullFineTuner", "NMTModule", "OPLFineTuner", "Translations"]

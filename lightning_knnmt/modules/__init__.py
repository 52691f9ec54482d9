"""LightningModules: steps, logging and optimizers around a `Transformer`."""

from lightning_knnmt.modules.nmt import NMTModule, Translations

__all__ = ["NMTModule", "Translations"]

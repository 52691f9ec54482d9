"""LightningModules and callbacks: what trains, and when retrieval is prepared and used."""

from lightning_knnmt.training.callbacks import (
    ModelCheckpoint,
    ProgressBar,
    TrainingCost,
    TrainingReport,
)
from lightning_knnmt.training.datastore_training import TrainOnDatastore
from lightning_knnmt.training.divergence import NonFiniteLossError
from lightning_knnmt.training.finetuners import AdapterFineTuner, FullFineTuner, LoRAFineTuner
from lightning_knnmt.training.knn_callback import (
    KNNCallback,
    knn_callback,
    load_best_weights,
    precision_of,
)
from lightning_knnmt.training.nmt import NMTModule
from lightning_knnmt.training.opl import OPLFineTuner
from lightning_knnmt.training.precision import TrainingAutocast
from lightning_knnmt.training.projection_loss import FrozenMass, projection_loss

__all__ = [
    "AdapterFineTuner",
    "FrozenMass",
    "FullFineTuner",
    "KNNCallback",
    "LoRAFineTuner",
    "ModelCheckpoint",
    "NMTModule",
    "NonFiniteLossError",
    "OPLFineTuner",
    "ProgressBar",
    "TrainOnDatastore",
    "TrainingAutocast",
    "TrainingCost",
    "TrainingReport",
    "knn_callback",
    "load_best_weights",
    "precision_of",
    "projection_loss",
]

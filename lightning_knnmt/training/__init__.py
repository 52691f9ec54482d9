"""LightningModules and callbacks: what trains, and when retrieval is prepared and used."""

from lightning_knnmt.training.building import build_datastore, ensure_datastore
from lightning_knnmt.training.combiner_choice import CombinerChoice, ReadyCombiner
from lightning_knnmt.training.combiners import AdaptiveChoice, FixedChoice
from lightning_knnmt.training.datastore_training import TrainOnDatastore
from lightning_knnmt.training.divergence import NonFiniteLossError
from lightning_knnmt.training.finetuners import AdapterFineTuner, FullFineTuner, LoRAFineTuner
from lightning_knnmt.training.fingerprint import fingerprint
from lightning_knnmt.training.knn_callback import KNNCallback, Retrieval
from lightning_knnmt.training.nmt import NMTModule, Translations
from lightning_knnmt.training.opl import OPLFineTuner
from lightning_knnmt.training.precision import TrainingAutocast
from lightning_knnmt.training.presets import adaptive_knn, fixed_knn
from lightning_knnmt.training.projection_loss import FrozenMass, projection_loss
from lightning_knnmt.training.ranks import OtherRankError
from lightning_knnmt.training.teacher_forcing import LabelledHidden, keys_from, teacher_forced
from lightning_knnmt.training.training_report import TrainingCost, TrainingReport
from lightning_knnmt.training.validation import ValidationPass, with_retrieval

__all__ = [
    "AdapterFineTuner",
    "AdaptiveChoice",
    "CombinerChoice",
    "FixedChoice",
    "FrozenMass",
    "FullFineTuner",
    "KNNCallback",
    "LabelledHidden",
    "LoRAFineTuner",
    "NMTModule",
    "NonFiniteLossError",
    "OPLFineTuner",
    "OtherRankError",
    "ReadyCombiner",
    "Retrieval",
    "TrainOnDatastore",
    "TrainingAutocast",
    "TrainingCost",
    "TrainingReport",
    "Translations",
    "ValidationPass",
    "adaptive_knn",
    "build_datastore",
    "ensure_datastore",
    "fingerprint",
    "fixed_knn",
    "keys_from",
    "projection_loss",
    "teacher_forced",
    "with_retrieval",
]

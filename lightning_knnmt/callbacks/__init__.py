"""Callbacks decide when; the rooms they call do the work."""

from lightning_knnmt.callbacks.building import build_datastore, ensure_datastore
from lightning_knnmt.callbacks.combiner_choice import CombinerChoice, ReadyCombiner
from lightning_knnmt.callbacks.combiners import AdaptiveChoice, FixedChoice
from lightning_knnmt.callbacks.datastore_training import TrainOnDatastore
from lightning_knnmt.callbacks.fingerprint import fingerprint
from lightning_knnmt.callbacks.knn import KNNCallback, Retrieval
from lightning_knnmt.callbacks.presets import adaptive_knn, fixed_knn
from lightning_knnmt.callbacks.ranks import OtherRankError
from lightning_knnmt.callbacks.teacher_forcing import LabelledHidden, keys_from, teacher_forced
from lightning_knnmt.callbacks.training_report import TrainingCost, TrainingReport
from lightning_knnmt.callbacks.validation import ValidationPass, with_retrieval

__all__ = [
    "AdaptiveChoice",
    "CombinerChoice",
    "FixedChoice",
    "KNNCallback",
    "LabelledHidden",
    "OtherRankError",
    "ReadyCombiner",
    "Retrieval",
    "TrainOnDatastore",
    "TrainingCost",
    "TrainingReport",
    "ValidationPass",
    "adaptive_knn",
    "build_datastore",
    "ensure_datastore",
    "fingerprint",
    "fixed_knn",
    "keys_from",
    "teacher_forced",
    "with_retrieval",
]

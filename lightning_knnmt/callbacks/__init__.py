"""Callbacks decide when; the rooms they call do the work."""

from lightning_knnmt.callbacks.building import build_datastore, ensure_datastore
from lightning_knnmt.callbacks.datastore_training import TrainOnDatastore
from lightning_knnmt.callbacks.fingerprint import fingerprint
from lightning_knnmt.callbacks.knn import KNNCallback, Retrieval
from lightning_knnmt.callbacks.ranks import OtherRankError
from lightning_knnmt.callbacks.teacher_forcing import LabelledHidden, teacher_forced
from lightning_knnmt.callbacks.validation import ValidationPass, with_retrieval

__all__ = [
    "KNNCallback",
    "LabelledHidden",
    "OtherRankError",
    "Retrieval",
    "TrainOnDatastore",
    "ValidationPass",
    "build_datastore",
    "ensure_datastore",
    "fingerprint",
    "teacher_forced",
    "with_retrieval",
]

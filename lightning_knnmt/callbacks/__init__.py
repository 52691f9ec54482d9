"""Callbacks decide when; the rooms they call do the work."""

from lightning_knnmt.callbacks.fingerprint import fingerprint
from lightning_knnmt.callbacks.knn import KNNCallback, Retrieval

__all__ = ["KNNCallback", "Retrieval", "fingerprint"]

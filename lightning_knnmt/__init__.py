"""Domain adaptation of machine translation by retrieval (kNN-MT), by fine-tuning, or both."""

from lightning_knnmt.pretrained import load_pretrained

__all__ = ["load_pretrained"]

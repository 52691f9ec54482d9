"""Published models and our own checkpoints become a Transformer and its tokenizer.

One file reads one format; `load_pretrained` recognises which.
"""

from lightning_knnmt.pretrained.adapters import AdapterError, load_adapters, save_adapters
from lightning_knnmt.pretrained.checkpoint import (
    CheckpointError,
    check_fits,
    checkpoint_entry,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from lightning_knnmt.pretrained.fairseq import load_fairseq
from lightning_knnmt.pretrained.fairseq_checkpoint import FairseqError
from lightning_knnmt.pretrained.huggingface import load_huggingface, load_huggingface_model
from lightning_knnmt.pretrained.huggingface_files import HuggingFaceError
from lightning_knnmt.pretrained.load import Pretrained, UnknownFormatError, load_pretrained
from lightning_knnmt.pretrained.marian import load_marian
from lightning_knnmt.pretrained.marian_binary import MarianError

__all__ = [
    "AdapterError",
    "CheckpointError",
    "FairseqError",
    "HuggingFaceError",
    "MarianError",
    "Pretrained",
    "UnknownFormatError",
    "check_fits",
    "checkpoint_entry",
    "load_adapters",
    "load_checkpoint",
    "load_fairseq",
    "load_huggingface",
    "load_huggingface_model",
    "load_marian",
    "load_pretrained",
    "read_checkpoint",
    "save_adapters",
    "save_checkpoint",
]

"""The Transformer: tensors in, hidden states out.

It knows nothing of files, training loops or retrieval. `Transformer.forward` returns the vectors
that the output projection layer sees, not logits: what turns them into words is the decoding room's
business.
"""

from lightning_knnmt.models.adapter import BottleneckAdapter, LowRankUpdate
from lightning_knnmt.models.layers import DecoderCache
from lightning_knnmt.models.positions import sinusoidal_table
from lightning_knnmt.models.settings import digest
from lightning_knnmt.models.transformer import (
    KEY_LAYERS,
    DecoderStates,
    KeyLayer,
    Memory,
    Transformer,
)

__all__ = [
    "KEY_LAYERS",
    "BottleneckAdapter",
    "DecoderCache",
    "DecoderStates",
    "KeyLayer",
    "LowRankUpdate",
    "Memory",
    "Transformer",
    "digest",
    "sinusoidal_table",
]

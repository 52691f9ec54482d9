"""The Transformer: tensors in, decoder states out.

It knows nothing about files, training loops or retrieval. `Transformer.forward` returns the inputs
of the output projection, not logits; `decoding` turns them into words.
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

"""One number for a model's settings and weights, to tell whether another model is the same."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(settings: Any, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of plain settings and named tensors, bit for bit, whatever device they are on.

    Returns:
        64 hexadecimal digits.
    """
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()

"""What a datastore must know of the model that made its keys."""

import hashlib
import json

import torch

from lightning_knnmt.models import Transformer


def fingerprint(model: Transformer, precision: str = "32-true") -> str:
    """Digest of everything that shapes a key: two models with one fingerprint make the same keys.

    The output projection comes after the key, so its weights are left out: tuning it alone keeps a
    datastore valid, while adapters or full fine-tuning change the fingerprint. The rule is bitwise.

    Args:
        model: The model whose hidden states are keys.
        precision: Lightning's name of the arithmetic ("32-true", "bf16-mixed", ...), which changes
            the keys as much as a weight does.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps([precision, model.config], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("output_projection."):
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()

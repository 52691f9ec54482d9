"""Which settings a Transformer takes, and a digest of settings and weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_knnmt.models.layers import ACTIVATIONS


def check_settings(config: dict[str, Any]) -> None:
    """Raises ValueError if an architecture is impossible."""
    choices = {
        "activation": tuple(ACTIVATIONS),
        "norm": ("post", "pre"),
        "positions": ("sinusoidal", "sinusoidal_paper", "learned"),
        "decoder_cell": ("attention", "ssru"),
        "tied_embeddings": ("all", "decoder", "embeddings", "none"),
    }
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise ValueError(f"{name} is {config[name]!r}; choose one of {', '.join(allowed)}.")
    model_dim, num_heads = config["model_dim"], config["num_heads"]
    if model_dim % num_heads or model_dim % 2:
        raise ValueError(
            f"model_dim {model_dim} cannot be divided among {num_heads} heads: choose an even "
            "multiple of num_heads."
        )
    if config["decoder_layers"] < 1:
        raise ValueError(f"decoder_layers is {config['decoder_layers']}; choose at least 1.")
    if config["source_vocab_size"] is not None:
        if config["tied_embeddings"] in ("all", "embeddings"):
            raise ValueError(
                f"source_vocab_size is {config['source_vocab_size']}, but tied_embeddings "
                f"{config['tied_embeddings']!r} makes source and target embedding one matrix: "
                "choose 'decoder' or 'none'."
            )
        if config["pad_id"] >= config["source_vocab_size"]:
            raise ValueError(
                f"pad_id {config['pad_id']} is outside the source vocabulary of "
                f"{config['source_vocab_size']} ids."
            )
    for name in ("pad_id", "start_id", "eos_id"):
        if not 0 <= config[name] < config["vocab_size"]:
            raise ValueError(
                f"{name} {config[name]} is outside the vocabulary of {config['vocab_size']} ids."
            )


def digest(settings: Any, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of plain settings and named tensors, bit for bit, on any device.

    Returns:
        64 hexadecimal digits.
    """
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()

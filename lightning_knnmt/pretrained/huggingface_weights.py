"""The weights of a Hugging Face model under our names, and what they say of the architecture."""

from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_knnmt.models import sinusoidal_table
from lightning_knnmt.pretrained.huggingface_config import FAMILIES
from lightning_knnmt.pretrained.huggingface_files import CONFIG, HuggingFaceError, Weights

# The logit of a token that the directory forbids to generate (bad_words_ids).
NEVER = -1e4


class NamedWeights(Protocol):
    """Weights under Hugging Face's names; `huggingface_files.Weights` explains the methods."""

    def __contains__(self, name: str) -> bool: ...

    def take(self, *names: str) -> Tensor: ...


def read_state(
    config: dict[str, Any], weights: Weights
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All weights.

    Returns:
        Arguments of `Transformer` that the weights decide, and its state dict.
    """
    architecture, state = read_embeddings(config, weights)
    architecture |= _read_positions(config, weights, state)
    for side in ("encoder", "decoder"):
        read_layers(side, config[f"{side}_layers"], weights, state)
        architecture[f"{side}_ffn_dim"] = len(state[f"{side}_layers.0.ffn.up.weight"])
        if FAMILIES[config["model_type"]].norm == "pre":
            for part in ("weight", "bias"):
                state[f"{side}_norm.{part}"] = weights.take(f"model.{side}.layer_norm.{part}")
    _refuse_leftovers(weights)
    return architecture, state


def read_embeddings(
    config: dict[str, Any], weights: NamedWeights
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both embeddings, the output projection, and which of them are one."""
    places = {
        "target_embedding": ("model.decoder.embed_tokens", "model.shared"),
        "source_embedding": (
            *("model.encoder.embed_tokens", "model.shared"),
            "model.decoder.embed_tokens",
        ),
        "output_projection": (
            *("lm_head", "model.decoder.output_projection"),
            *("model.decoder.embed_tokens", "model.shared"),
        ),
    }
    state: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    target = None
    for ours, theirs in places.items():
        present = [f"{name}.weight" for name in theirs if f"{name}.weight" in weights]
        name = present[0] if present else f"{theirs[-1]}.weight"
        if name not in read:
            read[name] = weights.take(name)
        tensor = read[name]
        # One tensor in several places is one in memory too, however often the files hold it.
        if target is None:
            target = tensor
        state[f"{ours}.weight"] = (
            target if tensor is target or torch.equal(tensor, target) else tensor
        )
    source, output = state["source_embedding.weight"], state["output_projection.weight"]
    tied = ("all" if source is target else "decoder") if output is target else "none"
    if tied == "none" and source is target:  # two matrices of ours, equal for now
        state["source_embedding.weight"] = source.clone()

    biased = "final_logits_bias" in weights or bool(config.get("bad_words_ids"))
    if biased:
        bias = torch.zeros(len(output))
        if "final_logits_bias" in weights:
            bias = weights.take("final_logits_bias").flatten()
        for words in config.get("bad_words_ids") or []:
            if len(words) == 1 and words[0] < len(bias):
                bias[words[0]] = NEVER
        state["output_projection.bias"] = bias
    architecture = {
        "vocab_size": len(output),
        "source_vocab_size": None if len(source) == len(output) else len(source),
        "tied_embeddings": tied,
        "output_bias": biased,
    }
    return architecture, state


def _read_positions(
    config: dict[str, Any], weights: Weights, state: dict[str, Tensor]
) -> dict[str, Any]:
    """The kind of positions; old MarianMT files hold the table, which counts as it stands."""
    family = FAMILIES[config["model_type"]]
    names = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    if config["model_type"] != "marian" or not all(name in weights for name in names):
        return {"positions": family.positions}
    tables = [weights.take(name) for name in names]
    for kind in ("sinusoidal_paper", "sinusoidal"):
        computed = sinusoidal_table(len(tables[0]), config["d_model"], kind)
        if all(
            t.shape == computed.shape and torch.allclose(t, computed, atol=1e-5) for t in tables
        ):
            return {"positions": kind}
    state["source_positions.table"], state["target_positions.table"] = tables
    return {"positions": "learned"}


def read_layers(side: str, count: int, weights: NamedWeights, state: dict[str, Tensor]) -> None:
    """The layers of encoder or decoder under our names."""

    def linear(ours: str, *theirs: str) -> None:
        for part in ("weight", "bias"):
            state[f"{ours}.{part}"] = weights.take(*(f"{name}.{part}" for name in theirs))

    for i in range(count):
        ours, theirs = f"{side}_layers.{i}", f"model.{side}.layers.{i}"
        cell, attention = ("attention" if side == "encoder" else "cell"), f"{theirs}.self_attn"
        parts = [f"{attention}.{each}_proj" for each in "qkv"]
        linear(f"{ours}.{cell}.query_key_value", *parts)
        linear(f"{ours}.{cell}.output", f"{attention}.out_proj")
        linear(f"{ours}.{cell}_residual.norm", f"{theirs}.self_attn_layer_norm")
        if side == "decoder":
            ours_cross, cross = f"{ours}.cross_attention", f"{theirs}.encoder_attn"
            linear(f"{ours_cross}.query", f"{cross}.q_proj")
            linear(f"{ours_cross}.key_value", f"{cross}.k_proj", f"{cross}.v_proj")
            linear(f"{ours_cross}.output", f"{cross}.out_proj")
            linear(f"{ours}.cross_residual.norm", f"{theirs}.encoder_attn_layer_norm")
        linear(f"{ours}.ffn.up", f"{theirs}.fc1")
        linear(f"{ours}.ffn.down", f"{theirs}.fc2")
        linear(f"{ours}.ffn_residual.norm", f"{theirs}.final_layer_norm")


def _refuse_leftovers(weights: Weights) -> None:
    """Weights without a place mean another architecture than the configuration says."""
    computed = ("embed_positions.weight", "embed_positions.weights", "_float_tensor", ".version")
    copies = ("model.shared.weight", "embed_tokens.weight")
    leftover = sorted(n for n in weights.unused if not n.endswith((*computed, *copies)))
    if leftover:
        raise HuggingFaceError(
            f"The weights in {weights.directory} hold {len(leftover)} tensors, {leftover[0]} "
            f"first, for which the architecture of its {CONFIG} has no place; get the files again."
        )

"""Hugging Face directories (`save_pretrained`, or a copy of a model of the hub).

MarianMT (OPUS-MT; Tiedemann & Thottingal, 2020), FSMT (fairseq's WMT19 models; Ng et al., 2019,
arXiv:1907.06616), M2M-100 (Fan et al., 2020, arXiv:2010.11125) and NLLB-200, which has its
architecture. The weights keep their values; `FAMILIES` holds what differs between the families.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.models import Transformer, sinusoidal_table
from lightning_knnmt.pretrained.huggingface_files import (
    CONFIG,
    HuggingFaceError,
    Weights,
    read_json,
)
from lightning_knnmt.pretrained.huggingface_tokenizer import Languages, read_tokenizer

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}


class Family(NamedTuple):
    """What a family's configuration does not state, or omits if it is the default."""

    models: str
    norm: Literal["post", "pre"]
    positions: Literal["sinusoidal", "sinusoidal_paper"]
    first_position_after_pad: bool  # fairseq's tables begin with the rows up to the padding id
    defaults: dict[str, Any]


FAIRSEQ_IDS = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
FAMILIES = {
    "marian": Family(
        "MarianMT (OPUS-MT)",
        norm="post",
        positions="sinusoidal_paper",
        first_position_after_pad=False,
        defaults={"scale_embedding": False, "activation_function": "gelu"},
    ),
    "fsmt": Family(
        "FSMT (WMT19)",
        norm="post",
        positions="sinusoidal",
        first_position_after_pad=True,
        defaults={"scale_embedding": True, "activation_function": "relu", **FAIRSEQ_IDS},
    ),
    "m2m_100": Family(
        "M2M-100 and NLLB",
        norm="pre",
        positions="sinusoidal",
        first_position_after_pad=True,
        defaults={"scale_embedding": True, "activation_function": "relu", **FAIRSEQ_IDS},
    ),
}


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration with its defaults; raises if the family is not supported."""
    path = directory / CONFIG
    config = read_json(path)
    type_ = config.get("model_type")
    if type_ not in FAMILIES:
        supported = ", ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        raise HuggingFaceError(
            f"{path} has model_type {type_!r} (architectures {config.get('architectures')}), which "
            f"is not supported; supported are {supported}."
        )
    generation = directory / "generation_config.json"
    overriding = read_json(generation) if generation.is_file() else {}
    names = ("decoder_start_token_id", "bad_words_ids")
    given = {name: overriding[name] for name in names if overriding.get(name) is not None}
    config = {**FAMILIES[type_].defaults, **config, **given}
    integers = {"d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads"}
    ids = {"pad_token_id", "eos_token_id", "decoder_start_token_id"}
    for name in sorted(integers | ids | {"max_position_embeddings"}):
        value, least = config.get(name), 0 if name in ids else 1
        if type(value) is not int or value < least:
            raise HuggingFaceError(
                f"{path} has {name}: {value!r}, which must be an integer of at least {least}."
            )
    heads = config["encoder_attention_heads"], config.get("decoder_attention_heads")
    if heads[0] != heads[1]:
        raise HuggingFaceError(
            f"{path} has {heads[0]} encoder_attention_heads and {heads[1]} "
            "decoder_attention_heads; only equal values are supported."
        )
    if config["activation_function"] not in list(ACTIVATIONS):
        raise HuggingFaceError(
            f"{path} has activation_function: {config['activation_function']!r}; supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    return config


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Transformer` from the configuration."""
    family = FAMILIES[config["model_type"]]
    offset = config["pad_token_id"] + 1 if family.first_position_after_pad else 0
    return {
        "pad_id": config["pad_token_id"],
        "start_id": config["decoder_start_token_id"],
        "eos_id": config["eos_token_id"],
        "model_dim": config["d_model"],
        "num_heads": config["encoder_attention_heads"],
        "encoder_layers": config["encoder_layers"],
        "decoder_layers": config["decoder_layers"],
        "dropout": config.get("dropout", 0.1),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "activation_dropout": config.get("activation_dropout", 0.0),
        "activation": ACTIVATIONS[config["activation_function"]],
        "norm": family.norm,
        "position_offset": offset,
        "max_positions": config["max_position_embeddings"],
        "scale_embedding": config["scale_embedding"],
    }


# The logit of tokens that must not be generated (bad_words_ids).
NEVER = -1e4


class NamedWeights(Protocol):
    """Weights under Hugging Face's names, as in `huggingface_files.Weights`."""

    def __contains__(self, name: str) -> bool: ...

    def take(self, *names: str) -> Tensor: ...


def read_state(
    config: dict[str, Any], weights: Weights
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads all weights.

    Returns:
        Arguments of `Transformer` that follow from the weights, and its state dict.
    """
    architecture, state = read_embeddings(config, weights)
    architecture |= _read_positions(config, weights, state)
    for side in ("encoder", "decoder"):
        read_layers(side, config[f"{side}_layers"], weights, state)
        architecture[f"{side}_ffn_dim"] = len(state[f"{side}_layers.0.ffn.up.weight"])
        if FAMILIES[config["model_type"]].norm == "pre":
            for part in ("weight", "bias"):
                state[f"{side}_norm.{part}"] = weights.take(f"model.{side}.layer_norm.{part}")
    _reject_leftovers(weights)
    return architecture, state


def read_embeddings(
    config: dict[str, Any], weights: NamedWeights
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both embeddings, the output projection, and which of them are tied."""
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
        # Equal matrices become one tensor, even if the files hold several copies.
        if target is None:
            target = tensor
        state[f"{ours}.weight"] = (
            target if tensor is target or torch.equal(tensor, target) else tensor
        )
    source, output = state["source_embedding.weight"], state["output_projection.weight"]
    tied = ("all" if source is target else "decoder") if output is target else "none"
    if tied == "none" and source is target:  # separate parameters with equal values
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
    """The kind of positions; tables in old MarianMT files are used unchanged."""
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


def _reject_leftovers(weights: Weights) -> None:
    """Raises if weights are left over: the architecture is not the one stated."""
    computed = ("embed_positions.weight", "embed_positions.weights", "_float_tensor", ".version")
    copies = ("model.shared.weight", "embed_tokens.weight")
    leftover = sorted(n for n in weights.unused if not n.endswith((*computed, *copies)))
    if leftover:
        raise HuggingFaceError(
            f"The weights in {weights.directory} hold {len(leftover)} tensors, {leftover[0]} "
            f"first, that the architecture in its {CONFIG} does not have; get the files again."
        )


def is_huggingface(path: Path) -> bool:
    """Whether the path is a directory with a config.json."""
    return path.is_dir() and (path / CONFIG).is_file()


def load_huggingface(
    path: Path | str, *, source_lang: str | None = None, target_lang: str | None = None
) -> tuple[Transformer, Tokenizer]:
    """Reads a model and its tokenizer.

    Args:
        path: The directory.
        source_lang: The source's language code, for models that translate from many.
        target_lang: The target's, for models that translate into many.

    Raises:
        HuggingFaceError: If a file is damaged or absent, or architecture or language unknown.
    """
    directory = Path(path)
    model = load_huggingface_model(directory)
    family = read_config(directory)["model_type"]
    tokenizer = read_tokenizer(directory, family, model, Languages(source_lang, target_lang))
    return model, tokenizer


def load_huggingface_model(path: Path | str) -> Transformer:
    """Reads a model without its tokenizer, in evaluation mode; half precision becomes float32.

    Raises:
        HuggingFaceError: If a file is damaged or absent, or the architecture is not supported.
    """
    directory = Path(path)
    config = read_config(directory)
    weights = Weights(directory)
    architecture, state = read_state(config, weights)
    try:
        return Transformer.assemble(settings(config) | architecture, state)
    except ValueError as error:
        raise HuggingFaceError(f"{directory / CONFIG}: {error}") from error

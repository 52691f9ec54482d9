"""What a Hugging Face config.json says of a model, for the families that we read."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_knnmt.pretrained.huggingface_files import CONFIG, HuggingFaceError, read_json

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}


class Family(NamedTuple):
    """What a family does not say in its configuration, or leaves out where it is the default."""

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
    """The configuration, completed, once it is of a supported family."""
    path = directory / CONFIG
    config = read_json(path)
    type_ = config.get("model_type")
    if type_ not in FAMILIES:
        supported = ", ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        raise HuggingFaceError(
            f"{path} says model_type {type_!r} (architectures {config.get('architectures')}), "
            f"which is not supported; supported are {supported}."
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
            "decoder_attention_heads; only equal numbers are supported."
        )
    if config["activation_function"] not in list(ACTIVATIONS):
        raise HuggingFaceError(
            f"{path} has activation_function: {config['activation_function']!r}; supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    return config


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments that stand in the configuration."""
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

"""The settings and weights of a fairseq Transformer under our names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_knnmt.data.fairseq.dictionary import EOS_ID, PAD_ID
from lightning_knnmt.models import sinusoidal_table
from lightning_knnmt.pretrained.fairseq_checkpoint import Checkpoint, FairseqError
from lightning_knnmt.pretrained.huggingface_weights import read_embeddings, read_layers
from lightning_knnmt.pretrained.tensor_file import read_tensor

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu"}
SUPPORTED = (
    "supported are transformer and its variants by size, such as transformer_iwslt_de_en, "
    "transformer_wmt_en_de_big or transformer_wmt19_de_en"
)
# Models of other parts whose names begin like those of the supported.
OTHER_TRANSFORMERS = (
    "transformer_lm",
    "transformer_from_pretrained",
    "transformer_monotonic",
    "transformer_pointer_generator",
)
# What changes the computation, and is not supported where it is set.
UNSUPPORTED = (
    "layernorm_embedding",
    "adaptive_softmax_cutoff",
    "adaptive_input",
    "no_token_positional_embeddings",
    "no_decoder_final_norm",
    "no_cross_attention",
    "cross_self_attention",
    "encoder_layers_to_keep",
    "decoder_layers_to_keep",
)
SIDES = ("encoder", "decoder")
OUTPUT = "decoder.output_projection.weight"
OLD_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
# Markers, computed tables, the second copies that version 0.12 keeps of its encoder's first (and
# never trains), and the network that adaptive kNN-MT trains beside the model.
IGNORED = re.compile(
    r".*\.version|.*\.embed_positions\.(_float_tensor|weights)|"
    r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)|"
    r"decoder\.retrieve_result_to_k_and_lambda\..*"
)
FUSED = re.compile(r"(.*_attn)\.in_proj_(weight|bias)")
OLD_NORM = re.compile(r"(encoder|decoder)(\.layers\.\d+)\.layer_norms\.([012])\.(weight|bias)")


class FairseqWeights:
    """The weights under Hugging Face's names, which are those of fairseq's newest version.

    Attributes:
        unused: Names that nobody has asked for yet.
    """

    def __init__(self, weights: Mapping[str, Tensor], path: Path) -> None:
        self._path = path
        self._weights = {f"model.{name}": tensor for name, tensor in modernize(weights).items()}
        self.unused = set(self._weights)

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def take(self, *names: str) -> Tensor:
        """One tensor, or several one after the other, as float32 in memory of its own.

        Raises:
            FairseqError: If the checkpoint lacks it.
        """
        for name in names:
            if name not in self._weights:
                raise FairseqError(
                    f"{self._path} lacks {name.removeprefix('model.')}, which its settings call "
                    "for; the file is of another architecture than it says, or damaged."
                )
            self.unused.discard(name)
        tensors = [read_tensor(self._path, self._weights[name]) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def modernize(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of fairseq 0.12, whatever version saved them."""
    modern: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if IGNORED.fullmatch(name):
            continue
        if match := FUSED.fullmatch(name):
            for each, part in zip("qkv", tensor.chunk(3), strict=True):
                modern[f"{match[1]}.{each}_proj.{match[2]}"] = part
        elif match := OLD_NORM.fullmatch(name):
            side, layer, number, part_name = match.groups()
            modern[f"{side}{layer}.{OLD_NORMS[side][int(number)]}.{part_name}"] = tensor
        else:
            modern[OUTPUT if name == "decoder.embed_out" else name] = tensor
    return modern


def read_transformer(
    checkpoint: Checkpoint, path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All weights.

    Returns:
        Arguments of `Transformer`, and its state dict.

    Raises:
        FairseqError: If the architecture is another, or weights are missing or left over.
    """
    settings = checkpoint.settings
    architecture = _read_settings(settings, path)
    weights = FairseqWeights(checkpoint.weights, path)
    shared = ("share_all_embeddings", "share_decoder_input_output_embed")
    if not any(settings.get(name) for name in shared):
        weights.take(f"model.{OUTPUT}")  # refuses its absence: nothing stands for it
    sizes, state = read_embeddings({}, weights)
    architecture |= sizes | _read_positions(settings, architecture, weights, state)
    for side in SIDES:
        read_layers(side, architecture[f"{side}_layers"], weights, state)
        architecture[f"{side}_ffn_dim"] = len(state[f"{side}_layers.0.ffn.up.weight"])
        if architecture["norm"] == "pre":
            for part in ("weight", "bias"):
                state[f"{side}_norm.{part}"] = weights.take(f"model.{side}.layer_norm.{part}")
    if weights.unused:
        first = min(weights.unused).removeprefix("model.")
        raise FairseqError(
            f"{path} holds {len(weights.unused)} tensors, {first} first, for which a Transformer "
            f"with its settings has no place: its architecture is another; {SUPPORTED}."
        )
    return architecture, state


def _read_settings(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Our constructor's arguments, except those that the weights decide."""
    arch, task = str(settings.get("arch")), settings.get("task")
    if not arch.startswith("transformer") or arch.startswith(OTHER_TRANSFORMERS):
        raise FairseqError(f"{path} has the architecture {arch}, which is not read; {SUPPORTED}.")
    if task not in (None, "translation"):
        raise FairseqError(
            f"{path} was trained for the task {task}; supported is translation, of one language "
            "into one other."
        )
    for name in UNSUPPORTED:
        if settings.get(name):
            raise FairseqError(
                f"{path} has {name}: {settings[name]!r}, which is not supported; only models "
                "without it are."
            )
    activation = settings.get("activation_fn", "relu")
    if activation not in list(ACTIVATIONS):
        raise FairseqError(
            f"{path} has activation_fn: {activation!r}; supported are {', '.join(ACTIVATIONS)}."
        )
    for name in ("embed_dim", "attention_heads", "normalize_before"):
        ours, theirs = (settings.get(f"{side}_{name}") for side in SIDES)
        if ours != theirs:
            raise FairseqError(
                f"{path} has encoder_{name} {ours} and decoder_{name} {theirs}; only equal ones "
                "are supported."
            )
    names = ("encoder_embed_dim", "encoder_attention_heads", "encoder_layers", "decoder_layers")
    for name in names:
        if type(settings.get(name)) is not int or settings[name] < 1:
            raise FairseqError(
                f"{path} has {name}: {settings.get(name)!r}, which must be a positive integer."
            )
    positions = [
        int(settings.get(f"max_{side}_positions") or 1024) for side in ("source", "target")
    ]
    return {
        "pad_id": PAD_ID,
        "start_id": EOS_ID,
        "eos_id": EOS_ID,
        "model_dim": settings["encoder_embed_dim"],
        "num_heads": settings["encoder_attention_heads"],
        "encoder_layers": settings["encoder_layers"],
        "decoder_layers": settings["decoder_layers"],
        "dropout": float(settings.get("dropout", 0.1)),
        "attention_dropout": float(settings.get("attention_dropout") or 0.0),
        "activation_dropout": float(
            settings.get("activation_dropout") or settings.get("relu_dropout") or 0.0
        ),
        "activation": ACTIVATIONS[activation],
        "norm": "pre" if settings.get("encoder_normalize_before") else "post",
        "position_offset": PAD_ID + 1,
        "max_positions": min(positions),
        "scale_embedding": not settings.get("no_scale_embedding"),
    }


def _read_positions(
    settings: Mapping[str, Any],
    architecture: Mapping[str, Any],
    weights: FairseqWeights,
    state: dict[str, Tensor],
) -> dict[str, Any]:
    """The kind of positions; if one side's are learned, the other's waves become a table too."""
    learned = [bool(settings.get(f"{side}_learned_pos")) for side in SIDES]
    if not any(learned):
        return {"positions": "sinusoidal"}
    rows = architecture["position_offset"] + architecture["max_positions"]
    for side, ours, is_learned in zip(SIDES, ("source", "target"), learned, strict=True):
        name = f"{ours}_positions.table"
        if is_learned:
            state[name] = weights.take(f"model.{side}.embed_positions.weight")[:rows]
        else:
            state[name] = sinusoidal_table(rows, architecture["model_dim"])
    return {"positions": "learned"}

"""Marian's binary models (Junczys-Dowmunt et al., 2018, arXiv:1804.00344), as Bergamot and Firefox
Translations publish them: 8-bit integer weights, a shared vocabulary, a decoder of SSRU cells.

The container is read in `marian_binary`; here its arrays become a Transformer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_knnmt.data import SentencePieceTokenizer
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.marian_binary import (
    Item,
    MarianError,
    Weights,
    read_items,
)

CONFIGURATION = "special:model.yml"
SUPPORTED = (
    "supported are Bergamot / Firefox Translations models: post-norm Transformers with an SSRU "
    "decoder, sinusoidal positions and all embeddings tied"
)
# The settings that decide what the weights mean; the sizes are read elsewhere.
REQUIRED: dict[str, Any] = {
    "type": "transformer",
    "dec-cell": "ssru",
    "transformer-decoder-autoreg": "rnn",
    "tied-embeddings-all": True,
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-top": "",
    "transformer-train-position-embeddings": False,
    "transformer-no-projection": False,
    "transformer-ffn-depth": 2,
    "transformer-tied-layers": [],
    "output-omit-bias": False,
    "right-left": False,
    "input-types": [],
    "lemma-dim-emb": 0,
    "ulr": False,
}
ACTIVATIONS = {"relu": "relu", "swish": "silu", "gelu": "gelu"}
# Marian has no mask for the padding row, hence a logit that no search ever chooses.
NEVER = -1e4


def is_marian(path: Path) -> bool:
    """Whether the path is a Marian binary, or a directory that holds one."""
    if path.is_dir():
        return any(path.glob("model.*.bin"))
    return path.is_file() and path.suffix == ".bin"


def load_marian(path: Path | str) -> tuple[Transformer, SentencePieceTokenizer]:
    """Reads a model and its vocabulary; int8 weights become float32.

    The vocabulary gets one more id after its last piece, padding and start at once, whose embedding
    is zero.

    Args:
        path: A directory with one model.*.bin and its vocab.*.spm, or the path of the .bin in it.

    Raises:
        MarianError: If the file is damaged or incomplete, or the architecture is another.
    """
    model_path, vocabulary_path = _find_files(Path(path))
    items = read_items(model_path)
    config = _read_config(items, model_path)
    tokenizer = SentencePieceTokenizer.from_file(vocabulary_path)
    vocabulary = tokenizer.vocabulary
    weights = Weights(items, model_path)

    num_pieces, model_dim = weights.embedding().shape
    if num_pieces + 1 != vocabulary.size:
        raise MarianError(
            f"{model_path} has {num_pieces} embeddings, but {vocabulary_path} has "
            f"{vocabulary.size - 1} pieces: they do not belong together."
        )
    num_heads = config["transformer-heads"]
    if model_dim % num_heads:
        raise MarianError(
            f"{model_path} has {num_heads} heads (transformer-heads), among which the embedding's "
            f"{model_dim} dimensions cannot be divided evenly; the file is damaged."
        )
    state = _state_dict(weights, config["enc-depth"], config["dec-depth"])
    # The sizes come from the arrays, so that no number of the configuration can claim memory.
    model = Transformer(
        vocab_size=vocabulary.size,
        pad_id=vocabulary.pad_id,
        start_id=vocabulary.start_id,
        eos_id=vocabulary.eos_id,
        model_dim=model_dim,
        num_heads=num_heads,
        encoder_layers=config["enc-depth"],
        decoder_layers=config["dec-depth"],
        encoder_ffn_dim=len(state["encoder_layers.0.ffn.up.weight"]),
        decoder_ffn_dim=len(state["decoder_layers.0.ffn.up.weight"]),
        # Students are trained without it, and cannot stand it: 0.1 takes the loss from 2.7 to 15.7.
        dropout=0.0,
        activation=ACTIVATIONS[config["transformer-ffn-activation"]],  # type: ignore[arg-type]
        norm="post",
        layer_norm_eps=1e-6,
        positions="sinusoidal",
        decoder_cell="ssru",
        tied_embeddings="all",
        output_bias=True,
        scale_embedding=True,
    )
    for name, expected in model.state_dict().items():
        if state[name].shape != expected.shape:
            raise MarianError(
                f"{model_path} is damaged: the weights that make {name} have shape "
                f"{list(state[name].shape)}, where the others call for {list(expected.shape)}."
            )
    model.load_state_dict(state)
    return model.eval(), tokenizer


def _state_dict(weights: Weights, encoder_depth: int, decoder_depth: int) -> dict[str, Tensor]:
    """The weights under our names."""
    embedding = weights.embedding()
    embedding = torch.cat([embedding, torch.zeros(1, embedding.shape[1])])
    bias = weights.vectors("decoder_ff_logit_out_b")
    state = {
        "source_embedding.weight": embedding,
        "target_embedding.weight": embedding,
        "output_projection.weight": embedding,
        "output_projection.bias": torch.cat([bias, torch.tensor([NEVER])]),
    }

    def linear(ours: str, theirs: str, matrices: str, biases: str) -> None:
        state[f"{ours}.weight"] = weights.matrices(*(f"{theirs}_W{each}" for each in matrices))
        state[f"{ours}.bias"] = weights.vectors(*(f"{theirs}_b{each}" for each in biases))

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.norm.weight"] = weights.vectors(f"{theirs}_ln_scale")
        state[f"{ours}.norm.bias"] = weights.vectors(f"{theirs}_ln_bias")

    def feed_forward(ours: str, theirs: str) -> None:
        linear(f"{ours}.ffn.up", f"{theirs}_ffn", "1", "1")
        linear(f"{ours}.ffn.down", f"{theirs}_ffn", "2", "2")
        norm(f"{ours}.ffn_residual", f"{theirs}_ffn_ffn")

    for i in range(encoder_depth):
        ours, theirs = f"encoder_layers.{i}", f"encoder_l{i + 1}"
        linear(f"{ours}.attention.query_key_value", f"{theirs}_self", "qkv", "qkv")
        linear(f"{ours}.attention.output", f"{theirs}_self", "o", "o")
        norm(f"{ours}.attention_residual", f"{theirs}_self_Wo")
        feed_forward(ours, theirs)
    for i in range(decoder_depth):
        ours, theirs = f"decoder_layers.{i}", f"decoder_l{i + 1}"
        cell = weights.matrices(f"{theirs}_rnn_W", f"{theirs}_rnn_Wf")
        state[f"{ours}.cell.candidate_forget.weight"] = cell
        state[f"{ours}.cell.forget_bias"] = weights.vectors(f"{theirs}_rnn_bf")
        norm(f"{ours}.cell_residual", f"{theirs}_rnn_ffn")
        linear(f"{ours}.cross_attention.query", f"{theirs}_context", "q", "q")
        linear(f"{ours}.cross_attention.key_value", f"{theirs}_context", "kv", "kv")
        linear(f"{ours}.cross_attention.output", f"{theirs}_context", "o", "o")
        norm(f"{ours}.cross_residual", f"{theirs}_context_Wo")
        feed_forward(ours, theirs)
    return state


def _read_config(items: Mapping[str, Item], path: Path) -> dict[str, Any]:
    """The model's own configuration, once it is one of the supported."""
    if CONFIGURATION not in items:
        raise MarianError(f"{path} holds no configuration ({CONFIGURATION}); {SUPPORTED}.")
    item = items[CONFIGURATION]
    try:
        config = yaml.safe_load(bytes(item.data).rstrip(b"\0").decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MarianError(
            f"{path} is damaged: its configuration, at byte {item.offset:,}, is not YAML; get the "
            "file again."
        ) from error
    settings = config if isinstance(config, dict) else {}
    for name, required in REQUIRED.items():
        if settings.get(name) != required:
            raise MarianError(
                f"{path} has {name}: {settings.get(name)!r}, where {required!r} is needed; "
                f"{SUPPORTED}."
            )
    activation = settings.get("transformer-ffn-activation")
    if activation not in list(ACTIVATIONS):
        raise MarianError(
            f"{path} has transformer-ffn-activation: {activation!r}; supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    for name in ("enc-depth", "dec-depth", "transformer-heads"):
        value = settings.get(name)
        if type(value) is not int or value < 1:
            raise MarianError(f"{path} has {name}: {value!r}, which must be a positive integer.")
    return settings


def _find_files(path: Path) -> tuple[Path, Path]:
    """The model's file and its vocabulary's."""
    directory = path if path.is_dir() else path.parent
    models = sorted(path.glob("model.*.bin")) if path.is_dir() else [path]
    if len(models) != 1:
        raise MarianError(
            f"{path} holds {len(models)} files model.*.bin; give the path of the one that is meant."
        )
    pair = models[0].name.split(".")[1]  # "pten" in model.pten.intgemm.alphas.bin
    vocabularies = sorted(directory.glob("vocab.*.spm"))
    named_alike = [each for each in vocabularies if each.name == f"vocab.{pair}.spm"]
    chosen = named_alike or vocabularies
    if len(chosen) != 1:
        raise MarianError(
            f"{directory} holds {len(chosen)} files vocab.*.spm, where {models[0].name} needs one "
            f"shared vocabulary, vocab.{pair}.spm."
        )
    return models[0], chosen[0]

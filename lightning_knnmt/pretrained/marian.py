"""Marian's binary models (Junczys-Dowmunt et al., 2018, arXiv:1804.00344), as Bergamot and Firefox
Translations publish them: 8-bit integer weights, a decoder of SSRU cells, one vocabulary or two.

`marian_binary` reads the container; this module turns its arrays into a Transformer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_knnmt.data import (
    PieceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    Vocabulary,
    sentencepiece_pieces,
)
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.marian_binary import (
    EMBEDDING,
    Item,
    MarianError,
    Weights,
    read_items,
)

CONFIGURATION = "special:model.yml"
SUPPORTED = (
    "supported are Bergamot / Firefox Translations models: post-norm Transformers with an SSRU "
    "decoder, sinusoidal positions and the output projection tied to the target's embedding"
)
# Settings that determine what the weights mean; sizes are read elsewhere.
REQUIRED: dict[str, Any] = {
    "type": "transformer",
    "dec-cell": "ssru",
    "transformer-decoder-autoreg": "rnn",
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
NEVER = -1e4


def is_marian(path: Path) -> bool:
    """Whether the path is a Marian binary, or a directory with one."""
    if path.is_dir():
        return any(path.glob("model.*.bin"))
    return path.is_file() and path.suffix == ".bin"


def load_marian(path: Path | str) -> tuple[Transformer, Tokenizer]:
    """Reads a model and its vocabulary, or its two; int8 weights become float32.

    The vocabulary gets one more id after its last piece, for both padding and start, with a zero
    embedding.

    Args:
        path: A directory with one model.*.bin and its vocab.*.spm (or srcvocab.*.spm and
            trgvocab.*.spm), or the path of the .bin in it.

    Raises:
        MarianError: If a file is damaged or missing, or the architecture is not supported.
    """
    model_path, vocabulary_paths = _find_files(Path(path))
    items = read_items(model_path)
    config = _read_config(items, model_path)
    weights = Weights(items, model_path)
    tokenizer, pieces = _read_tokenizer(vocabulary_paths)
    vocabulary = tokenizer.vocabulary
    # Even two vocabularies may share one matrix, whose rows then have two meanings.
    tied = bool(config["tied-embeddings-all"])
    embeddings = [
        weights.embedding(EMBEDDING if tied else f"{side}_{EMBEDDING}")
        for side in ("encoder", "decoder")
    ]
    for embedding, count, vocabulary_path in zip(embeddings, pieces, vocabulary_paths, strict=True):
        if len(embedding) != count:
            raise MarianError(
                f"{model_path} has {len(embedding)} embeddings, but {vocabulary_path} has {count} "
                "pieces: they do not belong together."
            )
    model_dim, num_heads = embeddings[0].shape[1], config["transformer-heads"]
    if model_dim % num_heads:
        raise MarianError(
            f"{model_path} has {num_heads} heads (transformer-heads), which do not divide the "
            f"embedding's {model_dim} dimensions; the file is damaged."
        )
    source, target = (_with_rows(embedding, vocabulary.size) for embedding in embeddings)
    state = _state_dict(weights, config["enc-depth"], config["dec-depth"])
    bias = weights.vectors("decoder_ff_logit_out_b")
    state |= {
        "source_embedding.weight": target if tied else source,
        "target_embedding.weight": target,
        "output_projection.weight": target,
        # The rows that we added must never be chosen.
        "output_projection.bias": torch.cat(
            [bias, bias.new_full([vocabulary.size - len(bias)], NEVER)]
        ),
    }
    # Sizes come from the arrays, so that a wrong configuration cannot allocate memory.
    architecture = {
        "vocab_size": vocabulary.size,
        "pad_id": vocabulary.pad_id,
        "start_id": vocabulary.start_id,
        "eos_id": vocabulary.eos_id,
        "model_dim": model_dim,
        "num_heads": num_heads,
        "encoder_layers": config["enc-depth"],
        "decoder_layers": config["dec-depth"],
        "encoder_ffn_dim": len(state["encoder_layers.0.ffn.up.weight"]),
        "decoder_ffn_dim": len(state["decoder_layers.0.ffn.up.weight"]),
        # Students are trained without dropout and need it off: 0.1 raises the loss from 2.7 to
        # 15.7.
        "dropout": 0.0,
        "activation": ACTIVATIONS[config["transformer-ffn-activation"]],
        "norm": "post",
        "layer_norm_eps": 1e-6,
        "positions": "sinusoidal",
        "decoder_cell": "ssru",
        "tied_embeddings": "all" if tied else "decoder",
        "output_bias": True,
        "scale_embedding": True,
    }
    try:
        return Transformer.assemble(architecture, state), tokenizer
    except ValueError as error:
        raise MarianError(f"{model_path} is damaged: {error}") from error


def _read_tokenizer(paths: Sequence[Path]) -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and how many pieces each side has.

    Two vocabularies get one padding, after the last piece of the larger.
    """
    if paths[0] == paths[1]:
        shared = SentencePieceTokenizer.from_file(paths[0])
        return shared, [shared.vocabulary.size - 1] * 2
    models, tables = [path.read_bytes() for path in paths], []
    for path, model in zip(paths, models, strict=True):
        try:
            tables.append({piece: i for i, piece in enumerate(sentencepiece_pieces(model))})
        except TokenizerError as error:
            raise MarianError(f"{path}: {error}") from error
    padding = max(map(len, tables))
    vocabulary = Vocabulary(
        size=padding + 1,
        pad_id=padding,
        start_id=padding,
        eos_id=tables[1].get("</s>", 0),  # the tokenizer rejects a table without it
        unk_id=tables[1].get("<unk>", 0),
        source_size=padding + 1,
    )
    try:
        tokenizer = PieceTokenizer(models[0], models[1], tables[0], tables[1], vocabulary)
    except TokenizerError as error:
        raise MarianError(f"{paths[0]} and {paths[1]}: {error}") from error
    return tokenizer, [len(table) for table in tables]


def _with_rows(embedding: Tensor, rows: int) -> Tensor:
    """An embedding with rows of zeros after its own."""
    return torch.cat([embedding, embedding.new_zeros(rows - len(embedding), embedding.shape[1])])


def _state_dict(weights: Weights, encoder_depth: int, decoder_depth: int) -> dict[str, Tensor]:
    """The layers' weights under our names."""
    state: dict[str, Tensor] = {}

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
    """The model's own configuration; raises if it is not supported."""
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
                f"{path} has {name}: {settings.get(name)!r}, but {required!r} is needed; "
                f"{SUPPORTED}."
            )
    # With two vocabularies of different sizes the source's embedding is a matrix of its own.
    names = ("tied-embeddings-all", "tied-embeddings", "tied-embeddings-src")
    tied_all, tied, tied_source = (settings.get(name) for name in names)
    if tied_all is not True and (tied_all, tied, bool(tied_source)) != (False, True, False):
        raise MarianError(
            f"{path} has tied-embeddings-all: {tied_all!r} and tied-embeddings: {tied!r}, but "
            f"one of them must be true; {SUPPORTED}."
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


def _find_files(path: Path) -> tuple[Path, tuple[Path, Path]]:
    """The model file, and the files of the source and target vocabularies, perhaps the same."""
    directory = path if path.is_dir() else path.parent
    models = sorted(path.glob("model.*.bin")) if path.is_dir() else [path]
    if len(models) != 1:
        raise MarianError(
            f"{path} holds {len(models)} files model.*.bin; give the path of one of them."
        )
    pair = models[0].name.split(".")[1]  # "pten" in model.pten.intgemm.alphas.bin
    shared, source, target = (
        _vocabulary_of(directory, kind, pair) for kind in ("vocab", "srcvocab", "trgvocab")
    )
    if shared:
        return models[0], (shared, shared)
    if source and target:
        return models[0], (source, target)
    spm = ", ".join(each.name for each in sorted(directory.glob("*.spm")))
    raise MarianError(
        f"{models[0]} needs its vocabulary beside it, vocab.{pair}.spm, or srcvocab.{pair}.spm and "
        f"trgvocab.{pair}.spm for two; {directory} holds {spm or 'no .spm file'}."
    )


def _vocabulary_of(directory: Path, kind: str, pair: str) -> Path | None:
    """The vocabulary named after the pair, else the only one of its kind."""
    found = sorted(directory.glob(f"{kind}.*.spm"))
    named_alike = [each for each in found if each.name == f"{kind}.{pair}.spm"]
    chosen = named_alike or found
    return chosen[0] if len(chosen) == 1 else None

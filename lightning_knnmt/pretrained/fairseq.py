"""Checkpoints of fairseq's encoder-decoder Transformers (Ott et al., 2019, arXiv:1904.01038).

Among them the WMT19 models (Ng et al., 2019, arXiv:1907.06616) that most papers on kNN-MT start
from. `fairseq_checkpoint` reads the file; this module turns its settings and weights into a
Transformer. Its dictionaries and BPE codes are files beside it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_knnmt.data import FairseqTokenizer, TextError, TokenizerError
from lightning_knnmt.data.fairseq.dictionary import EOS_ID, PAD_ID, FairseqDictionary
from lightning_knnmt.data.fairseq.tokenizer import (
    TEXT_STATES,
    BytePairEncoding,
    Moses,
    Side,
    TextState,
)
from lightning_knnmt.models import Transformer, sinusoidal_table
from lightning_knnmt.pretrained.fairseq_checkpoint import (
    Checkpoint,
    FairseqError,
    read_fairseq_checkpoint,
)
from lightning_knnmt.pretrained.huggingface import read_embeddings, read_layers
from lightning_knnmt.pretrained.tensor_file import read_tensor

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu"}
SUPPORTED = (
    "supported are transformer and its variants by size, such as transformer_iwslt_de_en, "
    "transformer_wmt_en_de_big or transformer_wmt19_de_en"
)
# Other models whose names begin like the supported ones.
OTHER_TRANSFORMERS = (
    "transformer_lm",
    "transformer_from_pretrained",
    "transformer_monotonic",
    "transformer_pointer_generator",
)
# Options that change the computation and are not supported.
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
# Markers, computed tables, the duplicates that version 0.12 keeps of its encoder's weights (and
# never trains), and the network of adaptive kNN-MT.
IGNORED = re.compile(
    r".*\.version|.*\.embed_positions\.(_float_tensor|weights)|"
    r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)|"
    r"decoder\.retrieve_result_to_k_and_lambda\..*"
)
FUSED = re.compile(r"(.*_attn)\.in_proj_(weight|bias)")
OLD_NORM = re.compile(r"(encoder|decoder)(\.layers\.\d+)\.layer_norms\.([012])\.(weight|bias)")


class FairseqWeights:
    """The weights under Hugging Face's names, which are those of fairseq's latest version.

    Attributes:
        unused: Names that were not taken yet.
    """

    def __init__(self, weights: Mapping[str, Tensor], path: Path) -> None:
        self._path = path
        self._weights = {f"model.{name}": tensor for name, tensor in modernize(weights).items()}
        self.unused = set(self._weights)

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def take(self, *names: str) -> Tensor:
        """One tensor, or several concatenated, as a new float32 tensor.

        Raises:
            FairseqError: If the checkpoint lacks one.
        """
        for name in names:
            if name not in self._weights:
                raise FairseqError(
                    f"{self._path} lacks {name.removeprefix('model.')}, which its settings need; "
                    "the file has another architecture than it says, or is damaged."
                )
            self.unused.discard(name)
        tensors = [read_tensor(self._path, self._weights[name]) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def modernize(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of fairseq 0.12, for any version."""
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
    """Reads all weights.

    Returns:
        Arguments of `Transformer`, and its state dict.

    Raises:
        FairseqError: If the architecture is not supported, or weights are missing or left over.
    """
    settings = checkpoint.settings
    architecture = _read_settings(settings, path)
    weights = FairseqWeights(checkpoint.weights, path)
    shared = ("share_all_embeddings", "share_decoder_input_output_embed")
    if not any(settings.get(name) for name in shared):
        weights.take(f"model.{OUTPUT}")  # raises if absent: nothing else replaces it
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
            f"{path} holds {len(weights.unused)} tensors that a Transformer with its settings does "
            f"not have, the first of them {first}: its architecture is another; {SUPPORTED}."
        )
    return architecture, state


def _read_settings(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `Transformer`, except those that follow from the weights."""
    arch, task = str(settings.get("arch")), settings.get("task")
    if not arch.startswith("transformer") or arch.startswith(OTHER_TRANSFORMERS):
        raise FairseqError(
            f"{path} has the architecture {arch}, which is not supported; {SUPPORTED}."
        )
    if task not in (None, "translation"):
        raise FairseqError(
            f"{path} was trained for the task {task}; only translation from one language into one "
            "other is supported."
        )
    for name in UNSUPPORTED:
        if settings.get(name):
            raise FairseqError(f"{path} has {name}: {settings[name]!r}, which is not supported.")
    activation = settings.get("activation_fn", "relu")
    if activation not in list(ACTIVATIONS):
        raise FairseqError(
            f"{path} has activation_fn: {activation!r}; supported are {', '.join(ACTIVATIONS)}."
        )
    for name in ("embed_dim", "attention_heads", "normalize_before"):
        ours, theirs = (settings.get(f"{side}_{name}") for side in SIDES)
        if ours != theirs:
            raise FairseqError(
                f"{path} has encoder_{name} {ours} and decoder_{name} {theirs}; only equal values "
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
    """The kind of positions; if one side's are learned, the other's become a table too."""
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


BEST = "checkpoint_best.pt"
CODES = ("bpecodes", "bpe.codes", "bpe_codes", "codes", "code", "*.codes", "*.code")


def is_fairseq(path: Path) -> bool:
    """Whether the path is a `.pt` file, or a directory with one."""
    if path.is_dir():
        return any(path.glob("*.pt"))
    return path.is_file() and path.suffix == ".pt"


def load_fairseq(
    path: Path | str, *, data_bin: Path | str | None = None, text: TextState = "raw"
) -> tuple[Transformer, FairseqTokenizer]:
    """Reads a checkpoint and its tokenizer; half precision becomes float32.

    Args:
        path: The `.pt` file, or a directory with one (or with a checkpoint_best.pt).
        data_bin: Where dict.SOURCE.txt and dict.TARGET.txt are, if not beside the checkpoint or in
            a `data-bin*` there; the BPE codes may be there too.
        text: The state of the text to translate and learn from: "raw" (processed by Moses and BPE),
            "tokenized" (processed by BPE) or "segmented" (pieces of the dictionary). Translations
            have the same state.

    Raises:
        FairseqError: If a file is damaged or absent, or the architecture is not supported.
    """
    file = _find_checkpoint(Path(path))
    if text not in TEXT_STATES:
        raise FairseqError(f"text is {text!r}; choose one of {', '.join(TEXT_STATES)}.")
    checkpoint = read_fairseq_checkpoint(file)
    architecture, state = read_transformer(checkpoint, file)
    try:
        model = Transformer.assemble(architecture, state)
    except ValueError as error:
        raise FairseqError(f"{file}: {error}") from error
    folders = _folders(file, data_bin)
    try:
        tokenizer = _read_tokenizer(checkpoint.settings, folders, file, text)
    except (TextError, TokenizerError) as error:
        raise FairseqError(f"The tokenizer of {file} cannot be used: {error}") from error
    _check_sizes(model, tokenizer, file)
    return model, tokenizer


def _find_checkpoint(path: Path) -> Path:
    if not path.exists():
        raise FairseqError(f"There is nothing at {path}; give a .pt file or a directory with one.")
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.pt"))
    if path / BEST in files:
        return path / BEST
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5])
        raise FairseqError(
            f"{path} holds {len(files)} files *.pt ({names}), none of them {BEST}; give the path "
            "of one."
        )
    return files[0]


def _folders(file: Path, data_bin: Path | str | None) -> list[Path]:
    """Where the checkpoint's other files may be, in search order."""
    given = [Path(data_bin)] if data_bin is not None else []
    return [*given, file.parent, *sorted(p for p in file.parent.glob("data-bin*") if p.is_dir())]


def _read_tokenizer(
    settings: Mapping[str, Any], folders: list[Path], file: Path, text: TextState
) -> FairseqTokenizer:
    languages = [settings.get("source_lang"), settings.get("target_lang")]
    if not all(isinstance(language, str) for language in languages):
        raise FairseqError(
            f"{file} does not state its languages (source_lang and target_lang are {languages}), "
            "after which its dictionaries are named."
        )
    names = [f"dict.{language}.txt" for language in languages]
    complete = [d for d in folders if all((d / name).is_file() for name in names)]
    if not complete:
        raise FairseqError(
            f"{' and '.join(names)}, the dictionaries of {file}, are not both in "
            f"{_listed(folders)}; copy them there, or name their folder as data_bin."
        )
    sides = []
    for language, name in zip(languages, names, strict=True):
        codes = None
        if text != "segmented":
            codes = BytePairEncoding.read(_find_codes(folders, str(language), file))
        moses = Moses(str(language)) if text == "raw" else None
        sides.append(Side(FairseqDictionary.read(complete[0] / name), codes, moses))
    return FairseqTokenizer(*sides)


def _find_codes(folders: list[Path], language: str, file: Path) -> Path:
    """The file of BPE codes; one that ends in the language is preferred."""
    for folder in folders:
        for pattern in CODES:
            found = sorted(folder.glob(f"{pattern}.{language}")) or sorted(folder.glob(pattern))
            if len(found) > 1:
                raise FairseqError(
                    f"{folder} holds {', '.join(p.name for p in found)}: which are the BPE "
                    f"codes of {file.name}? Keep one, or name it {CODES[0]}."
                )
            if found:
                return found[0]
    raise FairseqError(
        f"There are no BPE codes of {file}: none of {', '.join(CODES)} (or these with "
        f".{language}) is in {_listed(folders)}. Copy them there, or give segmented text "
        "(text='segmented')."
    )


def _check_sizes(model: Transformer, tokenizer: FairseqTokenizer, file: Path) -> None:
    for name, side, embedding in (
        ("source", tokenizer.source, model.source_embedding),
        ("target", tokenizer.target, model.target_embedding),
    ):
        rows, symbols = embedding.num_embeddings, len(side.dictionary)
        if rows != symbols:
            raise FairseqError(
                f"{file} has {rows} {name} embeddings, but its {name} dictionary has {symbols} "
                "symbols (four of them are not in its file): they do not belong together."
            )


def _listed(folders: list[Path]) -> str:
    return " or ".join(map(str, folders))

"""Recognises the format of a path, reads it, and averages several checkpoints of one training."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.adapters import load_adapters
from lightning_knnmt.pretrained.checkpoint import CheckpointError, differences, load_checkpoint
from lightning_knnmt.pretrained.fairseq import is_fairseq, load_fairseq
from lightning_knnmt.pretrained.huggingface import is_huggingface, load_huggingface
from lightning_knnmt.pretrained.marian import is_marian, load_marian


class Pretrained(NamedTuple):
    """A model, in evaluation mode, and its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer


# ORGANISATION/MODEL, as models of the Hugging Face hub are called.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class UnknownFormatError(ValueError):
    """A path without a model that we can read."""


class Format(NamedTuple):
    """One format of pretrained models: its description, and how to recognise and read it."""

    description: str
    recognises: Callable[[Path], bool]
    load: Callable[..., tuple[Transformer, Tokenizer]]
    takes: tuple[str, ...] = ()  # the options of `load_pretrained` that it accepts


def _is_checkpoint(path: Path) -> bool:
    return path.suffix == ".ckpt" and path.is_file()


FORMATS = (
    Format(
        "a checkpoint of train.py (a .ckpt file, or a run's folder with checkpoints/best.ckpt)",
        _is_checkpoint,
        load_checkpoint,
    ),
    Format(
        "a Bergamot / Firefox Translations model (a directory with model.*.bin and vocab.*.spm, or "
        "srcvocab.*.spm and trgvocab.*.spm, or the .bin file in it)",
        is_marian,
        load_marian,
    ),
    Format(
        "a Hugging Face model of MarianMT, FSMT, M2M-100 or NLLB (a directory with config.json)",
        is_huggingface,
        load_huggingface,
        takes=("source_lang", "target_lang"),
    ),
    Format(
        "a fairseq Transformer (a .pt file, or a directory with one, beside its dict.*.txt and BPE "
        "codes)",
        is_fairseq,
        load_fairseq,
        takes=("data_bin", "text"),
    ),
)


def load_pretrained(
    path: Path | str | Sequence[Path | str],
    *,
    adapters: Path | str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    data_bin: Path | str | None = None,
    text: str | None = None,
) -> Pretrained:
    """Reads a pretrained model of any supported format.

    Args:
        path: A file or directory; `FORMATS` lists what is recognised. The folder of a training run
            stands for its best checkpoint. Of several, checkpoints of one training, the weights are
            averaged.
        adapters: A file of `save_adapters` to insert.
        source_lang: The source language, by the model's name for it, if it translates from several.
        target_lang: The target language, if it translates into several.
        data_bin: The folder of a fairseq model's dictionaries, if they are not beside it.
        text: The state of a fairseq model's text: "raw" (None), "tokenized" or "segmented".

    Raises:
        CheckpointError: If several checkpoints have different architectures or tokenizers.
        UnknownFormatError: If there is nothing at the path, or nothing of a supported format.
        AdapterError: If the adapters were trained on another model.
        ValueError: If an option does not apply to a model of that format, such as a language of a
            bilingual model.
    """
    choices = {
        "source_lang": source_lang,
        "target_lang": target_lang,
        "data_bin": data_bin,
        "text": text,
    }
    options = {name: value for name, value in choices.items() if value is not None}
    paths = [path] if isinstance(path, Path | str) else path
    loaded = [_load(Path(each), options) for each in paths]
    model = loaded[0].model if len(loaded) == 1 else average([each.model for each in loaded])
    if len({each.tokenizer.digest for each in loaded}) > 1:
        raise CheckpointError(
            f"The checkpoints {', '.join(map(str, paths))} have different tokenizers and cannot be "
            "averaged; give checkpoints of the same training."
        )
    if adapters is not None:
        load_adapters(model, adapters)
    return Pretrained(model.eval(), loaded[0].tokenizer)


def _load(path: Path, options: Mapping[str, Any]) -> Pretrained:
    path = _in_run(path)
    for format_ in FORMATS:
        if format_.recognises(path):
            superfluous = [name for name in options if name not in format_.takes]
            if superfluous:
                raise ValueError(
                    f"{path} is {format_.description}, to which {' and '.join(superfluous)} does "
                    "not apply: leave it out."
                )
            return Pretrained(*format_.load(path, **options))
    supported = "; ".join(format_.description for format_ in FORMATS)
    raise UnknownFormatError(f"{_found(path)}. Supported are: {supported}.")


def _in_run(path: Path) -> Path:
    """The best checkpoint, where the path is the folder of a training run, else the path."""
    best = path / "checkpoints" / "best.ckpt"
    return best if best.is_file() else path


def _found(path: Path) -> str:
    if not path.exists():
        if HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
            return (
                f"There is nothing at {path}. If that is a model of the Hugging Face hub: those "
                f"are not downloaded, so run `hf download {path} --local-dir {path.name}` (pip "
                f"install huggingface_hub) and give the path {path.name}"
            )
        return f"There is nothing at {path}"
    if path.is_file():
        return f"{path} is a file of {path.stat().st_size:,} bytes in no known format"
    names = sorted(entry.name for entry in path.iterdir())
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{path} is a directory without a known model: it holds {listed or 'nothing'}"


def average(models: Sequence[Transformer]) -> Transformer:
    """The first model, with the mean of every weight over all (Vaswani et al., 2017, section 6.1).

    The sums are in float64.

    Raises:
        CheckpointError: If there are none, or they are not of one architecture.
    """
    if not models:
        raise CheckpointError("There is nothing to average: give at least one model.")
    first, *others = models
    for number, other in enumerate(others, start=2):
        if differing := differences(other.config, first.config):
            raise CheckpointError(
                f"Model {number} to average has another architecture than the first: {differing}. "
                "Give checkpoints of the same training."
            )
    with torch.no_grad():
        # Every parameter once, even if it is tied.
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            total = sum(parameter.double() for parameter in parameters)
            parameters[0].copy_(total / len(models))
    return first

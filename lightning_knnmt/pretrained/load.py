"""Recognises which format a path holds, and reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.adapters import load_adapters
from lightning_knnmt.pretrained.checkpoint import load_checkpoint
from lightning_knnmt.pretrained.huggingface import is_huggingface, load_huggingface
from lightning_knnmt.pretrained.marian import is_marian, load_marian


class Pretrained(NamedTuple):
    """A model, in evaluation mode, and the tokenizer that makes its ids."""

    model: Transformer
    tokenizer: Tokenizer


class UnknownFormatError(ValueError):
    """A path that holds no model we can read."""


class Format(NamedTuple):
    """One kind of pretrained model: what it is called, how it is told, and how it is read."""

    description: str
    recognises: Callable[[Path], bool]
    load: Callable[..., tuple[Transformer, Tokenizer]]
    takes_languages: bool = False


def _is_checkpoint(path: Path) -> bool:
    return path.suffix == ".ckpt" and path.is_file()


FORMATS = (
    Format("a checkpoint of train.py (a .ckpt file)", _is_checkpoint, load_checkpoint),
    Format(
        "a Bergamot / Firefox Translations model (a directory with model.*.bin and vocab.*.spm, or "
        "the .bin file in it)",
        is_marian,
        load_marian,
    ),
    Format(
        "a Hugging Face model of MarianMT, FSMT, M2M-100 or NLLB (a directory with config.json)",
        is_huggingface,
        load_huggingface,
        takes_languages=True,
    ),
)


def load_pretrained(
    path: Path | str,
    *,
    adapters: Path | str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> Pretrained:
    """Reads a pretrained model of any supported format.

    Args:
        path: A file or directory; `FORMATS` lists what is recognised.
        adapters: A file of `save_adapters` to put into it.
        source_lang: The source's language, as the model calls it, where it translates from many.
        target_lang: The target's, where it translates into many.

    Raises:
        UnknownFormatError: If there is nothing at the path, or nothing of a supported format.
        AdapterError: If the adapters were trained on another model.
        ValueError: If a language is given to a model that has but one.
    """
    path = Path(path)
    given = {"source_lang": source_lang, "target_lang": target_lang}
    languages = {name: code for name, code in given.items() if code is not None}
    for format_ in FORMATS:
        if format_.recognises(path):
            if languages and not format_.takes_languages:
                raise ValueError(
                    f"{path} is {format_.description}, which translates one pair of languages: "
                    f"leave {' and '.join(languages)} out."
                )
            model, tokenizer = format_.load(path, **languages)
            if adapters is not None:
                load_adapters(model, adapters)
            return Pretrained(model.eval(), tokenizer)
    supported = "; ".join(format_.description for format_ in FORMATS)
    raise UnknownFormatError(f"{_found(path)}. Supported are: {supported}.")


def _found(path: Path) -> str:
    if not path.exists():
        return f"There is nothing at {path}"
    if path.is_file():
        return f"{path} is a file of {path.stat().st_size:,} bytes in no known format"
    names = sorted(entry.name for entry in path.iterdir())
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{path} is a directory without a known model: it holds {listed or 'nothing'}"

"""Checkpoints of fairseq's encoder-decoder Transformers (Ott et al., 2019, arXiv:1904.01038).

Among them the WMT19 models (Ng et al., 2019, arXiv:1907.06616) that most papers on kNN-MT start
from. Beside a checkpoint lie its dictionaries, and the codes by which its text was segmented.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_knnmt.data import FairseqTokenizer, TextError, TokenizerError
from lightning_knnmt.data.fairseq.dictionary import FairseqDictionary
from lightning_knnmt.data.fairseq.tokenizer import (
    TEXT_STATES,
    BytePairEncoding,
    Moses,
    Side,
    TextState,
)
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.assembly import assemble
from lightning_knnmt.pretrained.fairseq_checkpoint import FairseqError, read_fairseq_checkpoint
from lightning_knnmt.pretrained.fairseq_weights import read_transformer

BEST = "checkpoint_best.pt"
CODES = ("bpecodes", "bpe.codes", "bpe_codes", "codes", "code", "*.codes", "*.code")


def is_fairseq(path: Path) -> bool:
    """Whether the path is a `.pt` file, or a directory that holds one."""
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
            a `data-bin*` there; the BPE codes may lie there too.
        text: What is given to translate and learn from: "raw" sentences, which go through Moses and
            BPE; "tokenized" ones, which go through BPE; or "segmented" ones, whose pieces stand
            in the dictionary. Translations come out likewise.

    Raises:
        FairseqError: If a file is damaged or absent, or the architecture another.
    """
    file = _find_checkpoint(Path(path))
    if text not in TEXT_STATES:
        raise FairseqError(f"text is {text!r}; choose one of {', '.join(TEXT_STATES)}.")
    checkpoint = read_fairseq_checkpoint(file)
    architecture, state = read_transformer(checkpoint, file)
    try:
        model = assemble(architecture, state)
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
            "of the one that is meant."
        )
    return files[0]


def _folders(file: Path, data_bin: Path | str | None) -> list[Path]:
    """Where the checkpoint's other files may be, in the order of search."""
    given = [Path(data_bin)] if data_bin is not None else []
    return [*given, file.parent, *sorted(p for p in file.parent.glob("data-bin*") if p.is_dir())]


def _read_tokenizer(
    settings: Mapping[str, Any], folders: list[Path], file: Path, text: TextState
) -> FairseqTokenizer:
    languages = [settings.get("source_lang"), settings.get("target_lang")]
    if not all(isinstance(language, str) for language in languages):
        raise FairseqError(
            f"{file} does not say its languages (source_lang and target_lang are {languages}), by "
            "which its dictionaries are named."
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
    """The file of BPE codes; one that ends in the language is meant for it alone."""
    for folder in folders:
        for pattern in CODES:
            found = sorted(folder.glob(f"{pattern}.{language}")) or sorted(folder.glob(pattern))
            if len(found) > 1:
                raise FairseqError(
                    f"{folder} holds {', '.join(p.name for p in found)}: which are the BPE "
                    f"codes of {file.name}? Leave one, or call it {CODES[0]}."
                )
            if found:
                return found[0]
    raise FairseqError(
        f"There are no BPE codes of {file}: none of {', '.join(CODES)} (or these with "
        f".{language}) is in {_listed(folders)}. Copy them there, or give text that is segmented "
        "already and say so (text='segmented')."
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

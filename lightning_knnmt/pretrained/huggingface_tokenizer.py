"""The tokenizers of Hugging Face directories: their files and their languages."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning_knnmt.data import (
    FairseqTokenizer,
    PieceTokenizer,
    Tokenizer,
    Vocabulary,
    sentencepiece_pieces,
)
from lightning_knnmt.data.fairseq.tokenizer import (
    BytePairEncoding,
    Moses,
    Side,
    dictionary_of_table,
)
from lightning_knnmt.data.tokenizer import TokenizerError
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.huggingface_files import CONFIG, HuggingFaceError, read_json

SETTINGS = "tokenizer_config.json"
# The order of M2M-100's language ids, which follow the pieces' ids; it is in no file.
M2M_LANGUAGES = {
    "m2m100": (
        "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl "
        "gu ha he hi hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml "
        "mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl "
        "tn tr uk ur uz vi wo xh yi yo zh zu"
    ),
    "wmt21": "en ha is ja cs ru zh de",
}
NLLB_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
FAIRSEQ_SPECIALS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


class Languages(NamedTuple):
    """The language codes of the pair to translate, for models that need them."""

    source: str | None
    target: str | None


def read_tokenizer(
    directory: Path, family: str, model: Transformer, languages: Languages
) -> Tokenizer:
    """The tokenizer in a model's directory.

    Args:
        directory: The model's.
        family: The model_type of its configuration.
        model: Provides special ids and sizes.
        languages: The pair to translate.

    Raises:
        HuggingFaceError: If files are absent, belong to another model, or lack a language.
    """
    settings = read_json(directory / SETTINGS) if (directory / SETTINGS).is_file() else {}
    try:
        if family == "marian":
            return _read_marian(directory, settings, model, languages)
        if family == "fsmt":
            _reject_languages(directory, languages)
            return read_fsmt_tokenizer(directory, settings, model)
        if "nllb" in str(settings.get("tokenizer_class", "")).lower():
            return _read_nllb(directory, settings, model, languages)
        return _read_m2m(directory, settings, model, languages)
    except TokenizerError as error:
        raise HuggingFaceError(f"The tokenizer in {directory} cannot be used: {error}") from error


def _read_marian(
    directory: Path, settings: Mapping[str, Any], model: Transformer, languages: Languages
) -> Tokenizer:
    """OPUS-MT: a SentencePiece model for each side; `>>code<<` first chooses among targets."""
    source_model = _read_bytes(directory / "source.spm")
    target_model = _read_bytes(directory / "target.spm")
    source = _read_table(directory / "vocab.json", _source_size(model))
    separate = bool(settings.get("separate_vocabs"))
    target = source
    if separate:
        target = _read_table(directory / "target_vocab.json", _target_size(model))
    codes = {piece[2:-2]: i for piece, i in source.items() if re.fullmatch(r">>.+<<", piece)}
    if languages.source is not None:
        raise HuggingFaceError(
            f"{directory} needs no source language: leave source_lang ({languages.source}) out."
        )
    if languages.target is not None and not codes:
        raise HuggingFaceError(
            f"{directory} translates into one language: leave target_lang ({languages.target}) out."
        )
    prefix = [] if not codes else [_language(codes, languages.target, "target", directory)]
    vocabulary = _vocabulary(model, target.get("<unk>", 0))
    if separate:  # perhaps of equal sizes
        vocabulary = replace(vocabulary, source_size=_source_size(model))
    return PieceTokenizer(source_model, target_model, source, target, vocabulary, prefix)


def _read_m2m(
    directory: Path, settings: Mapping[str, Any], model: Transformer, languages: Languages
) -> Tokenizer:
    """M2M-100: a table of pieces; the languages' ids follow."""
    if not any((directory / name).is_file() for name in ("vocab.json", SETTINGS)):
        raise HuggingFaceError(
            f"{directory} has neither vocab.json, which M2M-100's tokenizer needs, nor the "
            f"{SETTINGS} by which NLLB's is known; copy the one of your model there."
        )
    spm = _read_bytes(directory / "sentencepiece.bpe.model")
    pieces = _read_table(directory / "vocab.json", _target_size(model))
    order = str(settings.get("language_codes", "m2m100"))
    if order not in M2M_LANGUAGES:
        raise HuggingFaceError(
            f"{directory / SETTINGS} has language_codes: {order!r}; supported are "
            f"{', '.join(M2M_LANGUAGES)}."
        )
    codes = {code: len(pieces) + i for i, code in enumerate(M2M_LANGUAGES[order].split())}
    return _multilingual(directory, spm, pieces, codes, settings, model, languages)


def _read_nllb(
    directory: Path, settings: Mapping[str, Any], model: Transformer, languages: Languages
) -> Tokenizer:
    """NLLB: SentencePiece's ids shifted by one for fairseq's specials, then the languages."""
    if settings.get("legacy_behaviour"):
        raise HuggingFaceError(
            f"{directory / SETTINGS} asks for legacy_behaviour, which puts the source language "
            "last; only the usual order, language first, is supported."
        )
    spm = _read_bytes(directory / "sentencepiece.bpe.model")
    names = sentencepiece_pieces(spm)  # <unk>, <s>, </s>, then text
    pieces = {**{piece: i + 1 for i, piece in enumerate(names) if i > 2}, **FAIRSEQ_SPECIALS}
    codes = _nllb_languages(directory, settings, first=len(names) + 1)
    return _multilingual(directory, spm, pieces, codes, settings, model, languages)


def _nllb_languages(directory: Path, settings: Mapping[str, Any], first: int) -> dict[str, int]:
    """The languages' ids, from whichever file has them."""
    added = settings.get("added_tokens_decoder") or {}
    codes = {str(token["content"]): int(i) for i, token in added.items()}
    if not codes:
        path = directory / "special_tokens_map.json"
        listing = {**(read_json(path) if path.is_file() else {}), **settings}
        in_order = listing.get("extra_special_tokens") or listing.get("additional_special_tokens")
        codes = {str(code): first + i for i, code in enumerate(in_order or [])}
    codes = {code: i for code, i in codes.items() if NLLB_LANGUAGE.fullmatch(code)}
    if not codes:
        raise HuggingFaceError(
            f"{directory} does not state the ids of NLLB's languages: copy special_tokens_map.json "
            f"and {SETTINGS} of the original model there."
        )
    return codes


def _multilingual(
    directory: Path,
    spm: bytes,
    pieces: Mapping[str, int],
    codes: Mapping[str, int],
    settings: Mapping[str, Any],
    model: Transformer,
    languages: Languages,
) -> Tokenizer:
    """Every source begins with its language, every target with its own."""
    source = languages.source or settings.get("src_lang")
    target = languages.target or settings.get("tgt_lang")
    prefixes = [
        _language(codes, code, side, directory)
        for code, side in ((source, "source"), (target, "target"))
    ]
    highest = max(*pieces.values(), *prefixes)
    if highest >= _target_size(model):
        raise HuggingFaceError(
            f"The tokenizer in {directory} has the id {highest}, but the model has only "
            f"{_target_size(model)} embeddings: they do not belong together."
        )
    vocabulary = _vocabulary(model, pieces.get("<unk>", 0), (prefixes[1],))
    return PieceTokenizer(spm, spm, pieces, pieces, vocabulary, prefixes[:1])


def _reject_languages(directory: Path, languages: Languages) -> None:
    given = {"source_lang": languages.source, "target_lang": languages.target}
    for name, code in given.items():
        if code is not None:
            raise HuggingFaceError(
                f"{directory} translates one pair of languages: leave {name} ({code}) out."
            )


def _language(codes: Mapping[str, int], code: str | None, side: str, directory: Path) -> int:
    listed = ", ".join(sorted(codes))
    if code is None:
        raise HuggingFaceError(f"{directory} is multilingual: give {side}_lang, one of {listed}.")
    if code not in codes:
        raise HuggingFaceError(
            f"{directory} does not know the {side} language {code!r}; it knows {listed}."
        )
    return codes[code]


def _vocabulary(model: Transformer, unk_id: int, prefix: tuple[int, ...] = ()) -> Vocabulary:
    return Vocabulary(
        size=_target_size(model),
        pad_id=model.pad_id,
        start_id=model.start_id,
        eos_id=model.eos_id,
        unk_id=unk_id,
        target_prefix=prefix,
        source_size=model.config["source_vocab_size"],
    )


def _target_size(model: Transformer) -> int:
    return model.output_projection.out_features


def _source_size(model: Transformer) -> int:
    return model.source_embedding.num_embeddings


def _read_table(path: Path, size: int) -> dict[str, int]:
    table = read_json(path)
    ids = table.values()
    if not table or not all(type(i) is int and i >= 0 for i in ids):
        raise HuggingFaceError(f"{path} must give each piece an integer id; get the file again.")
    if max(ids) >= size:
        raise HuggingFaceError(
            f"{path} has the id {max(ids)}, but the model has only {size} embeddings: they do not "
            "belong together."
        )
    return {str(piece): i for piece, i in table.items()}


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise HuggingFaceError(
            f"{path.parent} has no {path.name}, which its tokenizer needs; copy it there from the "
            "original model (transformers may save tokenizers in another form)."
        )
    return path.read_bytes()


MERGES = "merges.txt"


def read_fsmt_tokenizer(
    directory: Path, settings: Mapping[str, Any], model: Transformer
) -> FairseqTokenizer:
    """The tokenizer of vocab-src.json, vocab-tgt.json and merges.txt.

    Args:
        directory: The model's.
        settings: The contents of tokenizer_config.json; may be empty.
        model: Must have as many embeddings as there are pieces.

    Raises:
        HuggingFaceError: If a file is absent or belongs to another model.
        TokenizerError: If a file's content cannot be used.
    """
    languages = settings.get("langs") or read_json(directory / CONFIG).get("langs")
    if not (isinstance(languages, list) and len(languages) == 2):
        raise HuggingFaceError(
            f"{directory} does not state its two languages: langs is {languages!r} in {CONFIG}; "
            "copy that file from the original model."
        )
    if settings.get("do_lower_case"):
        raise HuggingFaceError(f"{directory} asks for do_lower_case, which is not supported.")
    codes = BytePairEncoding.read(directory / MERGES)
    sides = []
    for language, name, embedding in zip(
        languages,
        ("vocab-src.json", "vocab-tgt.json"),
        (model.source_embedding, model.target_embedding),
        strict=True,
    ):
        table = read_json(directory / name)
        if len(table) != embedding.num_embeddings:
            raise HuggingFaceError(
                f"{directory / name} has {len(table)} pieces, but the model has "
                f"{embedding.num_embeddings} embeddings: they do not belong together."
            )
        try:
            dictionary = dictionary_of_table(table)
        except TokenizerError as error:
            raise HuggingFaceError(f"{directory / name}: {error}") from error
        moses = Moses(str(language), replace_unicode_punctuation=True)
        sides.append(Side(dictionary, codes, moses))
    return FairseqTokenizer(*sides)

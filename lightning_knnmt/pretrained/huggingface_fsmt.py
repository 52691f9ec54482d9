"""The tokenizer of Hugging Face's FSMT: Moses and BPE, as in the fairseq models it comes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_knnmt.data import FairseqTokenizer
from lightning_knnmt.data.fairseq.tokenizer import (
    BytePairEncoding,
    Moses,
    Side,
    dictionary_of_table,
)
from lightning_knnmt.data.tokenizer import TokenizerError
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.huggingface_files import CONFIG, HuggingFaceError, read_json

MERGES = "merges.txt"


def read_fsmt_tokenizer(
    directory: Path, settings: Mapping[str, Any], model: Transformer
) -> FairseqTokenizer:
    """The tokenizer of vocab-src.json, vocab-tgt.json and merges.txt.

    Args:
        directory: Where they are.
        settings: Those of tokenizer_config.json, which may be empty.
        model: Its embeddings must be as many as the pieces.

    Raises:
        HuggingFaceError: If a file is absent or belongs to another model.
        TokenizerError: If a file's content cannot be used.
    """
    languages = settings.get("langs") or read_json(directory / CONFIG).get("langs")
    if not (isinstance(languages, list) and len(languages) == 2):
        raise HuggingFaceError(
            f"{directory} does not say its two languages: langs is {languages!r} in {CONFIG}; copy "
            "that file from the original model."
        )
    if settings.get("do_lower_case"):
        raise HuggingFaceError(
            f"{directory} asks for do_lower_case, which is not supported; only models of text as "
            "it is written are."
        )
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

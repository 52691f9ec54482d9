"""Text becomes batches: finding and checking files, tokenizing, keeping the ids on disk, batching.

The way through the room: ``catalog`` fetches named text and models, ``text`` reads aligned files
and says what is wrong with them, ``tokenizer`` turns lines into ids, ``corpus`` keeps the ids
memory-mapped, ``batch`` groups and pads them, and ``ParallelDataModule`` ties these together for a
Trainer.
"""

from typing import TYPE_CHECKING

from lightning_knnmt.data.batch import (
    Batch,
    BatchDataset,
    EntryBatchSampler,
    Example,
    KeyDataset,
    LabelledKeys,
    ResumableDataLoader,
    TokenBatchSampler,
    at_least_one,
    collate,
)
from lightning_knnmt.data.catalog import (
    CORPORA,
    MODELS,
    CatalogError,
    prepare_corpus,
    prepare_model,
)
from lightning_knnmt.data.corpus import (
    Corpus,
    CorpusView,
    ParallelCorpus,
    encode_corpus,
    split_corpus,
)
from lightning_knnmt.data.encoding import LinePolicy
from lightning_knnmt.data.fairseq.corpus import FairseqCorpus
from lightning_knnmt.data.fairseq.data_bin import (
    DataBin,
    DataBinError,
    DictionaryTokenizer,
    IndexedIds,
)
from lightning_knnmt.data.fairseq.dictionary import FairseqDictionary
from lightning_knnmt.data.fairseq.tokenizer import FairseqTokenizer
from lightning_knnmt.data.pieces import PieceTokenizer, sentencepiece_pieces
from lightning_knnmt.data.text import TextError, TextPair, find_text_pair, one_line, read_lines
from lightning_knnmt.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    Vocabulary,
    tokenizer_from_state,
)

if TYPE_CHECKING:
    from lightning_knnmt.data.datamodule import BatchSource, ParallelDataModule

__all__ = [
    "CORPORA",
    "MODELS",
    "Batch",
    "BatchDataset",
    "BatchSource",
    "CatalogError",
    "Corpus",
    "CorpusView",
    "DataBin",
    "DataBinError",
    "DictionaryTokenizer",
    "EntryBatchSampler",
    "Example",
    "FairseqCorpus",
    "FairseqDictionary",
    "FairseqTokenizer",
    "IndexedIds",
    "KeyDataset",
    "LabelledKeys",
    "LinePolicy",
    "ParallelCorpus",
    "ParallelDataModule",
    "PieceTokenizer",
    "ResumableDataLoader",
    "SentencePieceTokenizer",
    "TextError",
    "TextPair",
    "TokenBatchSampler",
    "Tokenizer",
    "TokenizerError",
    "Vocabulary",
    "at_least_one",
    "collate",
    "encode_corpus",
    "find_text_pair",
    "one_line",
    "prepare_corpus",
    "prepare_model",
    "read_lines",
    "sentencepiece_pieces",
    "split_corpus",
    "tokenizer_from_state",
]


def __getattr__(name: str) -> object:
    """Import what needs Lightning on first use: it takes seconds, and translating needs none."""
    if name in ("BatchSource", "ParallelDataModule"):
        from lightning_knnmt.data import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""ParallelDataModule: aligned text files become batches, with one tokenizer for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_knnmt.data.batch import (
    Batch,
    BatchDataset,
    ResumableDataLoader,
    TokenBatchSampler,
    at_least_one,
)
from lightning_knnmt.data.corpus import Corpus, CorpusView, encode_corpus
from lightning_knnmt.data.encoding import LinePolicy
from lightning_knnmt.data.fairseq.corpus import FairseqCorpus
from lightning_knnmt.data.fairseq.data_bin import DataBin, DataBinError
from lightning_knnmt.data.text import TextPair, find_text_pair
from lightning_knnmt.data.tokenizer import SentencePieceTokenizer, Tokenizer


@runtime_checkable
class BatchSource(Protocol):
    """A Trainer's callback whose batches are trained on instead of the training text's."""

    def training_batches(self, trainer: pl.Trainer) -> DataLoader[Any]:
        """The batches of the fit that begins, such as a datastore's entries."""
        ...


class ParallelDataModule(pl.LightningDataModule):
    """Files ``{train,valid,test}.LANGUAGE`` of a folder become batches.

    The folder may also be fairseq's ``data-bin``, whose ids are used unchanged. Encoded text is
    kept under ``cache_dir``, so that a second run starts at once. A corpus is opened on first use.
    Works with and without a Trainer.

    Args:
        root: The folder; ``catalog.prepare_corpus`` returns that of a named corpus.
        source_lang: Ending of the source files.
        target_lang: Ending of the target files.
        cache_dir: Where downloads, tokenizers and encoded text are kept.
        tokenizer: Encodes the text; None trains SentencePiece on the training text.
        vocab_size: Size of the vocabulary to train if no tokenizer is given.
        character_coverage: Share of characters that this vocabulary covers.
        byte_fallback: Whether this vocabulary encodes rare characters as bytes.
        max_tokens: Maximum ids in a training batch: source, target and padding together.
        eval_max_tokens: The same for validation, test and datastore batches.
        max_sentences: Maximum sentences in a batch.
        max_length: Maximum ids of a side, EOS included.
        long_lines: What to do with longer training pairs; validation and test text is always cut.
        empty_lines: What to do with training pairs with an empty side; in validation and test text
            they are an error.
        bleu_tokenizer: How sacreBLEU divides translations into words (zh, ja-mecab, char, ...);
            None to choose it by the target language.
        max_pairs: Use only so many pairs of each text, its first ones: for a quick try.
        test: The first test set: a name beside ``train`` and ``valid``, or the path of any other
            text without its language ending.
        also_test: More test sets, for example outside the domain: their names in the results, and
            their paths without language ending.
        test_text: The text of the first test set, if that is binarised, as a path without its
            language ending: references are then read from it, not decoded from the ids.
        num_workers: Processes that form batches; 0 forms them in this process.
        seed: Determines the order of training batches.
    """

    def __init__(
        self,
        root: Path | str,
        source_lang: str,
        target_lang: str,
        *,
        cache_dir: Path | str,
        tokenizer: Tokenizer | None = None,
        vocab_size: int = 8000,
        character_coverage: float = 1.0,
        byte_fallback: bool = False,
        max_tokens: int = 4096,
        eval_max_tokens: int = 4096,
        max_sentences: int | None = None,
        max_length: int = 256,
        long_lines: Literal["cut", "skip"] = "cut",
        empty_lines: Literal["error", "skip"] = "error",
        bleu_tokenizer: str | None = None,
        max_pairs: int | None = None,
        test: str = "test",
        also_test: Mapping[str, str] | None = None,
        test_text: Path | str | None = None,
        num_workers: int = 0,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.source_lang = source_lang
        self.target_lang = target_lang
        self.name = f"{self.root.name}.{source_lang}-{target_lang}"
        self.cache_dir = Path(cache_dir)
        self.vocab_size = vocab_size
        self.character_coverage = character_coverage
        self.byte_fallback = byte_fallback
        self.max_tokens = max_tokens
        self.eval_max_tokens = eval_max_tokens
        self.max_sentences = max_sentences
        if max_pairs is not None and max_pairs < 1:
            raise ValueError(f"max_pairs is {max_pairs}, but must be at least 1, or null for all.")
        self.max_pairs = max_pairs
        self.policy = LinePolicy(max_length, long_lines, empty_lines)
        self.test_sets = {f"{self.name}/{Path(test).name}": test, **(also_test or {})}
        self.test_text = None if test_text is None else Path(test_text)
        self.bleu_tokenizer = bleu_tokenizer
        self.num_workers = num_workers
        self.seed = seed
        self._tokenizer = tokenizer
        self._corpora: dict[tuple[str, str], Corpus] = {}

    # ------------------------------------------------------------------ Lightning's hooks

    def prepare_data(self) -> None:
        """Downloads, trains and encodes what the stage needs, in one process of each machine."""
        self._open_all(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str) -> None:
        """Opens what ``prepare_data`` left in the cache."""
        self._open_all(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches, equally many on each rank; or those of a `BatchSource`."""
        if (trainer := self.trainer) is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, BatchSource):
                    return callback.training_batches(trainer)
        return ResumableDataLoader(
            **self._loader_arguments(self.train_corpus, self.max_tokens, shuffle=True)
        )

    def val_dataloader(self) -> DataLoader[Batch | None]:
        """Each validation pair once, longest first; None for a rank without batches."""
        return at_least_one(self.loader(self.valid_corpus))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Each pair of the first test set once, longest first."""
        return self.loader(self.test_corpus)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The same as `test_dataloader`."""
        return self.test_dataloader()

    # ------------------------------------------------------------------ any corpus as batches

    def loader(
        self, corpus: Corpus, *, rank: int | None = None, world_size: int | None = None
    ) -> DataLoader[Batch]:
        """Each pair of a corpus once, longest first, in batches of ``eval_max_tokens``.

        Args:
            corpus: The corpus.
            rank: Which part of the batches to return; None for the Trainer's rank.
            world_size: The number of parts; None for the Trainer's number of ranks. With rank=0 and
                world_size=1 every process gets the whole corpus.
        """
        return DataLoader(
            **self._loader_arguments(
                corpus, self.eval_max_tokens, shuffle=False, rank=rank, world_size=world_size
            )
        )

    def datastore_dataloader(self) -> DataLoader[Batch]:
        """Each training pair once, longest first; the corpus' ``target_offsets`` place them."""
        return self.loader(self.train_corpus)

    def whole_dataloader(self, split: str) -> DataLoader[Batch]:
        """Each pair of a split once, longest first, all of them on this rank."""
        return self.loader(self._corpus(split), rank=0, world_size=1)

    # ------------------------------------------------------------------ text and corpora

    @property
    def tokenizer(self) -> Tokenizer:
        """The given tokenizer, or one trained on the training text."""
        if self._tokenizer is None:
            if self._data_bin.is_there:
                raise DataBinError(
                    f"{self.root} holds ids, not text, so no tokenizer can be trained on it; give "
                    "the model that it was binarised for (model=pretrained model.path=...)."
                )
            text = self._text("train")
            text.summarize(self.cache_dir)
            self._tokenizer = SentencePieceTokenizer.train(
                [text.source_path, text.target_path],
                self.vocab_size,
                cache_dir=self.cache_dir,
                character_coverage=self.character_coverage,
                byte_fallback=self.byte_fallback,
            )
        return self._tokenizer

    @property
    def train_corpus(self) -> Corpus:
        """The training pairs."""
        return self._corpus("train")

    @property
    def valid_corpus(self) -> Corpus:
        """The validation pairs, one for each line of the files."""
        return self._corpus("valid")

    @property
    def test_corpus(self) -> Corpus:
        """The pairs of the first test set, one for each line of the files."""
        return self._corpus("test")

    def test_corpora(self) -> dict[str, Corpus]:
        """All test sets by name, the first one first."""
        return {name: self._test_corpus(name) for name in self.test_sets}

    def has(self, split: str) -> bool:
        """Whether ``train``, ``valid`` or ``test`` exists, at least one of its two files."""
        file_name = self._file_name(split)
        if self._data_bin.is_there and self._data_bin.has(file_name):
            return True
        prefix = self._prefix(file_name)
        return any(
            prefix.with_name(f"{prefix.name}.{lang}").is_file()
            for lang in (self.source_lang, self.target_lang)
        )

    def source_lines(self, split: str) -> list[str]:
        """The sources of ``train``, ``valid`` or the first test set, in the order of the corpus."""
        return self._corpus(split).source_lines()

    def references(self, split: str) -> list[str]:
        """The targets of ``train``, ``valid`` or the first test set, in the order of the corpus."""
        return self._corpus(split).target_lines()

    # ------------------------------------------------------------------ internals

    def _open_all(self, stage: str | None) -> None:
        """Opens the corpora of a stage; of every stage unless it is ``fit`` or the like."""
        of_stage = {"test": (), "validate": ("valid",), "fit": ("train", "valid")}
        for split in of_stage.get(stage or "", ("train", "valid")):
            self._corpus(split)
        if stage == "test" or stage not in of_stage:
            self.test_corpora()

    def _corpus(self, split: str) -> Corpus:
        if split == "test":
            return self._test_corpus(next(iter(self.test_sets)))
        return self._opened(f"{self.name}/{split}", split, self._file_name(split), None)

    def _test_corpus(self, name: str) -> Corpus:
        is_first = name == next(iter(self.test_sets))
        return self._opened(
            name, "test", self.test_sets[name], self.test_text if is_first else None
        )

    def _file_name(self, split: str) -> str:
        if split not in ("train", "valid", "test"):
            raise ValueError(f"There is no split {split!r}; there are train, valid and test.")
        return next(iter(self.test_sets.values())) if split == "test" else split

    def _opened(self, name: str, split: str, file_name: str, text: Path | None) -> Corpus:
        if (split, name) not in self._corpora:
            policy = self.policy if split == "train" else self.policy.aligned()
            corpus = self._open(name, file_name, policy, text)
            if self.max_pairs is not None and self.max_pairs < len(corpus):
                first = np.arange(self.max_pairs)
                corpus = CorpusView(corpus, first, f"{name}.first-{self.max_pairs}")
            self._corpora[split, name] = corpus
        return self._corpora[split, name]

    def _open(self, name: str, file_name: str, policy: LinePolicy, text: Path | None) -> Corpus:
        if self._data_bin.is_there and (
            file_name in ("train", "valid") or self._data_bin.has(file_name)
        ):
            return FairseqCorpus(
                self._data_bin,
                file_name,
                self._data_bin.require(self.tokenizer),
                policy,
                self.cache_dir,
                name,
                find_text_pair(text, self.source_lang, self.target_lang) if text else None,
            )
        if text:
            raise DataBinError(
                f"test_text is {text}, but the test set {file_name} is plain text already; leave "
                "test_text out."
            )
        return encode_corpus(self._text(file_name), self.tokenizer, self.cache_dir, policy, name)

    @property
    def _data_bin(self) -> DataBin:
        return DataBin(self.root, self.source_lang, self.target_lang)

    def _text(self, file_name: str) -> TextPair:
        return find_text_pair(self._prefix(file_name), self.source_lang, self.target_lang)

    def _prefix(self, file_name: str) -> Path:
        """A text's path without its language ending, in the folder or elsewhere."""
        prefix = self.root / file_name
        elsewhere = Path(f"{file_name}.{self.source_lang}")
        beside = prefix.with_name(f"{prefix.name}.{self.source_lang}")
        is_elsewhere = file_name not in ("train", "valid") and elsewhere.is_file()
        return Path(file_name) if is_elsewhere and not beside.is_file() else prefix

    def _loader_arguments(
        self,
        corpus: Corpus,
        max_tokens: int,
        *,
        shuffle: bool,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> dict[str, Any]:
        trainer = self.trainer
        sampler = TokenBatchSampler(
            corpus.source_lengths,
            corpus.target_lengths,
            max_tokens,
            max_sentences=self.max_sentences,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank if rank is not None else trainer.global_rank if trainer else 0,
            world_size=world_size or (trainer.world_size if trainer else 1),
        )
        return {
            "dataset": BatchDataset(corpus, self.tokenizer.vocabulary),
            "batch_size": None,
            "sampler": sampler,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

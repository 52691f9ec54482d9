"""Translates test sets by each method, scores the translations and reports the comparison."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytorch_lightning as pl
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_knnmt.data import Batch, ParallelDataModule, Tokenizer, at_least_one
from lightning_knnmt.decoding import (
    BeamSearch,
    NextTokenDistribution,
    SoftmaxDistribution,
    translate_batches,
)
from lightning_knnmt.evaluation.comparison import print_comparison
from lightning_knnmt.evaluation.loggers import log_results
from lightning_knnmt.evaluation.results import (
    ResultRow,
    check_results,
    text_digest,
    write_results,
    write_translations,
)
from lightning_knnmt.evaluation.scoring import Bleu, ChrF, find_doubts
from lightning_knnmt.models import Transformer, digest
from lightning_knnmt.retrieval import Retrieval, gathered, rank_zero_first
from lightning_knnmt.training import FullFineTuner, KNNCallback, NMTModule, precision_of

log = logging.getLogger(__name__)

NMT = NMTModule.method  # a model that was not fine-tuned
Prepare = Callable[[], Retrieval]


class Batches(Protocol):
    """Divides a corpus into batches, and those among the ranks."""

    def __call__(self, *, rank: int, world_size: int) -> DataLoader[Batch]: ...


class Translations(NamedTuple):
    """A corpus's translations, in its order.

    Attributes:
        token_ids: The best hypothesis of every sentence, EOS included.
        texts: The same as text.
        seconds: Time spent decoding; with several ranks, the slowest rank's.
        retrieval: What took part in decoding; None for the model alone.
    """

    token_ids: list[list[int]]
    texts: list[str]
    seconds: float
    retrieval: Retrieval | None

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids)


class TranslationTest(pl.LightningModule):
    """Translates a corpus in Lightning's test loop, on any number of ranks.

    Attributes:
        translations: Of the whole corpus, on every rank, once the test has ended.
    """

    translations: Translations

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        search: BeamSearch,
        batches: Batches,
        prepare: Prepare | None = None,
    ) -> None:
        """
        Args:
            model: Translates.
            tokenizer: Produces its ids.
            search: How to decode.
            batches: Gives a rank's share of the corpus.
            prepare: Prepares retrieval, on all ranks at once; None to decode by the model alone.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.search = search
        self._batches = batches
        self._prepare = prepare
        self._retrieval: Retrieval | None = None
        self._distribution: NextTokenDistribution
        self._decoded: list[tuple[int, list[int]]] = []
        self._seconds = 0.0

    def test_dataloader(self) -> DataLoader[Batch | None]:
        trainer = self.trainer
        return at_least_one(self._batches(rank=trainer.global_rank, world_size=trainer.world_size))

    def on_test_start(self) -> None:
        never = self.tokenizer.vocabulary.never_emitted
        self._distribution = nmt = SoftmaxDistribution(self.model.output_projection, never)
        if self._prepare is not None:
            self._retrieval = self._prepare()
            self._distribution = self._retrieval.distribution(nmt)

    def test_step(self, batch: Batch | None, batch_idx: int) -> None:
        if batch is None:
            return
        vocabulary = self.tokenizer.vocabulary
        started = time.perf_counter()
        found = list(
            translate_batches(self.model, vocabulary, [batch], self.search, self._distribution)
        )
        self._seconds += time.perf_counter() - started
        self._decoded += [(row, hypotheses[0].tokens) for row, hypotheses in found]

    def on_test_epoch_end(self) -> None:
        parts = gathered((self._decoded, self._seconds))
        token_ids = [ids for _, ids in sorted(pair for decoded, _ in parts for pair in decoded)]
        texts = [self.tokenizer.decode(ids) for ids in token_ids]
        seconds = max(seconds for _, seconds in parts)
        self.translations = Translations(token_ids, texts, seconds, self._retrieval)


def translate_corpus(
    trainer: pl.Trainer,
    model: Transformer,
    tokenizer: Tokenizer,
    search: BeamSearch,
    batches: Batches,
    prepare: Prepare | None = None,
) -> Translations:
    """Translates a corpus; every rank calls this and gets all translations.

    Args:
        trainer: Has the devices and the precision; the rest are `TranslationTest`'s arguments.
    """
    test = TranslationTest(model, tokenizer, search, batches, prepare)
    trainer.test(test, verbose=False)
    return test.translations


def evaluate(
    trainer: pl.Trainer,
    module: NMTModule,
    datamodule: ParallelDataModule,
    knn: KNNCallback | None,
    *,
    output_dir: Path,
    method: str = NMT,
    base: Callable[[], Transformer] | None = None,
    without_retrieval: bool = True,
) -> list[ResultRow]:
    """Translates the test sets by the base model, by the module's and with retrieval; reports.

    Retrieval comes first, so that what is wrong with it is found before anything is decoded.
    Translations are written as soon as they are made. Rank zero writes `results.json`, prints the
    comparison on each test set and tells the trainer's loggers.

    Args:
        trainer: Has the devices and the precision.
        module: Its model, with the weights to test, its tokenizer and search.
        datamodule: Has the test sets.
        knn: Prepares retrieval; None to test without.
        output_dir: Results are added to this folder.
        method: What the module's model alone is called.
        base: Loads the model that fine-tuning began with, to test it too.
        without_retrieval: Whether to test the module's model alone where there is retrieval.

    Returns:
        For each test set one row for each method, the base's first; on rank zero only.
    """
    bleu = Bleu.for_language(datamodule.target_lang, datamodule.bleu_tokenizer)
    rank_zero_first(partial(check_results, output_dir), _nothing)
    corpora = datamodule.test_corpora()

    def test(
        method: str, model: Transformer, prepare: Prepare | None = None
    ) -> dict[str, Translations]:
        found = {}
        for test_set, corpus in corpora.items():
            found[test_set] = each = translate_corpus(
                trainer,
                model,
                module.tokenizer,
                module.search,
                partial(datamodule.loader, corpus),
                prepare,
            )
            write = partial(write_translations, output_dir, method, test_set, each.texts)
            rank_zero_first(write, _nothing)
        return found

    if base is not None and method == NMT:
        method = FullFineTuner.method
    tested: dict[str, dict[str, Translations]] = {}  # by method and test set
    if knn is not None:
        mixed = knn.method if method == NMT else f"{method} + {knn.method}"
        prepare = partial(
            knn.prepare, module.model, module.tokenizer, datamodule, precision_of(trainer)
        )
        tested[mixed] = test(mixed, module.model, prepare)
    if knn is None or without_retrieval:
        tested[method] = test(method, module.model)
    models = dict.fromkeys(tested, module.model)
    if base is not None:
        models[NMT] = base()
        tested[NMT] = test(NMT, models[NMT])
    if not trainer.is_global_zero:
        return []

    digests = {model: digest(model.config, model.state_dict()) for model in {*models.values()}}
    search = [f"{name}={value}" for name, value in asdict(module.search).items()]
    decoding = "; ".join([*search, f"precision={trainer.precision}"])
    rows = []
    for test_set, corpus in corpora.items():
        sources, references = corpus.source_lines(), corpus.target_lines()
        about = {"test_set": test_set, "text_digest": text_digest(sources, references)}
        for method in reversed(tested):
            about |= {"method": method, "model_digest": digests[models[method]]}
            rows.append(
                _row(tested[method][test_set], references, bleu, decoding=decoding, **about)
            )
    write_results(output_dir, rows)
    log_results(trainer.loggers, rows, trainer.global_step)
    console = Console()
    for test_set, corpus in corpora.items():
        references = corpus.target_lines()
        hypotheses = {method: found[test_set].texts for method, found in tested.items()}
        first = next(iter(hypotheses.values()))
        for doubt in find_doubts(first, references, bleu.tokenizer, corpus.source_lines()):
            log.warning("%s: %s", test_set, doubt)
        print_comparison(
            console,
            [row for row in rows if row.test_set == test_set],
            hypotheses,
            corpus.source_lines(),
            references,
        )
    console.print(f"Results and hypotheses: {output_dir}", soft_wrap=True)
    return rows


def _row(
    translations: Translations, references: Sequence[str], bleu: Bleu, **about: Any
) -> ResultRow:
    bleu_score = bleu.score(translations.texts, references)
    chrf_score = ChrF().score(translations.texts, references)
    about_knn: dict[str, Any] = {}
    if translations.retrieval is not None:
        measured, datastore = (
            translations.retrieval.measured_index,
            translations.retrieval.datastore,
        )
        contents = f"{datastore.manifest.keys_digest} {datastore.manifest.values_digest}"
        about_knn = {
            **translations.retrieval.fitted.report,
            "metric": measured.index.metric,
            "index": measured.index.description,
            "recall_at_k": measured.recall_at_k,
            "datastore_entries": len(datastore),
            "datastore_bytes": datastore.num_bytes,
            "datastore_digest": hashlib.sha256(contents.encode()).hexdigest(),
        }
    return ResultRow(
        bleu=bleu_score.value,
        bleu_signature=bleu_score.signature,
        bleu_tokenizer=bleu.tokenizer,
        chrf=chrf_score.value,
        chrf_signature=chrf_score.signature,
        sentences=len(translations.texts),
        target_tokens=translations.num_tokens,
        seconds=translations.seconds,
        **about,
        **about_knn,
    )


def _nothing() -> None:
    """What the other ranks do meanwhile."""

"""Tests a module with and without retrieval on all test sets, and reports the comparison."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.evaluation.comparison import print_comparison
from lightning_knnmt.evaluation.loggers import log_results
from lightning_knnmt.evaluation.results import ResultRow, write_results
from lightning_knnmt.evaluation.scoring import bleu, chrf
from lightning_knnmt.retrieval import Retrieval
from lightning_knnmt.training import KNNCallback, NMTModule, Translations


def evaluate(
    trainer: pl.Trainer,
    module: NMTModule,
    datamodule: ParallelDataModule,
    knn: KNNCallback | None,
    *,
    checkpoint: str | None,
    output_dir: Path,
    without_retrieval: bool = True,
) -> list[ResultRow]:
    """Translates the test sets by the model alone and, if there is a callback, with retrieval.

    Rank zero writes `results.json` and the hypotheses into `output_dir`, prints the comparison and
    tells the trainer's loggers.

    Args:
        knn: One of the trainer's callbacks, or None.
        checkpoint: Whose weights are tested; None for the module's own.
        without_retrieval: Whether to test by the model alone too where there is a callback.

    Returns:
        For each test set one row for each method, NMT first.
    """
    rows = []
    for test_set in datamodule.test_sets:
        datamodule.select_test_set(test_set)
        rows += _evaluate_on_one(
            trainer, module, datamodule, knn, checkpoint, output_dir, without_retrieval
        )
    return rows


def _evaluate_on_one(
    trainer: pl.Trainer,
    module: NMTModule,
    datamodule: ParallelDataModule,
    knn: KNNCallback | None,
    checkpoint: str | None,
    output_dir: Path,
    without_retrieval: bool,
) -> list[ResultRow]:
    translations = {}
    if knn is None or without_retrieval:
        translations["NMT"] = _translate(trainer, module, datamodule, knn, False, checkpoint)
    if knn is not None:
        method = knn.method
        translations[method] = _translate(trainer, module, datamodule, knn, True, checkpoint)
    references = datamodule.references("test")
    retrieval = knn.retrieval if knn is not None else None
    rows = [
        _row(method, datamodule.test_corpus.name, each, references, retrieval)
        for method, each in translations.items()
    ]
    hypotheses = {method: each.texts for method, each in translations.items()}
    if trainer.is_global_zero:
        console = Console()
        write_results(output_dir, rows, hypotheses)
        log_results(trainer.loggers, rows, trainer.global_step)
        print_comparison(console, rows, hypotheses, datamodule.source_lines("test"), references)
        console.print(f"Results and hypotheses: {output_dir}", soft_wrap=True)
    return rows


def _translate(
    trainer: pl.Trainer,
    module: NMTModule,
    datamodule: ParallelDataModule,
    knn: KNNCallback | None,
    with_retrieval: bool,
    checkpoint: str | None,
) -> Translations:
    if knn is not None:
        knn.enabled = with_retrieval
    trainer.test(module, datamodule=datamodule, ckpt_path=checkpoint, verbose=False)
    assert module.translations is not None, "a test ends with translations"
    return module.translations


def _row(
    method: str,
    test_set: str,
    translations: Translations,
    references: list[str],
    retrieval: Retrieval | None,
) -> ResultRow:
    bleu_score, chrf_score = (
        bleu(translations.texts, references),
        chrf(translations.texts, references),
    )
    about_knn: dict[str, Any] = {}
    if retrieval is not None and method != "NMT":
        measured = retrieval.measured_index
        about_knn = {
            **retrieval.fitted.report,
            "metric": measured.index.metric,
            "index": measured.index.description,
            "recall_at_k": measured.recall_at_k,
            "datastore_entries": len(retrieval.datastore),
            "datastore_bytes": retrieval.datastore.num_bytes,
        }
    return ResultRow(
        method=method,
        test_set=test_set,
        bleu=bleu_score.value,
        bleu_signature=bleu_score.signature,
        chrf=chrf_score.value,
        chrf_signature=chrf_score.signature,
        sentences=len(translations.texts),
        target_tokens=translations.num_tokens,
        seconds=translations.seconds,
        **about_knn,
    )

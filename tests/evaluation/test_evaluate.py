"""Tests of translating and scoring in one process; tests/integration has those of commands."""

import functools
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.evaluation import evaluate as evaluation
from lightning_knnmt.evaluation.evaluate import evaluate, translate_corpus
from lightning_knnmt.evaluation.results import ResultRow, ResultsError, read_results
from lightning_knnmt.evaluation.scoring import Bleu, ChrF
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import FlatChoice, StaleDatastoreError
from lightning_knnmt.training import AdapterFineTuner, KNNCallback, NMTModule, knn_callback

Evaluate = Callable[..., list[ResultRow]]


@pytest.fixture
def trainer(tmp_path: Path) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )


@pytest.fixture
def module(tiny_model: Transformer, toy_datamodule: ParallelDataModule) -> NMTModule:
    search = BeamSearch(beam_size=1, max_length_ratio=1.0, max_length_offset=5)
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    return NMTModule(tiny_model, toy_datamodule.tokenizer, search, optimizer=adam)


@pytest.fixture
def knn(tmp_path: Path) -> KNNCallback:
    return new_knn(tmp_path / "datastores")


def new_knn(folder: Path, **options: Any) -> KNNCallback:
    values: dict[str, Any] = {"tune": False, "num_neighbours": 4, "temperature": 10.0}
    return knn_callback("fixed", folder, FlatChoice(), **(values | options))


@pytest.fixture
def run(
    trainer: pl.Trainer, module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> Evaluate:
    def call(knn: KNNCallback | None = None, **options: Any) -> list[ResultRow]:
        return evaluate(
            trainer, module, toy_datamodule, knn, output_dir=tmp_path / "run", **options
        )

    return call


def lines(folder: Path, method: str) -> list[str]:
    (path,) = folder.glob(f"hypotheses.*test.{method}.txt")
    return path.read_text().split("\n")[:-1]


def test_every_sentence_is_translated_once_in_the_corpus_order(
    trainer: pl.Trainer, module: NMTModule, toy_datamodule: ParallelDataModule
) -> None:
    batches = functools.partial(toy_datamodule.loader, toy_datamodule.test_corpus)
    found = translate_corpus(trainer, module.model, module.tokenizer, module.search, batches)
    assert len(found.texts) == len(found.token_ids) == 40
    assert found.num_tokens == sum(map(len, found.token_ids))
    assert found.retrieval is None
    # the third sentence alone gives what the third place holds
    batch = next(b for b in toy_datamodule.test_dataloader() if 3 in b.index.tolist())
    row = batch.index.tolist().index(3)
    alone = batch._replace(
        source_ids=batch.source_ids[row : row + 1], index=batch.index[row : row + 1]
    )
    best = module.translate(alone, module.search, module.nmt_distribution)[0]
    assert found.token_ids[3] == best.tokens


def test_scores_are_of_the_translations_that_are_written(
    run: Evaluate, toy_datamodule: ParallelDataModule, tmp_path: Path
) -> None:
    (row,) = run()
    (kept,) = read_results(tmp_path / "run")
    assert kept == row
    assert row.method == "NMT"
    references = toy_datamodule.references("test")
    texts = lines(tmp_path / "run", "NMT")
    assert row.bleu == Bleu("13a").score(texts, references).value
    assert row.chrf == ChrF().score(texts, references).value
    assert row.sentences == 40
    assert row.seconds > 0


@pytest.mark.parametrize("chosen", [None, "char"])
def test_the_target_language_or_a_setting_decides_what_bleu_counts(
    run: Evaluate, toy_datamodule: ParallelDataModule, tmp_path: Path, chosen: str | None
) -> None:
    toy_datamodule.bleu_tokenizer = chosen
    (row,) = run()
    assert row.bleu_tokenizer == (chosen or "13a")
    assert f"tok:{row.bleu_tokenizer}|" in row.bleu_signature
    expected = Bleu(row.bleu_tokenizer).score(
        lines(tmp_path / "run", "NMT"), toy_datamodule.references("test")
    )
    assert row.bleu == expected.value


def test_with_retrieval_there_are_two_rows_and_nothing_is_changed(
    run: Evaluate, module: NMTModule, knn: KNNCallback
) -> None:
    plain, mixed = run(knn)
    assert (plain.method, mixed.method) == ("NMT", "kNN-MT")
    assert (mixed.k, mixed.temperature, plain.k) == (4, 10.0, None)
    assert plain.model_digest == mixed.model_digest
    assert plain.text_digest == mixed.text_digest
    assert plain.datastore_digest is None
    assert mixed.datastore_digest is not None
    assert module.distribution is module.nmt_distribution
    (again,) = run(knn, without_retrieval=False)
    assert again.datastore_digest == mixed.datastore_digest


def test_a_tuned_model_stands_between_its_base_and_retrieval(
    trainer: pl.Trainer, module: NMTModule, toy_datamodule: ParallelDataModule,
    knn: KNNCallback, tmp_path: Path,
) -> None:  # fmt: skip
    base = deepcopy(module.model)
    tuned = AdapterFineTuner(
        module.model, module.tokenizer, module.search, bottleneck_dim=4,
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3), init="plain",
    )  # fmt: skip
    rows = evaluate(
        trainer, tuned, toy_datamodule, knn, output_dir=tmp_path / "run",
        method=tuned.method, base=lambda: base,
    )  # fmt: skip
    assert [row.method for row in rows] == ["NMT", "adapters", "adapters + kNN-MT"]
    assert rows[0].model_digest != rows[1].model_digest == rows[2].model_digest
    alone = evaluate(trainer, module, toy_datamodule, None, output_dir=tmp_path / "alone")
    assert alone[0].model_digest == rows[1].model_digest  # the module's model has adapters by now


def test_a_model_trained_by_an_unnamed_method_is_not_taken_for_its_base(
    run: Evaluate, module: NMTModule
) -> None:
    base = deepcopy(module.model)
    assert [row.method for row in run(base=lambda: base)] == ["NMT", "full fine-tuning"]


def test_a_datastore_of_another_model_is_rejected_before_anything_is_decoded(
    run: Evaluate, module: NMTModule, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    run(new_knn(tmp_path / "datastores", directory=given), without_retrieval=False)
    with torch.no_grad():
        next(module.model.parameters()).mul_(1.5)  # another model by now
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(StaleDatastoreError, match=str(given)):
        run(new_knn(tmp_path / "datastores", directory=given))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_damaged_results_are_found_before_anything_is_decoded(
    run: Evaluate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("[{]")
    monkeypatch.setattr(evaluation, "translate_corpus", lambda *_: pytest.fail("it decodes"))
    with pytest.raises(ResultsError, match=r"results\.json"):
        run()


def test_translations_survive_scores_that_fail(
    run: Evaluate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ChrF, "score", fail)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(lines(tmp_path / "run", "NMT")) == 40
    assert not (tmp_path / "run" / "results.json").exists()


def test_each_test_set_has_its_rows_and_its_logged_values(
    trainer: pl.Trainer, module: NMTModule, toy_text: Path, toy_cache: Path, tmp_path: Path
) -> None:
    datamodule = ParallelDataModule(
        toy_text, "xx", "yy", cache_dir=toy_cache, tokenizer=module.tokenizer,
        also_test={"held out": f"{toy_text}/valid"},
    )  # fmt: skip
    trainer.logger = CSVLogger(tmp_path, name="logs")
    rows = evaluate(trainer, module, datamodule, None, output_dir=tmp_path / "run")
    assert [(row.test_set, row.sentences) for row in rows] == [
        ("text.xx-yy/test", 40),
        ("held out", 30),
    ]
    assert rows[0].text_digest != rows[1].text_digest
    assert read_results(tmp_path / "run") == rows
    header, *_ = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"test_bleu/NMT", "test_bleu/NMT/held out"} <= {*header.split(",")}


def test_results_of_weights_that_moved_on_disappear(
    run: Evaluate, module: NMTModule, knn: KNNCallback, tmp_path: Path
) -> None:
    run(knn)
    with torch.no_grad():
        module.model.output_projection.weight.mul_(1.5)
    (row,) = run()
    assert json.loads((tmp_path / "run" / "results.json").read_text())[0]["bleu"] == row.bleu
    assert read_results(tmp_path / "run") == [row]
    assert not list((tmp_path / "run").glob("hypotheses.*kNN-MT.txt"))

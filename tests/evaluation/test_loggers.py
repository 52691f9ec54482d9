"""What loggers are told, read back from the files that they write."""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from pytorch_lightning.loggers import CSVLogger, WandbLogger

from lightning_knnmt.evaluation.loggers import (
    LoggerError,
    TableLogger,
    finish,
    log_config,
    log_results,
)
from lightning_knnmt.evaluation.results import ResultRow

NMT = ResultRow(
    method="NMT", test_set="words/test", bleu=40.0, bleu_signature="nrefs:1", chrf=60.0,
    chrf_signature="nc:6", sentences=2, target_tokens=30, seconds=0.5,
)  # fmt: skip
KNN = dataclasses.replace(
    NMT, method="kNN-MT", bleu=50.0, k=8, knn_weight=0.5, temperature=10.0, metric="l2",
    index="exact", recall_at_k=1.0, datastore_entries=100, datastore_bytes=1000,
)  # fmt: skip
NUMBERS = {
    "test_bleu/NMT": 40.0, "test_bleu/kNN-MT": 50.0, "test_chrf/NMT": 60.0,
    "test_chrf/kNN-MT": 60.0, "test_sentences_per_second/NMT": 4.0,
    "test_sentences_per_second/kNN-MT": 4.0, "test_tokens_per_second/NMT": 60.0,
    "test_tokens_per_second/kNN-MT": 60.0,
}  # fmt: skip


QUIET = {"console": "off", "silent": True, "x_disable_stats": True, "x_disable_meta": True}


@pytest.fixture(autouse=True)
def _no_service_afterwards() -> Iterator[None]:
    yield
    wandb.teardown()


def test_wandb_keeps_config_numbers_and_the_table(
    tmp_path: Path, wandb_run: Callable[[Path], dict[str, list[Any]]]
) -> None:
    offline = WandbLogger(save_dir=tmp_path, project="test", mode="offline", settings=QUIET)
    log_config([offline], {"knn": {"tune": False}, "name": "first"})
    log_results([offline], [NMT, KNN], 7)
    finish([offline])
    wandb.teardown()  # as at the end of the process: the file is whole
    kept = wandb_run(tmp_path)
    assert kept["knn"] == [{"tune": False}]
    assert kept["name"] == ["first"]
    assert {name: kept[name] for name in NUMBERS} == {n: [value] for n, value in NUMBERS.items()}
    assert kept["trainer/global_step"] == [7] * len(kept["trainer/global_step"])
    (path,) = tmp_path.glob("wandb/offline-run-*/files/media/table/results_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == [field.name for field in dataclasses.fields(ResultRow)]
    rows = [ResultRow(**dict(zip(table["columns"], row, strict=True))) for row in table["data"]]
    assert rows == [NMT, KNN]


def test_the_next_run_of_a_process_is_a_run_of_its_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        logger = WandbLogger(save_dir=tmp_path / name, mode="offline", settings=QUIET)
        log_config([logger], {})  # a run still open would be a warning, an error in our tests
        finish([logger])
        assert len(list(tmp_path.glob(f"{name}/wandb/offline-run-*"))) == 1


def test_a_logger_without_tables_is_told_the_numbers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="logs")
    assert not isinstance(logger, TableLogger)
    logger.log_metrics({"val_bleu": 3.0}, 6)
    logger.save()
    log_results([logger], [NMT, KNN], 7)
    finish([logger])
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        earlier, row = csv.DictReader(file)
    assert earlier["val_bleu"] == "3.0"
    assert {name: float(row[name]) for name in NUMBERS} == NUMBERS
    assert row["step"] == "7"


def test_without_an_account_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    logger = WandbLogger(save_dir=tmp_path, mode="online", settings=QUIET)
    with pytest.raises(LoggerError) as raised:
        log_config([logger], {})
    for part in ("No API key", "wandb login", "logger.mode=offline"):
        assert part in str(raised.value)

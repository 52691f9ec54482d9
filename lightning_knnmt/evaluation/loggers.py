"""What loggers get besides Lightning's curves: the run's configuration and results.

test_bleu/METHOD, test_chrf/METHOD, ...   values, for every kind of logger
results                                   the rows of results.json, for loggers with tables
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol, runtime_checkable

from pytorch_lightning.loggers import Logger, WandbLogger

from lightning_knnmt.evaluation.results import ResultRow

NUMBERS = ("bleu", "chrf", "sentences_per_second", "tokens_per_second")


class LoggerError(ValueError):
    """A logger that cannot start."""


@runtime_checkable
class TableLogger(Protocol):
    """A logger that shows tables, as Lightning's WandbLogger."""

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None: ...


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Gives every logger the resolved configuration; W&B starts with it.

    Raises:
        LoggerError: If W&B should send the run but cannot.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _start_wandb(logger)
        logger.log_hyperparams(config)


def _start_wandb(logger: WandbLogger) -> None:
    import wandb  # only where it is used: it takes half a second

    try:
        _ = logger.experiment
    except wandb.Error as error:
        raise LoggerError(
            f"Weights & Biases cannot start ({str(error).rstrip('.')}): log in with `wandb login`, "
            "or keep the run on this machine with logger.mode=offline."
        ) from error


def log_results(loggers: Sequence[Logger], rows: Sequence[ResultRow], step: int) -> None:
    """Gives every logger the scores and speeds, and loggers with tables all of the rows.

    Args:
        loggers: Of any kind.
        rows: One for each method and test set; of other test sets than the first, the names of
            numbers end in the test set's.
        step: Training steps of the tested weights.
    """
    numbers = {}
    for row in rows:
        where = row.method if row.test_set == rows[0].test_set else f"{row.method}/{row.test_set}"
        for name in NUMBERS:
            numbers[f"test_{name}/{where}"] = float(getattr(row, name))
    columns = [field.name for field in fields(ResultRow)]
    data = [list(asdict(row).values()) for row in rows]
    for logger in loggers:
        logger.log_metrics(numbers, step)
        if isinstance(logger, TableLogger):
            logger.log_table("results", columns, data)
        logger.save()


def finish(loggers: Sequence[Logger]) -> None:
    """Ends W&B's run, which the next run in this process would otherwise continue."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()

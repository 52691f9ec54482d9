"""What loggers are told beside Lightning's curves: the run's config, its results, its end.

test_bleu/METHOD, test_chrf/METHOD, ...   numbers, for every kind of logger
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
    """Tells every logger the resolved config; W&B starts with it.

    Raises:
        LoggerError: If W&B shall send the run but cannot.
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
    """Tells every logger the numbers of a test, and those that show tables all of it.

    Args:
        loggers: Of any kind.
        rows: One for each method, all on one test set.
        step: Training steps of the tested weights.
    """
    numbers = {
        f"test_{name}/{row.method}": float(getattr(row, name)) for row in rows for name in NUMBERS
    }
    columns = [field.name for field in fields(ResultRow)]
    data = [list(asdict(row).values()) for row in rows]
    for logger in loggers:
        logger.log_metrics(numbers, step)
        if isinstance(logger, TableLogger):
            logger.log_table("results", columns, data)
        logger.save()


def finish(loggers: Sequence[Logger]) -> None:
    """Ends W&B's run: the next one in this process would go on with it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()

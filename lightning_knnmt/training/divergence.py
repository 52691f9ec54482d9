"""Errors of a training that diverged: where it stopped, on which lines of text, what to do."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import Tensor

from lightning_knnmt.data import Batch, Corpus, LabelledKeys

LINES_SHOWN = 5
GO_ON = "then continue from the last checkpoint with resume=true, or start a new run."


class NonFiniteLossError(ValueError):
    """A loss or an update that is not finite."""


def training_diverged(
    trainer: pl.Trainer, loss: Tensor, batch: Batch | LabelledKeys, batch_idx: int
) -> str:
    """Says where training stopped because of its loss, and what to do."""
    corpus = trainer.datamodule.train_corpus  # type: ignore[attr-defined]
    return (
        f"The training loss is {loss.item()} in step {trainer.global_step} (epoch "
        f"{trainer.current_epoch}, batch {batch_idx}), on {origin(batch, corpus)}: lower "
        f"module.optimizer.lr, raise module.warmup_steps or look at these lines, {GO_ON}"
    )


def check_validation_loss(trainer: pl.Trainer, loss: float) -> None:
    """Ends a training before weights without a finite loss are saved; every rank must call this.

    Args:
        trainer: Knows whether this is a training.
        loss: The mean over all ranks.

    Raises:
        NonFiniteLossError: On all ranks.
    """
    if trainer.state.fn != "fit" or trainer.sanity_checking or math.isfinite(loss):
        return
    raise NonFiniteLossError(
        f"The validation loss is {loss} after step {trainer.global_step} (epoch "
        f"{trainer.current_epoch}): lower module.optimizer.lr or raise module.warmup_steps, {GO_ON}"
        if trainer.is_global_zero
        else "This rank stops because the validation loss is not finite."
    )


@contextmanager
def overflow_told(trainer: pl.Trainer, optimizer: Any) -> Iterator[None]:
    """Turns torch's error for an update that overflows into advice."""
    try:
        yield
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        rate = max(group["lr"] for group in optimizer.param_groups)
        raise NonFiniteLossError(
            f"The update of step {trainer.global_step}, with a learning rate of {rate:g}, is too "
            "large for the weights' precision: lower module.optimizer.lr and start a new run."
        ) from error


def origin(batch: Batch | LabelledKeys, corpus: Corpus) -> str:
    """Names the lines of text that a batch is made of.

    Args:
        batch: Sentences of the corpus, or entries of a datastore that was built from it.
        corpus: The training text.
    """
    if isinstance(batch, LabelledKeys):
        entries = batch.entries.cpu().numpy()
        rows = np.unique(np.searchsorted(corpus.target_offsets, entries, "right") - 1).tolist()
    else:
        rows = sorted(batch.index.tolist())
    lines = sorted(corpus.line_numbers(rows))
    shown = ", ".join(map(str, lines[:LINES_SHOWN]))
    more = f" and {len(lines) - LINES_SHOWN:,} more" if len(lines) > LINES_SHOWN else ""
    return f"lines {shown}{more} of {corpus.source_path} and its translation"

"""TrainOnDatastore: the output projection trains on a datastore's entries instead of the text."""

from pathlib import Path

import numpy as np
import pytorch_lightning as pl

from lightning_knnmt.data import EntryBatchSampler, KeyDataset, ResumableDataLoader
from lightning_knnmt.retrieval import (
    Datastore,
    DatastorePlan,
    available_memory,
    check_integer,
    ensure_datastore,
)
from lightning_knnmt.training.knn_callback import datamodule_of, precision_of
from lightning_knnmt.training.opl import OPLFineTuner

RUN_LENGTH = 64  # entries read together from a datastore that memory cannot hold


class TrainOnDatastore(pl.Callback):
    """Gives an `OPLFineTuner` the entries of the model's datastore to train on.

    The datastore is built when it is first needed, and used again by every run of the same model on
    the same text, with and without retrieval: tuning W_O does not change it.
    """

    def __init__(
        self,
        datastores: Path | str,
        *,
        directory: Path | str | None = None,
        batch_size: int = 2048,
        seed: int = 1,
    ) -> None:
        """
        Args:
            datastores: Datastores are kept in this folder, one for each corpus and model.
            directory: One datastore's own folder instead, to use or to build there.
            batch_size: Entries in a batch.
            seed: Fixes their order.
        """
        check_integer("callbacks.train_on_datastore.batch_size", batch_size)
        self.plan = DatastorePlan(
            Path(datastores), None if directory is None else Path(directory), index="flat"
        )
        self.batch_size = batch_size
        self.seed = seed

    def training_batches(self, trainer: pl.Trainer) -> ResumableDataLoader:
        """All entries of the datastore, which is built if need be; the datamodule asks for them."""
        module = trainer.lightning_module
        if not isinstance(module, OPLFineTuner):
            raise TypeError(
                "A datastore's entries train an output projection alone, but the module is a "
                f"{type(module).__name__}: use module=opl_datastore, or take "
                "callbacks.train_on_datastore out."
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"The output projection trains on a datastore in one process, but there are "
                f"{trainer.world_size}: set trainer.devices=1."
            )
        datastore = ensure_datastore(
            module.model,
            module.tokenizer,
            datamodule_of(trainer).train_corpus,
            self.plan,
            precision=precision_of(trainer),
        )
        return entry_loader(datastore, self.batch_size, self.seed)


def entry_loader(datastore: Datastore, batch_size: int, seed: int) -> ResumableDataLoader:
    """All entries in shuffled batches of `LabelledKeys`.

    Keys are read into memory where they take at most half of what is free. Larger ones stay on the
    disk, and neighbours in the text stay together while they are shuffled: about as much as the
    tokens of a sentence do in training through the model.
    """
    fits = 2 * datastore.keys.nbytes < available_memory()
    keys = np.array(datastore.keys) if fits else datastore.keys
    sampler = EntryBatchSampler(
        len(datastore), batch_size, run_length=1 if fits else RUN_LENGTH, seed=seed
    )
    return ResumableDataLoader(
        KeyDataset(keys, np.array(datastore.values)), batch_size=None, sampler=sampler
    )

"""Builds a datastore from a model and a corpus, on any number of ranks."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from lightning_knnmt.callbacks.teacher_forcing import teacher_forced
from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import Datastore, DatastoreWriter, refuse_if_too_large

logger = logging.getLogger(__name__)


def build_datastore(
    directory: Path,
    model: Transformer,
    datamodule: ParallelDataModule,
    *,
    model_fingerprint: str,
    trainer: pl.Trainer,
) -> Datastore:
    """Writes every target token of the training text with the hidden state before it.

    Every rank calls this. A row's place follows from its sentence and position alone, and a batch's
    composition does not depend on the ranks, so any number of them writes the same bytes.

    Args:
        directory: Where the datastore will be; the old one, if any, stays until the new is whole.
        model: Makes the keys.
        datamodule: Its training text is stored.
        model_fingerprint: The model's, for the manifest.
        trainer: Says rank, precision and how to wait for the other ranks.
    """
    corpus = datamodule.train_corpus
    num_entries = int(corpus.target_offsets[-1])
    key_dim = model.output_projection.in_features
    if trainer.is_global_zero:
        refuse_if_too_large(directory, num_entries, key_dim)
        writer = DatastoreWriter.create(directory, num_entries, key_dim)
    trainer.strategy.barrier("datastore created")
    if not trainer.is_global_zero:
        writer = DatastoreWriter.attach(directory, num_entries, key_dim)

    try:
        _write_all(writer, model, datamodule, trainer.precision_plugin.forward_context(), trainer)
        writer.flush()
    except BaseException:
        if trainer.is_global_zero:
            writer.abort()
        raise
    total = trainer.strategy.reduce(
        torch.tensor(writer.rows_written, device=trainer.strategy.root_device), reduce_op="sum"
    )
    if trainer.is_global_zero:
        writer.commit(
            int(total),
            model_fingerprint=model_fingerprint,
            tokenizer_digest=datamodule.tokenizer.digest,
            corpus_name=corpus.name,
            corpus_digest=corpus.digest,
        )
    trainer.strategy.barrier("datastore committed")
    return Datastore.open(directory, verify=False)  # its digests were computed a moment ago


def _write_all(
    writer: DatastoreWriter,
    model: Transformer,
    datamodule: ParallelDataModule,
    precision: AbstractContextManager[None],
    trainer: pl.Trainer,
) -> None:
    offsets = datamodule.train_corpus.target_offsets
    loader = datamodule.datastore_dataloader()
    # tqdm, as Lightning may have a rich bar on the screen and rich allows one at a time.
    bar = tqdm(
        total=writer.num_entries,
        desc="Building the datastore",
        unit="token",
        unit_scale=True,
        disable=not trainer.is_global_zero,
    )
    with bar:
        for hidden, labels, sentences, positions in teacher_forced(model, loader, precision):
            rows = offsets[sentences.cpu().numpy()] + positions.cpu().numpy()
            writer.write(rows, hidden.float().cpu().numpy(), labels.cpu().numpy())
            bar.update(len(rows) * trainer.world_size)

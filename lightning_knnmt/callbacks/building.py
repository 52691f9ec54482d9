"""Builds a datastore from a model and a corpus, on any number of ranks."""

from contextlib import AbstractContextManager
from pathlib import Path

import pytorch_lightning as pl
from tqdm import tqdm

from lightning_knnmt.callbacks.ranks import all_or_none, gathered, rank_zero_first
from lightning_knnmt.callbacks.teacher_forcing import teacher_forced
from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import Datastore, DatastoreWriter, refuse_if_too_large


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
    precision = trainer.precision_plugin.forward_context()

    def create() -> DatastoreWriter:
        refuse_if_too_large(directory, num_entries, key_dim)
        return DatastoreWriter.create(directory, num_entries, key_dim)

    def fill() -> None:
        _write_all(writer, model, datamodule, precision, trainer)
        writer.flush()

    def commit() -> None:
        if not trainer.is_global_zero:
            return
        writer.commit(
            sum(rows_written),
            model_fingerprint=model_fingerprint,
            tokenizer_digest=datamodule.tokenizer.digest,
            corpus_name=corpus.name,
            corpus_digest=corpus.digest,
        )

    writer = rank_zero_first(
        trainer, create, lambda: DatastoreWriter.attach(directory, num_entries, key_dim)
    )
    try:
        all_or_none(trainer, fill)
        rows_written = gathered(trainer, writer.rows_written)
        all_or_none(trainer, commit)
    except BaseException:
        if trainer.is_global_zero:
            writer.abort()
        raise
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
        disable=None if trainer.is_global_zero else True,  # None: only where somebody watches
    )
    with bar:
        for hidden, labels, sentences, positions in teacher_forced(model, loader, precision):
            rows = offsets[sentences.cpu().numpy()] + positions.cpu().numpy()
            writer.write(rows, hidden.float().cpu().numpy(), labels.cpu().numpy())
            bar.update(len(rows) * trainer.world_size)

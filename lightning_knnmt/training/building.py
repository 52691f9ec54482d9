"""Builds a datastore from a model and a corpus, on any number of ranks, or finds the one there."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytorch_lightning as pl
from tqdm import tqdm

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import (
    Datastore,
    DatastoreBusyError,
    DatastoreWriter,
    IndexKind,
    MissingDatastoreError,
    keys_of,
    refuse_foreign_datastore,
    refuse_if_too_large,
    wait_for_build,
)
from lightning_knnmt.training.fingerprint import fingerprint
from lightning_knnmt.training.ranks import all_or_none, gathered, rank_zero_first
from lightning_knnmt.training.teacher_forcing import teacher_forced

Check = Callable[[int, int, bool], None]  # of M and D; whether a datastore will be built


def ensure_datastore(
    trainer: pl.Trainer,
    model: Transformer,
    datastores: Path,
    *,
    directory: Path | None = None,
    rebuild: bool = False,
    index: IndexKind = "auto",
) -> Datastore:
    """The datastore of a model's present weights, built if there is none that fits.

    Every rank calls this.

    Args:
        trainer: Has the text, as its datamodule, and the precision.
        model: Makes the keys.
        datastores: The folder of all datastores; this one's name in it follows from the text, the
            tokenizer, the weights and the precision.
        directory: One datastore's own folder instead.
        rebuild: Build even if there is one that fits.
        index: The kind that will be made of it, which must fit too.

    Raises:
        StaleDatastoreError: If `directory` holds a datastore of another model, tokenizer or layer.
        ForeignFilesError: If it holds what is not a datastore's.
        DatastoreTooLargeError: If it or its index would not fit.
    """
    ours = fingerprint(model, trainer.precision)
    datamodule = datamodule_of(trainer)
    where = _directory(datamodule, datastores, ours, directory)

    def find() -> Datastore | None:
        wait_for_build(where)  # two runs that need the same datastore share it
        return _open_if_there(where)

    while True:
        if not rebuild:
            found = rank_zero_first(trainer, find, lambda: _open_if_there(where))
            if found is not None:
                found.require(
                    fingerprint=ours,
                    tokenizer_digest=datamodule.tokenizer.digest,
                    key_layer=model.key_layer,
                )
                return found
        try:
            return build_datastore(
                where, model, datamodule, model_fingerprint=ours, trainer=trainer, index=index
            )
        except DatastoreBusyError:  # its builder began since we looked: wait for it after all
            if rebuild or trainer.world_size > 1:
                raise


def refuse_what_will_not_fit(
    trainer: pl.Trainer,
    model: Transformer,
    datastores: Path,
    *,
    directory: Path | None = None,
    rebuild: bool = False,
    keys_change: bool = False,
    index: IndexKind = "auto",
    check: Check | None = None,
) -> None:
    """Raises if `ensure_datastore`, with the same arguments, could not build; builds nothing.

    Every rank calls this.

    Args:
        keys_change: Whether the model will be trained first, so that its present keys are not those
            that a datastore will hold.
        check: What else must be right with the datastore's shape.

    Raises:
        ForeignFilesError: If the folder holds what is not a datastore's.
        DatastoreTooLargeError: If the datastore or its index would not fit.
    """
    datamodule = datamodule_of(trainer)

    def check_all() -> None:
        ours = fingerprint(model, trainer.precision)
        where = _directory(datamodule, datastores, ours, directory)
        refuse_foreign_datastore(where, rebuild=rebuild)
        builds = rebuild or keys_change
        found = None if builds else _open_if_there(where, verify=False)
        num_entries, key_dim = _shape(model, datamodule) if found is None else found.keys.shape
        if found is None:
            refuse_if_too_large(where, num_entries, key_dim, index)
        if check is not None:
            check(num_entries, key_dim, found is None)

    rank_zero_first(trainer, check_all, lambda: None)


def _directory(
    datamodule: ParallelDataModule,
    datastores: Path,
    model_fingerprint: str,
    directory: Path | None,
) -> Path:
    """Where the datastore of a model's weights and a text is: a folder of its own, or given."""
    if directory is not None:
        return directory.resolve()  # what a link points to is replaced, not the link
    corpus = datamodule.train_corpus
    sources = f"{model_fingerprint} {corpus.digest} {datamodule.tokenizer.digest}"
    key = hashlib.sha256(sources.encode()).hexdigest()
    return datastores / f"{corpus.name.replace('/', '_')}-{key[:12]}"


def _shape(model: Transformer, datamodule: ParallelDataModule) -> tuple[int, int]:
    """M, an entry for each target token of the training text, and D."""
    corpus = datamodule.train_corpus
    return int(corpus.target_offsets[-1]), model.output_projection.in_features


def build_datastore(
    directory: Path,
    model: Transformer,
    datamodule: ParallelDataModule,
    *,
    model_fingerprint: str,
    trainer: pl.Trainer,
    index: IndexKind = "auto",
) -> Datastore:
    """Writes every target token of the training text with the key before it.

    Every rank calls this. A row's place follows from its sentence and position alone, and a batch's
    composition does not depend on the ranks, so any number of them writes the same bytes.

    Args:
        directory: Where the datastore will be; the old one, if any, stays until the new is whole.
        model: Makes the keys.
        datamodule: Its training text is stored.
        model_fingerprint: The model's, for the manifest.
        trainer: Says rank, precision and how to wait for the other ranks.
        index: The kind that will be made of it.
    """
    corpus = datamodule.train_corpus
    num_entries, key_dim = _shape(model, datamodule)
    precision = trainer.precision_plugin.forward_context()

    def create() -> DatastoreWriter:
        refuse_if_too_large(directory, num_entries, key_dim, index)
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
            key_layer=model.key_layer,
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
            keys = keys_of(hidden, model.key_layer)
            writer.write(rows, keys.float().cpu().numpy(), labels.cpu().numpy())
            bar.update(len(rows) * trainer.world_size)


def _open_if_there(directory: Path, verify: bool = True) -> Datastore | None:
    try:
        return Datastore.open(directory, verify)
    except MissingDatastoreError:
        return None


def datamodule_of(trainer: pl.Trainer) -> ParallelDataModule:
    """The trainer's text."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, ParallelDataModule):
        raise TypeError(
            f"A datastore is made of a ParallelDataModule's text, but the trainer has a "
            f"{type(datamodule).__name__}: pass datamodule=ParallelDataModule(...)."
        )
    return datamodule

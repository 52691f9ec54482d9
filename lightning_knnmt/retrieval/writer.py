"""Filling a datastore: every row's place is known in advance, so any number of processes can help.

Rank zero creates, everyone else attaches, each writes its own rows, rank zero commits. The bytes on
disk are the same for any number of ranks.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_knnmt.files import (
    building_path,
    file_digest,
    is_locked,
    locked,
    recover,
    replace_directory,
    sync,
    write_atomically,
)
from lightning_knnmt.models import KeyLayer
from lightning_knnmt.retrieval.datastore import (
    DATA_NAMES,
    DEFAULT_KEY_LAYER,
    FORMAT_VERSION,
    KEY_DTYPE,
    KEYS_NAME,
    OFFSET_DTYPE,
    OFFSETS_NAME,
    OUR_NAMES,
    TEXT_NAMES,
    VALUE_DTYPE,
    VALUES_NAME,
    Datastore,
    Manifest,
    array_header_bytes,
    digest_field,
    reject_foreign_datastore,
)
from lightning_knnmt.retrieval.errors import (
    DatastoreBusyError,
    DatastoreError,
    KeyRangeError,
    MissingDatastoreError,
)
from lightning_knnmt.retrieval.storage import (
    MANIFEST_NAME,
    explain_out_of_space,
    reject_foreign_files,
    reserve,
)

logger = logging.getLogger(__name__)

MARKS_NAME = "written.npy"  # one byte a row, gone before the datastore is finished
MARK_DTYPE = np.dtype(np.uint8)


class DatastoreWriter:
    """Writes keys and values to given rows of a datastore that is not there until it is committed.

    Attributes:
        directory: Where the datastore will be. Until then it grows in a hidden sibling, and the
            datastore that is there stays as it is.
        rows_written: Rows that this writer has written so far.
    """

    def __init__(
        self, directory: Path, num_entries: int, key_dim: int, lock: ExitStack | None = None
    ) -> None:
        self.directory = directory
        self.num_entries = num_entries
        self.key_dim = key_dim
        self.rows_written = 0
        self._num_sentences = 0
        self._building = building_path(directory)
        self._lock = lock or ExitStack()
        self._keys = _map(self._building / KEYS_NAME, (num_entries, key_dim), KEY_DTYPE)
        self._values = _map(self._building / VALUES_NAME, (num_entries,), VALUE_DTYPE)
        self._marks = _map(self._building / MARKS_NAME, (num_entries,), MARK_DTYPE)

    @classmethod
    def create(cls, directory: Path | str, num_entries: int, key_dim: int) -> DatastoreWriter:
        """Starts a datastore and takes all its space from the disk (rank zero).

        Args:
            directory: The folder of the datastore to be.
            num_entries: M, the number of target tokens of the corpus.
            key_dim: D, the model's width.
        """
        directory = Path(directory)
        if num_entries < 1 or key_dim < 1:
            raise DatastoreError(
                f"A datastore needs at least one entry and one dimension, but {num_entries} "
                f"entries of {key_dim} dimensions were asked for in {directory}."
            )
        recover(directory)
        reject_foreign_datastore(directory, rebuild=True)
        building = building_path(directory)
        with ExitStack() as lock:
            try:
                lock.enter_context(locked(directory, wait=False))
            except BlockingIOError as error:
                raise DatastoreBusyError(
                    f"Another process is building {directory} right now. Wait for it, or choose "
                    "another folder for the datastore."
                ) from error
            if building.exists():
                shutil.rmtree(building)
                logger.warning("Removed %s, left behind by a build that was stopped.", building)
            lock.callback(shutil.rmtree, building, ignore_errors=True)  # nothing after a commit
            building.mkdir()
            _allocate(building / KEYS_NAME, (num_entries, key_dim), KEY_DTYPE)
            _allocate(building / VALUES_NAME, (num_entries,), VALUE_DTYPE)
            _allocate(building / MARKS_NAME, (num_entries,), MARK_DTYPE)
            return cls(directory, num_entries, key_dim, lock.pop_all())

    @classmethod
    def attach(cls, directory: Path | str, num_entries: int, key_dim: int) -> DatastoreWriter:
        """Joins a build that rank zero has started (the other ranks)."""
        directory = Path(directory)
        if not (building_path(directory) / MARKS_NAME).is_file():
            raise MissingDatastoreError(
                f"No build of {directory} is under way to attach to. Let rank zero create it, wait "
                "at a barrier, then attach."
            )
        return cls(directory, num_entries, key_dim)

    def write(
        self,
        rows: npt.NDArray[np.int64],
        keys: npt.NDArray[np.floating[Any]],
        values: npt.NDArray[np.integer[Any]],
    ) -> None:
        """Writes some entries.

        Args:
            rows: Their rows in the datastore, each once, [m].
            keys: Their hidden states, rounded to float16 here, [m, D].
            values: The tokens that followed, [m].
        """
        if keys.shape != (len(rows), self.key_dim) or values.shape != rows.shape:
            raise DatastoreError(
                f"{len(rows)} rows need keys of shape ({len(rows)}, {self.key_dim}) and as many "
                f"values, but the keys have shape {keys.shape} and the values {values.shape}."
            )
        if len(rows) == 0:
            return
        self._check_rows(rows)
        self._keys[rows] = rounded_keys(keys)
        self._values[rows] = values
        self._marks[rows] = 1
        self.rows_written += len(rows)

    def _check_rows(self, rows: npt.NDArray[np.int64]) -> None:
        if rows.min() < 0 or rows.max() >= self.num_entries:
            raise DatastoreError(
                f"Rows {rows.min()} to {rows.max()} were given to a datastore of "
                f"{self.num_entries} entries: the corpus has more tokens than were announced."
            )
        again = self._marks[rows].astype(bool)
        if again.any() or len(np.unique(rows)) != len(rows):
            raise DatastoreError(
                f"A row was written twice (row {rows[again][0] if again.any() else rows.min()}, in "
                f"a batch of {len(rows)}): each sentence must be visited once, by one rank."
            )

    def flush(self) -> None:
        """Hands this writer's rows to the file system: call it on every rank before the commit."""
        for array in (self._keys, self._values, self._marks):
            array.flush()

    def write_text(
        self, offsets: npt.NDArray[np.int64], sources: Iterable[str], targets: Iterable[str]
    ) -> None:
        """Writes the pairs of sentences that the entries come from (rank zero).

        Args:
            offsets: The first entry of each pair, and M, [S + 1].
            sources: Their sources, S lines without line breaks.
            targets: Their targets.
        """
        with (self._building / OFFSETS_NAME).open("wb") as file:
            file.write(array_header_bytes(offsets.shape, OFFSET_DTYPE))
            file.write(offsets.astype(OFFSET_DTYPE).tobytes())
        for name, lines in zip(TEXT_NAMES, (sources, targets), strict=True):
            with (self._building / name).open("w", encoding="utf-8", newline="\n") as text:
                text.writelines(f"{line}\n" for line in lines)
        self._num_sentences = len(offsets) - 1

    def commit(
        self,
        total_rows_written: int,
        *,
        model_fingerprint: str,
        tokenizer_digest: str,
        corpus_name: str,
        corpus_digest: str,
        key_layer: KeyLayer = DEFAULT_KEY_LAYER,
        num_tokens_left_out: int = 0,
    ) -> Datastore:
        """Finishes the datastore and puts it in its place, over an older one too (rank zero).

        Args:
            total_rows_written: Sum of all ranks' rows_written.
            model_fingerprint: Of the model that made the keys.
            tokenizer_digest: Of the tokenizer that made the values.
            corpus_name: The corpus, for people.
            corpus_digest: The corpus, for comparison.
            key_layer: Whose inputs the keys are.
            num_tokens_left_out: Tokens of the corpus that have no row.
        """
        self.flush()
        self._check_complete(total_rows_written)
        if self._num_sentences == 0:  # entries whose text nobody gave: one pair of empty lines
            self.write_text(np.array([0, self.num_entries]), [""], [""])
        for name in DATA_NAMES:
            sync(self._building / name)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            num_entries=self.num_entries,
            num_sentences=self._num_sentences,
            num_tokens_left_out=num_tokens_left_out,
            key_dim=self.key_dim,
            key_dtype=KEY_DTYPE.name,
            model_fingerprint=model_fingerprint,
            tokenizer_digest=tokenizer_digest,
            corpus_name=corpus_name,
            corpus_digest=corpus_digest,
            complete=True,
            key_layer=key_layer,
            **{digest_field(name): file_digest(self._building / name) for name in DATA_NAMES},
        )
        (self._building / MARKS_NAME).unlink()
        path = self._building / MANIFEST_NAME
        try:
            write_atomically(path, manifest.to_json())
        except OSError as error:
            raise explain_out_of_space(error, path, len(manifest.to_json())) from error
        reject_foreign_files(self.directory, OUR_NAMES)
        replace_directory(self.directory)
        self._lock.close()
        return Datastore.open(self.directory, verify=False)  # its digests were computed just now

    def _check_complete(self, total_rows_written: int) -> None:
        missing = np.flatnonzero(self._marks == 0)
        if total_rows_written != self.num_entries or len(missing):
            first = f", the first of them row {missing[0]}" if len(missing) else ""
            raise DatastoreError(
                f"The datastore of {self.directory} was announced with {self.num_entries} entries, "
                f"but {total_rows_written} were written and {len(missing)} rows are empty{first}. "
                "Every target token of the corpus must be written once."
            )

    def abort(self) -> None:
        """Abandons the build and removes what was written (rank zero)."""
        self._lock.close()


def rounded_keys(keys: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float16]:
    """Rounds hidden states to float16, [m, D]; rejects those that float16 cannot represent."""
    with np.errstate(over="ignore"):
        rounded = keys.astype(KEY_DTYPE)
    if not np.isfinite(rounded).all():
        row = int(np.flatnonzero(~np.isfinite(rounded).all(axis=1))[0])
        largest = float(np.abs(keys[row]).max())
        raise KeyRangeError(
            f"Key {row} of a batch of {len(keys)} has a number of magnitude {largest}, but float16 "
            f"keys must be finite and at most {np.finfo(KEY_DTYPE).max}. The model has diverged, "
            "or its last layer is not normalised."
        )
    return rounded


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = array_header_bytes(shape, dtype)
    num_bytes = len(header) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    path.touch()
    reserve(path, num_bytes)
    with path.open("r+b") as file:
        file.write(header)


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
    array = np.lib.format.open_memmap(path, mode="r+")
    if array.shape != shape or array.dtype != dtype:
        raise DatastoreError(
            f"{path} was created as {array.dtype} {array.shape}, but this rank expects {dtype} "
            f"{shape}: all ranks must agree on the corpus and the model."
        )
    return array


def wait_for_build(directory: Path | str) -> None:
    """Returns when no other process is building a folder's datastore, however that build ended."""
    directory = Path(directory)
    if not is_locked(directory):
        return

    def waiting() -> None:
        logger.warning("Another process is building %s: waiting for it.", directory)

    # Where we may not write, another user's lock cannot be taken, nor anything built.
    with suppress(PermissionError), locked(directory, waiting=waiting):
        pass

"""Approximate search with faiss: an index described by one of its factory strings.

Everything that imports faiss is in this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_knnmt.files import (
    file_digest,
    locked,
    new_directory,
    recover,
    sync,
    write_atomically,
)
from lightning_knnmt.retrieval.errors import (
    DamagedIndexError,
    IndexFactoryError,
    MissingFaissError,
    MissingIndexError,
    StaleIndexError,
)
from lightning_knnmt.retrieval.index import Metric, check_k, check_metric
from lightning_knnmt.retrieval.storage import (
    MANIFEST_NAME,
    explain_out_of_space,
    reject_foreign_files,
)

INDEX_NAME = "index.faiss"
ADD_ROWS = 65536  # rows given to faiss at once, as float32
TRAINING_ROWS_PER_LIST = 48  # faiss warns below 39
MIN_TRAINING_ROWS = 65536
KMEANS_ITERATIONS = 10
WRITE_BYTES = 2**20

# faiss 1.15 ships 128000 for this threshold, which searches up to 500 queries of 256 dimensions one
# by one; the unit is queries times dimensions, so single queries stay on the direct path and
# batches go to BLAS.
BLAS_THRESHOLD = 2000


def require_faiss() -> ModuleType:
    """Imports faiss.

    Raises:
        MissingFaissError: If it is not installed.
    """
    try:
        import faiss as module
    except ImportError as error:
        raise MissingFaissError(
            f"Approximate search needs faiss, which cannot be imported ({error}): install "
            "faiss-cpu or faiss-gpu, or search exactly with index=flat."
        ) from error
    module.cvar.distance_compute_blas_threshold = BLAS_THRESHOLD
    return module


class _FaissOnFirstUse:
    """Stands for faiss until it is needed: exact search works without it."""

    def __getattr__(self, name: str) -> Any:
        global faiss
        faiss = require_faiss()
        return getattr(faiss, name)


faiss: Any = _FaissOnFirstUse()


@dataclass(frozen=True)
class IndexManifest:
    """A saved index's description."""

    factory: str
    metric: Metric
    parameters: str
    num_entries: int
    keys_digest: str
    index_digest: str
    faiss_version: str


class FaissIndex:
    """An index that faiss built.

    Attributes:
        metric: "l2" or "ip"; each trains and searches its own index.
        factory: faiss's description of the structure, as "IVF1024,PQ128x4fs,Refine(SQfp16)".
        parameters: Its settings at search time, as "nprobe=16,k_factor_rf=4"; may be empty.
        directory: Where it was saved; None if it was not.
    """

    def __init__(self, index: Any, factory: str, metric: Metric, parameters: str = "") -> None:
        check_metric(metric)
        self._index = index
        self.factory = factory
        self.metric: Metric = metric
        self.parameters = ""
        self.directory: Path | None = None
        self.set_parameters(parameters)

    @classmethod
    def build(
        cls,
        keys: npt.NDArray[Any],
        factory: str,
        metric: Metric = "l2",
        *,
        parameters: str = "",
        seed: int = 1,
    ) -> FaissIndex:
        """Trains an index on a sample of the keys and adds them all.

        The same keys, seed and number of threads give the same index.

        Args:
            keys: [M, D]; a memory map will do.
            factory: For `faiss.index_factory`. float16 keys are exact in "Refine(SQfp16)", at half
                the memory of "RFlat".
            metric: "l2" or "ip".
            parameters: For `faiss.ParameterSpace`.
            seed: Draws the training sample.

        Raises:
            IndexFactoryError: If there is no such index over keys of D dimensions.
        """
        check_metric(metric)
        index = _untrained(factory, keys.shape[1], metric)
        with _threads():
            _train(index, keys, seed)
            for start in range(0, len(keys), ADD_ROWS):
                index.add(np.ascontiguousarray(keys[start : start + ADD_ROWS], dtype=np.float32))
        return cls(_on_gpu(index, factory), factory, metric, parameters)

    def set_parameters(self, parameters: str) -> None:
        """Changes settings that need no rebuilding, as "nprobe=16,k_factor_rf=4".

        Raises:
            IndexFactoryError: If the index has no such settings.
        """
        if parameters:
            gpu = faiss.get_num_gpus() > 0
            space: Any = faiss.GpuParameterSpace() if gpu else faiss.ParameterSpace()
            try:
                space.set_index_parameters(self._index, parameters)
            except RuntimeError as error:
                raise IndexFactoryError(
                    f"The index {self.factory} cannot be searched with {parameters!r} "
                    f"({_reason(error)}): set index.parameters to settings that it has, as "
                    "nprobe=20,k_factor_rf=4 for IVF...,Refine(...)."
                ) from error
        self.parameters = parameters

    @property
    def description(self) -> str:
        settings = f", {self.parameters}" if self.parameters else ""
        return f"{self.factory} ({self.metric}{settings})"

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the saved index, about what it takes in memory."""
        lengths: list[int] = []
        _write(self._index, lambda data: lengths.append(len(data)))
        return sum(lengths)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        check_k(k, len(self))
        on_cpu = np.ascontiguousarray(queries.detach().float().cpu().numpy())
        with _threads():
            distances, entries = self._index.search(on_cpu, k)
        nearness = torch.from_numpy(distances)
        rows = torch.from_numpy(entries)
        if self.metric == "ip":
            nearness.neg_()
        if len(entries) and entries.min() < 0:
            nearness.masked_fill_(rows < 0, float("inf"))
        return nearness.to(queries.device), rows.to(queries.device)

    def save(self, directory: Path | str, *, keys_digest: str) -> None:
        """Writes the index and, last, its manifest; an older index there is replaced.

        Args:
            directory: The index's own folder, as Datastore.index_directory("faiss").
            keys_digest: The manifest's digest of the keys that the index was built over.
        """
        directory = Path(directory)
        reject_foreign_files(directory, (INDEX_NAME, MANIFEST_NAME))
        with locked(directory), new_directory(directory) as building:
            path = building / INDEX_NAME
            try:
                with path.open("wb") as file:
                    _write(self._index, file.write)
            except OSError as error:
                raise explain_out_of_space(error, path, self.num_bytes) from error
            sync(path)
            manifest = IndexManifest(
                factory=self.factory,
                metric=self.metric,
                parameters=self.parameters,
                num_entries=len(self),
                keys_digest=keys_digest,
                index_digest=file_digest(path),
                faiss_version=faiss.__version__,
            )
            as_json = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
            write_atomically(building / MANIFEST_NAME, as_json)
        self.directory = directory.resolve()

    @classmethod
    def load(cls, directory: Path | str, *, keys_digest: str) -> FaissIndex:
        """Reads a saved index, if it is whole and was built over these keys."""
        directory = Path(directory)
        recover(directory)
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise MissingIndexError(f"There is no finished index in {directory}. Build it first.")
        try:
            manifest = IndexManifest(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DamagedIndexError(
                f"{path} is not an index's manifest ({error}). Delete {directory} and build the "
                "index again."
            ) from error
        if manifest.keys_digest != keys_digest:
            raise StaleIndexError(
                f"The index in {directory} was built over the keys {manifest.keys_digest[:16]}…, "
                f"but the datastore's keys are {keys_digest[:16]}…. Delete {directory} and build "
                "the index again."
            )
        index_path = directory / INDEX_NAME
        if not index_path.is_file() or file_digest(index_path) != manifest.index_digest:
            raise DamagedIndexError(
                f"{index_path} is missing or damaged. Delete {directory} and build the index again."
            )
        index = _on_gpu(faiss.read_index(str(index_path)), manifest.factory)
        loaded = cls(index, manifest.factory, manifest.metric, manifest.parameters)
        loaded.directory = directory.resolve()
        return loaded


def check_factory(
    factory: str, parameters: str, num_entries: int, key_dim: int, metric: Metric
) -> None:
    """Rejects, before there are keys, what could not be built over M keys of D dimensions."""
    index = FaissIndex(_untrained(factory, key_dim, metric), factory, metric, parameters)._index
    ivf: Any = faiss.try_extract_index_ivf(index)
    lists = ivf.nlist if ivf is not None and ivf.quantizer_trains_alone != "\1" else 1  # not IMI's
    if lists > num_entries:
        raise IndexFactoryError(
            f"The index {factory} has {lists:,} lists, more than the datastore has entries, "
            f"{num_entries:,}: set index.factory to one with fewer, or let index=auto choose."
        )


def _untrained(factory: str, key_dim: int, metric: Metric) -> Any:
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        return faiss.index_factory(key_dim, factory, kind)
    except RuntimeError as error:
        raise IndexFactoryError(
            f"There is no index {factory!r} over keys of {key_dim} dimensions "
            f"({_reason(error)}): set index.factory to one, as "
            f"IVF1024,PQ{key_dim // 2}x4fs,Refine(SQfp16), or let index=auto choose."
        ) from error


def _reason(error: RuntimeError) -> str:
    """faiss's message, without its function and file."""
    said = str(error).rsplit("Error: ", 1)[-1].rsplit("failed: ", 1)[-1]
    return said.strip().rstrip(".")


def _train(index: Any, keys: npt.NDArray[Any], seed: int) -> None:
    """Trains on a random sample, in order of rows, that grows with the number of lists."""
    inner = faiss.extract_index_ivf(index) if _is_ivf(index) else index
    wanted = MIN_TRAINING_ROWS
    if _is_ivf(index):
        inner.cp.niter = KMEANS_ITERATIONS
        wanted = max(wanted, TRAINING_ROWS_PER_LIST * inner.nlist)
    if index.is_trained:
        return
    rows: npt.NDArray[np.int64] = np.arange(len(keys))
    if wanted < len(keys):
        rows = np.random.default_rng(seed).choice(len(keys), wanted, replace=False)
        rows.sort()
    index.train(np.ascontiguousarray(keys[rows], dtype=np.float32))


def _is_ivf(index: Any) -> bool:
    return faiss.try_extract_index_ivf(index) is not None


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Gives faiss as many threads as torch has: more of them than cores make it crawl."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    yield


def _on_gpu(index: Any, factory: str) -> Any:
    """Moves an index to the GPU where faiss has one and knows the structure there."""
    if faiss.get_num_gpus() == 0 or "fs" in factory or "Refine" in factory:
        return index
    return faiss.index_cpu_to_all_gpus(index)


def _on_cpu(index: Any) -> Any:
    return index if faiss.get_num_gpus() == 0 else faiss.index_gpu_to_cpu(index)


def _write(index: Any, write: Callable[[bytes], Any]) -> None:
    """Serialises an index by chunks, so that a full disk is an exception of `write`."""
    writer = faiss.PyCallbackIOWriter(write, WRITE_BYTES)
    faiss.write_index(_on_cpu(index), writer)

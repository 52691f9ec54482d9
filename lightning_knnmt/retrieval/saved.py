"""A prepared retrieval as plain settings for a file, and back."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.files import sha256_of
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval.auto import exact_dtype
from lightning_knnmt.retrieval.choice import MeasuredIndex
from lightning_knnmt.retrieval.combiner import Combiner
from lightning_knnmt.retrieval.combiner_file import load_combiner
from lightning_knnmt.retrieval.datastore import VERIFIED_NAMES, Datastore
from lightning_knnmt.retrieval.faiss_index import INDEX_NAME, FaissIndex
from lightning_knnmt.retrieval.fitting import FittedCombiner, output_digest
from lightning_knnmt.retrieval.index import METRICS, FlatIndex, Index
from lightning_knnmt.retrieval.learned import give_label_log_probs
from lightning_knnmt.retrieval.prepare import Retrieval
from lightning_knnmt.retrieval.storage import MANIFEST_NAME
from lightning_knnmt.retrieval.tuned import KINDS

T = TypeVar("T")

PACKED_COMBINER = "combiner.safetensors"


class SavedSystemError(ValueError):
    """A saved system that is incomplete, damaged or changed, and what to do."""


class Settings:
    """A table read from a file; each value is checked when it is asked for.

    Args:
        content: What the file holds at this place.
        file: The file, for errors.
        name: The place in the file, such as `retrieval.index`.
    """

    def __init__(self, content: Any, file: Path, name: str = "") -> None:
        self.file, self.name = file, name
        if not isinstance(content, dict):
            raise self.error(f"{name or 'the file'} is {content!r}, which is not a table")
        self._content: dict[str, Any] = content

    @classmethod
    def read(cls, raw: bytes, file: Path) -> Settings:
        """The settings in the content of a YAML file."""
        try:
            content = yaml.safe_load(raw.decode())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SavedSystemError(
                f"{file} is damaged ({' '.join(str(error).split())}). Run train.py or evaluate.py "
                "again."
            ) from error
        return cls(content, file)

    def get(self, name: str, *kinds: type) -> Any:
        """A value of one of these types; None is one only where `type(None)` is among them."""
        value = self._content.get(name)
        if type(value) not in kinds:
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise self.error(f"{self._place(name)} is {value!r}, which is not {expected}")
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> Any:
        """A value among some texts."""
        value = self.get(name, str)
        if value not in allowed:
            one_of = " or ".join(allowed)
            raise self.error(f"{self._place(name)} is {value!r}, which is not {one_of}")
        return value

    @property
    def content(self) -> dict[str, Any]:
        """A copy of everything."""
        return deepcopy(self._content)

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self._content]

    def table(self, name: str) -> Settings:
        """A table in this one."""
        return Settings(self._content.get(name), self.file, self._place(name))

    def part(self, name: str, what: str) -> Path:
        """An existing file or folder, whose path is relative to the file's folder.

        Args:
            name: Where its path stands.
            what: What it is, for the error.
        """
        return self.existing(self.get(name, str), what, self._place(name))

    def existing(self, relative: str, what: str, place: str) -> Path:
        path = (self.file.parent.resolve() / relative).resolve()
        if not path.exists():
            raise SavedSystemError(
                f"{self.file}: {place}, the {what}, is not at {path}. Put it back, change the path "
                "there, or run train.py or evaluate.py again. `lightning-knnmt pack` makes a file "
                "that can be moved."
            )
        return path

    def build(self, make: Callable[..., T], *, but: tuple[str, ...] = ()) -> T:
        """What `make` makes of all values as keywords, `but` some names."""
        values = {name: value for name, value in self._content.items() if name not in but}
        try:
            return make(**values)
        except (TypeError, ValueError) as error:
            raise self.error(f"{self.name} does not fit ({error})") from error

    def changed(self, name: str, found: str, what: str, path: Path) -> SavedSystemError:
        """The error where a part has another digest than the file says."""
        return SavedSystemError(
            f"{path} has changed: {what} has the digest {found[:12]}, but {self._place(name)} in "
            f"{self.file} is {str(self._content.get(name))[:12]}. Restore it, or run train.py or "
            "evaluate.py again."
        )

    def error(self, problem: str) -> SavedSystemError:
        return SavedSystemError(
            f"{self.file}: {problem}. Correct it, or run train.py or evaluate.py again."
        )

    def _place(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def settings_of(retrieval: Retrieval) -> dict[str, Any]:
    """Plain settings from which `open_retrieval` makes the same retrieval again.

    Paths are absolute. Values of a tuned combiner stand in it, a trained one is its file.
    """
    datastore, measured = retrieval.datastore, retrieval.measured_index
    manifest, index, combiner = datastore.manifest, measured.index, retrieval.fitted.combiner
    about_index: dict[str, Any] = {"kind": "exact", "metric": index.metric}
    if isinstance(index, FaissIndex):
        about_index |= {
            "kind": "faiss",
            "path": str(index.directory),
            "parameters": index.parameters,
        }
    if retrieval.fitted.path is not None:
        file = retrieval.fitted.path
        about_combiner = {"kind": "trained", "path": str(file), "sha256": sha256_of(file)}
    else:
        (kind,) = (name for name, each in KINDS.items() if type(combiner) is each.combiner)
        about_combiner = {"kind": kind, **asdict(combiner)}  # type: ignore[call-overload]
    return {
        "method": retrieval.method,
        "datastore": {
            "path": str(datastore.directory.resolve()),
            "entries": len(datastore),
            "keys": manifest.keys_digest,
            "values": manifest.values_digest,
        },
        "index": about_index | {"k": measured.k, "recall": measured.recall_at_k},
        "combiner": about_combiner,
    }


def open_retrieval(settings: Settings, model: Transformer, base: SoftmaxDistribution) -> Retrieval:
    """The retrieval that `settings_of` described.

    Args:
        settings: Read from a file; paths are relative to that file.
        model: The one that it was prepared for; what is searched lies on its device.
        base: The model's own distribution.

    Raises:
        SavedSystemError: If a part is missing, or another than it was.
        DatastoreError: If the datastore or its index is damaged.
        CombinerError: If the combiner is.
    """
    datastore = _open_datastore(settings.table("datastore"))
    index = _open_index(settings.table("index"), datastore, next(model.parameters()).device)
    about_index = settings.table("index")
    measured = MeasuredIndex(
        index, about_index.get("k", int), float(about_index.get("recall", int, float))
    )
    combiner = _open_combiner(settings.table("combiner"), datastore, model, base)
    return Retrieval(
        datastore.manifest.model_fingerprint,
        output_digest(model),
        datastore,
        measured,
        combiner,
        settings.get("method", str),
    )


def packed_parts(settings: Settings) -> tuple[dict[str, Any], dict[str, Path]]:
    """What a packed system keeps of a retrieval.

    Returns:
        The settings, with paths in the packed system, and the file of each path.
    """
    datastore = _open_datastore(settings.table("datastore"))
    packed = settings.content
    packed["datastore"]["path"] = "datastore"
    files = {f"datastore/{name}": datastore.directory / name for name in VERIFIED_NAMES}
    if "path" in settings.table("index").names:
        folder = settings.table("index").part("path", "index")
        packed["index"]["path"] = "index"
        files |= {f"index/{name}": folder / name for name in (INDEX_NAME, MANIFEST_NAME)}
    if "path" in settings.table("combiner").names:
        packed["combiner"]["path"] = PACKED_COMBINER
        files[PACKED_COMBINER] = settings.table("combiner").part("path", "combiner")
    return packed, files


def _open_datastore(settings: Settings) -> Datastore:
    datastore = Datastore.open(settings.part("path", "datastore"))
    for name, found in (
        ("keys", datastore.manifest.keys_digest),
        ("values", datastore.manifest.values_digest),
    ):
        if settings.get(name, str) != found:
            raise settings.changed(name, found, "the datastore", datastore.directory)
    return datastore


def _open_index(settings: Settings, datastore: Datastore, device: torch.device) -> Index:
    metric = settings.choice("metric", METRICS)
    if settings.choice("kind", ("exact", "faiss")) == "exact":
        return FlatIndex(datastore.keys, metric, device, exact_dtype(datastore.keys))
    directory = settings.part("path", "index")
    index = FaissIndex.load(directory, keys_digest=datastore.manifest.keys_digest)
    index.set_parameters(settings.get("parameters", str))
    return index


def _open_combiner(
    settings: Settings, datastore: Datastore, model: Transformer, base: SoftmaxDistribution
) -> FittedCombiner:
    kind = settings.choice("kind", ("trained", *KINDS))
    if kind != "trained":
        made: Combiner = settings.build(KINDS[kind].combiner, but=("kind",))
        return FittedCombiner(made)
    path = settings.part("path", "combiner")
    if settings.get("sha256", str) != (found := sha256_of(path)):
        raise settings.changed("sha256", found, "the combiner", path)
    combiner = load_combiner(path)
    give_label_log_probs(combiner, datastore, model, base)
    combiner.requires_grad_(False).to(next(model.parameters()).device)
    return FittedCombiner(combiner, path=path)

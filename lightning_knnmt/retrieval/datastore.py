"""The datastore on disk: hidden states and the tokens that followed them, independent of any index.

    manifest.json   what the files hold and which model, tokenizer and corpus made them
    keys.npy        float16 [M, D]: the output projection's inputs, or those of `Manifest.key_layer`
    values.npy      int32 [M]: the token that followed each of them
    offsets.npy     int64 [S + 1]: the first entry of each pair of sentences, and M
    sources.txt     the sources of the pairs, a line each
    targets.txt     the targets
    verified.json   which files were last read in full and found right; may be deleted
    indexes/        one folder an index: each can be thrown away and built again
    tuning/, combiners/, label_log_probs/    what was chosen or trained for it: may be deleted too

The manifest is written last, in a hidden sibling folder that is then renamed: a manifest means that
the datastore is whole (Khandelwal et al., 2021, "Nearest Neighbor Machine Translation",
arXiv:2010.00710, section 2, for what keys and values are).
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_knnmt.files import file_digest, recover
from lightning_knnmt.models import KeyLayer
from lightning_knnmt.retrieval.errors import (
    DamagedDatastoreError,
    MissingDatastoreError,
    StaleDatastoreError,
    TruncatedDatastoreError,
)
from lightning_knnmt.retrieval.storage import (
    MANIFEST_NAME,
    STAMP_NAME,
    reject_foreign_files,
    remember_verified,
    unchanged_since_verified,
)

FORMAT_VERSION = 2
KEYS_NAME = "keys.npy"
VALUES_NAME = "values.npy"
OFFSETS_NAME = "offsets.npy"
TEXT_NAMES = ("sources.txt", "targets.txt")
DATA_NAMES = (KEYS_NAME, VALUES_NAME, OFFSETS_NAME, *TEXT_NAMES)
VERIFIED_NAMES = (MANIFEST_NAME, *DATA_NAMES)
# All that a datastore's folder holds: what holds anything else is never replaced.
OUR_NAMES = (
    *(*VERIFIED_NAMES, STAMP_NAME, f".{STAMP_NAME}.*"),
    *("indexes", "tuning", "combiners", "label_log_probs"),
)
KEY_DTYPE = np.dtype(np.float16)
VALUE_DTYPE = np.dtype(np.int32)
OFFSET_DTYPE = np.dtype(np.int64)
DEFAULT_KEY_LAYER: KeyLayer = "opl_input"
LAYERS_IN_WORDS: dict[KeyLayer, str] = {
    "opl_input": "the output projection's inputs",
    "ffn_input": "the last feed-forward network's inputs",
}


@dataclass(frozen=True)
class Manifest:
    """A datastore's description; the digests are those of `files.file_digest`."""

    format_version: int
    num_entries: int
    num_sentences: int
    num_tokens_left_out: int  # of the text, because no output may contain them (<unk>)
    key_dim: int
    key_dtype: str
    model_fingerprint: str
    tokenizer_digest: str
    corpus_name: str
    corpus_digest: str
    keys_digest: str
    values_digest: str
    offsets_digest: str
    sources_digest: str
    targets_digest: str
    complete: bool
    key_layer: KeyLayer = DEFAULT_KEY_LAYER  # whose inputs the keys are

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise MissingDatastoreError(
                f"There is no finished datastore in {directory}: {MANIFEST_NAME} is missing, and "
                "it is written last. Build the datastore first."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedDatastoreError(
                f"{path} is not valid JSON ({error}). Delete {directory} and build it again."
            ) from error
        return cls._checked(content, path)

    @classmethod
    def _checked(cls, content: Any, path: Path) -> Manifest:
        kinds = {"int": int, "str": str, "bool": bool, "KeyLayer": str}
        fields = {field.name: kinds[str(field.type)] for field in dataclasses.fields(cls)}
        version = content.get("format_version") if isinstance(content, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            raise DamagedDatastoreError(
                f"{path} has format version {version}, but this program reads version "
                f"{FORMAT_VERSION}. Build the datastore again: delete {path.parent}, or set "
                "knn.rebuild=true."
            )
        wrong = (
            sorted(name for name, kind in fields.items() if type(content.get(name)) is not kind)
            if isinstance(content, dict)
            else sorted(fields)
        )
        if wrong or not content["complete"]:
            raise DamagedDatastoreError(
                f"{path} has no valid entry for {', '.join(wrong) or 'complete'}. Delete "
                f"{path.parent} and build it again."
            )
        if content["key_dtype"] != KEY_DTYPE.name:
            raise DamagedDatastoreError(
                f"{path} has {content['key_dtype']} keys, but this program reads {KEY_DTYPE.name}. "
                "Build the datastore again."
            )
        if content["key_layer"] not in LAYERS_IN_WORDS:
            raise DamagedDatastoreError(
                f"{path} has key layer {content['key_layer']!r}, but this program knows "
                f"{', '.join(LAYERS_IN_WORDS)}. Build the datastore again."
            )
        return cls(**{name: content[name] for name in fields})


@dataclass(frozen=True)
class Datastore:
    """An open datastore.

    Attributes:
        directory: Its folder.
        manifest: Its description.
        keys: Hidden states, [M, D] float16, memory-mapped and read-only.
        values: The tokens that followed, [M] int32, memory-mapped and read-only.
        offsets: The first entry of each pair of sentences, and M, [S + 1] int64, memory-mapped.
    """

    directory: Path
    manifest: Manifest
    keys: npt.NDArray[np.float16]
    values: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def open(cls, directory: Path | str, verify: bool = True) -> Datastore:
        """Opens a finished datastore.

        Args:
            directory: The datastore's folder.
            verify: Whether to read every byte and compare the digests, unless that was done before
                and the files have not changed since (see `storage`). Measured on two cores with
                the files in the system's cache: 0.08 s for 208k entries of 256 dimensions, 13 to
                25 s for 36 GB. A second opening takes 2 ms at any size, as does verify=False, which
                checks only the manifest, headers and lengths.
        """
        directory = Path(directory)
        recover(directory)
        manifest = Manifest.read(directory)
        keys = _open_array(
            directory / KEYS_NAME, (manifest.num_entries, manifest.key_dim), KEY_DTYPE
        )
        values = _open_array(directory / VALUES_NAME, (manifest.num_entries,), VALUE_DTYPE)
        offsets = _open_array(directory / OFFSETS_NAME, (manifest.num_sentences + 1,), OFFSET_DTYPE)
        for name in TEXT_NAMES:
            if not (directory / name).is_file():
                raise DamagedDatastoreError(
                    f"{directory / name} is missing. Delete {directory} and build it again."
                )
        store = cls(directory, manifest, keys, values, offsets)
        if verify and not unchanged_since_verified(directory, VERIFIED_NAMES):
            store.verify()
            remember_verified(directory, VERIFIED_NAMES)
        return store

    def verify(self) -> None:
        """Reads every byte and compares the digests with the manifest's."""
        for name in DATA_NAMES:
            digest = getattr(self.manifest, digest_field(name))
            found = file_digest(self.directory / name)
            if found != digest:
                raise DamagedDatastoreError(
                    f"{self.directory / name} is damaged: its digest is {found[:16]}…, but the "
                    f"manifest says {digest[:16]}…. Delete {self.directory} and build it again."
                )

    def require(
        self, *, fingerprint: str, tokenizer_digest: str, key_layer: KeyLayer = DEFAULT_KEY_LAYER
    ) -> None:
        """Checks that this model and this tokenizer made the datastore.

        Args:
            fingerprint: Of the model whose hidden states will be the queries.
            tokenizer_digest: Of the tokenizer whose ids the values must be.
            key_layer: Whose inputs the queries will be.
        """
        theirs = self.manifest.key_layer
        if theirs != key_layer:
            raise StaleDatastoreError(
                f"The keys of the datastore in {self.directory} are {LAYERS_IN_WORDS[theirs]} "
                f"({theirs}), but {LAYERS_IN_WORDS[key_layer]} ({key_layer}) are needed here: give "
                f"another directory, or for retrieval set knn.key_layer={theirs}."
            )
        if self.manifest.model_fingerprint != fingerprint:
            raise StaleDatastoreError(
                f"The datastore in {self.directory} was built by a model with fingerprint "
                f"{self.manifest.model_fingerprint}, but this model has {fingerprint}: its keys "
                "would not match. Rebuild it, or load the checkpoint it was built from."
            )
        if self.manifest.tokenizer_digest != tokenizer_digest:
            raise StaleDatastoreError(
                f"The datastore in {self.directory} was built with the tokenizer "
                f"{self.manifest.tokenizer_digest}, but this tokenizer is {tokenizer_digest}: its "
                "values would name other tokens. Rebuild it, or use its own tokenizer."
            )

    def sentences_of(self, entries: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The pair of sentences that each entry comes from, as a number from 0, [...]."""
        sentences: npt.NDArray[np.int64] = np.searchsorted(self.offsets, entries, "right") - 1
        return sentences

    def pair(self, sentence: int) -> tuple[str, str]:
        """Source and target of a pair of sentences."""
        source, target = (lines[sentence] for lines in self._text)
        return source, target

    @cached_property
    def _text(self) -> tuple[_Lines, _Lines]:
        sources, targets = (_Lines(self.directory / name) for name in TEXT_NAMES)
        for lines in (sources, targets):
            if len(lines) != self.manifest.num_sentences:
                raise DamagedDatastoreError(
                    f"{lines.path} has {len(lines):,} lines, but its manifest says "
                    f"{self.manifest.num_sentences:,}. Delete {self.directory} and build it again."
                )
        return sources, targets

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of keys and values, without indexes."""
        return int(self.keys.nbytes + self.values.nbytes)

    def __len__(self) -> int:
        return self.manifest.num_entries

    def index_directory(self, name: str) -> Path:
        """The folder of the index of this name; it need not exist."""
        return self.directory / "indexes" / name


class _Lines:
    """A text file of which any line is read without the others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0)
        self._ends = np.flatnonzero(self._bytes == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        start = int(self._ends[number - 1]) + 1 if number else 0
        return bytes(self._bytes[start : self._ends[number]]).decode("utf-8")


def digest_field(name: str) -> str:
    """The manifest's field for the digest of one of `DATA_NAMES`."""
    return f"{name.partition('.')[0]}_digest"


def reject_foreign_datastore(directory: Path, *, rebuild: bool = False) -> None:
    """Raises if building a datastore in a folder would lose files that are not a datastore's.

    Args:
        directory: The folder; one that holds a datastore is not built in.
        rebuild: Unless that is wanted.

    Raises:
        ForeignFilesError: If there are such files, or there is no folder but a file.
    """
    if rebuild or not (directory / MANIFEST_NAME).is_file():
        reject_foreign_files(directory, OUR_NAMES)


def array_header_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The .npy header of an array of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape},
    )
    return buffer.getvalue()


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    header = array_header_bytes(shape, dtype)
    promised = len(header) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != promised:
        raise TruncatedDatastoreError(
            f"{path} has {found:,} bytes, but its manifest says {promised:,}. Delete "
            f"{path.parent} and build it again."
        )
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise DamagedDatastoreError(
                f"{path} is damaged: its header is not that of a {dtype.name} array of shape "
                f"{shape}. Delete {path.parent} and build it again."
            )
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]

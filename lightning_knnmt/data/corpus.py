"""Encoded parallel text on disk: flat arrays of ids, memory-mapped, made once and kept.

A corpus of M pairs is four arrays: all source ids, all target ids, and where each sentence begins
in them. Nothing but the offsets is ever read into memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from lightning_knnmt.data.cache import locked, new_directory
from lightning_knnmt.data.encoding import EncodingCounts, LinePolicy, write_arrays
from lightning_knnmt.data.text import TextPair
from lightning_knnmt.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

UNKNOWN_SHARE = 0.01  # of a text's tokens; above, something is wrong with it

_FORMAT_VERSION = 1

Ids = npt.NDArray[np.integer[Any]]


class Corpus(Protocol):
    """Pairs of encoded sentences, wherever they lie.

    Attributes:
        name: For manifests and reports.
        digest: SHA-256, in hex, of everything that determines the ids and their order.
        source_lengths: Ids of each source, EOS included, [n].
        target_lengths: Ids of each target, EOS included, [n].
        target_offsets: Where each target begins in the row of all targets, [n + 1].
        source_path: The file that `line_numbers` speaks of; the targets' lies beside it.
    """

    name: str
    digest: str
    source_lengths: npt.NDArray[np.int64]
    target_lengths: npt.NDArray[np.int64]
    target_offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of pairs."""
        ...

    def __getitem__(self, i: int) -> tuple[Ids, Ids]:
        """Source ids and target ids of a pair, both with EOS last."""
        ...

    @property
    def source_path(self) -> Path: ...

    @property
    def target_tokens(self) -> Ids:
        """The ids of all targets, one after the other, EOS included, [M]."""
        ...

    def line_numbers(self, rows: Sequence[int]) -> list[int]:
        """Where some pairs stand in the files, counted from 1."""
        ...

    def source_lines(self) -> list[str]:
        """The sources as text, in the order of the pairs."""
        ...

    def target_lines(self) -> list[str]:
        """The targets as text, in the order of the pairs: the references."""
        ...


class ParallelCorpus:
    """Pairs of encoded sentences in a folder that ``encode_corpus`` wrote.

    Args:
        directory: The folder of arrays.
        text: The files it was made from, for the text itself.
        name: For manifests and reports.

    Attributes:
        digest: SHA-256, in hex, of the text, the tokenizer and the policy.
        source_lengths: Ids of each source, EOS included, [n].
        target_lengths: Ids of each target, EOS included, [n].
        target_offsets: Where each target begins in the row of all targets, [n + 1].
    """

    def __init__(self, directory: Path, text: TextPair, name: str) -> None:
        manifest = json.loads((directory / "manifest.json").read_text())
        self.directory = directory
        self.text = text
        self.name = name
        self.digest: str = manifest["digest"]
        self._source_ids = np.load(directory / "source_ids.npy", mmap_mode="r")
        self._target_ids = np.load(directory / "target_ids.npy", mmap_mode="r")
        self._lines = np.load(directory / "lines.npy", mmap_mode="r")
        self._source_offsets = np.load(directory / "source_offsets.npy")
        self.target_offsets: npt.NDArray[np.int64] = np.load(directory / "target_offsets.npy")
        self.source_lengths: npt.NDArray[np.int64] = np.diff(self._source_offsets)
        self.target_lengths: npt.NDArray[np.int64] = np.diff(self.target_offsets)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.source_lengths)

    def __getitem__(self, i: int) -> tuple[Ids, Ids]:
        """Source ids and target ids of a pair, both with EOS last; views into the files."""
        source = self._source_ids[self._source_offsets[i] : self._source_offsets[i + 1]]
        target = self._target_ids[self.target_offsets[i] : self.target_offsets[i + 1]]
        return source, target

    @property
    def source_path(self) -> Path:
        return self.text.source_path

    @property
    def source_tokens(self) -> Ids:
        """The ids of all sources, one after the other, EOS included; a view into the file."""
        ids: Ids = self._source_ids
        return ids

    @property
    def target_tokens(self) -> Ids:
        """The ids of all targets, one after the other, EOS included, [M]; a view into the file."""
        ids: Ids = self._target_ids
        return ids

    def line_numbers(self, rows: Sequence[int]) -> list[int]:
        """Where some pairs stand in the files of text, counted from 1."""
        numbers: list[int] = self._lines[list(rows)].tolist()
        return numbers

    def source_lines(self) -> list[str]:
        """The sources as text, in the order of the pairs."""
        return self._kept(source for source, _ in self.text.read())

    def target_lines(self) -> list[str]:
        """The targets as text, in the order of the pairs: the references."""
        return self._kept(target for _, target in self.text.read())

    def _kept(self, lines: Iterable[str]) -> list[str]:
        kept = set(self._lines.tolist())
        return [line for number, line in enumerate(lines, start=1) if number in kept]

    def __reduce__(self) -> tuple[type[Self], tuple[Path, TextPair, str]]:
        """Travels to worker processes as its folder: a pickled map would carry all ids."""
        return type(self), (self.directory, self.text, self.name)


def encode_corpus(
    text: TextPair, tokenizer: Tokenizer, cache_dir: Path, policy: LinePolicy, name: str
) -> ParallelCorpus:
    """Encodes two aligned files, or finds that this was done before.

    The folder's name is the digest of everything that shapes its contents, so a changed text,
    tokenizer or policy is encoded anew. Interrupted work leaves nothing; of several processes one
    does the work.

    Args:
        text: The files.
        tokenizer: Makes the ids.
        cache_dir: Where encoded text is kept.
        policy: What happens to long and empty lines.
        name: For manifests and reports.
    """
    source, target = text.summarize(cache_dir)
    key = {
        "format_version": _FORMAT_VERSION,
        "source": source.sha256,
        "target": target.sha256,
        "tokenizer": tokenizer.digest,
        **asdict(policy),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    directory = cache_dir / "encoded" / digest[:32]
    with locked(directory):
        if not directory.exists():
            log.info("Encoding %s (%s pairs of lines).", name, f"{source.lines:,}")
            with new_directory(directory) as partial:
                counts = write_arrays(partial, text, source.lines, tokenizer, policy)
                manifest = {"digest": digest, **key, "counts": asdict(counts)}
                (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
    manifest = json.loads((directory / "manifest.json").read_text())
    tell(EncodingCounts(**manifest["counts"]), policy, text.source_path.with_suffix(""))
    corpus = ParallelCorpus(directory, text, name)
    _tell_unknown(corpus, tokenizer.vocabulary.unk_id)
    return corpus


def _tell_unknown(corpus: ParallelCorpus, unk_id: int) -> None:
    """Warns of text that the vocabulary cannot spell, as of another script."""
    for path, ids in (
        (corpus.source_path, corpus.source_tokens),
        (corpus.text.target_path, corpus.target_tokens),
    ):
        share = np.count_nonzero(ids == unk_id) / len(ids)
        if share > UNKNOWN_SHARE:
            log.warning(
                "%s: %.1f %% of the tokens are <unk>: the text is in another language or script, "
                "or prepared otherwise, than what the vocabulary was made of.",
                path,
                100 * share,
            )


def tell(counts: EncodingCounts, policy: LinePolicy, prefix: Path) -> None:
    """Warns of the pairs of a split, named by its files' prefix, that were cut or skipped."""
    if counts.long:
        log.warning(
            "%s: %s of %s pairs were %s because a side has more than %d tokens (the longest has "
            "%s; the first is line %s).",
            prefix,
            f"{counts.long:,}",
            f"{counts.pairs:,}",
            "cut" if policy.long_lines == "cut" else "skipped",
            policy.max_length,
            f"{counts.longest:,}",
            f"{counts.first_long:,}",
        )
    if counts.empty:
        log.warning(
            "%s: %s of %s pairs were skipped because a side is empty.",
            prefix,
            f"{counts.empty:,}",
            f"{counts.pairs:,}",
        )

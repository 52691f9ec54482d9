"""Encoded parallel text on disk: flat, memory-mapped arrays of ids, written once and kept.

A corpus is four arrays: all source ids, all target ids, and where each sentence begins in them.
Only the offsets are read into memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from lightning_knnmt.data.encoding import EncodingCounts, LinePolicy, write_arrays
from lightning_knnmt.data.text import TextPair
from lightning_knnmt.data.tokenizer import Tokenizer
from lightning_knnmt.files import default_cache, locked, new_directory

log = logging.getLogger(__name__)

UNKNOWN_SHARE = 0.01  # of a text's tokens; a larger one is worth a line
# If at most ten characters are 80 % of the unknown ones, it is these, not the language.
FEW_SYMBOLS, MOST_OF_THEM = 10, 0.8

_FORMAT_VERSION = 1
_DIGITS = re.compile(r"\d+")

Ids = npt.NDArray[np.integer[Any]]


class Corpus(Protocol):
    """Pairs of encoded sentences, however they are stored.

    Attributes:
        name: For manifests and reports.
        digest: SHA-256, in hex, of everything that determines the ids and their order.
        source_lengths: Ids of each source, EOS included, [n].
        target_lengths: Ids of each target, EOS included, [n].
        target_offsets: Where each target begins in the concatenation of all targets, [n + 1].
        source_path: The source file, to which `line_numbers` refers.
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
        """Source ids and target ids of a pair, EOS last."""
        ...

    @property
    def source_path(self) -> Path: ...

    @property
    def target_tokens(self) -> Ids:
        """The concatenated ids of all targets, EOS included, [M]."""
        ...

    def line_numbers(self, rows: Sequence[int]) -> list[int]:
        """Line numbers of some pairs in the files, counted from 1."""
        ...

    def source_lines(self) -> list[str]:
        """The source lines, in the order of the pairs."""
        ...

    def target_lines(self) -> list[str]:
        """The target lines (the references), in the order of the pairs."""
        ...


class ParallelCorpus:
    """A corpus in a folder that ``encode_corpus`` wrote.

    Args:
        directory: The folder of arrays.
        text: The files that were encoded.
        name: For manifests and reports.

    Attributes:
        digest: SHA-256, in hex, of the text, the tokenizer and the policy.
        source_lengths: Ids of each source, EOS included, [n].
        target_lengths: Ids of each target, EOS included, [n].
        target_offsets: Where each target begins in the concatenation of all targets, [n + 1].
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
        """Source ids and target ids of a pair, EOS last; views of the files."""
        source = self._source_ids[self._source_offsets[i] : self._source_offsets[i + 1]]
        target = self._target_ids[self.target_offsets[i] : self.target_offsets[i + 1]]
        return source, target

    @property
    def source_path(self) -> Path:
        return self.text.source_path

    @property
    def source_tokens(self) -> Ids:
        """The concatenated ids of all sources, EOS included; a view of the file."""
        ids: Ids = self._source_ids
        return ids

    @property
    def target_tokens(self) -> Ids:
        """The concatenated ids of all targets, EOS included, [M]; a view of the file."""
        ids: Ids = self._target_ids
        return ids

    def line_numbers(self, rows: Sequence[int]) -> list[int]:
        """Line numbers of some pairs in the text files, counted from 1."""
        numbers: list[int] = self._lines[list(rows)].tolist()
        return numbers

    def source_lines(self) -> list[str]:
        """The source lines, in the order of the pairs."""
        return self._kept(source for source, _ in self.text.read())

    def target_lines(self) -> list[str]:
        """The target lines (the references), in the order of the pairs."""
        return self._kept(target for _, target in self.text.read())

    def _kept(self, lines: Iterable[str]) -> list[str]:
        kept = set(self._lines.tolist())
        return [line for number, line in enumerate(lines, start=1) if number in kept]

    def __reduce__(self) -> tuple[type[Self], tuple[Path, TextPair, str]]:
        """Pickled as its folder: a pickled memory map would contain all ids."""
        return type(self), (self.directory, self.text, self.name)


class CorpusView:
    """Some pairs of a corpus, as a corpus of their own.

    Args:
        corpus: The whole corpus.
        rows: The view's pairs as rows of the corpus, in the view's order, [n].
        name: For manifests and reports.

    Attributes:
        digest: SHA-256, in hex, of the whole corpus' digest and the rows.
        source_lengths: Ids of each source, EOS included, [n].
        target_lengths: Ids of each target, EOS included, [n].
        target_offsets: Where each target begins in the view's concatenated targets, [n + 1].
    """

    def __init__(self, corpus: Corpus, rows: npt.NDArray[np.int64], name: str) -> None:
        self.corpus = corpus
        self.rows = rows
        self.name = name
        of_rows = hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()
        self.digest = hashlib.sha256(f"{corpus.digest}\0{of_rows}".encode()).hexdigest()
        self.source_lengths: npt.NDArray[np.int64] = corpus.source_lengths[rows]
        self.target_lengths: npt.NDArray[np.int64] = corpus.target_lengths[rows]
        self.target_offsets: npt.NDArray[np.int64] = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(self.target_lengths, out=self.target_offsets[1:])

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Ids, Ids]:
        """Source ids and target ids of a pair, EOS last."""
        return self.corpus[int(self.rows[i])]

    @property
    def source_path(self) -> Path:
        return self.corpus.source_path

    @property
    def target_tokens(self) -> Ids:
        """The concatenated ids of the view's targets, EOS included, [M]; a copy."""
        return np.concatenate([self[i][1] for i in range(len(self))])

    def line_numbers(self, rows: Sequence[int]) -> list[int]:
        """Line numbers of some of the view's pairs in the files, counted from 1."""
        return self.corpus.line_numbers(self.rows[list(rows)].tolist())

    def source_lines(self) -> list[str]:
        """The source lines, in the order of the view."""
        return self._of_view(self.corpus.source_lines())

    def target_lines(self) -> list[str]:
        """The target lines, in the order of the view."""
        return self._of_view(self.corpus.target_lines())

    def _of_view(self, lines: Sequence[str]) -> list[str]:
        return [lines[row] for row in self.rows]


def split_corpus(corpus: Corpus, share: float, seed: int = 1) -> tuple[CorpusView, CorpusView]:
    """Holds out some pairs of a corpus, for tuning without validation text.

    Sources that differ only in case, spaces or digits count as one: all their pairs are on the
    same side. The side depends only on the text and the seed.

    Args:
        corpus: The training text.
        share: Approximate share of the pairs to hold out, between 0 and 1.
        seed: Selects one of the possible divisions.

    Returns:
        The pairs to train on, and those held out; both in the order of the corpus.

    Raises:
        ValueError: If the share is out of range, or the text has too few different sources.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share is {share}, but must be between 0 and 1, for example 0.05.")
    groups: dict[str, list[int]] = {}
    for row, line in enumerate(corpus.source_lines()):
        groups.setdefault(_without_details(line), []).append(row)
    if len(groups) < 2:
        raise ValueError(
            f"{corpus.source_path} cannot be divided into training and held-out text because all "
            f"{len(corpus):,} sources are the same. Add text, or give validation text."
        )
    wanted, held_out = share * len(corpus), np.zeros(len(corpus), dtype=bool)
    in_random_order = sorted(
        groups, key=lambda line: hashlib.sha256(f"{seed}\0{line}".encode()).digest()
    )
    for line in in_random_order[:-1]:  # one group at least is left to train on
        held_out[groups[line]] = True
        if np.count_nonzero(held_out) >= wanted:
            break
    train, tune = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    return (
        CorpusView(corpus, train, f"{corpus.name} without held-out pairs"),
        CorpusView(corpus, tune, f"{corpus.name}, held-out pairs"),
    )


def _without_details(line: str) -> str:
    return _DIGITS.sub("0", " ".join(line.casefold().split()))


def encode_corpus(
    text: TextPair,
    tokenizer: Tokenizer,
    cache_dir: Path | None = None,
    policy: LinePolicy | None = None,
    name: str | None = None,
) -> ParallelCorpus:
    """Encodes two aligned files, or opens what was encoded before.

    The folder's name is the digest of everything that determines its contents, so a changed text,
    tokenizer or policy is encoded again. Interrupted work leaves nothing; one of several processes
    does the work and the others wait.

    Args:
        text: The files.
        tokenizer: Makes the ids.
        cache_dir: Where encoded text is kept; None for `files.default_cache`.
        policy: What happens to long and empty lines; None for `LinePolicy`'s defaults.
        name: For manifests and reports; None for the source file's name.
    """
    cache_dir = default_cache() if cache_dir is None else cache_dir
    policy = policy or LinePolicy()
    name = name or text.source_path.name
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
    counts = EncodingCounts.from_json(manifest["counts"])
    tell(counts, policy, text.source_path.with_suffix(""))
    _tell_unknown(counts, text, tokenizer, name)
    return ParallelCorpus(directory, text, name)


def tell(counts: EncodingCounts, policy: LinePolicy, prefix: Path) -> None:
    """Warns about pairs that were cut or skipped; the prefix names the split's files."""
    if counts.long:
        done = "cut" if policy.long_lines == "cut" else "skipped"
        _say_once(
            logging.WARNING,
            f"{prefix}: {counts.long:,} of {counts.pairs:,} pairs were {done} because a side has "
            f"more than {policy.max_length} tokens (the longest has {counts.longest:,}; the first "
            f"is line {counts.first_long:,}).",
        )
    if counts.empty:
        _say_once(
            logging.WARNING,
            f"{prefix}: {counts.empty:,} of {counts.pairs:,} pairs were skipped because a side is "
            "empty.",
        )


def _tell_unknown(counts: EncodingCounts, text: TextPair, tokenizer: Tokenizer, name: str) -> None:
    """Names the characters that the vocabulary lacks; warns if they are more than a few.

    What was said about one text of a run is not repeated for the next, unless most is new.
    """
    few: set[str] = set()
    rarer: set[str] = set()
    shares, fates = [], []
    for side, path, unknown, fate in (
        ("source", text.source_path, counts.source, "reads them as <unk>"),
        ("target", text.target_path, counts.target, "never writes them"),
    ):
        share = unknown.unknown / max(1, unknown.tokens)
        if share <= UNKNOWN_SHARE or not unknown.symbols:
            continue
        symbols = sorted(unknown.symbols, key=lambda symbol: -unknown.symbols[symbol])
        times = np.cumsum([unknown.symbols[symbol] for symbol in symbols])
        needed = 1 + int(np.searchsorted(times, MOST_OF_THEM * times[-1]))
        if needed > FEW_SYMBOLS:
            _say_once(
                logging.WARNING,
                f"{path}: the vocabulary lacks {len(symbols):,} characters, among them "
                f"{' '.join(symbols[:FEW_SYMBOLS])} ({share:.1%} of the tokens are <unk>): is the "
                "text in the language and script that the model was trained on?",
            )
            continue
        named = _named.setdefault((tokenizer.digest, side), set())
        if 2 * sum(unknown.symbols.get(symbol, 0) for symbol in named) < times[-1]:
            named.update(symbols[:needed])
            few.update(symbols[:needed])
            rarer.update(symbols[needed:])
            shares.append(f"{share:.1%} of the {side} tokens")
            fates.append(fate)
    if few:
        others = f" and {len(rarer - few):,} rarer characters" if rarer - few else ""
        _say_once(
            logging.INFO,
            f"{name}: the vocabulary lacks {' '.join(sorted(few))}{others} ({', '.join(shares)}): "
            f"the model {' and '.join(fates)}.",
        )


_said: set[str] = set()
_named: dict[tuple[str, str], set[str]] = {}  # missing characters, by tokenizer and side


def _say_once(level: int, message: str) -> None:
    """Logs a message once in this process, and only on rank zero."""
    if message not in _said and os.environ.get("LOCAL_RANK", "0") == "0":
        _said.add(message)
        log.log(level, message)

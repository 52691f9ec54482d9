"""fairseq's binarised text as a corpus, without converting or copying it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lightning_knnmt.data.corpus import Ids, tell
from lightning_knnmt.data.encoding import EncodingCounts, LinePolicy
from lightning_knnmt.data.fairseq.data_bin import (
    DataBin,
    DataBinError,
    DictionaryTokenizer,
    IndexedIds,
    data_files,
)
from lightning_knnmt.data.text import TextPair, summarize_file

log = logging.getLogger(__name__)


class FairseqCorpus:
    """Pairs of one split of a data-bin.

    Sentences are cut or skipped while reading; the files stay unchanged.

    Args:
        data_bin: The folder.
        split: The beginning of the files' names: ``train``, ``valid``, ``test``, ``test1``, ...
        tokenizer: Turns ids into text.
        policy: What to do with long and empty sentences.
        cache_dir: Where digests of files are kept.
        name: For manifests and reports.
        text: The text that was binarised, to read references instead of decoding them.

    Attributes:
        digest: SHA-256, in hex, of the ids, the tokenizer and the policy.
        source_lengths: Ids of each source, EOS included, [n].
        target_lengths: Ids of each target, EOS included, [n].
        target_offsets: Where each target begins in the concatenation of all targets, [n + 1].
        source_path: The source files' path, without ``.idx`` and ``.bin``.
    """

    def __init__(
        self,
        data_bin: DataBin,
        split: str,
        tokenizer: DictionaryTokenizer,
        policy: LinePolicy,
        cache_dir: Path,
        name: str,
        text: TextPair | None = None,
    ) -> None:
        self._arguments = (data_bin, split, tokenizer, policy, cache_dir, name, text)
        self.name = name
        self.tokenizer = tokenizer
        self.text = text
        prefixes = [
            data_bin.side(split, lang) for lang in (data_bin.source_lang, data_bin.target_lang)
        ]
        self.source_path = prefixes[0]
        self._source, self._target = (IndexedIds(prefix) for prefix in prefixes)
        if len(self._source) != len(self._target):
            raise DataBinError(
                f"{prefixes[0]} has {len(self._source):,} sentences but {prefixes[1]} has "
                f"{len(self._target):,}; sentence n of one must translate sentence n of the other, "
                "so binarise both together."
            )
        for side in (self._source, self._target):
            side.check_ends(tokenizer.vocabulary.eos_id)
        key = {
            "format": "fairseq",
            "files": [
                summarize_file(path, cache_dir).sha256 for p in prefixes for path in data_files(p)
            ],
            "tokenizer": tokenizer.digest,
            **asdict(policy),
        }
        self.digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        lengths = np.stack([np.diff(side.offsets) for side in (self._source, self._target)])
        self._rows, counts = _kept(lengths, policy, prefixes)
        tell(counts, policy, data_bin.root / split)
        # Cut sentences keep their EOS, see `_cut`.
        lengths = np.minimum(lengths[:, self._rows], policy.max_length)
        self.source_lengths: npt.NDArray[np.int64] = lengths[0]
        self.target_lengths: npt.NDArray[np.int64] = lengths[1]
        self.target_offsets: npt.NDArray[np.int64] = np.zeros(len(self._rows) + 1, dtype=np.int64)
        np.cumsum(self.target_lengths, out=self.target_offsets[1:])

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._rows)

    def __getitem__(self, i: int) -> tuple[Ids, Ids]:
        """Source ids and target ids of a pair, EOS last; views unless they are cut."""
        row = self._rows[i]
        return (
            _cut(self._source[row], self.source_lengths[i]),
            _cut(self._target[row], self.target_lengths[i]),
        )

    @property
    def target_tokens(self) -> Ids:
        """The concatenated ids of all targets, EOS included, [M]; a copy."""
        return np.concatenate([self[i][1] for i in range(len(self))])

    def line_numbers(self, rows: Sequence[int]) -> list[int]:
        """Line numbers of some pairs in the files, and in the text they came from, from 1."""
        return [int(self._rows[row]) + 1 for row in rows]

    def source_lines(self) -> list[str]:
        """The source lines, in the order of the pairs."""
        if self.text is not None:
            return self._lines(0)
        silent = self.tokenizer.vocabulary.special_ids
        sentences = (self._source[row].tolist() for row in self._rows)
        decode = self.tokenizer.source.decode
        return [decode([i for i in ids if i not in silent]) for ids in sentences]

    def target_lines(self) -> list[str]:
        """The target lines (the references), in the order of the pairs."""
        if self.text is not None:
            return self._lines(1)
        unk_id = self.tokenizer.vocabulary.unk_id
        unknown = int(np.count_nonzero(self._target.ids == unk_id))
        if unknown:
            log.warning(
                "%s: the references are decoded from ids, of which %s are <unk>; scores are only "
                "comparable with published ones if the text itself is given (data.test_text).",
                self.name,
                f"{unknown:,}",
            )
        return [self.tokenizer.decode(self._target[row].tolist()) for row in self._rows]

    def _lines(self, side: int) -> list[str]:
        assert self.text is not None, "called only if there is text"
        lines = [pair[side] for pair in self.text.read()]
        if len(lines) != len(self._source):
            raise DataBinError(
                f"{(self.text.source_path, self.text.target_path)[side]} has {len(lines):,} lines, "
                f"but {self.name} has {len(self._source):,} sentences; give the text that was "
                "binarised."
            )
        return [lines[row] for row in self._rows]

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Pickled as its folder: a pickled memory map would contain all ids."""
        return type(self), self._arguments


def _kept(
    lengths: npt.NDArray[np.int64], policy: LinePolicy, prefixes: list[Path]
) -> tuple[npt.NDArray[np.int64], EncodingCounts]:
    """The rows that a policy keeps, and counts of what it cuts and skips; lengths are [2, n]."""
    is_empty = lengths.min(axis=0) == 1  # EOS alone
    if policy.empty_lines == "error" and is_empty.any():
        row = int(is_empty.argmax())
        raise DataBinError(
            f"{prefixes[int(lengths[0, row] > 1)]}, sentence {row + 1:,} is empty, and every "
            "sentence must hold text; binarise without it (training text may also be read with "
            "empty_lines=skip)."
        )
    longest = np.where(is_empty, 0, lengths.max(axis=0))
    is_long = longest > policy.max_length
    counts = EncodingCounts(
        pairs=lengths.shape[1],
        long=int(is_long.sum()),
        empty=int(is_empty.sum()),
        first_long=int(is_long.argmax()) + 1 if is_long.any() else 0,
        longest=int(longest.max()) if is_long.any() else 0,
    )
    dropped = is_empty | is_long if policy.long_lines == "skip" else is_empty
    rows = np.flatnonzero(~dropped)
    if len(rows) == 0:
        raise DataBinError(
            f"No pair of {prefixes[0]} and {prefixes[1]} is left: all {counts.pairs:,} were "
            "skipped as empty or too long; raise max_length or binarise other text."
        )
    return rows, counts


def _cut(ids: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """The first ids, then the last one, EOS."""
    return ids if len(ids) == length else np.append(ids[: length - 1], ids[-1])

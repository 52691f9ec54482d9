"""Sentences, or the entries of a datastore, become batches that Lightning's loops can continue.

B sentences, S source length, T target length (EOS included), n sentences of a corpus or entries of
a batch; M entries of a datastore, D the model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from lightning_knnmt.data.corpus import Corpus, Ids
from lightning_knnmt.data.tokenizer import Vocabulary


class Batch(NamedTuple):
    """Padded pairs of sentences.

    Attributes:
        source_ids: EOS last, then padding, [B, S].
        target_ids: Start id first, EOS last, then padding, [B, T + 1].
        index: Row of each sentence in its corpus, [B].
        pad_id: The padding.
    """

    source_ids: Tensor
    target_ids: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no batch needs
    pad_id: int

    @property
    def source_mask(self) -> Tensor:
        """True where there is a source token, [B, S]."""
        return self.source_ids != self.pad_id

    @property
    def decoder_input(self) -> Tensor:
        """The decoder's input: the start id and all tokens but the last, [B, T]."""
        return self.target_ids[:, :-1]

    @property
    def labels(self) -> Tensor:
        """The tokens to predict, [B, T]."""
        return self.target_ids[:, 1:]

    @property
    def label_mask(self) -> Tensor:
        """True where there is a label, EOS included, [B, T]."""
        return self.labels != self.pad_id

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on a device; Lightning calls it like a tensor's `to`."""
        source_ids, target_ids, index = (
            each.to(device, non_blocking=non_blocking) for each in self[:3]
        )
        return Batch(source_ids, target_ids, index, self.pad_id)


class Example(NamedTuple):
    """One pair, both sides with EOS last, and its row in the corpus."""

    row: int
    source_ids: Ids | Sequence[int]
    target_ids: Ids | Sequence[int]


def collate(examples: Sequence[Example], vocabulary: Vocabulary) -> Batch:
    """Pads the examples into one batch and puts the start id before every target."""
    source_length = max(len(example.source_ids) for example in examples)
    target_length = max(len(example.target_ids) for example in examples)
    source = np.full((len(examples), source_length), vocabulary.pad_id, dtype=np.int64)
    target = np.full((len(examples), target_length + 1), vocabulary.pad_id, dtype=np.int64)
    target[:, 0] = vocabulary.start_id
    for i, example in enumerate(examples):
        source[i, : len(example.source_ids)] = example.source_ids
        target[i, 1 : len(example.target_ids) + 1] = example.target_ids
    index = torch.tensor([example.row for example in examples])
    return Batch(torch.from_numpy(source), torch.from_numpy(target), index, vocabulary.pad_id)


class BatchDataset(Dataset[Batch]):
    """A corpus indexed by lists of rows: an item is a whole batch."""

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary) -> None:
        self.corpus = corpus
        self.vocabulary = vocabulary

    def __getitem__(self, rows: list[int]) -> Batch:
        """The sentences in these rows as one batch."""
        return collate([Example(i, *self.corpus[i]) for i in rows], self.vocabulary)

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.corpus)


class TokenBatchSampler(DistributedSampler[list[int]]):
    """Lists of rows whose padded batch holds at most ``max_tokens`` ids, both sides counted.

    Sentences of similar length go together. Which ones form a batch depends only on the lengths,
    the seed and the epoch, never on the number of ranks: rank r takes every ``world_size``-th batch
    of the same sequence.

    With ``shuffle`` (training) the order of the batches, and the grouping of equally long
    sentences, change every epoch. All ranks get the same number of batches; the first ones are
    repeated if necessary. Without ``shuffle`` (evaluation, datastore) the longest batches come
    first and each sentence comes exactly once, on one rank, so ranks may differ by one batch.

    It is a ``DistributedSampler`` so that Lightning does not divide the batches again. Pass it to
    the DataLoader as ``sampler`` (with ``batch_size=None``) so that Lightning finds ``set_epoch``.

    Args:
        source_lengths: Ids of each source, [n].
        target_lengths: Ids of each target, [n].
        max_tokens: Maximum ids in a batch, padding included; a longer pair forms its own batch.
        max_sentences: Maximum sentences in a batch.
        shuffle: Whether to shuffle (see above).
        seed: Determines the shuffling, together with the epoch.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        source_lengths: npt.NDArray[np.int64],
        target_lengths: npt.NDArray[np.int64],
        max_tokens: int,
        *,
        max_sentences: int | None = None,
        shuffle: bool = False,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if max_tokens < 1 or (max_sentences is not None and max_sentences < 1):
            raise ValueError(
                "A batch must hold at least one token and one sentence, but max_tokens is "
                f"{max_tokens} and max_sentences is {max_sentences}."
            )
        super().__init__(
            range(len(source_lengths)),  # type: ignore[arg-type]
            world_size,
            rank,
            shuffle,
            seed,
        )
        # One integer key that sorts by the longer side, then target, then source: the order with
        # the least padding of those tried on real text.
        source, target = (np.asarray(x, np.int64) for x in (source_lengths, target_lengths))
        keys = np.maximum(source, target) << 42 | target << 21 | source
        order = np.argsort(keys, kind="stable")
        self._order = order if shuffle else order[::-1]
        self._keys = keys[self._order]
        self._bounds = _batch_bounds(
            source[self._order],
            target[self._order],
            max_tokens,
            max_sentences or len(order),
        )
        self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the shuffling; a new epoch begins at its first batch."""
        if epoch != self.epoch:
            self.first_batch = 0
        super().set_epoch(epoch)

    def resume(self, epoch: int, first_batch: int) -> None:
        """Makes the next iteration begin in the middle of an epoch."""
        super().set_epoch(epoch)
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Number of batches that this rank gets in a whole epoch."""
        extra = self.num_replicas - 1 if self.shuffle else self.num_replicas - 1 - self.rank
        return (len(self._bounds) - 1 + extra) // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        """The rows of this rank's batches, from ``first_batch`` on."""
        order, batches = self._order, np.arange(len(self._bounds) - 1)
        if self.shuffle:
            random = np.random.default_rng([self.seed, self.epoch])
            order = self._shuffled_ties(random)
            # Repeats the first batches where the ranks would otherwise get unequal counts.
            batches = np.resize(random.permutation(batches), len(self) * self.num_replicas)
        mine = batches[self.rank :: self.num_replicas]
        for batch in mine[self.first_batch :]:
            yield order[self._bounds[batch] : self._bounds[batch + 1]].tolist()

    def _shuffled_ties(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        # The sequence of lengths stays the same, so the bounds are valid in every epoch.
        shuffled = random.permutation(len(self._order))
        return self._order[shuffled[np.argsort(self._keys[shuffled], kind="stable")]]


def _batch_bounds(
    source_lengths: npt.NDArray[np.int64],
    target_lengths: npt.NDArray[np.int64],
    max_tokens: int,
    max_sentences: int,
) -> npt.NDArray[np.int64]:
    """Divides sentences, sorted by length, into the fewest batches: the start of each, then n."""
    bounds, start, total = [0], 0, len(source_lengths)
    guess = 64
    while start < total:
        # Looks ahead by the size of the last batch, and further only if that is not enough.
        while True:
            stop = min(start + min(guess, max_sentences), total)
            longest_source = np.maximum.accumulate(source_lengths[start:stop])
            longest_target = np.maximum.accumulate(target_lengths[start:stop])
            sizes = (longest_source + longest_target) * np.arange(1, stop - start + 1)
            fitting = int(np.searchsorted(sizes, max_tokens, side="right"))
            if fitting < stop - start or stop == total or stop - start == max_sentences:
                break
            guess *= 2
        guess = max(2 * fitting, 64)
        start += max(fitting, 1)
        bounds.append(start)
    return np.array(bounds, dtype=np.int64)


class LabelledKeys(NamedTuple):
    """Some entries of a datastore.

    Attributes:
        keys: Inputs of the output projection, [n, D]; float16, as stored.
        labels: The tokens to predict, [n].
        entries: Their rows in the datastore, [n].
    """

    keys: Tensor
    labels: Tensor
    entries: Tensor


class KeyDataset(Dataset[LabelledKeys]):
    """Keys and values indexed by arrays of rows: an item is a whole batch.

    Args:
        keys: Hidden states, [M, D], in memory or memory-mapped.
        values: The tokens that followed, [M].
    """

    def __init__(self, keys: npt.NDArray[np.float16], values: npt.NDArray[np.int32]) -> None:
        self.keys = keys
        self.values = values

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> LabelledKeys:
        """The entries in these rows as one batch."""
        keys, labels = (torch.from_numpy(each[rows]) for each in (self.keys, self.values))
        return LabelledKeys(keys, labels.long(), torch.from_numpy(rows))

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.values)


class EntryBatchSampler(Sampler[npt.NDArray[np.int64]]):
    """Arrays of rows in an order that changes every epoch; each entry comes once.

    Works with ``ResumableDataLoader`` and Lightning. Batch sizes differ by at most one entry, so
    that all batches have the same weight.

    Args:
        num_entries: M.
        batch_size: Maximum entries in a batch.
        run_length: Number of consecutive entries that stay together: 1 shuffles single entries;
            more saves disk seeks.
        seed: Determines the shuffling, together with the epoch.
    """

    def __init__(
        self, num_entries: int, batch_size: int, *, run_length: int = 1, seed: int = 1
    ) -> None:
        if batch_size < 1 or run_length < 1:
            raise ValueError(
                f"A batch of entries must hold at least one, in runs of at least one, but "
                f"batch_size is {batch_size} and run_length is {run_length}."
            )
        self.num_entries = num_entries
        self.run_length = run_length
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0
        self._num_batches = -(-num_entries // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order; a new epoch begins at its first batch."""
        if epoch != self.epoch:
            self.first_batch = 0
        self.epoch = epoch

    def resume(self, epoch: int, first_batch: int) -> None:
        """Makes the next iteration begin in the middle of an epoch."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return self._num_batches

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        """The rows of the batches, from ``first_batch`` on."""
        random: Any = np.random.default_rng([self.seed, self.epoch])
        starts = random.permutation(np.arange(0, self.num_entries, self.run_length))
        rows = (starts[:, None] + np.arange(self.run_length)).ravel()
        rows = rows[rows < self.num_entries]
        yield from np.array_split(rows, self._num_batches)[self.first_batch :]


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader that a checkpoint in the middle of an epoch can continue.

    Its sampler is a ``TokenBatchSampler`` or an ``EntryBatchSampler``. Lightning saves and restores
    loaders that have these two methods. The state counts the batches that were used, not those
    that worker processes have prefetched.
    """

    sampler: TokenBatchSampler | EntryBatchSampler
    _handed_out = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches, beginning with the sampler's ``first_batch``."""
        self._handed_out = self.sampler.first_batch
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch
        self.sampler.first_batch = 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were used."""
        return {"epoch": self.sampler.epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration continue where the saved one stopped."""
        self.sampler.resume(state["epoch"], state["batches"])


def at_least_one(batches: DataLoader[Batch]) -> DataLoader[Any]:
    """A rank's batches of a text, or a single None where it has no batches.

    Lightning does not call the hooks of a rank without batches, for which the other ranks wait.
    """
    if len(batches):
        return batches
    nothing: Any = [None]
    alone: DistributedSampler[Any] = DistributedSampler(
        nothing, num_replicas=1, rank=0
    )  # else Lightning would divide it
    return DataLoader(nothing, batch_size=None, sampler=alone)

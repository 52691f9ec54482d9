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
        """What the decoder reads: the start id and all tokens but the last, [B, T]."""
        return self.target_ids[:, :-1]

    @property
    def labels(self) -> Tensor:
        """What the decoder is to say at each position, [B, T]."""
        return self.target_ids[:, 1:]

    @property
    def label_mask(self) -> Tensor:
        """True where there is a label, EOS included, [B, T]."""
        return self.labels != self.pad_id

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on a device; Lightning calls it like a tensor's `to`."""
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
    """A corpus asked for whole batches: its items are named by lists of rows."""

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary) -> None:
        self.corpus = corpus
        self.vocabulary = vocabulary

    def __getitem__(self, rows: list[int]) -> Batch:
        """The sentences of the rows as one batch."""
        return collate([Example(i, *self.corpus[i]) for i in rows], self.vocabulary)

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.corpus)


class TokenBatchSampler(DistributedSampler[list[int]]):
    """Lists of rows whose padded batch holds at most ``max_tokens`` ids, both sides counted.

    Sentences of like length go together. Which ones form a batch depends on the lengths, the seed
    and the epoch alone, never on the number of ranks: of the one sequence of batches, rank r takes
    every ``world_size``-th.

    With ``shuffle`` (training) the order of the batches, and which of the equally long sentences
    meet, change with every epoch, and all ranks get equally many batches, the first ones being
    repeated if need be. Without (evaluation, datastore) the longest batches come first and each
    sentence comes exactly once on exactly one rank, so ranks may differ by one batch.

    It is a ``DistributedSampler`` so that Lightning leaves the division among ranks to it, and it
    is given to the DataLoader as its ``sampler`` (with ``batch_size=None``) so that Lightning finds
    ``set_epoch``.

    Args:
        source_lengths: Ids of each source, [n].
        target_lengths: Ids of each target, [n].
        max_tokens: Most ids in a batch, padding included; a longer pair forms a batch of its own.
        max_sentences: Most sentences in a batch.
        shuffle: Whether to shuffle, see above.
        seed: Fixes the shuffling, together with the epoch.
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
        # One integer that sorts by the longer side, then target, then source: of the orders
        # tried on real text the one with the least padding.
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
        """Names the epoch, which decides the shuffling; a new epoch begins at its first batch."""
        if epoch != self.epoch:
            self.first_batch = 0
        super().set_epoch(epoch)

    def resume(self, epoch: int, first_batch: int) -> None:
        """Lets the next iteration begin in the middle of an epoch."""
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
            # Repeats from the start when the ranks would otherwise get unequal numbers.
            batches = np.resize(random.permutation(batches), len(self) * self.num_replicas)
        mine = batches[self.rank :: self.num_replicas]
        for batch in mine[self.first_batch :]:
            yield order[self._bounds[batch] : self._bounds[batch + 1]].tolist()

    def _shuffled_ties(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        # Lengths stay in their places, so the batches' bounds hold for every epoch.
        shuffled = random.permutation(len(self._order))
        return self._order[shuffled[np.argsort(self._keys[shuffled], kind="stable")]]


def _batch_bounds(
    source_lengths: npt.NDArray[np.int64],
    target_lengths: npt.NDArray[np.int64],
    max_tokens: int,
    max_sentences: int,
) -> npt.NDArray[np.int64]:
    """Cuts sentences sorted by length into the fewest batches: where each begins, and n."""
    bounds, start, total = [0], 0, len(source_lengths)
    guess = 64
    while start < total:
        # Looks as far ahead as the last batch was large, and further only if that was not enough.
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
        keys: What the output projection sees, [n, D]; float16, as they are stored.
        labels: What it is to say, [n].
        entries: Their rows in the datastore, [n].
    """

    keys: Tensor
    labels: Tensor
    entries: Tensor


class KeyDataset(Dataset[LabelledKeys]):
    """Keys and values asked for whole batches: its items are named by arrays of rows.

    Args:
        keys: Hidden states, [M, D]; in memory, or memory-mapped.
        values: The tokens that followed, [M].
    """

    def __init__(self, keys: npt.NDArray[np.float16], values: npt.NDArray[np.int32]) -> None:
        self.keys = keys
        self.values = values

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> LabelledKeys:
        """The entries of the rows as one batch."""
        keys, labels = (torch.from_numpy(each[rows]) for each in (self.keys, self.values))
        return LabelledKeys(keys, labels.long(), torch.from_numpy(rows))

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.values)


class EntryBatchSampler(Sampler[npt.NDArray[np.int64]]):
    """Arrays of rows in an order that changes with every epoch; each entry comes once.

    It has what ``ResumableDataLoader`` and Lightning ask of a sampler. Batches differ by at most
    one entry, so that none weighs more than another.

    Args:
        num_entries: M.
        batch_size: Most entries in a batch.
        run_length: Entries that stay together, in their order: 1 shuffles single entries, more
            spares a disk that must seek for each.
        seed: Fixes the shuffling, together with the epoch.
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
        """Names the epoch, which decides the order; a new epoch begins at its first batch."""
        if epoch != self.epoch:
            self.first_batch = 0
        self.epoch = epoch

    def resume(self, epoch: int, first_batch: int) -> None:
        """Lets the next iteration begin in the middle of an epoch."""
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
    loaders that have these two methods. Counted is what was handed out, not what worker processes
    have read ahead.
    """

    sampler: TokenBatchSampler | EntryBatchSampler
    _handed_out = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches, from the sampler's first one on."""
        self._handed_out = self.sampler.first_batch
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch
        self.sampler.first_batch = 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self.sampler.epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration go on where the saved one stood."""
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

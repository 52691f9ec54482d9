"""Datastore entries as batches: which, in which order, and from where an epoch goes on."""

import numpy as np
import pytest
import torch

from lightning_knnmt.data import EntryBatchSampler, KeyDataset, ResumableDataLoader


@pytest.mark.parametrize("run_length", [1, 4, 7, 200])
@pytest.mark.parametrize(("num_entries", "batch_size"), [(100, 7), (5, 100), (64, 16)])
def test_each_entry_comes_once_in_batches_of_nearly_one_size(
    num_entries: int, batch_size: int, run_length: int
) -> None:
    sampler = EntryBatchSampler(num_entries, batch_size, run_length=run_length)
    batches = list(sampler)
    assert len(batches) == len(sampler) == -(-num_entries // batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_entries))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_the_order_depends_on_epoch_and_seed_alone() -> None:
    def order(epoch: int, seed: int = 1) -> list[int]:
        sampler = EntryBatchSampler(50, 8, seed=seed)
        sampler.set_epoch(epoch)
        return [int(row) for row in np.concatenate(list(sampler))]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=2)
    assert order(0) != list(range(50))


def test_runs_stay_together() -> None:
    rows = np.concatenate(list(EntryBatchSampler(64, 64, run_length=4))).reshape(16, 4)
    assert (np.diff(rows) == 1).all()
    assert (rows[:, 0] % 4 == 0).all()
    assert not (np.diff(rows[:, 0]) == 4).all()


def test_batches_hold_the_entries_and_an_epoch_goes_on_where_it_stopped() -> None:
    keys = np.random.default_rng(1).standard_normal((30, 3)).astype(np.float16)
    values = np.arange(100, 130, dtype=np.int32)

    def loader() -> ResumableDataLoader:
        return ResumableDataLoader(
            KeyDataset(keys, values), batch_size=None, sampler=EntryBatchSampler(30, 8)
        )

    first = loader()
    batches = iter(first)
    for _ in range(2):
        batch = next(batches)
        rows = batch.entries.numpy()
        assert torch.equal(batch.keys, torch.from_numpy(keys[rows]))
        assert batch.labels.tolist() == values[rows].tolist()
    other = loader()
    other.load_state_dict(first.state_dict())
    for ours, theirs in zip(other, batches, strict=True):
        assert torch.equal(ours.entries, theirs.entries)
    assert len(list(other)) == 4  # the next epoch is a whole one


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 0\b"):
        EntryBatchSampler(10, 0)

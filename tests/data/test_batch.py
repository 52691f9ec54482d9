from itertools import chain, pairwise

import numpy as np
import pytest

from lightning_knnmt.data import Example, TokenBatchSampler, Vocabulary, collate

VOCABULARY = Vocabulary(size=50, pad_id=0, unk_id=1, start_id=2, eos_id=3)
MARIAN = Vocabulary(size=50, pad_id=49, unk_id=1, start_id=49, eos_id=0)


def _lengths(count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    source = random.integers(2, 40, count)
    return source, np.clip(source + random.integers(-3, 4, count), 2, None)


def test_collate_pads_and_starts() -> None:
    batch = collate([Example(7, [5, 6, 3], [8, 3]), Example(4, [9, 3], [5, 6, 3])], VOCABULARY)
    assert batch.source_ids.tolist() == [[5, 6, 3], [9, 3, 0]]
    assert batch.target_ids.tolist() == [[2, 8, 3, 0], [2, 5, 6, 3]]
    assert batch.decoder_input.tolist() == [[2, 8, 3], [2, 5, 6]]
    assert batch.labels.tolist() == [[8, 3, 0], [5, 6, 3]]
    assert batch.source_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.label_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.index.tolist() == [7, 4]


def test_masks_are_right_when_padding_is_the_start() -> None:
    ids = np.array([5, 0], dtype=np.uint16)
    batch = collate([Example(0, ids, ids), Example(1, [5, 6, 0], [5, 6, 0])], MARIAN)
    assert batch.target_ids.tolist() == [[49, 5, 0, 49], [49, 5, 6, 0]]
    assert batch.label_mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("max_sentences", [None, 5])
def test_batches_hold_every_sentence_once_within_the_budget(
    shuffle: bool, max_sentences: int | None
) -> None:
    source, target = _lengths()
    sampler = TokenBatchSampler(source, target, 300, shuffle=shuffle, max_sentences=max_sentences)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(chain.from_iterable(batches)) == list(range(500))
    for rows in batches:
        assert len(rows) * (source[rows].max() + target[rows].max()) <= 300
        assert len(rows) <= (max_sentences or 500)


def test_batches_are_no_smaller_than_need_be() -> None:
    source, target = _lengths()
    for rows, following in pairwise(TokenBatchSampler(source, target, 300)):
        more = [*rows, following[0]]
        assert len(more) * (source[more].max() + target[more].max()) > 300


def test_a_pair_beyond_the_budget_forms_its_own_batch() -> None:
    sampler = TokenBatchSampler(np.array([5, 90, 5]), np.array([5, 90, 5]), 20)
    assert sorted(map(sorted, sampler)) == [[0, 2], [1]]


def test_evaluation_goes_from_long_to_short() -> None:
    source, target = _lengths()
    longer = np.maximum(source, target)
    longest = [longer[rows].max() for rows in TokenBatchSampler(source, target, 300)]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_evaluation_without_loss_or_repeat(world_size: int) -> None:
    source, target = _lengths()
    alone = list(TokenBatchSampler(source, target, 300))
    samplers = [
        TokenBatchSampler(source, target, 300, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for rank, sampler in enumerate(samplers):
        assert list(sampler) == alone[rank::world_size]
        assert len(list(sampler)) == len(sampler)


def test_ranks_train_on_the_same_batches_in_equal_numbers() -> None:
    source, target = _lengths()
    alone = list(TokenBatchSampler(source, target, 300, shuffle=True, seed=3))
    ranks = [
        list(TokenBatchSampler(source, target, 300, shuffle=True, seed=3, rank=rank, world_size=4))
        for rank in range(4)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    together = list(chain.from_iterable(zip(*ranks, strict=True)))
    assert together[: len(alone)] == alone
    assert together[len(alone) :] == alone[: len(together) - len(alone)]


def test_more_ranks_than_batches() -> None:
    ones = np.array([2])
    samplers = [
        TokenBatchSampler(ones, ones, 9, shuffle=shuffle, rank=2, world_size=3)
        for shuffle in (True, False)
    ]
    assert [list(sampler) for sampler in samplers] == [[[0]], []]
    assert [len(sampler) for sampler in samplers] == [1, 0]


def test_epochs_differ_and_can_be_repeated() -> None:
    source, target = _lengths()
    sampler = TokenBatchSampler(source, target, 300, shuffle=True, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert len(second) == len(first)
    assert {frozenset(rows) for rows in second} != {frozenset(rows) for rows in first}
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TokenBatchSampler(source, target, 300, shuffle=True, seed=6)) != first


def test_an_epoch_can_be_resumed_in_its_middle() -> None:
    source, target = _lengths()
    sampler = TokenBatchSampler(source, target, 300, shuffle=True)
    sampler.set_epoch(2)
    whole = list(sampler)
    resumed = TokenBatchSampler(source, target, 300, shuffle=True)
    resumed.resume(epoch=2, first_batch=4)
    resumed.set_epoch(2)  # as Lightning does at the epoch's start
    assert list(resumed) == whole[4:]
    assert len(resumed) == len(whole)
    resumed.set_epoch(3)
    assert len(list(resumed)) == len(whole)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_tokens is 0\b"):
        TokenBatchSampler(*_lengths(), max_tokens=0)

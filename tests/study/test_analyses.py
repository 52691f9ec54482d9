"""Tokens by frequency and decoding steps, against plain loops."""

from __future__ import annotations

from collections import Counter, defaultdict
from fractions import Fraction

import pytest
import torch

from lightning_knnmt.analysis.word_recall import BUCKETS
from lightning_knnmt.retrieval import Record
from lightning_knnmt.study.analyses import token_buckets, whole_steps

EDGES = (Fraction(1, 100), Fraction(5, 100), Fraction(20, 100))


def record_of(gold: list[int]) -> Record:
    size = len(gold)
    nothing = torch.zeros(size, 1)
    return Record(
        tokens=nothing.int(),
        distances=nothing,
        entries=nothing.long(),
        gold=torch.tensor(gold, dtype=torch.int32),
        gold_log_probs=nothing[:, 0],
        neighbour_log_probs=nothing,
        sentences=nothing[:, 0].int(),
        queries=None,
    )


def buckets_by_loop(gold: list[int], values: list[int]) -> list[int]:
    """Types of equal counts stand together, where the middle of their ranks lies."""
    counts = Counter(values)
    ranked = sorted(counts.values(), reverse=True)
    found = []
    for token in gold:
        if token not in counts:
            found.append(len(EDGES) + 1)
            continue
        first, size = ranked.index(counts[token]), ranked.count(counts[token])
        middle = Fraction(2 * first + size, 2 * len(ranked))
        found.append(sum(middle >= edge for edge in EDGES))
    return found


@pytest.mark.parametrize("num_types", [1, 2, 3, 10, 30, 50, 199, 400])
def test_buckets_are_by_rank(num_types: int) -> None:
    vocab_size = num_types + 20
    ids = torch.randperm(vocab_size)[:num_types]
    more = ids[(num_types * torch.rand(5 * num_types) ** 3).long()]  # some are frequent
    values = torch.cat([ids, more])[torch.randperm(6 * num_types)]
    gold = torch.randint(0, vocab_size, (500,)).tolist() + list(range(vocab_size))
    found = token_buckets(record_of(gold), values, vocab_size)
    assert found.tolist() == buckets_by_loop(gold, values.tolist())


def test_of_1000_types_10_are_the_top_1_percent() -> None:
    values = torch.cat([torch.full((1001 - token,), token) for token in range(1, 1001)])
    found = token_buckets(record_of([*range(1005)]), values, 1005).tolist()
    unseen = BUCKETS.index("unseen")
    assert [found[token] for token in (0, 1001, 1002, 1003, 1004)] == [unseen] * 5
    assert found[1:11] == [BUCKETS.index("top 1 %")] * 10
    assert found[11:51] == [BUCKETS.index("1-5 %")] * 40
    assert found[51:201] == [BUCKETS.index("5-20 %")] * 150
    assert found[201:1001] == [BUCKETS.index("20-100 %")] * 800


def test_without_entries_all_tokens_are_unseen() -> None:
    found = token_buckets(record_of([0, 3, 3]), torch.empty(0, dtype=torch.int64), 4)
    assert found.tolist() == [BUCKETS.index("unseen")] * 3
    assert token_buckets(record_of([]), torch.tensor([1, 2]), 4).tolist() == []


LENGTHS = [5, 1, 7, 3, 3, 9, 2, 4, 6, 1, 8]


@pytest.fixture
def record() -> Record:
    sentences = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    num_tokens = len(sentences)
    columns = torch.zeros(num_tokens, 2)
    return Record(
        tokens=columns.int(),
        distances=columns,
        entries=columns.long(),
        gold=columns[:, 0].int(),
        gold_log_probs=columns[:, 0],
        neighbour_log_probs=columns,
        sentences=sentences.int(),
        queries=None,
    )


@pytest.mark.parametrize("num_tokens", [1, 16, 49, 1000])
def test_steps_are_whole(record: Record, num_tokens: int) -> None:
    members = defaultdict(list)  # rows of a step, by batch of four sentences and position
    row = 0
    for sentence, length in enumerate(LENGTHS):
        for position in range(length):
            members[sentence // 4, position].append(row)
            row += 1
    rows, steps = whole_steps(record, 4, num_tokens)
    found = defaultdict(list)
    for row, step in zip(rows.tolist(), steps.tolist(), strict=True):
        found[step].append(row)
    assert {*map(tuple, found.values())} <= {*map(tuple, members.values())}
    assert rows.tolist() == sorted(rows.tolist())
    if num_tokens >= len(record.sentences):
        assert len(found) == len(members)
    else:  # about as many as asked for
        every = len(record.sentences) // num_tokens
        assert len(found) == -(-len(members) // every)

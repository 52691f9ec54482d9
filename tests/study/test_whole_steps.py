"""Decoding steps of a recorded text, against plain loops over its sentences."""

from collections import defaultdict

import pytest
import torch

from lightning_knnmt.retrieval import Record
from lightning_knnmt.study.analyses import whole_steps

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

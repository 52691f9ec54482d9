"""A record holds what model and datastore say, in the text's order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_knnmt.models import DecoderStates
from lightning_knnmt.retrieval import record as record_module
from lightning_knnmt.retrieval.index import FlatIndex
from lightning_knnmt.retrieval.record import (
    Record,
    Recorder,
    RecordError,
    merge,
)
from lightning_knnmt.retrieval.retriever import LocalSource, Retriever

DIM, VOCAB, ENTRIES = 6, 11, 20
Text = tuple[DecoderStates, Tensor, Tensor]


class ToyBase:
    """A softmax, without its room."""

    def __init__(self) -> None:
        self.weight = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(1))

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        return torch.log_softmax(states.hidden @ self.weight.T, dim=-1)

    def top_with(self, states: DecoderStates, n: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self(states)
        best = log_probs.topk(n)
        ids = torch.cat([best.indices, tokens], dim=-1)
        return torch.cat([best.values, log_probs.gather(-1, tokens)], dim=-1), ids


class LimitedIndex(FlatIndex):
    """Finds fewer neighbours than it is asked for, as approximate indexes may."""

    def __init__(self, keys: Tensor, num_found: int) -> None:
        super().__init__(keys)
        self.num_found = num_found

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, entries = super().search(queries, k)
        distances[:, self.num_found :] = torch.inf
        entries[:, self.num_found :] = -1
        return distances, entries


def retriever(num_found: int = 4) -> Retriever:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(ENTRIES, DIM, generator=generator)
    values = torch.randint(1, VOCAB, (ENTRIES,), generator=generator)
    return Retriever(LocalSource(LimitedIndex(keys, num_found), values), 4)


@pytest.fixture
def text() -> Text:
    """Five sentences of 3, 1, 4, 2 and 3 tokens, as decoder states, labels and sentence numbers."""
    generator = torch.Generator().manual_seed(3)
    sentences = torch.repeat_interleave(torch.arange(5), torch.tensor([3, 1, 4, 2, 3]))
    labels = torch.randint(1, VOCAB, (13,), generator=generator)
    return DecoderStates(torch.randn(13, DIM, generator=generator)), labels, sentences


def recorder(num_found: int = 4, *, keep_queries: bool = False) -> Recorder:
    return Recorder(retriever(num_found), ToyBase(), keep_queries=keep_queries)


def record(text: Text, *, keep_queries: bool = False) -> Record:
    fresh = recorder(keep_queries=keep_queries)
    fresh.write(*text)
    return fresh.finish()


def test_a_record_holds_what_the_dense_computation_says(
    text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "ROWS_AT_ONCE", 5)
    states, labels, sentences = text
    found = record(text, keep_queries=True)
    expected = retriever()(states)
    dense = ToyBase()(states)
    assert (found.num_tokens, found.max_neighbours) == (13, 4)
    torch.testing.assert_close(found.tokens.long(), expected.tokens)
    torch.testing.assert_close(found.distances, expected.distances)
    torch.testing.assert_close(found.entries, expected.entries)
    torch.testing.assert_close(found.gold_log_probs, dense.gather(-1, labels[:, None])[:, 0])
    torch.testing.assert_close(found.neighbour_log_probs, dense.gather(-1, expected.tokens))
    torch.testing.assert_close(found.gold.long(), labels)
    torch.testing.assert_close(found.sentences.long(), sentences)
    assert found.queries is not None
    torch.testing.assert_close(found.queries, states.hidden)
    assert record(text).queries is None


def test_missing_neighbours_are_infinitely_far_and_have_no_probability(
    text: Text,
) -> None:
    fresh = recorder(num_found=3)
    fresh.write(*text)
    found = fresh.finish()
    assert torch.isinf(found.distances[:, 3]).all()
    assert (found.neighbour_log_probs[:, 3] == -torch.inf).all()
    assert (found.tokens[:, 3] == 0).all()
    assert (found.entries[:, 3] == -1).all()
    assert torch.isfinite(found.distances[:, :3]).all()
    assert torch.isfinite(found.neighbour_log_probs[:, :3]).all()


def test_the_order_of_batches_and_the_number_of_processes_change_nothing(
    text: Text,
) -> None:
    states, labels, sentences = text
    whole = record(text, keep_queries=True)
    ranks = [recorder(keep_queries=True), recorder(keep_queries=True)]
    for rank, batch in ((0, [4, 1]), (1, [2, 0]), (0, [3])):
        rows = torch.cat([torch.nonzero(sentences == number)[:, 0] for number in batch])
        ranks[rank].write(states.select(rows), labels[rows], sentences[rows])
    assert [rank.num_tokens for rank in ranks] == [6, 7]
    merged = merge([rank.finish() for rank in ranks])
    for name, tensor in merged.arrays().items():
        torch.testing.assert_close(tensor, whole.arrays()[name])
    assert torch.equal(merged.tokens, whole.tokens)
    assert torch.equal(merged.sentences, whole.sentences)


def test_a_record_made_under_inference_mode_can_train_a_combiner(
    text: Text,
) -> None:
    with torch.inference_mode():
        states, labels, sentences = text
        found = record((DecoderStates(states.hidden.clone()), labels.clone(), sentences.clone()))
    weight = torch.ones(4, requires_grad=True)
    (found.distances * weight).sum().backward()
    torch.testing.assert_close(weight.grad, found.distances.sum(dim=0))


def test_kept_queries_are_the_records_own(text: Text) -> None:
    fresh = recorder(keep_queries=True)
    hidden = text[0].hidden.clone()
    fresh.write(DecoderStates(hidden), *text[1:])
    hidden.zero_()
    queries = fresh.finish().queries
    assert queries is not None
    torch.testing.assert_close(queries, text[0].hidden)


def test_writing_says_what_is_wrong(text: Text) -> None:
    states, labels, sentences = text
    with pytest.raises(RecordError, match=r"Hidden states \[13, 6\], labels \[12\] and sentence"):
        recorder().write(states, labels[1:], sentences)
    with pytest.raises(RecordError, match=r"Hidden states \[1, 13, 6\].*label mask"):
        recorder().write(DecoderStates(states.hidden[None]), labels[None], sentences[None])
    with pytest.raises(RecordError, match="nothing to merge: no token was recorded"):
        recorder().finish()

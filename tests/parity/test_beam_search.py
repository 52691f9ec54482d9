"""Beam search against two searches written for reading: all sequences there are, and fairseq's
rules for one sentence in plain Python lists."""

import importlib
import itertools
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_knnmt.decoding import Hypothesis, Stateless, beam_search
from lightning_knnmt.models import DecoderStates

START, EOS = 0, 1


@dataclass
class TableCache:
    sources: Tensor  # [B]
    sums: Tensor  # [N], of the tokens read
    step: int = 0

    def reorder(self, rows: Tensor) -> None:
        self.sums = self.sums[rows]

    def keep(self, sentences: Tensor) -> None:
        self.sources = self.sources[sentences]


class TableDecoder:
    """A "model" whose log-probabilities are random numbers, looked up by source and history."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(10, 12, 11, vocab_size, vocab_size, generator=generator)
        self.table = logits.log_softmax(-1)  # [source, step, sum of tokens, last token, V]

    def encode(self, source_ids: Tensor) -> Tensor:
        return source_ids[:, 0]

    def start(self, memory: Tensor, beam_size: int) -> TableCache:
        return TableCache(memory, torch.zeros(len(memory) * beam_size, dtype=torch.long))

    def decode_step(self, tokens: Tensor, cache: TableCache) -> DecoderStates:
        cache.sums = (cache.sums + tokens) % 11
        sources = cache.sources.repeat_interleave(len(tokens) // len(cache.sources))
        cache.step += 1
        log_probs = self.table[sources, cache.step - 1, cache.sums, tokens]
        return DecoderStates(log_probs, ffn_input=sources.unsqueeze(1))  # so that rows can be told

    def log_probs(self, source: int, prefix: tuple[int, ...]) -> list[float]:
        tokens = (START, *prefix)
        return self.table[source, len(prefix), sum(tokens) % 11, tokens[-1]].tolist()

    def score(self, source: int, tokens: tuple[int, ...]) -> float:
        return sum(self.log_probs(source, tokens[:i])[token] for i, token in enumerate(tokens))


class Identity(Stateless):
    """The distribution of a decoder whose hidden states are log-probabilities already."""

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        return states.hidden

    def top(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        best = states.hidden.topk(min(n, states.hidden.shape[1]))
        return best.values, best.indices


def search(model: TableDecoder, sources: list[int], **settings: object) -> list[list[Hypothesis]]:
    source_ids = torch.tensor(sources).unsqueeze(1)
    return beam_search(model, source_ids, Identity(), start_id=START, eos_id=EOS, **settings)


Scored = list[tuple[tuple[int, ...], float]]


def assert_same(found: list[Hypothesis], expected: Scored) -> None:
    assert [tuple(h.tokens) for h in found] == [tokens for tokens, _ in expected]
    assert [h.normalized_score for h in found] == pytest.approx([s for _, s in expected], abs=1e-4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("min_length", [0, 2])
def test_a_wide_beam_finds_every_sequence_in_order(length_penalty: float, min_length: int) -> None:
    model = TableDecoder(vocab_size=4, seed=0)
    words = [token for token in range(4) if token != EOS]
    found = search(
        model,
        [3, 5],
        beam_size=64,  # more than there are prefixes: nothing is pruned
        max_length=4,
        min_length=min_length,
        length_penalty=length_penalty,
    )
    for source, hypotheses in zip([3, 5], found, strict=True):
        everything = [
            (*prefix, EOS)
            for length in range(min_length, 4)
            for prefix in itertools.product(words, repeat=length)
        ]
        scored = [(t, model.score(source, t) / len(t) ** length_penalty) for t in everything]
        assert len(scored) == 40 - 4 * (min_length == 2)
        assert_same(hypotheses, sorted(scored, key=lambda pair: -pair[1]))


def fairseq_search(
    model: TableDecoder,
    source: int,
    beam_size: int,
    max_length: int,
    min_length: int,
    length_penalty: float,
) -> Scored:
    finished: Scored = []
    beams: Scored = [((), 0.0)]
    for step in range(max_length):
        candidates = []
        for prefix, score in beams:
            for token, log_prob in enumerate(model.log_probs(source, prefix)):
                is_forbidden = token == EOS and step < min_length
                is_late = token != EOS and step == max_length - 1
                if not is_forbidden and not is_late:
                    candidates.append(((*prefix, token), score + log_prob))
        candidates = sorted(candidates, key=lambda pair: -pair[1])[: 2 * beam_size]
        for tokens, score in candidates[:beam_size]:
            if tokens[-1] == EOS and len(finished) < beam_size:
                finished.append((tokens, score / len(tokens) ** length_penalty))
        if len(finished) == beam_size:
            break
        beams = [pair for pair in candidates if pair[0][-1] != EOS][:beam_size]
    return sorted(finished, key=lambda pair: -pair[1])


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
@pytest.mark.parametrize("min_length", [0, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_batch_is_searched_by_fairseqs_rules(
    beam_size: int, min_length: int, length_penalty: float
) -> None:
    limits = [6, 4, 11, 8, 11, 5, 9, 11, 7, 11]
    for seed in range(5):
        model = TableDecoder(vocab_size=7, seed=seed)
        found = search(
            model,
            list(range(10)),
            beam_size=beam_size,
            max_length=torch.tensor(limits),
            min_length=min_length,
            length_penalty=length_penalty,
        )
        for source, (hypotheses, limit) in enumerate(zip(found, limits, strict=True)):
            expected = fairseq_search(model, source, beam_size, limit, min_length, length_penalty)
            assert_same(hypotheses, expected)


@dataclass
class BiasedSession:
    """Adds to the log-probabilities what belongs to the sentence of each row.

    It checks that the states which it is given are those of the rows that it takes them for.
    """

    bias: Tensor  # [10, V]
    sources: Tensor  # [B], of the sentences that are still decoded
    beam_size: int
    calls: Counter[str]

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        num_rows = len(self.sources) * self.beam_size
        if rows is None:
            rows = torch.arange(num_rows)
            self.calls["all rows"] += 1
        else:
            self.calls["some rows"] += len(rows) < num_rows
        sources = self.sources[rows // self.beam_size]
        assert states.of("ffn_input").squeeze(1).tolist() == sources.tolist()
        return states.hidden + self.bias[sources]

    def top(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        log_probs = self(states)
        best = log_probs.topk(min(n, log_probs.shape[1]))
        return best.values, best.indices

    def keep(self, sentences: Tensor) -> None:
        assert len(sentences) < len(self.sources)
        self.calls["left"] += 1
        self.sources = self.sources[sentences]


class Biased:
    def __init__(self, bias: Tensor) -> None:
        self.bias = bias
        self.calls: Counter[str] = Counter()

    def begin(self, source_ids: Tensor, source_mask: Tensor, beam_size: int) -> BiasedSession:
        self.calls["sessions"] += 1
        assert source_ids.shape == source_mask.shape
        assert source_mask.all()
        return BiasedSession(self.bias, source_ids[:, 0], beam_size, self.calls)


@pytest.mark.parametrize("beam_size", [1, 2, 5])
@pytest.mark.parametrize("share", [0.05, 0.4, 2.0])  # leaving at once, sometimes, never
@pytest.mark.parametrize("limits", [[6, 4, 11, 8, 11, 5, 9, 11, 7, 11], [3] * 10, [2, 9] * 5])
def test_a_session_knows_the_sentence_of_every_row(
    beam_size: int, share: float, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's attribute of this name is the function.
    module = importlib.import_module("lightning_knnmt.decoding.beam_search")
    monkeypatch.setattr(module, "LEAVING_SHARE", share)
    model = TableDecoder(vocab_size=7, seed=1)
    bias = torch.randn(10, 7, generator=torch.Generator().manual_seed(2))
    order = [4, 0, 9, 2, 7, 1, 8, 3, 6, 5]
    distribution = Biased(bias)
    found = beam_search(
        model,
        torch.tensor(order).unsqueeze(1),
        distribution,
        start_id=START,
        eos_id=EOS,
        beam_size=beam_size,
        max_length=torch.tensor(limits),
    )
    assert distribution.calls["sessions"] == 1
    if len({*limits}) > 1:
        assert distribution.calls["some rows"] > 0
        assert (distribution.calls["left"] > 0) == (share < 2)
    biased = TableDecoder(vocab_size=7, seed=1)
    biased.table += bias[:, None, None, None]
    for source, hypotheses, limit in zip(order, found, limits, strict=True):
        assert_same(hypotheses, fairseq_search(biased, source, beam_size, limit, 0, 1.0))


def test_a_sessions_rows_are_right_under_a_prefix_and_a_shortest_length() -> None:
    model, prefix = TableDecoder(vocab_size=7, seed=3), [5, 2]
    bias = torch.randn(10, 7, generator=torch.Generator().manual_seed(4))
    settings = {"start_id": START, "eos_id": EOS, "beam_size": 3, "min_length": 4, "prefix": prefix}
    limits = torch.tensor([6, 8, 5, 9, 8, 11, 5, 6, 7, 8])
    sources = torch.arange(10).unsqueeze(1)
    together = beam_search(model, sources, Biased(bias), max_length=limits, **settings)
    for each, limit, hypotheses in zip(sources, limits, together, strict=True):
        (alone,) = beam_search(model, each[None], Biased(bias), max_length=int(limit), **settings)
        assert_same(hypotheses, [(tuple(h.tokens), h.normalized_score) for h in alone])
        assert {tuple(h.tokens[:2]) for h in hypotheses} == {(5, 2)}

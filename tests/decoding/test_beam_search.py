"""Beam search over a real, tiny Transformer; its rules are held to others in tests/parity."""

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_knnmt.decoding import (
    Hypothesis,
    NextTokenDistribution,
    SoftmaxDistribution,
    Stateless,
    beam_search,
)
from lightning_knnmt.models import DecoderStates, Transformer

PAD, START, EOS = 0, 2, 3
LENGTHS = [9, 3, 6, 1, 7, 9, 4, 2]


def random_model(cell: str = "attention") -> Transformer:
    """Random weights, sharpened so that hypotheses differ in length and in more than chance."""
    torch.manual_seed(10)
    model = Transformer(
        vocab_size=30,
        pad_id=PAD,
        start_id=START,
        eos_id=EOS,
        model_dim=16,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        decoder_cell=cell,
        tied_embeddings="none",
        output_bias=True,
    )
    with torch.no_grad():
        model.output_projection.weight.mul_(4)
        model.output_projection.bias[EOS] = 4.0
        model.output_projection.bias[[PAD, START]] = -1e4
    return model.eval()


def sources() -> Tensor:
    generator = torch.Generator().manual_seed(8)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(4, 30, (length,), generator=generator)
    return ids


def search(model: Transformer, source_ids: Tensor, **settings: Any) -> list[list[Hypothesis]]:
    distribution = SoftmaxDistribution(model.output_projection)
    settings = {"start_id": START, "eos_id": EOS, "max_length": 25} | settings
    return beam_search(model, source_ids, distribution, **settings)


def tokens_of(found: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[h.tokens for h in hypotheses] for hypotheses in found]


def assert_same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    assert tokens_of(found) == tokens_of(expected)
    scores, others = ([h.score for hs in each for h in hs] for each in (found, expected))
    assert scores == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_prefix_begins_every_hypothesis_at_no_cost(beam_size: int) -> None:
    """Its scores are those of the same decoder that has read the prefix before it starts."""
    model, prefix = random_model(), [7, 11]
    found = search(model, sources(), beam_size=beam_size, prefix=prefix, length_penalty=0.0)
    free = search(model, sources(), beam_size=beam_size)
    assert any(h.tokens[:2] != prefix for hypotheses in free for h in hypotheses)
    for ids, hypotheses in zip(sources(), found, strict=True):
        source = ids[ids != PAD][None]
        for hypothesis in hypotheses:
            assert hypothesis.tokens[:2] == prefix
            read = torch.tensor([[START, *hypothesis.tokens[:-1]]])
            log_probs = model.output_projection(model(source, read).hidden).log_softmax(-1)[0]
            costs = log_probs.gather(1, torch.tensor(hypothesis.tokens)[:, None])[2:]
            assert hypothesis.score == pytest.approx(costs.sum().item(), abs=1e-3)


def test_a_prefix_must_leave_room() -> None:
    with pytest.raises(ValueError, match="prefix of 5 tokens leaves no room in the smallest max_l"):
        search(random_model(), sources(), prefix=[7] * 5, max_length=5)


@pytest.mark.parametrize("cell", ["attention", "ssru"])
def test_beam_of_one_is_greedy(cell: str) -> None:
    model = random_model(cell)
    found = search(model, sources(), beam_size=1)
    lengths = set()
    for length, ids, hypotheses in zip(LENGTHS, sources(), found, strict=True):
        memory = model.encode(ids[None, :length])
        tokens: list[int] = []
        while tokens[-1:] != [EOS] and len(tokens) < 24:
            hidden = model.decode(torch.tensor([[START, *tokens]]), memory).hidden
            tokens.append(int(model.output_projection(hidden[0, -1]).argmax()))
        if tokens[-1] != EOS:
            tokens.append(EOS)
        assert [h.tokens for h in hypotheses] == [tokens]
        lengths.add(len(tokens))
    assert len(lengths) > 2  # or the test would say little about sentences that end early


@pytest.mark.parametrize("cell", ["attention", "ssru"])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_force_decoding_a_hypothesis_gives_its_beam_score(cell: str, beam_size: int) -> None:
    model = random_model(cell)
    for ids, hypotheses in zip(
        sources(), search(model, sources(), beam_size=beam_size, length_penalty=0.7), strict=True
    ):
        assert len(hypotheses) == beam_size
        for h in hypotheses:
            states = model(ids.unsqueeze(0), torch.tensor([[START, *h.tokens[:-1]]]))
            log_probs = SoftmaxDistribution(model.output_projection)(states)[0]
            forced = log_probs.gather(1, torch.tensor(h.tokens).unsqueeze(1)).sum().item()
            assert h.score == pytest.approx(forced, abs=1e-4)
            assert h.normalized_score == pytest.approx(h.score / len(h.tokens) ** 0.7)


@pytest.mark.parametrize("cell", ["attention", "ssru"])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_companions_in_the_batch_change_nothing(cell: str, beam_size: int) -> None:
    model = random_model(cell)
    alone = [
        search(model, ids[None, :length], beam_size=beam_size)[0]
        for length, ids in zip(LENGTHS, sources(), strict=True)
    ]
    assert_same(search(model, sources(), beam_size=beam_size), alone)


@pytest.mark.parametrize("cell", ["attention", "ssru"])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_leaving_the_batch_changes_nothing(
    cell: str, beam_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's attribute of this name is the function.
    module = importlib.import_module("lightning_knnmt.decoding.beam_search")
    model = random_model(cell)
    results = []
    for share in (0.0, 0.4, 2.0):  # as soon as possible, sometimes, never
        monkeypatch.setattr(module, "LEAVING_SHARE", share)
        results.append(search(model, sources(), beam_size=beam_size))
    assert_same(results[0], results[2])
    assert_same(results[1], results[2])


def test_hypotheses_come_best_first_and_differ() -> None:
    for hypotheses in search(random_model(), sources(), beam_size=5):
        scores = [h.normalized_score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(h.tokens) for h in hypotheses}) == 5


@pytest.mark.parametrize("beam_size", [1, 3])
def test_lengths_keep_within_each_sentences_bounds(beam_size: int) -> None:
    limits = torch.tensor([5, 25, 7, 25, 6, 5, 25, 9])
    found = search(random_model(), sources(), beam_size=beam_size, min_length=4, max_length=limits)
    for limit, hypotheses in zip(limits.tolist(), found, strict=True):
        for h in hypotheses:
            assert 5 <= len(h.tokens) <= limit
            assert h.tokens.index(EOS) == len(h.tokens) - 1


def test_the_longest_hypothesis_pays_for_its_forced_end() -> None:
    model = random_model()
    (h,) = search(model, sources()[:1], beam_size=1, min_length=3, max_length=4)[0]
    states = model(sources()[:1], torch.tensor([[START, *h.tokens[:-1]]]))
    log_probs = SoftmaxDistribution(model.output_projection)(states)[0]
    assert h.score == pytest.approx(log_probs[range(4), h.tokens].sum().item(), abs=1e-4)


@dataclass(frozen=True)
class Certain(Stateless):
    """All probability on one token, as retrieval alone may have it."""

    token: int

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        log_probs = torch.full((len(states.hidden), 30), float("-inf"))
        log_probs[:, self.token] = 0.0
        return log_probs

    def top(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        best = self(states).topk(n)
        return best.values, best.indices


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_sentence_whose_end_is_impossible_still_gets_a_hypothesis(beam_size: int) -> None:
    model = random_model()
    found = beam_search(
        model, sources(), Certain(9), start_id=START, eos_id=EOS, beam_size=beam_size, max_length=4
    )
    assert tokens_of(found) == [[[9, 9, 9, EOS]]] * len(LENGTHS)


def test_where_nothing_is_possible_the_hypothesis_is_empty() -> None:
    found = beam_search(
        random_model(),
        sources(),
        Certain(EOS),
        start_id=START,
        eos_id=EOS,
        min_length=1,
        max_length=3,
    )
    assert tokens_of(found) == [[[EOS]]] * len(LENGTHS)
    assert found[0][0].score == float("-inf")


NEVER = (PAD, 1, START)


def eager_model() -> Transformer:
    """Wants to emit what is never emitted, most of all."""
    model = random_model()
    with torch.no_grad():
        model.output_projection.bias[list(NEVER)] = torch.tensor([6.0, 8.0, 7.0])
    return model


@dataclass(frozen=True)
class Masked(Stateless):
    """The definition: probabilities of the softmax, and none for what is never emitted."""

    output_projection: torch.nn.Linear

    def __call__(self, states: DecoderStates, rows: Tensor | None = None) -> Tensor:
        log_probs = self.output_projection(states.hidden).log_softmax(-1)
        return log_probs.index_fill(1, torch.tensor(NEVER), float("-inf"))

    def top(self, states: DecoderStates, n: int) -> tuple[Tensor, Tensor]:
        best = self(states).topk(n)
        return best.values, best.indices


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("max_length", [3, 25])
def test_what_is_never_emitted_is_in_no_hypothesis(beam_size: int, max_length: int) -> None:
    model = eager_model()
    settings = {"start_id": START, "eos_id": EOS, "max_length": max_length, "beam_size": beam_size}

    def found(distribution: NextTokenDistribution) -> list[list[Hypothesis]]:
        return beam_search(model, sources(), distribution, **settings)

    def emitted(hypotheses: list[list[Hypothesis]]) -> set[int]:
        return {token for each in hypotheses for h in each for token in h.tokens}

    freely = found(SoftmaxDistribution(model.output_projection))
    assert emitted(freely) & {*NEVER}
    ours = found(SoftmaxDistribution(model.output_projection, NEVER))
    assert not emitted(ours) & {*NEVER}
    assert_same(ours, found(Masked(model.output_projection)))


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_prefix_is_given_even_if_it_is_never_emitted(beam_size: int) -> None:
    model, prefix = eager_model(), [START, 7, 1]
    distribution = SoftmaxDistribution(model.output_projection, NEVER)
    found = beam_search(
        model, sources(), distribution, start_id=START, eos_id=EOS, beam_size=beam_size,
        max_length=12, prefix=prefix, length_penalty=0.0,
    )  # fmt: skip
    for ids, hypotheses in zip(sources(), found, strict=True):
        assert len(hypotheses) == beam_size
        for h in hypotheses:
            assert h.tokens[:3] == prefix
            assert not {*h.tokens[3:]} & {*NEVER}
            states = model(ids[ids != PAD][None], torch.tensor([[START, *h.tokens[:-1]]]))
            costs = distribution(states)[0].gather(1, torch.tensor(h.tokens)[:, None])[3:]
            assert h.score == pytest.approx(costs.sum().item(), abs=1e-3)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_an_end_that_is_also_the_start_ends(beam_size: int) -> None:
    """As in fairseq's models, whose decoder starts with EOS: the end is not in `never` there."""
    model = eager_model()
    with torch.no_grad():  # EOS takes over what START has been
        model.target_embedding.weight[EOS] = model.target_embedding.weight[START]
    distribution = SoftmaxDistribution(model.output_projection, (PAD, 1))
    found = beam_search(
        model, sources(), distribution, start_id=EOS, eos_id=EOS, beam_size=beam_size, max_length=25
    )
    apart = beam_search(
        model, sources(), distribution, start_id=START, eos_id=EOS, beam_size=beam_size,
        max_length=25,
    )  # fmt: skip
    assert_same(found, apart)
    assert any(len(h.tokens) < 25 for hypotheses in found for h in hypotheses)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_fewer_tokens_are_allowed_than_the_beam_wants(beam_size: int) -> None:
    model = random_model()
    never = tuple(token for token in range(30) if token not in (EOS, 9))
    distribution = SoftmaxDistribution(model.output_projection, never)
    found = beam_search(
        model, sources(), distribution, start_id=START, eos_id=EOS, beam_size=beam_size,
        max_length=4, length_penalty=0.0,
    )  # fmt: skip
    possible = [[*[9] * length, EOS] for length in range(4)]
    for ids, hypotheses in zip(sources(), found, strict=True):
        assert len(hypotheses) == beam_size
        if beam_size == 4:  # all there are
            assert sorted(h.tokens for h in hypotheses) == sorted(possible)
        for h in hypotheses:
            assert h.tokens in possible
            states = model(ids[ids != PAD][None], torch.tensor([[START, *h.tokens[:-1]]]))
            costs = distribution(states)[0].gather(1, torch.tensor(h.tokens)[:, None])
            assert h.score == pytest.approx(costs.sum().item(), abs=1e-3)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="beam_size is 0; it must be at least 1"):
        search(random_model(), sources(), beam_size=0)
    with pytest.raises(ValueError, match="min_length is 25 and the smallest max_length 25"):
        search(random_model(), sources(), min_length=25)

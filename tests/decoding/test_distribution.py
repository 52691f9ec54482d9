from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.decoding.distribution import CHUNK, best_tokens
from lightning_knnmt.models import DecoderStates


def random_distribution(vocab_size: int, *, bias: bool = True) -> SoftmaxDistribution:
    torch.manual_seed(0)
    return SoftmaxDistribution(nn.Linear(8, vocab_size, bias=bias).requires_grad_(False))


def queries() -> DecoderStates:
    return DecoderStates(3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))


def assert_is_best(scores: Tensor, n: int) -> None:
    """The n largest, from places where they do stand, each once: ties may fall as they like."""
    best, tokens = best_tokens(scores, n)
    n = min(n, scores.shape[1])
    assert torch.equal(best, scores.topk(n).values)
    assert torch.equal(scores.gather(1, tokens), best)
    assert all(len(set(row)) == n for row in tokens.tolist())


@pytest.mark.parametrize("vocab_size", [3, CHUNK, 10 * CHUNK, 10 * CHUNK + 1, 40 * CHUNK - 1])
@pytest.mark.parametrize("n", [1, 2, 8, 30])
def test_best_tokens_are_those_of_topk(vocab_size: int, n: int) -> None:
    scores = torch.randn(20, vocab_size, generator=torch.Generator().manual_seed(2))
    assert_is_best(scores, n)


@pytest.mark.parametrize("n", [1, 2, 8, 30])
def test_best_tokens_under_ties(n: int) -> None:
    few_values = torch.randint(
        0, 3, (20, 10 * CHUNK + 5), generator=torch.Generator().manual_seed(3)
    )
    assert_is_best(few_values.float(), n)
    assert_is_best(torch.zeros(2, 10 * CHUNK + 5), n)


def test_best_tokens_stand_at_the_very_ends() -> None:
    scores = torch.zeros(1, 10 * CHUNK + 1)
    scores[0, -1], scores[0, 0] = 2.0, 1.0
    best, tokens = best_tokens(scores, 2)
    assert best.tolist() == [[2.0, 1.0]]
    assert tokens.tolist() == [[10 * CHUNK, 0]]


def test_log_probs_sum_to_one_in_every_leading_shape() -> None:
    distribution = random_distribution(50)
    log_probs = distribution(DecoderStates(queries().hidden.view(2, 3, 8)))
    assert log_probs.shape == (2, 3, 50)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_top_is_the_definitions_best(bias: bool, n: int) -> None:
    distribution = random_distribution(2000, bias=bias)
    expected = distribution(queries())
    log_probs, tokens = distribution.top(queries(), n)
    torch.testing.assert_close(log_probs, expected.topk(n).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_probs, expected.gather(1, tokens), rtol=1e-5, atol=1e-5)


def test_top_of_a_small_vocabulary_is_all_of_it() -> None:
    log_probs, tokens = random_distribution(5).top(queries(), 8)
    assert log_probs.shape == tokens.shape == (6, 5)


def test_top_with_gives_the_best_then_the_tokens_asked_for() -> None:
    distribution = random_distribution(2000)
    asked = torch.randint(0, 2000, (6, 4), generator=torch.Generator().manual_seed(4))
    best, tokens_of_best = distribution.top(queries(), 3)
    log_probs, tokens = distribution.top_with(queries(), 3, asked)
    assert torch.equal(tokens, torch.cat([tokens_of_best, asked], dim=1))
    torch.testing.assert_close(log_probs[:, :3], best)
    torch.testing.assert_close(log_probs, distribution(queries()).gather(1, tokens))


def test_extreme_logits_stay_finite() -> None:
    projection = nn.Linear(8, 300).requires_grad_(False)
    projection.bias[7], projection.bias[8] = 1e4, -1e4
    distribution = SoftmaxDistribution(projection)
    log_probs, tokens = distribution.top_with(queries(), 1, torch.full((6, 1), 8))
    assert tokens.tolist() == [[7, 8]] * 6
    torch.testing.assert_close(log_probs[:, 0], torch.zeros(6))
    torch.testing.assert_close(log_probs[:, 1], torch.full((6,), -2e4), rtol=1e-3, atol=0.0)


def test_bfloat16_weights_give_float32_probabilities() -> None:
    projection = nn.Linear(8, 300).requires_grad_(False).bfloat16()
    distribution = SoftmaxDistribution(projection)
    states = DecoderStates(queries().hidden.bfloat16())
    log_probs, tokens = distribution.top(states, 4)
    dense = distribution(states)
    assert log_probs.dtype == dense.dtype == torch.float32
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(6))
    torch.testing.assert_close(log_probs, dense.gather(1, tokens), rtol=1e-2, atol=1e-2)


def likely(vocab_size: int, never: tuple[int, ...]) -> SoftmaxDistribution:
    """A distribution in which the tokens that are never emitted are the most probable."""
    distribution = random_distribution(vocab_size)
    distribution.output_projection.bias[list(never)] = 20.0
    return replace(distribution, never=never)


@pytest.mark.parametrize("vocab_size", [20, 10 * CHUNK + 3])
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("never", [(0,), (0, 3, 19), (19, 1)])
def test_top_never_returns_what_is_never_emitted(
    vocab_size: int, n: int, never: tuple[int, ...]
) -> None:
    distribution = likely(vocab_size, never)
    dense = distribution(queries())
    assert torch.equal(dense, replace(distribution, never=())(queries())), "nothing renormalised"
    assert set(dense.argmax(1).tolist()) <= {*never}
    allowed = dense.index_fill(1, torch.tensor(never), float("-inf"))
    log_probs, tokens = distribution.top(queries(), n)
    torch.testing.assert_close(log_probs, allowed.topk(n).values)
    torch.testing.assert_close(log_probs, allowed.gather(1, tokens))
    assert all(len(set(row)) == n for row in tokens.tolist())

    asked = torch.tensor([[never[0], 5]]).expand(6, -1)  # whoever asks for one gets its share
    log_probs, tokens = distribution.top_with(queries(), n, asked)
    torch.testing.assert_close(log_probs, dense.gather(1, tokens))
    assert not torch.isin(tokens[:, :n], torch.tensor(never)).any()
    assert torch.equal(tokens[:, n:], asked)


def test_fewer_tokens_are_allowed_than_asked_for() -> None:
    distribution = likely(5, (0, 2, 3))
    log_probs, tokens = distribution.top(queries(), 8)
    assert torch.equal(tokens.sort(1).values, torch.tensor([[1, 4]]).expand(6, -1))
    torch.testing.assert_close(log_probs, distribution(queries()).gather(1, tokens))
    log_probs, tokens = distribution.top_with(queries(), 8, torch.tensor([[3]]).expand(6, -1))
    assert tokens.shape == log_probs.shape == (6, 3)
    assert (tokens[:, 2] == 3).all()


def test_a_sure_token_that_is_never_emitted_does_not_overflow() -> None:
    distribution = likely(300, (7,))
    distribution.output_projection.bias[7] = 1e4
    log_probs, _ = distribution.top(queries(), 2)
    torch.testing.assert_close(log_probs, torch.full((6, 2), -1e4), rtol=1e-2, atol=0.0)

"""The loss with its own gradient, against autograd through torch's cross-entropy."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_knnmt.training import FrozenMass, projection_loss

VOCABULARY, DIM = 37, 6
CHUNK = 8  # entries


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[projection_loss.__module__]  # the package has the function by that name
    monkeypatch.setattr(module, "CHUNK_LOGITS", CHUNK * VOCABULARY + 1)


def problem(num_entries: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden states, labels, and a projection with its bias."""
    hidden = torch.randn(num_entries, DIM, dtype=dtype)
    labels = torch.randint(VOCABULARY, (num_entries,))
    weight = torch.randn(VOCABULARY, DIM, dtype=dtype, requires_grad=True)
    return hidden, labels, weight, torch.randn(VOCABULARY, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("num_entries", [1, 5, CHUNK, 2 * CHUNK + 3])
def test_value_and_gradient_are_autograds(num_entries: int, label_smoothing: float) -> None:
    hidden, labels, weight, bias = problem(num_entries)
    hidden.requires_grad_()
    expected = cross_entropy(hidden @ weight.T + bias, labels, label_smoothing=label_smoothing)
    loss = projection_loss(hidden, labels, weight, bias, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    theirs = torch.autograd.grad(3 * expected, [hidden, weight, bias])
    ours = torch.autograd.grad(3 * loss, [hidden, weight, bias])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_frozen_projection_passes_the_gradient_on() -> None:
    hidden, labels, weight, bias = problem(9)
    hidden.requires_grad_()
    weight, bias = weight.detach(), bias.detach()
    expected = cross_entropy(hidden @ weight.T + bias, labels, label_smoothing=0.1)
    loss = projection_loss(hidden, labels, weight, bias, label_smoothing=0.1)
    theirs, ours = (torch.autograd.grad(each, hidden)[0] for each in (expected, loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_under_autocast_products_are_rounded_and_nothing_else() -> None:
    hidden, labels, weight, bias = (
        each if each.dtype == torch.long else each.detach().float() for each in problem(40)
    )
    given = [each.requires_grad_() for each in (hidden, weight, bias)]
    expected = cross_entropy(hidden @ weight.T + bias, labels, label_smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = projection_loss(hidden, labels, weight, bias, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert not torch.equal(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_projection_without_bias() -> None:
    hidden, labels, weight, _ = problem(9)
    expected = cross_entropy(hidden @ weight.T, labels, label_smoothing=0.1)
    loss = projection_loss(hidden, labels, weight, None, label_smoothing=0.1)
    theirs, ours = (torch.autograd.grad(each, weight)[0] for each in (expected, loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["usual", "logits that exp cannot hold"])
def test_float32_is_as_exact_as_autograd(scale: float) -> None:
    hidden, labels, weight, bias = problem(50)
    hidden = scale * hidden
    exact = cross_entropy(hidden @ weight.T + bias, labels, label_smoothing=0.1)
    narrow = [each.detach().float().requires_grad_() for each in (weight, bias)]
    loss = projection_loss(hidden.float(), labels, *narrow, label_smoothing=0.1)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    expected = torch.autograd.grad(exact, [weight, bias])
    for ours, theirs in zip(torch.autograd.grad(loss, narrow), expected, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_frozen_rows_count_in_the_softmax_and_in_the_smoothing(scale: float) -> None:
    hidden, labels, weight, bias = problem(CHUNK + 7)
    hidden = scale * hidden
    trained = torch.tensor([3, 0, 11, 30, 8])
    labels = trained[labels % len(trained)]
    logits = hidden @ weight.T + bias
    expected = cross_entropy(logits, labels, label_smoothing=0.1)
    theirs = [g[trained] for g in torch.autograd.grad(expected, [weight, bias])]

    frozen = torch.ones(VOCABULARY, dtype=torch.bool)
    frozen[trained] = False
    others = logits[:, frozen].detach()
    rows = [each.detach()[trained].requires_grad_() for each in (weight, bias)]
    loss = projection_loss(
        hidden,
        (labels.unsqueeze(1) == trained).int().argmax(1),
        *rows,
        label_smoothing=0.1,
        frozen=FrozenMass(others.logsumexp(1), others.sum(1), int(frozen.sum())),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        list(torch.autograd.grad(loss, rows)), theirs, rtol=1e-10, atol=1e-12 * scale
    )


def test_bfloat16_rows_are_computed_in_float32() -> None:
    hidden, labels, weight, bias = (each.detach() for each in problem(40))
    rows = [each.bfloat16().requires_grad_() for each in (weight, bias)]
    loss = projection_loss(hidden.bfloat16(), labels, *rows, label_smoothing=0.1)
    wide = [each.detach().float().requires_grad_() for each in rows]
    expected = cross_entropy(
        hidden.bfloat16().float() @ wide[0].T + wide[1], labels, label_smoothing=0.1
    )
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, rows), torch.autograd.grad(expected, wide), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=1e-5)

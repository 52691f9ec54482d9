"""The loss of an output projection on given hidden states, with its gradient, in one sweep.

Autograd would keep [n, V] numbers several times over and pass over them again and again. Here a
chunk of entries that stays in the processor's cache gives its share of loss and gradient at once,
and what is linear in the logits (labels, smoothing) never touches them. n entries, D the model's
width, R rows of the projection, V the vocabulary; R = V unless the other rows are frozen.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 256  # entries


class FrozenMass(NamedTuple):
    """What rows that do not train add to the softmax of each entry.

    Attributes:
        log_mass: Log of the sum of their exponentiated logits, [n].
        logit_sum: The sum of their logits, [n].
        num_rows: How many they are.
    """

    log_mass: Tensor
    logit_sum: Tensor
    num_rows: int


def projection_loss(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    label_smoothing: float,
    frozen: FrozenMass | None = None,
) -> Tensor:
    """Label-smoothed cross-entropy of softmax(hidden weight^T + bias), the mean over entries.

    Differentiable once, in `weight` and `bias` alone. Computed in float32, or float64 if `weight`
    is float64.

    Args:
        hidden: The projection's inputs, [n, D].
        labels: Each entry's row of `weight`, [n].
        weight: The rows that train, [R, D].
        bias: [R], or None.
        label_smoothing: Share of the target distribution spread over the vocabulary, frozen rows
            included.
        frozen: The other rows, where there are some.

    Returns:
        Nats a token, [].
    """
    loss: Tensor = _ProjectionLoss.apply(weight, bias, hidden, labels, label_smoothing, frozen)  # type: ignore[no-untyped-call]
    return loss


class _ProjectionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        labels: Tensor,
        label_smoothing: float,
        frozen: FrozenMass | None,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            loss, weight_grad, bias_grad = loss_and_gradient(
                hidden, labels, weight, bias, label_smoothing, frozen
            )
        ctx.save_for_backward(weight_grad.to(weight), bias_grad.to(weight))
        ctx.has_bias = bias is not None
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight_grad, bias_grad = ctx.saved_tensors
        bias_part = upstream[0] * bias_grad if ctx.has_bias else None
        return upstream[0] * weight_grad, bias_part, None, None, None, None


def loss_and_gradient(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    frozen: FrozenMass | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`projection_loss` and its gradient.

    With p the softmax and ε the label smoothing, the gradient of row v is the mean over entries of
    (p_v - (1 - ε) [label = v] - ε / V) hidden.

    Returns:
        The loss, [], its gradient in the weight, [R, D], and in the bias, [R].
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
    vocab_size = len(weight) + (frozen.num_rows if frozen else 0)
    weight_grad, bias_grad = torch.zeros_like(weight), torch.zeros_like(bias)
    log_normalizers = hidden.new_empty(len(hidden))
    buffer = hidden.new_empty(min(CHUNK, len(hidden)), len(weight))
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        inputs = hidden[part]  # [c, D]
        logits = torch.addmm(bias, inputs, weight.T, out=buffer[: len(inputs)])  # [c, R]
        highest = logits.amax(1, keepdim=True)
        if frozen:
            highest = torch.maximum(highest, frozen.log_mass[part].to(dtype).unsqueeze(1))
        mass = logits.sub_(highest).exp_()
        total = mass.sum(1, keepdim=True)
        if frozen:
            total += (frozen.log_mass[part].to(dtype).unsqueeze(1) - highest).exp()
        log_normalizers[part] = (total.log() + highest).squeeze(1)
        # p = mass / total; the division falls on D numbers instead of R.
        weight_grad.addmm_(mass.T, inputs / total)
        bias_grad.addmv_(mass.T, 1 / total.squeeze(1))

    gold = (hidden * weight[labels]).sum(1) + bias[labels]
    logit_sum = hidden @ weight.sum(0) + bias.sum() + (frozen.logit_sum.to(dtype) if frozen else 0)
    smoothing = label_smoothing / vocab_size
    losses = log_normalizers - (1 - label_smoothing) * gold - smoothing * logit_sum
    weight_grad.index_add_(0, labels, hidden, alpha=label_smoothing - 1)
    weight_grad -= smoothing * hidden.sum(0)
    bias_grad.index_add_(0, labels, torch.ones_like(gold), alpha=label_smoothing - 1)
    bias_grad -= smoothing * len(hidden)
    return losses.mean(), weight_grad.div_(len(hidden)), bias_grad.div_(len(hidden))

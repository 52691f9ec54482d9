"""The loss of an output projection on hidden states, with its gradients, in one pass.

Autograd would keep several [n, V] tensors and read each of them several times. Here a chunk of
entries that fits the processor's cache gives its share of loss and gradients at once, and terms
that are linear in the logits (labels, smoothing) are computed without them.

n entries, D the model's width, R rows of the projection, V the vocabulary; R = V unless some rows
are frozen.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_knnmt.models.linear import linear

CHUNK_LOGITS = 2**21  # of a chunk: 8 MB


class FrozenMass(NamedTuple):
    """The share of the rows that do not train in the softmax of each entry.

    Attributes:
        log_mass: Log of the sum of their exponentiated logits, [n].
        logit_sum: The sum of their logits, [n].
        num_rows: How many rows they are.
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

    Differentiable once, in `hidden`, `weight` and `bias` (in `hidden` only without frozen rows).
    Computed in float32, or in float64 if `weight` is float64; under autocast the matrix products
    have autocast's precision.

    Args:
        hidden: The projection's inputs, [n, D].
        labels: Each entry's row of `weight`, [n].
        weight: The rows that train, [R, D].
        bias: [R], or None.
        label_smoothing: Share of the target distribution spread over the vocabulary, frozen rows
            included.
        frozen: The other rows, if any.

    Returns:
        Nats a token, [].
    """
    loss: Tensor = _ProjectionLoss.apply(hidden, weight, bias, labels, label_smoothing, frozen)  # type: ignore[no-untyped-call]
    return loss


class _ProjectionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_smoothing: float,
        frozen: FrozenMass | None,
    ) -> Tensor:
        device = hidden.device.type
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        wanted = Gradients(*ctx.needs_input_grad[:3])
        assert not (frozen and wanted.hidden), "the frozen rows' share is not computed"
        with torch.autocast(device, enabled=False):
            loss, gradients = loss_and_gradients(
                hidden, labels, weight, bias, label_smoothing, frozen, wanted, products
            )
        ctx.save_for_backward(
            *(
                gradient if gradient is None else gradient.to(given)
                for gradient, given in zip(gradients, (hidden, weight, bias), strict=True)
            )
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if each is None else upstream[0] * each for each in ctx.saved_tensors)
        return (*gradients, None, None, None)


class Gradients(NamedTuple):
    """The gradient of each input, or whether it is needed; None where it is not."""

    hidden: Any  # [n, D]
    weight: Any  # [R, D]
    bias: Any  # [R]


def loss_and_gradients(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    frozen: FrozenMass | None,
    wanted: Gradients,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Gradients]:
    """Computes `projection_loss` and its gradients.

    With p the softmax, ε the label smoothing and q_v = (1 - ε) [label = v] + ε / V, the loss of an
    entry has the gradient Σ_v (p_v - q_v) W_v in its hidden state and (p_v - q_v) hidden in row v.

    Args:
        wanted: Which gradients to compute.
        products: The precision of the matrix products; None for that of everything else.

    Returns:
        The loss, [], and the gradients.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    products = products or dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    rounded_weight = weight.to(products)
    has_bias = bias is not None
    bias = weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
    vocab_size = len(weight) + (frozen.num_rows if frozen else 0)
    found = Gradients(
        torch.empty_like(hidden) if wanted.hidden else None,
        weight.new_zeros(weight.shape[::-1]).T
        if wanted.weight
        else None,  # its transpose is contiguous
        torch.zeros_like(bias) if wanted.bias and has_bias else None,
    )
    log_normalizers = hidden.new_empty(len(hidden))
    chunk = max(1, CHUNK_LOGITS // len(weight))
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        inputs = hidden[part]  # [c, D]
        if products == dtype:
            logits = linear(inputs, weight, bias)  # [c, R]
        else:
            logits = linear(inputs.to(products), rounded_weight) + bias
        highest = logits.amax(1, keepdim=True)
        if frozen:
            highest = torch.maximum(highest, frozen.log_mass[part].to(dtype).unsqueeze(1))
        mass = logits.sub_(highest).exp_()
        total = mass.sum(1, keepdim=True)
        if frozen:
            total += (frozen.log_mass[part].to(dtype).unsqueeze(1) - highest).exp()
        log_normalizers[part] = (total.log() + highest).squeeze(1)
        # p = mass / total; dividing [c, D] is cheaper than dividing [c, R].
        if found.bias is not None:
            found.bias.addmv_(mass.T, 1 / total.squeeze(1))
        mass = mass.to(products)
        if found.hidden is not None:
            torch.div(linear(mass, rounded_weight.T), total, out=found.hidden[part])
        if found.weight is not None:
            scaled = (inputs / total).to(products).T.contiguous()  # [D, c]
            found.weight.T.add_(linear(scaled, mass.T))

    gold = (hidden * weight[labels]).sum(1) + bias[labels]
    smoothing = label_smoothing / vocab_size
    losses = log_normalizers - (1 - label_smoothing) * gold
    if smoothing:
        row_sum, frozen_sum = weight.sum(0), frozen.logit_sum.to(dtype) if frozen else 0
        losses -= smoothing * (hidden @ row_sum + bias.sum() + frozen_sum)
        if found.hidden is not None:
            found.hidden.sub_(row_sum, alpha=smoothing)
        if found.weight is not None:
            found.weight.sub_(hidden.sum(0), alpha=smoothing)
        if found.bias is not None:
            found.bias.sub_(smoothing * len(hidden))
    if found.hidden is not None:
        found.hidden.sub_(weight[labels], alpha=1 - label_smoothing)
    if found.weight is not None:
        found.weight.index_add_(0, labels, hidden, alpha=label_smoothing - 1)
    if found.bias is not None:
        found.bias.index_add_(0, labels, torch.ones_like(gold), alpha=label_smoothing - 1)
    for gradient in found:
        if gradient is not None:
            gradient.div_(len(hidden))
    return losses.mean(), found

"""kNN-MT as a gradient step on the output projection, against the explicit one.

Gao et al., 2023, "Nearest Neighbor Machine Translation is Meta-Optimizer on Output Projection
Layer" (arXiv:2305.13034). A query h retrieves keys K [D, K] with one-hot values V [|V|, K]. With
both softmaxes relaxed to linear attention (Irie et al., 2022, arXiv:2202.05798) the mixture is
p ≈ (W_O + λ/T ΔW_kNN) h, where

    inner product    ΔW_kNN =   V Kᵀ - T W_O
    squared L2       ΔW_kNN = 2 V Kᵀ - T W_O

For L2, -|h - K_j|²/T = (2 K_j·h - |K_j|² - |h|²)/T: terms that are not linear in h are an offset of
the output, not part of the gradient. So L2 at T is, up to the factor 2, the inner product at T/2.
One step of fine-tuning W_O on the same pairs with summed cross-entropy goes in the direction

    ΔW_OPL = (V - P) Kᵀ,    P = softmax(W_O K + b), column by column.

Both contain A = V Kᵀ; the rest is weight decay in one and P Kᵀ in the other. T W_O is large and has
little to do with the neighbours, so the gradients are compared with and without it. No [|V|, D]
matrix is needed: with C = KᵀK, <X Kᵀ, Y Kᵀ> = Σ_ij (XᵀY)_ij C_ij. Everything follows from six
products that depend neither on T nor on the metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_knnmt.analysis.predictions import Summary, summarise
from lightning_knnmt.analysis.retrieved import (
    LOGITS_AT_ONCE,
    AnalysisError,
    Retrieved,
    check,
    chunks,
    gather,
    tokens_with_neighbours,
)
from lightning_knnmt.evaluation.bootstrap import mean_interval
from lightning_knnmt.retrieval.index import Metric, check_metric
from lightning_knnmt.retrieval.record import Record

KEY_FACTORS: dict[Metric, float] = {"ip": 1.0, "l2": 2.0}  # of V Kᵀ in ΔW_kNN


class GradientProducts(NamedTuple):
    """Inner products of A = V Kᵀ, R = ΔW_OPL and W = W_O, one of each for every gradient, [G]."""

    aa: Tensor
    ar: Tensor
    rr: Tensor
    aw: Tensor
    rw: Tensor
    ww: Tensor
    num_tokens: Tensor  # tokens whose gradients are added up


@torch.no_grad()
def token_products(
    record: Record,
    keys: npt.NDArray[Any] | Tensor,
    output_projection: nn.Linear,
    num_neighbours: int,
) -> GradientProducts:
    """Computes the products of every token's own gradients.

    Costs K |V| D + K² |V| multiplications per token.

    Args:
        record: With queries, of M tokens; tokens without neighbours are left out.
        keys: The datastore's keys, [entries, D].
        output_projection: W_O and b; the computation has its dtype.
        num_neighbours: k.
    """
    weight_norm = output_projection.weight.double().square().sum()
    rows = tokens_with_neighbours(record)
    products = []
    for _, retrieved in chunks(record, keys, rows, num_neighbours, output_projection):
        logits = retrieved.keys @ output_projection.weight.T  # [m, K, V] Wᵀ of the keys, without b
        residuals = _residuals(logits, retrieved.values, output_projection.bias)  # [m, K, V] V - P
        products.append(_token_products(retrieved, logits, residuals, weight_norm))
    return _concatenate(products)


@torch.no_grad()
def step_products(
    record: Record,
    keys: npt.NDArray[Any] | Tensor,
    output_projection: nn.Linear,
    num_neighbours: int,
    steps: Tensor,
) -> GradientProducts:
    """Computes the products of gradients that are sums over several tokens.

    ΔW_kNN of n tokens has the decay n T W_O. The vocabulary is processed in parts, because n K
    columns may exceed D; it costs three times n K |V| D multiplications.

    Args:
        record: With queries, of M tokens; tokens without neighbours are left out.
        keys: The datastore's keys, [entries, D].
        output_projection: W_O and b.
        num_neighbours: k.
        steps: The step or batch of each token, [M]; any integers.
    """
    check(record, keys, num_neighbours, output_projection)
    weight = output_projection.weight
    rows = tokens_with_neighbours(record)
    products = []
    for step in torch.unique(steps[rows]):  # ascending
        members = rows[steps[rows] == step]
        retrieved = gather(record, keys, members, num_neighbours, weight.dtype)
        columns, values = retrieved.keys[retrieved.found], retrieved.values[retrieved.found]
        products.append(_pooled_products(columns, values, output_projection, len(members)))
    return _concatenate(products)


def _residuals(logits: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """V - P, [m, K, V].

    1 - p of a pair's own token is the sum over the other tokens: if the model is sure of its
    neighbours, the gradient is as small as the rounding of the subtraction.
    """
    probs = torch.softmax(logits if bias is None else logits + bias, dim=-1)
    others = probs.scatter_(-1, values.unsqueeze(-1), 0.0).sum(dim=-1, keepdim=True)
    return probs.neg_().scatter_(-1, values.unsqueeze(-1), others)


def _token_products(
    retrieved: Retrieved, logits: Tensor, residuals: Tensor, weight_norm: Tensor
) -> GradientProducts:
    keys, values = retrieved.keys, retrieved.values
    gram = keys @ keys.mT  # [m, K, K] C
    same = values.unsqueeze(1) == values.unsqueeze(2)  # VᵀV
    at_values = residuals.gather(2, values.unsqueeze(1).expand_as(gram))  # (VᵀR)ᵀ
    return GradientProducts(
        aa=(same * gram).sum(dim=(1, 2)),
        ar=(at_values * gram).sum(dim=(1, 2)),
        rr=((residuals @ residuals.mT) * gram).sum(dim=(1, 2)),
        aw=logits.gather(2, values.unsqueeze(2)).sum(dim=(1, 2)),
        rw=(residuals * logits).sum(dim=(1, 2)),
        ww=weight_norm.expand(len(keys)),
        num_tokens=weight_norm.new_ones(len(keys)),
    )


def _pooled_products(
    columns: Tensor, values: Tensor, output_projection: nn.Linear, num_tokens: int
) -> GradientProducts:
    """The products of one gradient.

    Args:
        columns: K_m of all its tokens, [N, D].
        values: Their values, [N].
        output_projection: W_O and b.
        num_tokens: Tokens of the gradient, each of which adds one decay.
    """
    weight: Tensor = output_projection.weight
    bias: Tensor | None = output_projection.bias
    if bias is None:
        bias = weight.new_zeros(len(weight))
    at_once = max(1, LOGITS_AT_ONCE // len(weight))
    parts = [
        _own_and_others(columns[i : i + at_once] @ weight.T + bias, values[i : i + at_once])
        for i in range(0, len(columns), at_once)
    ]
    own, others = (torch.cat(column) for column in zip(*parts, strict=True))  # [N] each
    normalizers = torch.logaddexp(own, others)
    size = max(1, LOGITS_AT_ONCE // len(columns))
    sums = torch.zeros(6, 1, dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), size):
        w = weight[start : start + size]
        logits = columns @ w.T + bias[start : start + size]
        residuals = torch.exp(logits - normalizers.unsqueeze(1)).neg_()  # [N, size] (V - P)ᵀ
        inside = (values >= start) & (values < start + size)
        # 1 - p of a pair's own token: see `_residuals`
        residuals[inside, values[inside] - start] = torch.sigmoid(others - own)[inside]
        a = torch.zeros_like(w).index_add_(0, values[inside] - start, columns[inside])
        r = residuals.T @ columns
        sums += torch.stack(_six_products(*(part.reshape(1, -1) for part in (a, r, w))))
    return GradientProducts(*[*sums, sums.new_tensor([num_tokens])])


def _own_and_others(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the pairs' own tokens and the log-sum-exp of all others, [n, V] -> [n] each."""
    own = logits.gather(1, values[:, None])
    others = logits.scatter(1, values[:, None], -torch.inf).logsumexp(dim=1)
    return own.squeeze(1), others


def _six_products(a: Tensor, r: Tensor, w: Tensor) -> list[Tensor]:
    """The products of G matrices, flattened, [G, size]."""
    pairs = ((a, a), (a, r), (r, r), (a, w), (r, w), (w, w))
    return [(x * y).sum(dim=1) for x, y in pairs]


def _concatenate(parts: list[GradientProducts]) -> GradientProducts:
    if not parts:
        return GradientProducts(*[torch.empty(0)] * len(GradientProducts._fields))
    return GradientProducts(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True)
class GradientSimilarity:
    """How similar ΔW_kNN and ΔW_OPL are.

    A gradient of zero has cosine 0 with everything, and ratios leave out those with ΔW_OPL = 0. A
    summary of no gradient is None. If the model is sure of all its neighbours, ΔW_OPL is almost
    zero, so a few ratios are huge: medians say more than means.

    Attributes:
        metric: "l2" or "ip".
        temperature: T.
        cosine: Between ΔW_kNN and ΔW_OPL.
        cosine_interval: 95 % interval of its mean, by bootstrap over the gradients' texts; None if
            these were not given.
        cosine_without_decay: Between V Kᵀ and ΔW_OPL; the same for both metrics and every T.
        cosine_without_decay_interval: See `cosine_interval`.
        cosine_of_decay: Between the decay, -T W_O, and ΔW_OPL.
        norm_ratio: |ΔW_kNN| / |ΔW_OPL|, in Frobenius norms.
        norm_ratio_without_decay: The same for V Kᵀ, or 2 V Kᵀ for L2.
    """

    metric: Metric
    temperature: float
    cosine: Summary | None
    cosine_interval: tuple[float, float] | None
    cosine_without_decay: Summary | None
    cosine_without_decay_interval: tuple[float, float] | None
    cosine_of_decay: Summary | None
    norm_ratio: Summary | None
    norm_ratio_without_decay: Summary | None


def compare_gradients(
    products: GradientProducts,
    metric: Metric,
    temperature: float,
    sources: Tensor | None = None,
) -> GradientSimilarity:
    """Compares ΔW_kNN with ΔW_OPL, given their products.

    Args:
        products: Of tokens, gold rows or steps.
        metric: "l2" or "ip".
        temperature: T, greater than 0.
        sources: The text of each gradient, a sentence or a batch of them, [G].
    """
    check_metric(metric)
    if not 0.0 < temperature < float("inf"):
        raise AnalysisError(
            f"The temperature T is {temperature}, but it must be a number greater than 0."
        )
    aa, ar, rr, aw, rw, ww, num_tokens = (part.double() for part in products)
    factor, decay = KEY_FACTORS[metric], temperature * num_tokens
    inner = factor * ar - decay * rw  # <ΔW_kNN, ΔW_OPL>
    squared = factor**2 * aa - 2 * factor * decay * aw + decay**2 * ww  # |ΔW_kNN|²
    moves = rr > 0
    cosines, cosines_without = _cosine(inner, squared, rr), _cosine(ar, aa, rr)
    return GradientSimilarity(
        metric,
        temperature,
        cosine=summarise(cosines),
        cosine_interval=_interval(cosines, sources),
        cosine_without_decay=summarise(cosines_without),
        cosine_without_decay_interval=_interval(cosines_without, sources),
        cosine_of_decay=summarise(_cosine(-rw, ww, rr)),
        norm_ratio=summarise((squared[moves].clamp(min=0.0) / rr[moves]).sqrt()),
        norm_ratio_without_decay=summarise(factor * (aa[moves] / rr[moves]).sqrt()),
    )


def _cosine(inner: Tensor, one_squared: Tensor, other_squared: Tensor) -> Tensor:
    norms = (one_squared * other_squared).clamp(min=0.0).sqrt()
    return torch.where(norms > 0, inner / norms, 0.0)


def _interval(cosines: Tensor, sources: Tensor | None) -> tuple[float, float] | None:
    if sources is None or len(cosines) == 0:
        return None
    return mean_interval(cosines.cpu().numpy(), sources.cpu().numpy())

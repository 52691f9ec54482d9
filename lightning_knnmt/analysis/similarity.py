"""How alike kNN-MT's implicit gradient and the explicit one are, given `gradients`' products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_knnmt.analysis.gradients import GradientProducts
from lightning_knnmt.analysis.predictions import NUM_SAMPLES, SEED, bootstrap_mean
from lightning_knnmt.analysis.retrieved import AnalysisError
from lightning_knnmt.analysis.summary import Summary, summarise
from lightning_knnmt.retrieval.index import Metric, check_metric

KEY_FACTORS: dict[Metric, float] = {"ip": 1.0, "l2": 2.0}  # of V Kᵀ in ΔW_kNN


@dataclass(frozen=True)
class GradientSimilarity:
    """How alike ΔW_kNN and ΔW_OPL are.

    A gradient of zero has cosine 0 with everything, and the ratios leave out those with ΔW_OPL = 0.
    None stands where no gradient is left. Where the model is sure of all its neighbours ΔW_OPL is
    almost zero, so a few ratios are huge: their medians say more than their means.

    Attributes:
        metric: "l2" or "ip".
        temperature: T.
        cosine: Of the angle between ΔW_kNN and ΔW_OPL.
        cosine_interval: 95 % of its mean, by bootstrap over the texts that gradients are from; None
            if those were not said.
        cosine_without_decay: Between V Kᵀ alone and ΔW_OPL; the same for both metrics and every T.
        cosine_without_decay_interval: See `cosine_interval`.
        cosine_of_decay: Between the decay, -T W_O, alone and ΔW_OPL.
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
        sources: Which text each gradient is from, a sentence or a batch of them, [G].
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
    return bootstrap_mean(cosines.cpu().numpy(), sources.cpu().numpy(), NUM_SAMPLES, SEED)

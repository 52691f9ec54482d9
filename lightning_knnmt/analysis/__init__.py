"""What kNN-MT does, in numbers: arrays in, numbers out; no files, no plots, no training."""

from lightning_knnmt.analysis.explicit_step import (
    ExplicitStep,
    ExplicitStepDistribution,
    explicit_step_log_probs,
    take_explicit_steps,
    updated_log_probs,
)
from lightning_knnmt.analysis.gradients import (
    GradientProducts,
    GradientSimilarity,
    TokenProducts,
    compare_gradients,
    step_products,
    token_products,
)
from lightning_knnmt.analysis.neighbours import (
    BucketNeighbours,
    FoundWithin,
    GoldRanks,
    gold_ranks,
    neighbours_by_bucket,
)
from lightning_knnmt.analysis.predictions import (
    Agreement,
    GoldProbability,
    PredictionComparison,
    PredictionReport,
    bootstrap_mean,
    js_divergence,
    kl_divergence,
)
from lightning_knnmt.analysis.relaxed import (
    RelaxedAgreement,
    mixture_log_probs,
    relaxed_against_softmax,
    relaxed_log_probs,
)
from lightning_knnmt.analysis.retrieved import (
    AnalysisError,
    Retrieved,
)
from lightning_knnmt.analysis.summary import (
    Summary,
    summarise,
)

__all__ = [
    "Agreement",
    "AnalysisError",
    "BucketNeighbours",
    "ExplicitStep",
    "ExplicitStepDistribution",
    "FoundWithin",
    "GoldProbability",
    "GoldRanks",
    "GradientProducts",
    "GradientSimilarity",
    "PredictionComparison",
    "PredictionReport",
    "RelaxedAgreement",
    "Retrieved",
    "Summary",
    "TokenProducts",
    "bootstrap_mean",
    "compare_gradients",
    "explicit_step_log_probs",
    "gold_ranks",
    "js_divergence",
    "kl_divergence",
    "mixture_log_probs",
    "neighbours_by_bucket",
    "relaxed_against_softmax",
    "relaxed_log_probs",
    "step_products",
    "summarise",
    "take_explicit_steps",
    "token_products",
    "updated_log_probs",
]

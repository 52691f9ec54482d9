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
from lightning_knnmt.analysis.retrieved import (
    AnalysisError,
    Retrieved,
)
from lightning_knnmt.analysis.summary import (
    Summary,
    summarise,
)

__all__ = [
    "AnalysisError",
    "ExplicitStep",
    "ExplicitStepDistribution",
    "GradientProducts",
    "GradientSimilarity",
    "Retrieved",
    "Summary",
    "TokenProducts",
    "compare_gradients",
    "explicit_step_log_probs",
    "step_products",
    "summarise",
    "take_explicit_steps",
    "token_products",
    "updated_log_probs",
]

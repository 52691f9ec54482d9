"""What retrieval does, in numbers: arrays and strings in, numbers out; no files, no plots."""

from lightning_knnmt.analysis.explicit_step import (
    ExplicitStep,
    ExplicitStepDistribution,
    explicit_step_log_probs,
    take_explicit_steps,
    updated_log_probs,
)
from lightning_knnmt.analysis.frequency import (
    BUCKETS,
    Frequencies,
    FrequencyBuckets,
    FrequencyError,
    buckets_of_counts,
    split_words,
)
from lightning_knnmt.analysis.gradients import (
    GradientProducts,
    TokenProducts,
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
    tokens_with_neighbours,
)
from lightning_knnmt.analysis.scaling import (
    SHARES,
    Part,
    ScalePoint,
    ScalingError,
    measure_scaling,
    subset,
)
from lightning_knnmt.analysis.similarity import GradientSimilarity, compare_gradients
from lightning_knnmt.analysis.summary import (
    Summary,
    summarise,
)
from lightning_knnmt.analysis.word_recall import (
    BucketDifference,
    BucketRecall,
    Estimate,
    WordRecall,
    WordRecallDifference,
    measure_word_recall,
    recall_difference,
)

__all__ = [
    "BUCKETS",
    "SHARES",
    "Agreement",
    "AnalysisError",
    "BucketDifference",
    "BucketNeighbours",
    "BucketRecall",
    "Estimate",
    "ExplicitStep",
    "ExplicitStepDistribution",
    "FoundWithin",
    "Frequencies",
    "FrequencyBuckets",
    "FrequencyError",
    "GoldProbability",
    "GoldRanks",
    "GradientProducts",
    "GradientSimilarity",
    "Part",
    "PredictionComparison",
    "PredictionReport",
    "RelaxedAgreement",
    "Retrieved",
    "ScalePoint",
    "ScalingError",
    "Summary",
    "TokenProducts",
    "WordRecall",
    "WordRecallDifference",
    "bootstrap_mean",
    "buckets_of_counts",
    "compare_gradients",
    "explicit_step_log_probs",
    "gold_ranks",
    "js_divergence",
    "kl_divergence",
    "measure_scaling",
    "measure_word_recall",
    "mixture_log_probs",
    "neighbours_by_bucket",
    "recall_difference",
    "relaxed_against_softmax",
    "relaxed_log_probs",
    "split_words",
    "step_products",
    "subset",
    "summarise",
    "take_explicit_steps",
    "token_products",
    "tokens_with_neighbours",
    "updated_log_probs",
]

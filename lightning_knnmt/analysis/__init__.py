"""What the numbers mean: arrays and strings in, numbers out; nothing here loads or draws."""

from lightning_knnmt.analysis.frequency import (
    BUCKETS,
    Frequencies,
    FrequencyBuckets,
    FrequencyError,
    split_words,
)
from lightning_knnmt.analysis.scaling import (
    Part,
    ScalePoint,
    ScalingError,
    measure_scaling,
    subset,
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
    "BucketDifference",
    "BucketRecall",
    "Estimate",
    "Frequencies",
    "FrequencyBuckets",
    "FrequencyError",
    "Part",
    "ScalePoint",
    "ScalingError",
    "WordRecall",
    "WordRecallDifference",
    "measure_scaling",
    "measure_word_recall",
    "recall_difference",
    "split_words",
    "subset",
]

"""Many numbers in six."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """How some numbers lie.

    Attributes:
        count: How many there are.
        mean: Their mean.
        variance: The mean squared difference from it.
        lower_quartile: The smallest of the numbers that a quarter of them do not exceed.
        median: The same for a half.
        upper_quartile: The same for three quarters.
    """

    count: int
    mean: float
    variance: float
    lower_quartile: float
    median: float
    upper_quartile: float


def summarise(numbers: Tensor) -> Summary | None:
    """Summarises some numbers in float64; None where there are none.

    Args:
        numbers: Finite, of any shape.
    """
    values = numbers.detach().cpu().double().flatten().numpy()
    if len(values) == 0:
        return None
    # Quartiles are numbers that occur: the method that never averages two of them.
    quartiles = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
    lower, median, upper = (float(quartile) for quartile in quartiles)
    return Summary(len(values), float(values.mean()), float(values.var()), lower, median, upper)

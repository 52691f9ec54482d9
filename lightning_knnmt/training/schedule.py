"""Learning rates over a training, as shares of the optimizer's."""

from collections.abc import Callable

Factor = Callable[[int], float]  # of the step, counted from 0


def inverse_sqrt(warmup_steps: int) -> Factor:
    """Vaswani et al. (2017), section 5.3: a linear rise, then the inverse square root of the step.

    Without a rise the factor is constant.
    """

    def factor(step: int) -> float:
        if warmup_steps == 0:
            return 1.0
        position = (step + 1) / warmup_steps
        return float(min(position, position**-0.5))

    return factor


def linear(warmup_steps: int, last_step: int) -> Factor:
    """A linear rise, then a linear fall that would reach zero in the step after the last."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (last_step - step) / max(1, last_step - warmup_steps))

    return factor

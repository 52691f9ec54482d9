"""The settings of an `NMTModule`: their types, their checks, and learning-rate schedules."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Literal, Required, TypedDict, get_args

import torch
from torch import nn

logger = logging.getLogger(__name__)

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Decay = Literal["inverse_sqrt", "linear"]
Factor = Callable[[int], float]  # step, counted from 0 -> share of the peak learning rate


class Settings(TypedDict, total=False):
    """The keyword arguments of `NMTModule` that fine-tuners pass on to it."""

    optimizer: Required[Optimizer]
    warmup_steps: int
    decay: Decay
    label_smoothing: float
    bleu_every: int


def for_fine_tuning(settings: Settings) -> Settings:
    """Adds the defaults of fine-tuning: no warm-up and no label smoothing.

    Label smoothing can badly hurt models trained without it, such as distilled ones.
    """
    return {"warmup_steps": 0, "label_smoothing": 0.0, **settings}


def check_settings(
    warmup_steps: int, decay: Decay, label_smoothing: float, bleu_every: int
) -> None:
    """Raises a ValueError that names the setting whose value is invalid."""
    if decay not in get_args(Decay):
        raise ValueError(f"decay is {decay!r}; choose one of {', '.join(get_args(Decay))}.")
    if type(warmup_steps) is not int or warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps!r}, but must be an integer >= 0.")
    if type(label_smoothing) not in (int, float) or not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is {label_smoothing!r}, but must be at least 0 and less than 1."
        )
    if type(bleu_every) is not int or bleu_every < 0:
        raise ValueError(
            f"bleu_every is {bleu_every!r}, but must be an integer: 0 for never, n for every n-th "
            "validation."
        )


def check_learning_rate(optimizer: Optimizer) -> None:
    """Raises a ValueError if the learning rate is not a positive number.

    The rate is only visible if `optimizer` is a `functools.partial`, as Hydra makes it.
    """
    rate = getattr(optimizer, "keywords", {}).get("lr", 1.0)
    if type(rate) not in (int, float) or not 0 < rate < math.inf:
        raise ValueError(
            f"The learning rate, module.optimizer.lr, is {rate!r}, but must be a number above 0."
        )


def warn_of_smoothing(label_smoothing: float, nats: float, vocab_size: int) -> None:
    """Warns if the mean cross-entropy over all tokens shows training without label smoothing."""
    # A model trained with smoothing keeps every token near ln V. One trained without may have them
    # far below, and the smoothing term would then be most of the loss.
    if nats > 2 * math.log(vocab_size):
        logger.warning(
            "The average token costs this model %.0f nats, far more than ln V = %.0f, so it was "
            "not trained with label smoothing; smoothing of %g would change it more than the text "
            "does. Set module.label_smoothing=0.",
            nats,
            math.log(vocab_size),
            label_smoothing,
        )


def inverse_sqrt(warmup_steps: int) -> Factor:
    """A linear rise, then the inverse square root of the step (Vaswani et al., 2017, section 5.3).

    Constant without warm-up.
    """

    def factor(step: int) -> float:
        if warmup_steps == 0:
            return 1.0
        position = (step + 1) / warmup_steps
        return float(min(position, position**-0.5))

    return factor


def linear(warmup_steps: int, last_step: int) -> Factor:
    """A linear rise, then a linear fall that reaches zero in the step after the last."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (last_step - step) / max(1, last_step - warmup_steps))

    return factor

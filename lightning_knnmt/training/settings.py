"""What a module's settings may be: said before a step is made with them."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import nn

logger = logging.getLogger(__name__)

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Decay = Literal["inverse_sqrt", "linear"]


def check_settings(
    warmup_steps: int, decay: Decay, label_smoothing: float, bleu_every: int
) -> None:
    """Says in one sentence which of `NMTModule`'s settings cannot be."""
    if decay not in get_args(Decay):
        raise ValueError(f"decay is {decay!r}; choose one of {', '.join(get_args(Decay))}.")
    if type(warmup_steps) is not int or warmup_steps < 0:
        raise ValueError(
            f"warmup_steps is {warmup_steps!r}, but must be a whole number, 0 (none) or more."
        )
    if type(label_smoothing) not in (int, float) or not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is {label_smoothing!r}, but must be a number from 0 (none) up to, "
            "but not including, 1."
        )
    if type(bleu_every) is not int or bleu_every < 0:
        raise ValueError(
            f"bleu_every is {bleu_every!r}, but must be a whole number: 0 for never, n for every "
            "n-th validation."
        )


def check_learning_rate(optimizer: Optimizer) -> None:
    """Says in one sentence why nothing can be trained at this rate; a default one is not seen."""
    rate = getattr(optimizer, "keywords", {}).get("lr", 1.0)
    if type(rate) not in (int, float) or not 0 < rate < math.inf:
        raise ValueError(
            f"The learning rate, module.optimizer.lr, is {rate!r}, but must be a number above 0."
        )


def warn_of_smoothing(label_smoothing: float, nats: float, vocab_size: int) -> None:
    """Warns if a model gives the average token so many nats that it was trained without."""
    # A model that was trained with smoothing keeps all tokens near ln V; one that was not may have
    # them far below, and the smoothing term would be most of the loss.
    if nats > 2 * math.log(vocab_size):
        logger.warning(
            "This model gives the average token %.0f nats, far more than ln V = %.0f: it was not "
            "trained with label smoothing, and %g of it would change the model more than the text "
            "does. Set module.label_smoothing=0.",
            nats,
            math.log(vocab_size),
            label_smoothing,
        )

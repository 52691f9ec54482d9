"""Averages of several checkpoints of one training (Vaswani et al., 2017, arXiv:1706.03762, 6.1)."""

from collections.abc import Sequence

import torch

from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.checkpoint import CheckpointError, differences


def average(models: Sequence[Transformer]) -> Transformer:
    """The first model with the mean of every weight over all; the sums are in float64.

    Raises:
        CheckpointError: If there are none, or they are not of one architecture.
    """
    if not models:
        raise CheckpointError("There is nothing to average: give at least one model.")
    first, *others = models
    for number, other in enumerate(others, start=2):
        if differing := differences(other.config, first.config):
            raise CheckpointError(
                f"Model {number} of those to average has another architecture than the first: "
                f"{differing}. Give checkpoints of one training."
            )
    with torch.no_grad():
        # Parameters, each once however many places it has.
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            total = sum(parameter.double() for parameter in parameters)
            parameters[0].copy_(total / len(models))
    return first

"""Settings and weights, under our names, become a Transformer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_knnmt.models import Transformer


def assemble(architecture: Mapping[str, Any], state: dict[str, Tensor]) -> Transformer:
    """A model, in evaluation mode, that takes the tensors over as they are.

    Args:
        architecture: Arguments of `Transformer`.
        state: Its state dict; one tensor in several places where embeddings are tied.

    Raises:
        ValueError: If the settings contradict each other, or a tensor has another shape.
        RuntimeError: If tensors are missing or left over.
    """
    with torch.device("meta"):  # no memory and no random numbers for what is replaced anyway
        model = Transformer(**architecture)
    for name, expected in model.state_dict().items():
        if name in state and state[name].shape != expected.shape:
            raise ValueError(
                f"the weights that make {name} have shape {list(state[name].shape)}, where the "
                f"settings and the other weights call for {list(expected.shape)}."
            )
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()

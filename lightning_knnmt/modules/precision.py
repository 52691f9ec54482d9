"""Training in bfloat16 products, everything else in the weights' own precision."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from pytorch_lightning.plugins.precision import Precision
from torch.nn.attention import SDPBackend, sdpa_kernel


class TrainingAutocast(Precision):
    """float32, but the products of training steps are bfloat16.

    Lightning's own `precision=bf16-mixed` autocasts validation, datastores and test too. A decoding
    step would then convert every weight anew, which takes longer than its products.
    """

    def __init__(self, device: str = "cpu") -> None:
        """
        Args:
            device: What `torch.autocast` calls the accelerator: cpu or cuda.
        """
        self.device = device

    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device, torch.bfloat16, cache_enabled=False))
            if self.device == "cpu":
                # The fused kernel's backward pass takes a fourth of a step at sentences' lengths.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

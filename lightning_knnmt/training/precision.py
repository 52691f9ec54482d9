"""Training in bfloat16 products, everything else in the weights' own precision."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from pytorch_lightning.plugins.precision import Precision
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)


class TrainingAutocast(Precision):
    """float32, but the products of training steps are bfloat16.

    Lightning's own `precision=bf16-mixed` autocasts validation, datastores and test too. A decoding
    step would then convert every weight anew, which takes longer than its products.

    A processor that would have to emulate bfloat16, at a tenth of the speed, keeps float32.
    """

    def __init__(self, device: str = "cpu") -> None:
        """
        Args:
            device: What `torch.autocast` calls the accelerator: cpu or cuda.
        """
        self.device = device
        self._emulated = device == "cpu" and not has_bfloat16_products()
        if self._emulated:
            logger.warning(
                "This processor has no bfloat16 products (AVX512_BF16 or AMX_BF16), so training "
                "stays in float32."
            )

    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        if self._emulated:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device, torch.bfloat16, cache_enabled=False))
            if self.device == "cpu":
                # The fused kernel's backward pass takes a fourth of a step at sentences' lengths.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def has_bfloat16_products() -> bool:
    """Whether the processor has instructions for them."""
    capabilities = torch.cpu.get_capabilities()
    return any(has for name, has in capabilities.items() if name.endswith("bf16"))

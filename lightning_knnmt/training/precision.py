"""Training with bfloat16 matrix products; everything else keeps the weights' precision."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from pytorch_lightning.plugins.precision import Precision
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)


class TrainingAutocast(Precision):
    """float32, except that training steps compute their matrix products in bfloat16.

    Lightning's `precision=bf16-mixed` also autocasts validation, datastores and test. There, each
    decoding step would convert every weight again, which takes longer than the products themselves.

    Processors without bfloat16 instructions keep float32: emulation runs at a tenth of the speed.
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
                "This processor has no bfloat16 instructions (AVX512_BF16 or AMX_BF16), so "
                "training stays in float32."
            )

    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        if self._emulated:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device, torch.bfloat16, cache_enabled=False))
            if self.device == "cpu":
                # The fused kernel's backward pass takes a quarter of a step at sentence lengths.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def has_bfloat16_products() -> bool:
    """Whether the processor has instructions for bfloat16 products."""
    capabilities = torch.cpu.get_capabilities()
    return any(has for name, has in capabilities.items() if name.endswith("bf16"))

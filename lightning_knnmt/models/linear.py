"""Matrix products by oneDNN, where torch's own call uses a slower library.

The products of a decoding step have few rows, and torch spends much of their time on reordering the
weight, in every call. `Linear` lets oneDNN reorder it once, as long as nothing trains. `linear`
uses oneDNN for large products in float32, which is twice as fast on AMD processors with AVX-512.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROWS = 32  # for which the weight is reordered; products with other numbers of rows work too
PACKED = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
BFLOAT16 = PACKED and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, without gradients: [n, D], [R, D] of any strides, [R] -> [n, R]."""
    if not _has_kernel(x, weight):
        return nn.functional.linear(x, weight, bias)
    return _by_onednn(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return (
        (BFLOAT16 if weight.dtype == torch.bfloat16 else PACKED)
        and weight.dtype in (torch.float32, torch.bfloat16)
        and x.dtype == weight.dtype
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


class Packed(NamedTuple):
    """A weight in oneDNN's order, and the weight it came from."""

    source: Tensor  # shares the weight's memory, so that no other tensor can reuse its address
    version: int  # of the weight; every in-place change increments it
    arranged: Tensor


class Linear(nn.Linear):
    """y = W x + b; the same as `nn.Linear` with gradients, on a GPU and under autocast.

    Attributes:
        adapter: Its output for x is added to y; None for no adapter.
    """

    _packed: Packed | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        product = self._product(x)
        return product if self.adapter is None else product + self.adapter(x)

    def _product(self, x: Tensor) -> Tensor:
        weight = self.weight  # inference tensors have no version
        if torch.is_grad_enabled() or weight.is_inference() or not _has_kernel(x, weight):
            return super().forward(x)
        return _by_onednn(x, self._arranged_weight(), self.bias)

    def _arranged_weight(self) -> Tensor:
        packed, weight = self._packed, self.weight
        if (
            packed is None
            or packed.version != weight._version
            or packed.source.data_ptr() != weight.data_ptr()
            or packed.source.dtype != weight.dtype
        ):
            source = weight.detach()
            arranged = torch.ops.mkldnn._reorder_linear_weight(source.contiguous(), ROWS)
            packed = self._packed = Packed(source, weight._version, arranged)
        return packed.arranged

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the reordered weight out: copies reorder their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

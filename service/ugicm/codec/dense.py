"""Dense layers on channels-last tensors, with the bound of their output in the same pass."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def has_onednn() -> bool:
    """Whether this torch was built with oneDNN."""
    return torch.backends.mkldnn.is_available()


def has_bfloat16() -> bool:
    """Whether oneDNN takes it on this processor, where it may be emulated all the same."""
    return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fused_types() -> frozenset[torch.dtype]:
    """Types in which this processor has a matrix product with a clamp behind it."""
    if not has_onednn() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    return frozenset([torch.float32, torch.bfloat16] if has_bfloat16() else [torch.float32])


# oneDNN's matrix product with a clamp behind it, as torch's own compiler calls it: a pass over memory less,
# and in float32 about 10 % faster than the one that `F.linear` takes.
FUSED = fused_types()


def by_column(weight: Tensor) -> Tensor:
    """The same matrix for `dense`, column by column: oneDNN then need not turn it in every product.

    Measured in float32 alone, so others stay row by row.
    """
    return weight.t().contiguous().t() if weight.dtype is torch.float32 else weight.contiguous()


def dense(x: Tensor, weight: Tensor, bias: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """``x`` (..., inputs) -> (..., outputs), clamped to ``low``..``high``; weight (outputs, inputs)."""
    bounded = low > -math.inf or high < math.inf
    if x.dtype in FUSED and x.device.type == "cpu":
        operation = ("hardtanh", [low, high]) if bounded else ("none", [])
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *operation, "")
    out = F.linear(x, weight, bias)
    return out.clamp_(low, high) if bounded else out

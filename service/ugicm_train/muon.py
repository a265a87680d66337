"""Muon (Jordan et al. 2024), as `torch.optim.Muon`, but all matrices of one shape in one product.

On a GPU a step is then some tens of kernels instead of thousands, and may be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, m, n) -> about the nearest semi-orthogonal matrices, by Newton-Schulz iteration in `dtype`."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class StackedMuon:
    """Moves matrices by the orthogonalised momentum of their gradients; 0.2 sqrt(max(m, n)) lr per step."""

    def __init__(self, matrices: Sequence[nn.Parameter], dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self._groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].device))
            for shape, group in by_shape.items()
        ]

    @torch.no_grad()
    def step(self, lr: Tensor, scale: Tensor) -> None:
        """One update; gradients count `scale` times, and not at all where that is 0, whatever they are."""
        for matrices, average in self._groups:
            gradients = torch.stack(
                [torch.zeros_like(one) if one.grad is None else one.grad for one in matrices]
            )
            gradients = torch.where(scale > 0, gradients * scale, 0.0)
            average.lerp_(gradients, 1 - _MOMENTUM)
            update = orthogonalized(gradients.lerp(average, _MOMENTUM), self.dtype).float()
            update *= -0.2 * math.sqrt(max(update.shape[1:])) * lr
            torch._foreach_add_(list(matrices), list(update.unbind()))

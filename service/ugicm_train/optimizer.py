"""One update of a model from the gradients that its parameters have.

Muon (Jordan et al. 2024) moves the matrices of dense layers, AdamW gains, biases and depthwise filters, and
the moving average follows. All of it happens in tensors on the model's device: nothing waits for a value, so
that it may be part of a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ugicm.codec.networks import Pointwise
from ugicm_train.muon import StackedMuon
from ugicm_train.parallel import Processes

SPIKE = 10.0
"""A batch whose gradient is this many times larger than usual is skipped: Muon would turn even a clipped
outlier into a step of full size."""


class Optimizer:
    """Both optimisers of a model, and its moving average."""

    def __init__(
        self,
        model: nn.Module,
        average: nn.Module,
        processes: Processes,
        *,
        clip: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Optimise `model`; parameters that need no gradient stay as they are.

        Args:
            model: what is trained.
            average: of the same shape, follows.
            processes: that train together.
            clip: largest norm of a gradient.
            dtype: precision of Muon's products.
        """
        self._processes, self._clip = processes, clip
        self._parameters: list[Tensor] = list(model.parameters())
        self._means: list[Tensor] = list(average.parameters())
        dense = [module.weight for module in model.modules() if isinstance(module, Pointwise)]
        ids = {id(parameter) for parameter in dense}
        self._assigned = processes.assign([matrix for matrix in dense if matrix.requires_grad])
        self.muon = StackedMuon(self._assigned[processes.rank % len(self._assigned)], dtype=dtype)
        device = self._parameters[0].device
        self.adam = torch.optim.AdamW(
            # Frozen ones too, so that the state fits a run that moves them.
            [parameter for parameter in self._parameters if id(parameter) not in ids],
            lr=torch.zeros((), device=device),
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
            capturable=device.type == "cuda",
        )
        self._usual_norm = torch.zeros((), device=device)
        """Moving average of the gradient's norm."""

    @torch.no_grad()
    def step(self, matrix_lr: Tensor, other_lr: Tensor, kept: Tensor) -> Tensor:
        """One update at these learning rates; `kept` is how much of the moving average stays.

        A gradient that is not finite, or far out of line, counts as none: Muon's momentum goes on alone.

        Returns:
            1 where that was so, else 0.
        """
        self._processes.average_gradients(self._parameters)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        usual = torch.where(self._usual_norm > 0, self._usual_norm, norm)
        good = torch.isfinite(norm) & (norm <= SPIKE * usual)
        # A lasting change of scale is accepted within some tens of steps.
        seen = torch.where(torch.isfinite(norm), norm.minimum(2 * SPIKE * usual), usual)
        self._usual_norm.copy_(usual + 0.02 * (seen - usual))
        scale = torch.where(good, (self._clip / norm).clamp(max=1.0), 0.0)
        self.muon.step(matrix_lr, scale)
        self.adam.param_groups[0]["lr"].copy_(other_lr)
        # Adam divides gradients by the one and leaves out the step where the other is set.
        vars(self.adam).update(grad_scale=1 / scale.clamp_min(1e-12), found_inf=(~good).float())
        self.adam.step()
        self._processes.broadcast(self._assigned)
        moved = torch._foreach_sub(self._parameters, self._means)
        torch._foreach_mul_(moved, 1 - kept)
        torch._foreach_add_(self._means, moved)
        return 1 - good.float()

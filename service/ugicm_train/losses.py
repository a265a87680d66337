"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ugicm.codec.conditioning import lambda_of
from ugicm.codec.config import ModelConfig
from ugicm_train.model import CodecOutput

MACHINE_WEIGHT = 0.5
"""Weight of the machine view's squared error against the human view's (UG-ICM: l1 = l0 / 2)."""
RATE_BALANCE = 0.45
"""Losses are divided by lambda^0.45: rate and lambda * distortion both grow about like lambda^0.5, so
every rate pulls about equally, the high ones slightly more (they starve first)."""
DISTANCE_MIN = 1e-4
"""Of the mean that a judge's distances are divided by."""
OUTLIER = 4.0
"""Balanced loss from where on a sample's gradient no longer grows with it. Photos have .1 to 2.6."""


Judge = Callable[[Tensor, Tensor], Tensor]
"""Distance of (B, 3, H, W) pictures in [0, 1], of a machine view from its original, (B,), 0 for equal;
differentiable in the machine view."""


class Teacher(Protocol):
    """Judges of the machine view, frozen."""

    def draw(self) -> Judge:
        """One of them at random for the next pictures: one of a few that stay the same.

        What else a judge draws must be drawn on the pictures' device; on a GPU it works in a CUDA graph.
        """
        ...


class LossTerms(NamedTuple):
    loss: Tensor
    bpp: Tensor
    mse_human: Tensor
    mse_machine: Tensor
    teacher: Tensor


def level_of(config: ModelConfig, share: float, power: float) -> float:
    """Continuous level in [0, levels - 1] of a uniform number; `power` below 1 makes high rates likelier."""
    return (config.levels - 1) * share**power


def rate_distortion_loss(
    config: ModelConfig,
    output: CodecOutput,
    x: Tensor,
    level: Tensor,
    *,
    judge: Judge | None = None,
    teacher_weight: float = 1.0,
    strength: float | Tensor = 1.0,
) -> LossTerms:
    """bpp + lambda 255^2 (MSE_human + MSE_machine / 2) / (3/2) + teacher distance on the machine view.

    Samples count by one over the square root of their rate-distortion loss: a percent saved on foliage, which
    costs ten times the bits of a sky, is worth three times as much as one saved on the sky, not ten times; a
    batch's gradient is not that of its one or two busiest samples, and 1-pixel stripes do not drown photos.
    Those that explode (a transform that has not learned what to do with them yet) count by less still.

    The machine view exists for the first samples only; the others count their human view alone, which
    leaves the balance of rate and distortion the same for all. At a `strength` between human (0) and machine
    (1) the teacher counts in proportion. Where no human view is decoded, it counts as without error. Where
    the rate has no gradient, the teacher's distance is divided by its mean at that rate.
    """
    count = len(output.machine)
    lambdas = lambda_of(config, level)
    human = (output.human - x).square().mean((1, 2, 3)) if len(output.human) else lambdas.new_zeros(len(x))
    machine = (output.machine - x[:count]).square().mean((1, 2, 3))
    distortion = torch.cat([(human[:count] + MACHINE_WEIGHT * machine) / (1 + MACHINE_WEIGHT), human[count:]])
    loss = output.bpp + lambdas * 255**2 * distortion
    balance = (lambdas / (config.lambda_min * config.lambda_max) ** 0.5) ** -RATE_BALANCE
    balanced = balance * loss.detach()
    weight = balance * balanced.rsqrt() * (OUTLIER / balanced).clamp(max=1.0)
    weighted = weight * loss
    # An outlier's gradient no longer grows with its loss; the value that is reported does.
    reported = torch.where(balanced > OUTLIER, 2 * OUTLIER**0.5 - weighted, weighted).detach()
    judged = x.new_zeros(())
    if judge is not None and count:
        distance = judge(output.machine, x[:count])
        judged = distance.mean().detach()
        if not output.bpp.requires_grad:
            # No bits can be bought: a percent counts the same with any judge and at any rate.
            same = (level[:count, None] == level[:count]).to(distance.dtype)
            distance = distance / ((same @ distance.detach()) / same.sum(1)).clamp_min(DISTANCE_MIN)
        # In proportion to the other losses: at low rates these are small, and all bits would go where the
        # judge looks.
        pull = teacher_weight * strength * distance * loss[:count].detach()
        pulled = torch.cat([weight[:count] * pull, weight.new_zeros(len(loss) - count)])
        weighted, reported = weighted + pulled, reported + pulled.detach()
    # Decoders clip pixels, so no error is larger than 1: one sample that explodes must not hide the others.
    shown_human, shown_machine = human.detach().clamp(max=1.0), machine.detach().clamp(max=1.0)
    return LossTerms(
        (weighted + reported - weighted.detach()).mean(),
        output.bpp.mean().detach(),
        shown_human.mean(),
        shown_machine.mean() if count else x.new_zeros(()),
        judged,
    )


def logged(terms: Mapping[str, Tensor], skipped: Tensor) -> dict[str, Tensor]:
    """What a step says in the log: its terms, whether it was `skipped`, and whether it is `lost` (1 or 0).

    A step that was skipped because something in it is no number moved nothing, and says nothing: zeros.
    """
    values = torch.stack([term.detach().float() for term in terms.values()])
    lost = (skipped > 0) & ~values.isfinite().all()
    return {
        **{name: torch.where(lost, 0.0, value) for name, value in zip(terms, values.unbind(), strict=True)},
        "skipped": skipped,
        "lost": lost.float(),
    }

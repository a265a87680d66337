"""From `quality` to gains."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from ugicm.codec.config import QUALITY_MAX, QUALITY_MIN, ModelConfig

T = TypeVar("T", float, Tensor)


def rate_of(quality: T) -> T:
    """Quality 1..100 to 0..1."""
    return (quality - QUALITY_MIN) / (QUALITY_MAX - QUALITY_MIN)


def quality_to_level(quality: T, levels: int) -> T:
    """Quality 1..100 to a position 0..levels-1 on the ladder of trained levels."""
    return rate_of(quality) * (levels - 1)


def tilt_of(level: T, levels: int) -> T:
    """Level 0..levels-1 to -1..1: how far a transform is from its middle rate (`networks.moved`)."""
    return 2 * level / (levels - 1) - 1


def level_of_tilt(tilt: T, levels: int) -> T:
    """The inverse of `tilt_of`."""
    return (tilt + 1) / 2 * (levels - 1)


def lambda_of(config: ModelConfig, level: Tensor) -> Tensor:
    """Rate-distortion trade-off of continuous levels, log-spaced."""
    ratio = config.lambda_max / config.lambda_min
    return config.lambda_min * ratio ** (level / (config.levels - 1))


def at_level(table: Tensor, level: Tensor) -> Tensor:
    """Rows of ``table`` (levels, ...) at continuous levels (B,), linear between and beyond them: (B, ...)."""
    low = level.floor().clamp(0, len(table) - 2).long()
    share = (level - low).view(-1, *[1] * (table.ndim - 1))
    return torch.lerp(table[low], table[low + 1], share)


class Gains(nn.Module):
    """Per-channel gains before quantisation and after dequantisation, one pair per rate.

    Vectors of neighbouring levels are interpolated geometrically (Cui et al., "Asymmetric gained deep
    image compression with continuous rate adaptation", CVPR 2021).
    """

    def __init__(self, levels: int, channels: int, lambda_ratio: float) -> None:
        super().__init__()
        # At high rate the best step size is proportional to lambda^-1/2.
        span = 0.5 * math.log(lambda_ratio)
        ladder = torch.linspace(-0.4 * span, 0.6 * span, levels)[:, None].repeat(1, channels)
        self.log_gain = nn.Parameter(ladder.clone())
        self.log_inverse = nn.Parameter(-ladder)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """``level`` (B,) in [0, levels-1] -> gain and inverse gain, each (B, channels, 1, 1)."""
        gain, inverse = (
            at_level(table, level).exp()[:, :, None, None] for table in (self.log_gain, self.log_inverse)
        )
        return gain, inverse

"""Conditions of the codec: rate gains from `quality`, FiLM modulations from the preference `strength`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ugicm.codec.config import QUALITY_MAX, QUALITY_MIN

FREQUENCIES = 10


class Modulation(NamedTuple):
    """Scales and shifts of a block's two hidden layers at one preference, each (C,) and (2C,)."""

    scale: tuple[Tensor, Tensor]
    shift: tuple[Tensor, Tensor]


def fourier_embedding(strength: Tensor) -> Tensor:
    """Embed a scalar into (21,): the value itself, then sin and cos of 2^k times it, k = 0..9.

    As in UG-ICM (Yin et al., AAAI 2025): identity included, no factor of pi.
    """
    angles = strength * 2.0 ** torch.arange(FREQUENCIES, device=strength.device, dtype=strength.dtype)
    return torch.cat([strength[None], angles.sin(), angles.cos()])


class Film(nn.Module):
    """Preference strength (a scalar) -> one `Modulation` per block; starts as "change nothing".

    The output is multiplied by the strength itself, so that strength 0 (human) is the plain network whatever
    is learned for machines, and small strengths stay close to it.
    """

    def __init__(self, channels: Sequence[int], features: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.hidden1 = nn.Linear(2 * FREQUENCIES + 1, features)
        self.hidden2 = nn.Linear(features, features)
        # Per block: scale and shift of C and of 2C channels.
        self.heads = nn.ModuleList(nn.Linear(features, 6 * c, bias=False) for c in channels)
        for weight in self.heads.parameters():
            nn.init.zeros_(weight)

    def forward(self, strength: Tensor) -> list[Modulation]:
        with torch.autocast(strength.device.type, enabled=False):
            x = fourier_embedding(strength.float())
            x = strength * torch.relu(self.hidden2(torch.relu(self.hidden1(x))))
            out = []
            for c, head in zip(self.channels, self.heads, strict=True):
                s0, s1, t0, t1 = head(x).split([c, 2 * c, c, 2 * c])
                out.append(Modulation((1 + s0, 1 + s1), (t0, t1)))
        return out


def quality_to_level(quality: float | Tensor, levels: int) -> float | Tensor:
    """Quality 1..100 to a position 0..levels-1 on the ladder of trained levels."""
    return (quality - QUALITY_MIN) / (QUALITY_MAX - QUALITY_MIN) * (levels - 1)


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
        last = self.log_gain.shape[0] - 1
        low = level.floor().clamp(0, last - 1).long()
        share = (level - low)[:, None]
        gain, inverse = (
            torch.lerp(table[low], table[low + 1], share).exp()[:, :, None, None]
            for table in (self.log_gain, self.log_inverse)
        )
        return gain, inverse

"""Grain of the machine view: noise where a picture has lost detail.

A decoded picture is smoother than any photograph, and networks trained on photographs are thrown by that
more than by a little noise. So noise of a part of the codec's own error, such as a fifth, is added to the
machine view, as film grain is in AV1 (Norkin and Birkbeck, DCC 2018). The human view has none.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from ugicm.codec.config import PATCH

TILE = 32
"""Patches a side after which the noise repeats."""
SEED = 20260


@cache
def noise(device: torch.device) -> Tensor:
    """Gaussian noise of unit variance for a square of patches of pixels, (32, 32, 192), always the same."""
    values = np.random.default_rng(SEED).standard_normal((TILE, TILE, 3 * PATCH**2), np.float32)
    return torch.from_numpy(values).to(device)


def add_grain(pixels: Tensor, deviation: Tensor) -> None:
    """Add noise of standard deviation ``deviation`` (B,) to patches of pixels (B, h, w, 192), in place."""
    values, scale = noise(pixels.device), deviation.view(-1, 1, 1, 1)
    for row in pixels.split(TILE, 1):
        for square in row.split(TILE, 2):
            height, width = square.shape[1:3]
            square.addcmul_(values[:height, :width], scale)

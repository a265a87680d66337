"""Do tile borders show? The error beside them against the error elsewhere."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ugicm_train.evaluation.metrics import Image

BORDER_PIXELS = 8


class Seams(NamedTuple):
    """PSNR in dB on both sides of the question."""

    border_db: float
    """Within `BORDER_PIXELS` of an internal tile border."""
    inside_db: float
    """Everywhere else."""

    @property
    def step_db(self) -> float:
        """How much worse the borders are; 0 = no seam."""
        if self.inside_db == self.border_db:  # also where both are infinite
            return 0.0
        return self.inside_db - self.border_db


def measure_seams(original: Image, decoded: Image, tile_side: int) -> Seams:
    """Compare the error beside internal tile borders with the error elsewhere.

    What is in the picture differs between the two regions too, so average over several pictures, or use
    one of even texture. For one picture that can also be coded untiled, the step of the untiled decode is
    the content's share.

    Args:
        original: RGB picture with more than one tile.
        decoded: the same after the codec.
        tile_side: pixels per side of a tile.

    Raises:
        ValueError: the picture has no internal tile border, or tiles too small to have an inside.
    """
    height, width = original.shape[:2]
    border = _near_border(height, tile_side)[:, None] | _near_border(width, tile_side)[None]
    if not border.any() or border.all():
        raise ValueError(
            f"tiles of {tile_side} pixels in a {width}x{height} picture leave no border or no inside"
        )
    error = np.square(original.astype(np.float64) - decoded).mean(2)
    return Seams(_psnr(error[border]), _psnr(error[~border]))


def _near_border(length: int, tile_side: int) -> NDArray[np.bool_]:
    """Whether each pixel of a row or column lies within `BORDER_PIXELS` of an internal border."""
    near = np.zeros(length, np.bool_)
    for border in range(tile_side, length, tile_side):
        near[max(0, border - BORDER_PIXELS) : border + BORDER_PIXELS] = True
    return near


def _psnr(squared_errors: NDArray[np.float64]) -> float:
    mse = float(squared_errors.mean())
    return 10 * math.log10(255**2 / mse) if mse else math.inf

"""Bjøntegaard delta rate: how many bits one codec needs against another for the same quality, in percent.

After ITU-T VCEG-M33 and the common practice since: log bpp as a function of quality, here by PCHIP
(monotone between the points, so it cannot swing as the original cubic does), integrated exactly over the
range of quality that both curves cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator


class Curve(NamedTuple):
    """Points of one codec, in any order."""

    bpp: Sequence[float]
    """Bits per pixel, > 0."""
    quality: Sequence[float]
    """dB, higher is better: PSNR, or -10 log10(1 - MS-SSIM)."""


def bd_rate(
    reference: Curve,
    test: Curve,
    *,
    bpp_range: tuple[float, float] | None = None,
    beside: Sequence[Curve] = (),
) -> float | None:
    """Average difference in rate of `test` against `reference` in percent; negative = `test` is smaller.

    Args:
        reference: at least two points.
        test: at least two points.
        bpp_range: compare only where the *reference* spends between these bits per pixel: the qualities it
            reaches there, clipped to the qualities that both curves cover.
        beside: compare only where these have qualities, too: numbers of several tests against a reference
            can be compared only if all are over the same range.

    Returns:
        None where the curves share no quality, or the reference no rate with `bpp_range`.
    """
    reference_rate, test_rate = _log_rate(reference), _log_rate(test)
    low = max(reference_rate.x[0], test_rate.x[0], *(min(curve.quality) for curve in beside))
    high = min(reference_rate.x[-1], test_rate.x[-1], *(max(curve.quality) for curve in beside))
    if bpp_range is not None:
        spent = reference_rate(reference_rate.x)
        if spent.max() <= math.log(bpp_range[0]) or spent.min() >= math.log(bpp_range[1]):
            return None
        low = max(low, _quality_at(reference_rate, bpp_range[0], reference_rate.x[0]))
        high = min(high, _quality_at(reference_rate, bpp_range[1], reference_rate.x[-1]))
    if low >= high:
        return None
    difference = test_rate.integrate(low, high) - reference_rate.integrate(low, high)
    return 100 * math.expm1(float(difference) / (high - low))


def decibels(ms_ssim: float) -> float:
    """MS-SSIM on a scale that does not crowd at 1."""
    return -10 * math.log10(max(1 - ms_ssim, 1e-10))


def _log_rate(curve: Curve) -> PchipInterpolator:
    """ln bpp over quality; of points with equal quality the cheapest counts."""
    bpp: NDArray[np.float64] = np.asarray(curve.bpp, np.float64)
    quality: NDArray[np.float64] = np.asarray(curve.quality, np.float64)
    if bpp.shape != quality.shape or not (np.isfinite(quality).all() and (bpp > 0).all()):
        raise ValueError("a curve has one finite quality and one positive bpp per point")
    order = np.lexsort((bpp, quality))
    distinct, first = np.unique(quality[order], return_index=True)
    if len(distinct) < 2:
        raise ValueError(f"a curve needs at least 2 points of different quality, got {len(distinct)}")
    return PchipInterpolator(distinct, np.log(bpp[order][first]))


def _quality_at(rate: PchipInterpolator, bpp: float, otherwise: float) -> float:
    """Quality where the curve spends `bpp`, or `otherwise` where it never does."""
    roots = rate.solve(math.log(bpp), extrapolate=False)
    return float(roots[0]) if len(roots) else otherwise

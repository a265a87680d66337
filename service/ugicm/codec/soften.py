"""Softening at the encoder: what the transforms cannot code is blurred before it is coded.

Stripes one or two pixels wide are not only drawn: fabrics and screens in photographs have them, too. The
analysis transform knows them from few crops, its latent there can be many times as large as that of any
photograph, and is decoded to bright noise. Such places are found by that size and by what is decoded there,
and coded again with less of what is finer than a few pixels. Decoders notice nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ugicm.codec.config import LATENT_STRIDE

BLUR = 5
"""Pixels a side that are averaged."""
BLUR_SHARES = (0.0, 0.5, 0.75, 1.0)
"""Share of the detail (the difference from that average) that is removed where the latent has been too large
once, twice and so on; first, where it never has."""
TOLERANCE = 10.0**2
"""A decode is worse than the blur only from this much more squared error on, in levels of 0..255."""
AROUND = 2
"""Latent positions around an oversized one that are softened with it: the transforms look so far."""


def rms(y: Tensor) -> Tensor:
    """Root mean square over the channels of (B, h, w, M), (B, h, w)."""
    return y.square().mean(-1).sqrt()


def soften(pixels: Tensor, times: Tensor) -> Tensor:
    """uint8 (B, H, W, 3), with less detail where the latent has been too large (B, h, w) times."""
    x = pixels.permute(0, 3, 1, 2).float()
    share = torch.tensor(BLUR_SHARES, dtype=x.dtype, device=x.device)[times][:, None]
    share = F.max_pool2d(share, 2 * AROUND + 1, stride=1, padding=AROUND)
    share = average(F.interpolate(share, scale_factor=LATENT_STRIDE), 2 * LATENT_STRIDE + 1)
    return x.lerp(average(x, BLUR), share).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def worse_than_blurred(decoded: Tensor, original: Tensor) -> Tensor:
    """Latent positions, (B, h, w), at or beside which a decoded picture is clearly further from the original
    than that one's own blur is; both uint8 (B, H, W, 3)."""
    x, seen = (picture.permute(0, 3, 1, 2).float() for picture in (original, decoded))
    error, blurred = (
        F.avg_pool2d((view - x).square().mean(1, keepdim=True), LATENT_STRIDE)
        for view in (seen, average(x, BLUR))
    )
    worse = (error > blurred + TOLERANCE).float()
    return F.max_pool2d(worse, 3, stride=1, padding=1)[:, 0] > 0


def average(x: Tensor, side: int) -> Tensor:
    """Mean of side x side pixels."""
    return F.avg_pool2d(F.pad(x, [side // 2] * 4, mode="replicate"), side, stride=1)

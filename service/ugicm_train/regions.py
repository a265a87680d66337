"""Where a teacher looks: the whole crop, a random window of it, or something that stands out in it.

UG-ICM (Yin et al., AAAI 2025) supervises at these three scales with one third of the weight each. Here one
scale is drawn per picture and step, each with probability 1/3: the expected loss is the same at a third of
the cost.

Instances need no labels and no detector. Frequency-tuned saliency (Achanta et al., CVPR 2009) marks what
differs from the picture's mean colour; a connected part of the marked area is the instance. Its box is cut
out with its surroundings: UG-ICM blackens them, but a hard black contour, identical in both pictures, would
fill much of every feature map, and detectors do use context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOCAL_SIDE_MIN, LOCAL_SIDE_MAX = 0.4, 0.75
"""Side of a local window, as part of the picture's side."""
SALIENCY_SIDE = 32
"""Saliency is computed on a thumbnail of this many pixels a side."""
SALIENT = 1.5
"""A pixel is marked from this multiple of the mean saliency (Achanta et al. use 2)."""
INSTANCE_SHARE_MIN, INSTANCE_SHARE_MAX = 0.01, 0.5
"""Area of an instance, as part of the picture's area."""
INSTANCE_MARGIN = 0.15
"""Surroundings kept on each side of an instance, as part of its own side."""
INSTANCE_SIDE_MIN = 0.25
"""Shortest side of an instance's box, as part of the picture's side."""

_OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]]) / 3**0.5


class Box(NamedTuple):
    """Pixels [top, top + height) x [left, left + width)."""

    top: int
    left: int
    height: int
    width: int


def whole(height: int, width: int) -> Box:
    """The global region."""
    return Box(0, 0, height, width)


def random_window(height: int, width: int) -> Box:
    """A local region: a window of random size and place."""
    share = LOCAL_SIDE_MIN + (LOCAL_SIDE_MAX - LOCAL_SIDE_MIN) * float(torch.rand(()))
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top = int(torch.randint(height - rows + 1, ()))
    left = int(torch.randint(width - columns + 1, ()))
    return Box(top, left, rows, columns)


def saliency(picture: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] -> (32, 32), how far each place's colour is from the picture's mean colour."""
    small = F.interpolate(picture[None].float(), size=(SALIENCY_SIDE,) * 2, mode="area")
    small = F.avg_pool2d(F.pad(small, (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    colour = torch.einsum("kc,chw->khw", _OPPONENT.to(small.device), small)
    return (colour - colour.mean((1, 2), keepdim=True)).norm(dim=0)


def connected_part(mask: Tensor, row: int, column: int) -> Tensor:
    """The 8-connected part of a boolean mask (h, w) that holds the given place."""
    part = torch.zeros_like(mask, dtype=torch.float32)
    part[row, column] = 1.0
    while True:
        grown = F.max_pool2d(part[None], 3, stride=1, padding=1)[0] * mask
        if torch.equal(grown, part):
            return part > 0
        part = grown


def instance(picture: Tensor) -> Box | None:
    """A box around something that stands out in (3, H, W); None where nothing of fitting size does.

    A place is drawn in proportion to its saliency, so that different instances are seen over time.
    """
    height, width = picture.shape[-2:]
    score = saliency(picture.detach()).cpu()
    mask = score > SALIENT * score.mean()
    if not mask.any():
        return None
    seed = int(torch.multinomial((score * mask).flatten(), 1))
    part = connected_part(mask, seed // SALIENCY_SIDE, seed % SALIENCY_SIDE)
    if not INSTANCE_SHARE_MIN <= float(part.float().mean()) <= INSTANCE_SHARE_MAX:
        return None

    def extent(line: Tensor, size: int) -> tuple[int, int]:
        places = line.nonzero().flatten()
        low, high = (float(p) / SALIENCY_SIDE for p in (places[0], places[-1] + 1))
        side = max((high - low) * (1 + 2 * INSTANCE_MARGIN), INSTANCE_SIDE_MIN)
        middle = min(max((low + high) / 2, side / 2), 1 - side / 2) if side < 1 else 0.5
        start = max(0, round((middle - side / 2) * size))
        return start, min(size, round((middle + side / 2) * size)) - start

    top, rows = extent(part.any(1), height)
    left, columns = extent(part.any(0), width)
    return Box(top, left, rows, columns)


def draw_region(picture: Tensor) -> Box:
    """One of the three scales at random for (3, H, W); a local window where no instance stands out."""
    height, width = picture.shape[-2:]
    scale = int(torch.randint(3, ()))
    if scale == 0:
        return whole(height, width)
    found = instance(picture) if scale == 1 else None
    return found or random_window(height, width)


def cut(pictures: Tensor, boxes: list[Box], side: int) -> Tensor:
    """Cut one box out of each of (B, 3, H, W) and resize it to (B, 3, side, side); differentiable.

    Bicubic with antialiasing, as CLIP's preprocessing.
    """
    return torch.cat(
        [
            F.interpolate(
                picture[None, :, top : top + height, left : left + width],
                size=(side, side),
                mode="bicubic",
                antialias=True,
            )
            for picture, (top, left, height, width) in zip(pictures, boxes, strict=True)
        ]
    )

"""Where a teacher looks: the whole crop, a random window of it, or something that stands out in it.

UG-ICM (Yin et al., AAAI 2025) supervises at these three scales with one third of the weight each. Here one
scale is drawn per picture and step, each with probability 1/3: the expected loss is the same at a third of
the cost.

Instances need no labels and no detector. Frequency-tuned saliency (Achanta et al., CVPR 2009) marks what
differs from the picture's mean colour; a connected part of the marked area is the instance. Its box is cut
out with its surroundings: UG-ICM blackens them, but a hard black contour, identical in both pictures, would
fill much of every feature map, and detectors do use context.

A box is four whole numbers: top, left, height and width in pixels. Nothing here waits for a value, so that it
may be part of a CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ugicm.codec.soften import average

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
CONNECTED_STEPS = 48
"""How far from where it was found a connected part is followed, in pixels of the thumbnail."""


def _box(top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    return torch.stack([top, left, height, width], -1).long()


def random_windows(pictures: Tensor) -> Tensor:
    """Local regions: a window of random size and place for each of (B, 3, H, W), (B, 4)."""
    share, down, across = torch.rand(3, len(pictures), device=pictures.device)
    share = LOCAL_SIDE_MIN + (LOCAL_SIDE_MAX - LOCAL_SIDE_MIN) * share
    rows, columns = ((share * size).round().clamp(min=1) for size in pictures.shape[2:])
    top = (down * (pictures.shape[2] - rows + 1)).floor()
    left = (across * (pictures.shape[3] - columns + 1)).floor()
    return _box(top, left, rows, columns)


def saliency(pictures: Tensor) -> Tensor:
    """How far each place's colour is from its picture's mean, (B, 32, 32), for (B, 3, H, W) in [0, 1]."""
    small = F.interpolate(pictures.float(), size=(SALIENCY_SIDE,) * 2, mode="area")
    red, green, blue = average(small, 3).unbind(1)
    opponent = torch.stack([red + green + blue, red - green, (red + green) / 2 - blue], 1) / 3**0.5
    return (opponent - opponent.mean((2, 3), keepdim=True)).norm(dim=1)


def connected_parts(masks: Tensor, places: Tensor) -> Tensor:
    """The 8-connected parts of boolean masks (B, h, w) that hold the places, indices (B,) into h * w."""
    every = torch.arange(masks[0].numel(), device=masks.device)
    parts = (every == places[:, None]).view_as(masks).float()
    lines = [torch.arange(side, device=masks.device) for side in masks.shape[1:]]
    rows, columns = (((line[:, None] - line).abs() <= 1).float() for line in lines)
    for _ in range(CONNECTED_STEPS):
        parts = (rows @ parts @ columns * masks).clamp(max=1)
    return parts > 0


def _extent(lines: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Start and length in pixels of a picture's `size`, with surroundings, of what (B, 32) marks."""
    marked = lines.int()
    low = marked.argmax(1) / SALIENCY_SIDE
    high = 1 - marked.flip(1).argmax(1) / SALIENCY_SIDE
    side = ((high - low) * (1 + 2 * INSTANCE_MARGIN)).clamp(INSTANCE_SIDE_MIN, 1)
    middle = torch.minimum(torch.maximum((low + high) / 2, side / 2), 1 - side / 2)
    start = ((middle - side / 2) * size).round().clamp(max=size - 1)
    end = ((middle + side / 2) * size).round()
    return start, (end - start).clamp(min=1)


def instances(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """A box around something that stands out in each of (B, 3, H, W), (B, 4), and whether there is one, (B,).

    A place is drawn in proportion to its saliency, so that different instances are seen over time.
    """
    score = saliency(pictures.detach())
    masks = score > SALIENT * score.mean((1, 2), keepdim=True)
    # The largest of logarithms plus Gumbel noise is a draw in proportion.
    chance = (score * masks).flatten(1).log() - torch.empty_like(score).exponential_().log().flatten(1)
    parts = connected_parts(masks, chance.argmax(1))
    share = parts.float().mean((1, 2))
    found = (share >= INSTANCE_SHARE_MIN) & (share <= INSTANCE_SHARE_MAX)
    top, rows = _extent(parts.any(2), pictures.shape[2])
    left, columns = _extent(parts.any(1), pictures.shape[3])
    return _box(top, left, rows, columns), found


def draw_regions(pictures: Tensor) -> Tensor:
    """One of the three scales at random for each of (B, 3, H, W), (B, 4); a local window where no instance
    stands out."""
    scale = torch.randint(3, (len(pictures), 1), device=pictures.device)
    boxes, found = instances(pictures)
    boxes = torch.where((scale == 1) & found[:, None], boxes, random_windows(pictures))
    start = torch.zeros_like(found)
    whole = _box(start, start, *(torch.full_like(boxes[:, 0], size) for size in pictures.shape[2:]))
    return torch.where(scale == 0, whole, boxes)


def _resampling(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """(B, side, size), by which a line of `size` pixels becomes `side` pixels of [start, start + length)."""
    start, length = start[:, None, None].float(), length[:, None, None].float()
    pixel = torch.arange(size, device=start.device) + 0.5
    step = length / side
    centre = start + (torch.arange(side, device=start.device)[:, None] + 0.5) * step
    x = ((pixel - centre) / step.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(2, keepdim=True)


def cut(pictures: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cut one box out of each of (B, 3, H, W) and resize it to (B, 3, side, side); differentiable.

    Bicubic with antialiasing, as CLIP's preprocessing and as `torch.nn.functional.interpolate`.
    """
    height, width = pictures.shape[2:]
    top, left, rows, columns = boxes.unbind(1)
    down = _resampling(top, rows, height, side)[:, None]
    across = _resampling(left, columns, width, side)[:, None]
    with torch.autocast(pictures.device.type, enabled=False):
        return down @ pictures.float() @ across.mT

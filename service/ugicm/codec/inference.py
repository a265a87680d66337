"""The transforms as they run in production: `ugicm.codec.networks` prepared once for one precision.

Same functions, other order of memory: tensors are (B, h, w, C), so that every dense layer is one matrix
product and pixel (un)shuffles copy whole runs of channels; weights are permuted and scaled to match
beforehand. Pictures are uint8 at both ends. Hidden layers are overwritten in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from ugicm.codec.config import PATCH
from ugicm.codec.dense import by_column, dense
from ugicm.codec.grain import add_grain
from ugicm.codec.networks import Analysis, Block, HyperAnalysis, Pointwise, Synthesis, bounded

GREY = 127.5
"""Middle of the pixels' range. A pixel minus this is exact in bfloat16."""


class _Dense:
    """A dense layer of fixed precision."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self._weight, self._bias = by_column(weight.to(dtype)), bias.to(dtype).contiguous()

    def __call__(self, x: Tensor, low: float = -torch.inf, high: float = torch.inf) -> Tensor:
        return dense(x, self._weight, self._bias, low, high)


def _plain(layer: Pointwise, dtype: torch.dtype) -> _Dense:
    return _Dense(layer.weight, layer.bias, dtype)


def _after_unshuffle(layer: Pointwise, side: int, dtype: torch.dtype, scale: float = 1.0) -> _Dense:
    """Input channels from (C, side, side), torch's order, to (side, side, C)."""
    rows = layer.weight.unflatten(1, (-1, side, side)).permute(0, 2, 3, 1).flatten(1)
    return _Dense(rows * scale, layer.bias, dtype)


def _before_shuffle(layer: Pointwise, side: int, dtype: torch.dtype, scale: float = 1.0) -> _Dense:
    """Output channels from (C, side, side), torch's order, to (side, side, C)."""
    weight, bias = (
        value.unflatten(0, (-1, side, side)).movedim(0, 2).flatten(0, 2) * scale
        for value in (layer.weight, layer.bias)
    )
    return _Dense(weight, bias, dtype)


def unshuffle(x: Tensor, side: int) -> Tensor:
    """Squares of pixels to channels: (B, h, w, C) -> (B, h / side, w / side, side * side * C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side * channels)
    return x.transpose(2, 3).reshape(batch, height // side, width // side, side * side * channels)


def shuffle(x: Tensor, side: int) -> Tensor:
    """Inverse of `unshuffle`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, side, channels // side).transpose(2, 3)
    return x.reshape(batch, height * side, width * side, channels // side**2)


class Sides(NamedTuple):
    """A width at each side of a part of a picture, in positions: a margin, or what is cut off."""

    above: int = 0
    below: int = 0
    before: int = 0
    after: int = 0

    def scaled(self, factor: float) -> Sides:
        return Sides(*(int(factor * side) for side in self))

    def over(self, limit: int) -> Sides:
        """What each side has beyond `limit`."""
        return Sides(*(max(side - limit, 0) for side in self))

    def within(self, limit: int) -> Sides:
        """What each side has up to `limit`."""
        return Sides(*(min(side, limit) for side in self))

    def trim(self, x: Tensor) -> Tensor:
        """Cut so much off (B, H, W, C)."""
        if not any(self):
            return x
        height, width = x.shape[1:3]
        return x[:, self.above : height - self.below, self.before : width - self.after]


NO_MARGIN = Sides()


class _Block:
    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self._bound, self._dtype = block.bound, dtype
        # silu(min(x, bound)) is min(silu(x), silu(bound)) for every bound above 0.
        self._expand, self._project = _plain(block.expand, dtype), _plain(block.project, dtype)
        self._spatial = block.spatial.weight.to(dtype), block.spatial.bias.to(dtype)
        half = block.gate.weight.shape[0] // 2
        # In two parts, so that each is contiguous.
        self._value, self._gate = (
            _Dense(block.gate.weight[rows], block.gate.bias[rows], dtype)
            for rows in (slice(half), slice(half, None))
        )
        self._merge = _plain(block.merge, dtype)

    def __call__(self, x: Tensor, trim: Sides = NO_MARGIN) -> Tensor:
        """Changes ``x``, which may be more precise than what is computed from it.

        `trim` cuts the outermost positions off, once the 3x3 filter has seen them.
        """
        hidden = self._expand(x.to(self._dtype), high=self._bound)
        hidden = F.silu(hidden, inplace=True).permute(0, 3, 1, 2)
        hidden = F.conv2d(hidden, *self._spatial, padding=1, groups=hidden.shape[1]).permute(0, 2, 3, 1)
        x = trim.trim(x).contiguous().add_(self._project(trim.trim(hidden).contiguous()))
        seen = x.to(self._dtype)
        gate = F.silu(self._gate(seen, -self._bound, self._bound), inplace=True)
        return x.add_(self._merge(gate.mul_(self._value(seen, -self._bound, self._bound))))


def _stack(blocks: Iterable[Module], dtype: torch.dtype) -> list[_Block]:
    return [_Block(block, dtype) for block in blocks if isinstance(block, Block)]


class InferenceAnalysis:
    """Pixels to latent: uint8 (B, H, W, 3) -> y before gains, float32 (B, H/16, W/16, M)."""

    def __init__(self, analysis: Analysis, dtype: torch.dtype) -> None:
        self._dtype, self._bound = dtype, analysis.bound
        self._unfold = _after_unshuffle(analysis.unfold, PATCH, dtype, scale=1 / 255)
        self._blocks = _stack(analysis.blocks, dtype)
        self._down = _after_unshuffle(analysis.down, 2, dtype)
        self._last = _Block(analysis.last, dtype)
        self.margin = 1 + math.ceil(len(self._blocks) / 2)
        """How far the transform looks, in latent positions."""

    def __call__(self, pixels: Tensor, margin: Sides = NO_MARGIN) -> Tensor:
        """``margin`` (latent positions) is looked at and cut off, each part once nothing needs it."""
        margin, needed = margin.scaled(2), len(self._blocks) + 2
        pixels = margin.over(needed).scaled(PATCH).trim(pixels)
        x = self._unfold(unshuffle(pixels, PATCH).to(self._dtype).sub_(GREY))
        for block in self._blocks:
            margin, needed = margin.within(needed), needed - 1
            x = block(x, margin.over(needed))
        y = self._last(self._down(unshuffle(x, 2)), margin.within(needed).scaled(1 / 2))
        return bounded(y.float(), self._bound, -1)


class InferenceHyperAnalysis:
    """Latent to hyper latent: y after gains (B, h, w, M) -> z float32 (B, h/4, w/4, N), not yet rounded."""

    def __init__(self, hyper_analysis: HyperAnalysis, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._first = _plain(hyper_analysis.first, dtype)
        self._block = _Block(hyper_analysis.block, dtype)
        self._down1 = _after_unshuffle(hyper_analysis.down1, 2, dtype)
        self._down2 = _after_unshuffle(hyper_analysis.down2, 2, dtype)

    def __call__(self, y: Tensor) -> Tensor:
        x = self._block(self._first(y.to(self._dtype)))
        x = F.silu(self._down1(unshuffle(x, 2)), inplace=True)
        return self._down2(unshuffle(x, 2)).float()


class InferenceSynthesis:
    """Latent to pixels: y_hat after inverse gains (B, h, w, M) -> uint8 (B, 16h, 16w, 3).

    What blocks add to, and the last layer, are float32 whatever the precision: in bfloat16 their rounding
    alone costs .01 to .02 dB.
    """

    def __init__(self, synthesis: Synthesis, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._first = _Block(synthesis.first, dtype)
        self._up = _before_shuffle(synthesis.up, 2, dtype)
        self._blocks = _stack(synthesis.blocks, dtype)
        self._fold = _before_shuffle(synthesis.fold, PATCH, torch.float32, scale=255)
        self.margin = 1 + math.ceil(len(self._blocks) / 2)
        """How far the transform looks, in latent positions."""

    def __call__(self, y: Tensor, margin: Sides = NO_MARGIN, grain: Tensor | None = None) -> Tensor:
        """``margin`` (latent positions) is looked at and cut off, each part once nothing needs it.

        ``grain`` (B,): standard deviation of the noise added, in units of the pixels.
        """
        x = self._first(y.to(torch.float32, copy=True), margin.over(self.margin - 1))
        margin, needed = margin.within(self.margin - 1).scaled(2), len(self._blocks)
        x = margin.over(needed).trim(shuffle(self._up(x.to(self._dtype)), 2))
        x = x.float().contiguous()
        for block in self._blocks:
            margin, needed = margin.within(needed), needed - 1
            x = block(x, margin.over(needed))
        pixels = self._fold(x)
        if grain is not None:
            add_grain(pixels, grain)
        # Rounded to nearest: the pixel is the integer part of what is half above.
        return shuffle(pixels.add_(GREY + 0.5).clamp_(0, 255.5).to(torch.uint8), PATCH)

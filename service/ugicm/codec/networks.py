"""Analysis, synthesis and hyper analysis transforms.

Every dense layer is a 1x1 convolution and every spatial one a depthwise 3x3, at 1/8 resolution or below
(Jia et al., "Towards practical real-time neural video compression", CVPR 2025). Resolution changes are
pixel (un)shuffles around a 1x1 layer. That keeps the arithmetic in matrix products, which both CPUs and
GPUs run near their peak, and makes every dense weight a plain matrix for the optimiser.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugicm.codec.config import PATCH, ModelConfig

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

ACTIVATION_MAX = 16.0
"""Bound of the hidden layers of both transforms. Photos stay within; without it every block multiplies what
it does not know, and a picture unlike any photo (1-pixel stripes) comes out at 10^5 times its range."""

LATENT_MAX = 64.0
"""Bound of the latent's length (root of the sum of squares over its channels) at every position. Of 402
photos 400 stay within. Stripes one or two pixels wide reached nine times as much, and came out as noise that
few training steps can learn from."""

Layer = tuple[Tensor, Tensor]
"""Weight and bias."""
Weights = Mapping[str, Tensor]
"""Those of a module by name."""


def _by_sample(x: Tensor, weight: Tensor, bias: Tensor) -> Layer:
    """Weight and bias for each sample of ``x``, from those for each of its R equal parts."""
    repeats = len(x) // len(weight)
    return weight.repeat_interleave(repeats, 0), bias.repeat_interleave(repeats, 0)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution of (B, C, H, W); weight (out, in).

    With a weight (R, out, in) and bias (R, out) for each of R equal parts of the batch, all in one product.
    """
    if weight.ndim == 2 and not x.is_cuda:
        return F.conv2d(x, weight[:, :, None, None], bias)
    rows = x.permute(0, 2, 3, 1)
    if weight.ndim == 2:
        return F.linear(rows, weight, bias).permute(0, 3, 1, 2)
    # A product for each sample: few and long ones would leave most of a GPU idle in the weight's gradient.
    weight, bias = _by_sample(x, weight, bias)
    out = torch.bmm(rows.flatten(1, 2), weight.mT)
    return (out + bias[:, None].to(out.dtype)).view(*rows.shape[:3], -1).permute(0, 3, 1, 2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 depthwise convolution of (B, C, H, W) with zero padding; weight (C, 1, 3, 3).

    With a weight (R, C, 1, 3, 3) and bias (R, C) for each of R equal parts of the batch.
    """
    if weight.ndim == 4 and not torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias, padding=1, groups=len(weight))
    # Nine shifted products: a compiler fuses them, in channels-last, with whatever stands before and behind.
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    weight, bias = _by_sample(x, weight, bias) if weight.ndim == 5 else (weight[None], bias[None])
    weight, out = weight.to(x.dtype), bias[:, :, None, None].to(x.dtype)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + height, column : column + width]
            out = out + weight[:, :, :, row, column, None] * shifted
    return out


def gated_block(
    x: Tensor, bound: float, expand: Layer, spatial: Layer, project: Layer, gate: Layer, merge: Layer
) -> Tensor:
    """What a `Block` computes with these layers."""
    if x.is_cuda:
        x = x.contiguous(memory_format=torch.channels_last)
    # hardtanh is clamp with a gradient in one pass instead of five.
    hidden = F.silu(F.hardtanh(pointwise(x, *expand), -math.inf, bound))
    x = x + pointwise(depthwise(hidden, *spatial), *project)
    value, gates = F.hardtanh(pointwise(x, *gate), -bound, bound).chunk(2, 1)
    return x + pointwise(value * F.silu(gates), *merge)


def bounded(y: Tensor, limit: float, dim: int) -> Tensor:
    """``y``, at no position larger than `limit`: root mean square over the channels, dimension `dim`."""
    square = y.float().square().mean(dim, keepdim=True)
    return y * (limit**2 / square.clamp_min(limit**2)).sqrt().to(y.dtype)


class Pointwise(nn.Module):
    """1x1 convolution on (B, C, H, W); the weight is stored as a matrix (out, in)."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound) * scale)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class Depthwise(nn.Module):
    """3x3 depthwise convolution with zero padding on (B, C, H, W); weight (C, 1, 3, 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 3, 3).uniform_(-1 / 3, 1 / 3))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.weight, self.bias)


class Block(nn.Module):
    """Residual block: 1x1, SiLU, depthwise 3x3, 1x1; then a gated 1x1 feed-forward.

    Both branches start near zero, so a stack of blocks starts as the identity.
    """

    function = staticmethod(gated_block)
    """May be replaced by a compiled one."""

    def __init__(self, channels: int, bound: float = ACTIVATION_MAX) -> None:
        """``bound``: largest magnitude in the two hidden layers."""
        super().__init__()
        self.bound = bound
        self.expand = Pointwise(channels, channels)
        self.spatial = Depthwise(channels)
        self.project = Pointwise(channels, channels, scale=0.1)
        self.gate = Pointwise(channels, 2 * channels)
        self.merge = Pointwise(channels, channels, scale=0.1)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.expand, self.spatial, self.project, self.gate, self.merge)
        return self.function(x, self.bound, *((layer.weight, layer.bias) for layer in layers))


class Analysis(nn.Module):
    """Pixels to latent: (B, 3, H, W) in [0, 1] -> y before gains, (B, M, H/16, W/16).

    H and W are multiples of 64.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, latent = config.channels, config.latent_channels
        self.bound = LATENT_MAX / math.sqrt(latent)
        """Largest size (`bounded`)."""
        self.unfold = Pointwise(3 * PATCH**2, channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(config.encoder_blocks))
        self.down = Pointwise(4 * channels, latent)
        self.last = Block(latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unfold(F.pixel_unshuffle(x - 0.5, PATCH))
        for block in self.blocks:
            x = block(x)
        return bounded(self.last(self.down(F.pixel_unshuffle(x, 2))), self.bound, 1)


class HyperAnalysis(nn.Module):
    """Latent to hyper latent: y after gains (B, M, h, w) -> z (B, N, h/4, w/4), not yet rounded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hyper = config.entropy_channels, config.hyper_channels
        self.first = Pointwise(config.latent_channels, width)
        # Its input grows with the quality's gains; what it gives is clamped as integers.
        self.block = Block(width, bound=math.inf)
        self.down1 = Pointwise(4 * width, hyper)
        self.down2 = Pointwise(4 * hyper, hyper)

    def forward(self, y: Tensor) -> Tensor:
        x = self.block(self.first(y))
        x = F.silu(self.down1(F.pixel_unshuffle(x, 2)))
        return self.down2(F.pixel_unshuffle(x, 2))


class Synthesis(nn.Module):
    """Latent to pixels: y_hat after inverse gains (B, M, h, w) -> picture (B, 3, 16h, 16w), about [0, 1].

    The only part that depends on the preference.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, latent = config.channels, config.latent_channels
        self.first = Block(latent)
        self.up = Pointwise(latent, 4 * channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(config.decoder_blocks))
        self.fold = Pointwise(channels, 3 * PATCH**2)

    def forward(self, y: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.up(self.first(y)), 2)
        for block in self.blocks:
            x = block(x)
        return F.pixel_shuffle(self.fold(x).float(), PATCH) + 0.5


def weights_of(module: nn.Module) -> Weights:
    """By name."""
    return dict(module.named_parameters())


def moved_weights(weights: Weights, *changes: tuple[Weights, float | Tensor]) -> dict[str, Tensor]:
    """Every weight by name plus others of the same names and shapes, each times a share; differentiable.

    This is how one transform serves every rate and every preference. Rates: weights lie on a line from those
    of the lowest quality to those of the middle one and on another to those of the highest (`between_rates`).
    Preferences: on a line from those of the human view (share 0) to those of the machine view (1) at the same
    rate; encoder and entropy model never see them, so that one bitstream serves both (Yin et al., AAAI 2025).
    There, a condition adds biases to some layers; moving every weight costs nothing more when coding, and
    leaves the human view untouched whatever is learned for machines.
    """
    result = dict(weights)
    for change, share in changes:
        for name, difference in change.items():
            result[name] = result[name] + share * difference
    return result


def between_rates(low: T, high: T, tilt: float) -> tuple[tuple[T, float], tuple[T, float]]:
    """How much of what the lowest (tilt -1) and the highest rate (1) add to the weights of the middle one."""
    return (low, max(-tilt, 0.0)), (high, max(tilt, 0.0))


@torch.no_grad()
def moved(module: M, *changes: tuple[nn.Module, float]) -> M:
    """A copy of `module` with its `moved_weights`."""
    copied = copy.deepcopy(module)
    # At least one end of every two rates has no share.
    needed = [(weights_of(change), share) for change, share in changes if share]
    copied.load_state_dict(moved_weights(weights_of(module), *needed))
    return copied

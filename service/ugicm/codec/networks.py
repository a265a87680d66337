"""Analysis, synthesis and hyper analysis transforms.

Every dense layer is a 1x1 convolution and every spatial one a depthwise 3x3, at 1/8 resolution or below
(Jia et al., "Towards practical real-time neural video compression", CVPR 2025). Resolution changes are
pixel (un)shuffles around a 1x1 layer. That keeps the arithmetic in matrix products, which both CPUs and
GPUs run near their peak, and makes every dense weight a plain matrix for the optimiser.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugicm.codec.conditioning import Film, Modulation
from ugicm.codec.config import PATCH, ModelConfig

GATE_MAX = 4.0
"""Bound of the gates' input. Photos stay below 1; without a bound a product of two activations grows
quadratically in every block, and a picture unlike any photo (1-pixel stripes) explodes."""


class Pointwise(nn.Module):
    """1x1 convolution on (B, C, H, W); the weight is stored as a matrix (out, in)."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound) * scale)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return _dense(x, self.weight, self.bias)

    def modulated(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias that give ``forward(x) * scale + shift``; scale and shift are (out,)."""
        return self.weight * scale[:, None], self.bias * scale + shift


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None], bias)


class Depthwise(nn.Module):
    """3x3 depthwise convolution with zero padding on (B, C, H, W); weight (C, 1, 3, 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 3, 3).uniform_(-1 / 3, 1 / 3))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1, groups=self.weight.shape[0])


class Block(nn.Module):
    """Residual block: 1x1, SiLU, depthwise 3x3, 1x1; then a gated 1x1 feed-forward.

    Both branches start near zero, so a stack of blocks starts as the identity. A `Modulation` scales and
    shifts the two hidden layers (FiLM, Perez et al. 2018).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = Pointwise(channels, channels)
        self.spatial = Depthwise(channels)
        self.project = Pointwise(channels, channels, scale=0.1)
        self.gate = Pointwise(channels, 2 * channels)
        self.merge = Pointwise(channels, channels, scale=0.1)

    @torch.no_grad()
    def absorb(self, modulation: Modulation) -> None:
        """Multiply the modulation of one preference into the weights; it then costs nothing."""
        for layer, scale, shift in zip(
            (self.expand, self.gate), modulation.scale, modulation.shift, strict=True
        ):
            weight, bias = layer.modulated(scale, shift)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        if modulation is None:
            hidden = self.expand(x)
        else:
            hidden = _dense(x, *self.expand.modulated(modulation.scale[0], modulation.shift[0]))
        x = x + self.project(self.spatial(F.silu(hidden)))
        if modulation is None:
            hidden = self.gate(x)
        else:
            hidden = _dense(x, *self.gate.modulated(modulation.scale[1], modulation.shift[1]))
        value, gate = hidden.chunk(2, 1)
        return x + self.merge(value * F.silu(gate.clamp(max=GATE_MAX)))


class Analysis(nn.Module):
    """Pixels to latent: (B, 3, H, W) in [0, 1] -> y before gains, (B, M, H/16, W/16).

    H and W are multiples of 64.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, latent = config.channels, config.latent_channels
        self.unfold = Pointwise(3 * PATCH**2, channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(config.encoder_blocks))
        self.down = Pointwise(4 * channels, latent)
        self.last = Block(latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unfold(F.pixel_unshuffle(x - 0.5, PATCH))
        for block in self.blocks:
            x = block(x)
        return self.last(self.down(F.pixel_unshuffle(x, 2)))


class HyperAnalysis(nn.Module):
    """Latent to hyper latent: y after gains (B, M, h, w) -> z (B, N, h/4, w/4), not yet rounded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hyper = config.entropy_channels, config.hyper_channels
        self.first = Pointwise(config.latent_channels, width)
        self.block = Block(width)
        self.down1 = Pointwise(4 * width, hyper)
        self.down2 = Pointwise(4 * hyper, hyper)

    def forward(self, y: Tensor) -> Tensor:
        x = self.block(self.first(y))
        x = F.silu(self.down1(F.pixel_unshuffle(x, 2)))
        return self.down2(F.pixel_unshuffle(x, 2))


class Synthesis(nn.Module):
    """Latent to pixels: y_hat after inverse gains (B, M, h, w) -> picture (B, 3, 16h, 16w), about [0, 1].

    The only part that sees the preference (``strength`` 0 human .. 1 machine), so that one bitstream
    serves every preference (Yin et al., AAAI 2025).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, latent = config.channels, config.latent_channels
        self.first = Block(latent)
        self.up = Pointwise(latent, 4 * channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(config.decoder_blocks))
        self.fold = Pointwise(channels, 3 * PATCH**2)
        self.film = Film([latent] + [channels] * config.decoder_blocks, features=config.condition_features)

    def forward(self, y: Tensor, strength: Tensor | None = None) -> Tensor:
        """``strength``: a scalar in [0, 1]; None skips conditioning (weights already folded)."""
        count = len(self.blocks) + 1
        modulations = [None] * count if strength is None else self.film(strength)
        x = F.pixel_shuffle(self.up(self.first(y, modulations[0])), 2)
        for block, modulation in zip(self.blocks, modulations[1:], strict=True):
            x = block(x, modulation)
        return F.pixel_shuffle(self.fold(x).float(), PATCH) + 0.5

    def folded(self, strength: float) -> Synthesis:
        """A copy for one preference, to be called without `strength`."""
        copied = copy.deepcopy(self)
        with torch.no_grad():
            modulations = self.film(torch.tensor(strength, device=self.up.weight.device))
        for block, modulation in zip([copied.first, *copied.blocks], modulations, strict=True):
            assert isinstance(block, Block)
            block.absorb(modulation)
        return copied

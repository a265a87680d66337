"""The exact entropy model in floating point, differentiable: what training moves, and refinement asks.

It computes what `ugicm.codec.entropy` computes in integers; `ugicm_train.export` rounds it to the integer
grid. Layer names are the same on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugicm.codec.config import STEP_XOR, ModelConfig
from ugicm.codec.fixed_point import INDEX_BITS, MEAN, rounding_half, sum_bits
from ugicm.codec.networks import Depthwise, Layer, Pointwise, depthwise, pointwise
from ugicm.codec.viterbi import cut, nearest

LIKELIHOOD_MIN = 1e-9
OCTAVES_PER_UNIT = 1.25
"""The network's scale output v means sigma = 2^(1.25 v)."""
LOGISTIC_SCALE = math.sqrt(3) / math.pi
"""Scale parameter of the logistic distribution of standard deviation 1."""
SCALE_UNIT_MIN, SCALE_UNIT_MAX = -2.5, 5.375
INDEX_OFFSET = 20
"""Table index of scale unit 0, that is of sigma = 1."""
TRELLIS_FIRST = 10
"""Table of new models from which on symbols lie on paths of the trellis (`ugicm.codec.trellis`): standard
deviation .34."""
TRELLIS_STEP = 33
"""Step of new models' paths in units of the means, 1/64: points are about as dense as whole numbers."""
CELL = math.sqrt(12 * 0.2525)
"""Width in steps of uniform noise as large as the error on a path where a distribution is wide."""


class Paths(NamedTuple):
    """What the twin knows of the trellis."""

    first: int = TRELLIS_FIRST
    """Table from which on symbols lie on paths."""
    step: int = TRELLIS_STEP
    """In units of the means."""

    @property
    def spacing(self) -> float:
        """The step in whole numbers."""
        return self.step / 2**MEAN.bits

    @property
    def width(self) -> float:
        """Width of uniform noise as large as the error on paths."""
        return CELL * self.spacing

    def alone(self, unit: Tensor) -> Tensor:
        """Whether symbols of this scale unit do not lie on paths."""
        return unit < (self.first - INDEX_OFFSET - 0.5) / 2**INDEX_BITS

    def nearest(self, x: Tensor, unit: Tensor) -> Tensor:
        """x rounded, and what lies on paths on the nearest ones; rows are cut as an encoder cuts them."""
        places = np.flatnonzero(~self.alone(unit).numpy())
        rows = cut(places[np.argsort(unit.detach().numpy().reshape(-1)[places], kind="stable")])
        values = x.round().reshape(-1)
        spacing = np.float32(self.spacing)
        points = nearest(x.numpy().reshape(-1)[rows] / spacing)
        values[torch.from_numpy(rows)] = torch.from_numpy(points * spacing)
        return values.view_as(x)

    def seen(self, x: Tensor, unit: Tensor, rounded: Tensor, noise: Tensor) -> Tensor:
        """`rounded`; x with noise, uniform in -1/2..1/2, as large as the error where it lies on paths."""
        return torch.where(self.alone(unit), rounded, x + self.width * noise)


def add_noise(x: Tensor) -> Tensor:
    """Uniform noise in place of rounding, for the rate (Balle et al., ICLR 2017)."""
    return x + torch.empty_like(x).uniform_(-0.5, 0.5)


def round_straight(x: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return x + (x.round() - x).detach()


Quantise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(difference of y from its mean, scale unit) -> what is decoded of it, what is rated."""


def round_all(x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Each symbol alone, whatever its scale."""
    del unit
    rounded = round_straight(x)
    return rounded, rounded


def with_noise(x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded, and rated with noise; what lies on paths of a new model gets noise as large as its error."""
    paths = Paths()
    rated = paths.seen(x, unit, add_noise(x), torch.empty_like(x).uniform_(-0.5, 0.5))
    return torch.where(paths.alone(unit), round_straight(x), rated), rated


def as_coded(x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """As a new model's encoder does, but rated as `with_noise`; all with the gradient of the identity.

    A GPU must not wait for the search of paths: there it is `with_noise`.
    """
    seen, rated = with_noise(x, unit)
    if not x.is_cuda:
        seen = x + (Paths().nearest(x.detach(), unit) - x).detach()
    return seen, rated


def logistic_mass(y: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Probability of the unit bin around y under a logistic distribution of scale 1 / `inverse`."""
    # abs() keeps both arguments in the accurate tail.
    distance = (y - mean).abs()
    return torch.sigmoid((0.5 - distance) * inverse) - torch.sigmoid((-0.5 - distance) * inverse)


def logistic_bits(y: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """Bits of y under a logistic distribution integrated over unit bins. Shapes equal.

    Its standard deviation is 2^(1.25 unit).
    """
    inverse = torch.exp2(-OCTAVES_PER_UNIT * unit) / LOGISTIC_SCALE
    return -torch.log2(logistic_mass(y, mean, inverse).clamp_min(LIKELIHOOD_MIN))


def entropy_block(x: Tensor, expand: Layer, spatial: Layer, project: Layer) -> Tensor:
    """What an `EntropyBlock` computes with these layers."""
    if x.is_cuda:
        x = x.contiguous(memory_format=torch.channels_last)
    return x + pointwise(F.relu(depthwise(F.relu(pointwise(x, *expand)), *spatial)), *project)


class EntropyBlock(nn.Module):
    """Residual block of ReLU, 1x1 and depthwise 3x3 only, so that it can be evaluated in integers."""

    function = staticmethod(entropy_block)
    """May be replaced by a compiled one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = Pointwise(channels, channels)
        self.spatial = Depthwise(channels)
        self.project = Pointwise(channels, channels, scale=0.1)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.expand, self.spatial, self.project)
        return self.function(x, *((layer.weight, layer.bias) for layer in layers))


def split_phases(x: Tensor) -> list[Tensor]:
    """(B, C, 2h, 2w) -> the four positions of every 2x2 square, each (B, C, h, w)."""
    return [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def merge_phases(phases: list[Tensor]) -> Tensor:
    """Inverse of `split_phases`."""
    batch, channels, height, width = phases[0].shape
    grid = torch.stack(phases, -1).view(batch, channels, height, width, 2, 2)
    return grid.permute(0, 1, 2, 4, 3, 5).reshape(batch, channels, 2 * height, 2 * width)


class EntropyOutput(NamedTuple):
    y_hat: Tensor
    """Quantised latent (B, M, h, w)."""
    bits: Tensor
    """Estimated bits of y, (B,)."""


class EntropyNetwork(nn.Module):
    """Hyper latent and the symbols decoded so far -> mean and scale of the next quarter of the latent.

    The latent is coded in four steps: each step codes one channel group at every position, another group
    at each position of a 2x2 square (quadtree partition of DCVC-DC, Li et al., CVPR 2023).
    """

    function = staticmethod(logistic_bits)
    """May be replaced by a compiled one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        latent, width, hyper = config.latent_channels, config.entropy_channels, config.hyper_channels
        self.hyper1 = Pointwise(hyper, 4 * hyper)
        self.hyper2 = Pointwise(hyper, 4 * width)
        self.hyper_block = EntropyBlock(width)
        self.base = Pointwise(width, width)
        self.context = nn.ModuleList(Pointwise(latent, width, scale=0.5) for _ in range(3))
        self.trunk = nn.ModuleList(EntropyBlock(width) for _ in range(config.context_blocks))
        self.heads = nn.ModuleList(Pointwise(width, 2 * latent, scale=0.1) for _ in range(4))
        self.group_channels = latent // 4

    def _parameters_of(self, step: int, position: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale unit of the group coded at `position`, from that phase of the hidden layer."""
        group, size = position ^ STEP_XOR[step], 2 * self.group_channels
        head, rows = self.heads[step], slice(group * size, (group + 1) * size)
        assert isinstance(head, Pointwise)
        out = pointwise(hidden, head.weight[rows], head.bias[rows]).float()
        mean, unit = out.chunk(2, 1)
        return mean, unit.clamp(SCALE_UNIT_MIN, SCALE_UNIT_MAX)

    def forward(self, z_hat: Tensor, y: Tensor, quantise: Quantise) -> EntropyOutput:
        """``z_hat`` (B, N, h/4, w/4), ``y`` (B, M, h, w) float32."""
        x = F.relu(F.pixel_shuffle(self.hyper1(z_hat), 2))
        x = F.relu(F.pixel_shuffle(self.hyper2(x), 2))
        hyper = self.hyper_block(x)
        base = self.base(hyper)
        zeros = torch.zeros_like(y[:, : self.group_channels, ::2, ::2])
        targets = [phase.split(self.group_channels, 1) for phase in split_phases(y)]
        known = [[zeros] * 4 for _ in range(4)]
        observed, means, units = [], [], []
        for step in range(4):
            if step == 0:
                hidden = hyper
            else:
                so_far = merge_phases([torch.cat(groups, 1) for groups in known])
                hidden = F.relu(base + self.context[step - 1](so_far.to(base.dtype)))
                for block in self.trunk:
                    hidden = block(hidden)
            for position, phase in enumerate(split_phases(hidden)):
                group = position ^ STEP_XOR[step]
                mean, unit = self._parameters_of(step, position, phase)
                target = targets[position][group]
                seen, rated = quantise(target - mean, unit)
                known[position][group] = seen + mean
                observed.append(rated + mean)
                means.append(mean)
                units.append(unit)
        y_hat = merge_phases([torch.cat(groups, 1) for groups in known])
        bits = self.function(torch.cat(observed, 1), torch.cat(means, 1), torch.cat(units, 1))
        return EntropyOutput(y_hat, bits.sum((1, 2, 3)))


def float_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored integers of the entropy model as the weights of an `EntropyNetwork`."""
    prefix, state = "entropy.", {}
    for key, bits in tensors.items():
        if not (key.startswith(prefix) and key.endswith(".bits")):
            continue
        name = key.removeprefix(prefix).removesuffix(".bits")
        weight, bias = (tensors[f"{prefix}{name}.{kind}"] for kind in ("weight", "bias"))
        scale = torch.exp2(-bits.double()).view(-1, *[1] * (weight.ndim - 1))
        units = torch.exp2(-sum_bits(name, bits).double())
        state[f"{name}.weight"] = (weight * scale).float()
        state[f"{name}.bias"] = ((bias - rounding_half(name, bits)) * units).float()
    return state

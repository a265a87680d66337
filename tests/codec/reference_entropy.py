"""The entropy model once more, in numpy int64 and nothing else, written from its description alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ugicm.codec.config import ModelConfig

Int = NDArray[np.int64]


def _clamp(x: Int, low: int = -32768) -> Int:
    return np.clip(x, low, 32767)


class ReferenceEntropy:
    """Arrays are (C, h, w) int64."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Int]) -> None:
        self.config = config
        self.tensors = {
            name[8:]: value.astype(np.int64) for name, value in tensors.items() if name.startswith("entropy.")
        }

    def dense(self, name: str, x: Int) -> Int:
        weight, bias = self.tensors[name + ".weight"], self.tensors[name + ".bias"]
        return np.einsum("oc,chw->ohw", weight, x) + bias[:, None, None]

    def depthwise(self, name: str, x: Int) -> Int:
        weight, bias = self.tensors[name + ".weight"], self.tensors[name + ".bias"]
        _, height, width = x.shape
        out = np.zeros_like(x)
        for row in range(height):
            for column in range(width):
                total = bias.copy()
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= row + i < height and 0 <= column + j < width:
                            total += weight[:, 0, i + 1, j + 1] * x[:, row + i, column + j]
                out[:, row, column] = total
        return out

    def block(self, name: str, x: Int) -> Int:
        hidden = _clamp(self.dense(name + ".expand", x) >> 10, 0)
        hidden = _clamp(self.depthwise(name + ".spatial", hidden) >> 10, 0)
        return _clamp(x + _clamp(self.dense(name + ".project", hidden) >> 10))

    @staticmethod
    def double(x: Int) -> Int:
        channels, height, width = x.shape
        out = np.empty((channels // 4, 2 * height, 2 * width), np.int64)
        for channel in range(channels):
            row, column = divmod(channel % 4, 2)
            out[channel // 4, row::2, column::2] = x[channel]
        return out

    def parameters(self, z: Int, y_symbols: Int) -> tuple[Int, Int]:
        """All symbols, (N, h/4, w/4) and (M, h, w) -> table index of every y symbol, and y_hat * 64."""
        x = _clamp(self.dense("hyper1", np.clip(z, -511, 511) * 64) >> 10, 0)
        x = _clamp(self.dense("hyper2", self.double(x)) >> 10, 0)
        hyper = self.block("hyper_block", self.double(x))
        base = self.dense("base", hyper)
        quarter = self.config.latent_channels // 4
        indexes = np.full_like(y_symbols, -1)
        y_hat = np.zeros_like(y_symbols)
        for step, flip in enumerate((0, 3, 2, 1)):
            hidden = hyper
            if step:
                context = self.dense(f"context.{step - 1}", _clamp(y_hat))
                hidden = _clamp((base + context) >> 10, 0)
                for block in range(self.config.context_blocks):
                    hidden = self.block(f"trunk.{block}", hidden)
            head = self.dense(f"heads.{step}", hidden)
            decoded = y_hat.copy()
            for position in range(4):
                group = position ^ flip
                i, j = divmod(position, 2)
                part = head[2 * quarter * group : 2 * quarter * (group + 1), i::2, j::2]
                channels = slice(group * quarter, (group + 1) * quarter)
                mean = _clamp(part[:quarter] >> 10)
                indexes[channels, i::2, j::2] = np.clip((part[quarter:] >> 13) + 20, 0, 63)
                decoded[channels, i::2, j::2] = y_symbols[channels, i::2, j::2] * 64 + mean
            y_hat = decoded
        return indexes, y_hat


def assemble(config: ModelConfig, steps: tuple[NDArray[np.generic], ...]) -> Int:
    """Per-step arrays (4 positions, h/2, w/2, M/4) of the production code -> (M, h, w)."""
    quarter = config.latent_channels // 4
    _, height, width, _ = steps[0].shape
    out = np.full((config.latent_channels, 2 * height, 2 * width), -1, np.int64)
    for step, flip in enumerate((0, 3, 2, 1)):
        for position in range(4):
            group = position ^ flip
            i, j = divmod(position, 2)
            out[group * quarter : (group + 1) * quarter, i::2, j::2] = steps[step][position].transpose(
                2, 0, 1
            )
    return out

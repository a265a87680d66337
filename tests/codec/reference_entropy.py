"""The entropy model once more, in numpy int64 and nothing else, written from its description alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ugicm.codec.config import ModelConfig

Int = NDArray[np.int64]


def _clamp(x: Int, places: int, limit: int) -> Int:
    """To -limit <= x < limit, with `places` binary places."""
    return np.clip(x, -(limit << places), (limit << places) - 1)


def _relu(x: Int, places: int, limit: int) -> Int:
    return np.maximum(_clamp(x, places, limit), 0)


class ReferenceEntropy:
    """Arrays are (C, h, w) int64."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Int]) -> None:
        self.config = config
        self.tensors = {
            name[8:]: value.astype(np.int64) for name, value in tensors.items() if name.startswith("entropy.")
        }
        self.step = int(tensors["tables.step"])
        self.first = 64 - len(tensors["tables.branches"])
        self.largest = 0.0
        """Largest magnitude that a sum of products, in any order, could have had so far, in its units."""

    def dense(self, name: str, x: Int, places: int, wanted: int, add: Int | None = None) -> Int:
        """Input has `places` binary places; the result is floored to `wanted`. `add` has 8 places."""
        weight, bias, bits = (self.tensors[f"{name}.{kind}"] for kind in ("weight", "bias", "bits"))
        sums = np.einsum("oc,chw->ohw", weight, x) + bias[:, None, None]
        bound = np.einsum("oc,chw->ohw", abs(weight), abs(x)) + abs(bias)[:, None, None]
        if add is not None:
            aligned = add << (bits + places - 8)[:, None, None]
            sums, bound = sums + aligned, bound + abs(aligned)
        self.largest = max(self.largest, bound.max())
        return self.shift(sums, bits + places - wanted)

    @staticmethod
    def shift(sums: Int, places: Int) -> Int:
        """Drop binary places by row; a negative number adds some."""
        places = places[:, None, None]
        return np.where(places > 0, sums >> np.maximum(places, 0), sums << np.maximum(-places, 0))

    def depthwise(self, name: str, x: Int, places: int, wanted: int) -> Int:
        weight, bias, bits = (self.tensors[f"{name}.{kind}"] for kind in ("weight", "bias", "bits"))
        _, height, width = x.shape
        out = np.zeros_like(x)
        for row in range(height):
            for column in range(width):
                total, bound = bias.copy(), abs(bias)
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= row + i < height and 0 <= column + j < width:
                            product = weight[:, 0, i + 1, j + 1] * x[:, row + i, column + j]
                            total, bound = total + product, bound + abs(product)
                out[:, row, column] = total
                self.largest = max(self.largest, bound.max())
        return self.shift(out, bits + places - wanted)

    def block(self, name: str, x: Int, places: int, limit: int) -> Int:
        hidden = _relu(self.dense(name + ".expand", x, places, 6), 6, 64)
        hidden = _relu(self.depthwise(name + ".spatial", hidden, 6, 7), 7, 32)
        return _clamp(x + self.dense(name + ".project", hidden, 7, places), places, limit)

    @staticmethod
    def double(x: Int) -> Int:
        channels, height, width = x.shape
        out = np.empty((channels // 4, 2 * height, 2 * width), np.int64)
        for channel in range(channels):
            row, column = divmod(channel % 4, 2)
            out[channel // 4, row::2, column::2] = x[channel]
        return out

    def phases(self, x: Int, flip: int) -> list[Int]:
        """What is coded in one step, at each of the four positions, of (M, h, w)."""
        quarter = self.config.latent_channels // 4
        parts = []
        for position in range(4):
            group, (i, j) = position ^ flip, divmod(position, 2)
            parts.append(x[group * quarter : (group + 1) * quarter, i::2, j::2])
        return parts

    def units(self, indexes: Int) -> Int:
        """What a symbol of each of these tables counts; they are all those of one step, in their order.

        From the widest table down, symbols make rows, as long as their tables are wide enough; of equally
        wide ones the last come first. A row has a 32nd of all that are wide enough, at least 32, at most 256.
        """
        order = sorted(range(indexes.size), key=lambda place: (indexes.flat[place], place), reverse=True)
        wide = [place for place in order if indexes.flat[place] >= self.first]
        units = np.full(indexes.size, 64)
        length = min(max(len(wide) // 32, 32), 256)
        units[wide[: len(wide) // length * length]] = self.step
        return units.reshape(indexes.shape)

    def parameters(self, z: Int, y_symbols: Int) -> tuple[Int, Int]:
        """All symbols, (N, h/4, w/4) and (M, h, w) -> table index of every y symbol, and y_hat * 64.

        A symbol counts 64, in a row as many as the model's step.
        """
        x = _relu(self.dense("hyper1", np.clip(z, -511, 511), 0, 5), 5, 32)
        x = _relu(self.dense("hyper2", self.double(x), 5, 6), 6, 16)
        hyper = self.block("hyper_block", self.double(x), 6, 16)
        base = _clamp(self.dense("base", hyper, 6, 8), 8, 128)
        quarter = self.config.latent_channels // 4
        indexes = np.full_like(y_symbols, -1)
        y_hat = np.zeros_like(y_symbols)
        for step, flip in enumerate((0, 3, 2, 1)):
            hidden = hyper
            if step:
                seen = _clamp(y_hat >> 1, 5, 256)
                hidden = _relu(self.dense(f"context.{step - 1}", seen, 5, 6, add=base), 6, 64)
                for block in range(self.config.context_blocks):
                    hidden = self.block(f"trunk.{block}", hidden, 6, 64)
            # Both with six places here; an index has three.
            head = self.dense(f"heads.{step}", hidden, 6, 6)
            decoded = y_hat.copy()
            means = []
            for position in range(4):
                group = position ^ flip
                i, j = divmod(position, 2)
                part = head[2 * quarter * group : 2 * quarter * (group + 1), i::2, j::2]
                channels = slice(group * quarter, (group + 1) * quarter)
                means.append(_clamp(part[:quarter], 6, 512))
                indexes[channels, i::2, j::2] = np.clip((part[quarter:] >> 3) + 20, 0, 63)
            units = self.units(np.stack([x.transpose(1, 2, 0) for x in self.phases(indexes, flip)]))
            for position, mean in enumerate(means):
                group = position ^ flip
                i, j = divmod(position, 2)
                channels = slice(group * quarter, (group + 1) * quarter)
                unit = units[position].transpose(2, 0, 1)
                decoded[channels, i::2, j::2] = y_symbols[channels, i::2, j::2] * unit + mean
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

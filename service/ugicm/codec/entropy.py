"""The exact entropy model: hyper latent and decoded symbols -> means and table indexes, in integers.

A decoder must reproduce the encoder's probabilities to the last bit, or everything after the first
difference is garbage. So this path has no rounding that depends on the machine: weights, biases and
activations are integers, carried in float64, where every sum here stays far below 2^53 and is therefore
exact in any order: on any device, with any number of threads, alone or in a batch.

Fixed-point units (powers of two):

====================  ===========  =======================================
weights               2^-10        int16
activations, means    2^-6         clamped to int16 after every layer
sums and biases       2^-16        32767 * 32768 * fan-in < 2^40
====================  ===========  =======================================

Every layer ends in an arithmetic shift (floor); the half that makes it round is part of the stored bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ugicm.codec.coder import SYMBOL_LIMIT, Indexes, SymbolDecoder, SymbolEncoder, Symbols, Tables
from ugicm.codec.config import STEP_XOR, ModelConfig

WEIGHT_BITS, ACTIVATION_BITS, INDEX_BITS = 10, 6, 3
SUM_BITS = WEIGHT_BITS + ACTIVATION_BITS
ACTIVATION_MAX = 32767
ACTIVATION_UNIT = 1 << ACTIVATION_BITS
INDEX_OFFSET = 20
"""Table index of scale unit 0, that is of sigma = 1."""
SCALE_COUNT = 64
"""Number of Gaussian tables; sigma of table i is 2^((i - 20) 5 / 32), from 0.11 to 105."""
SKIP_INDEX = 0
"""Symbols with this index are certainly zero and not coded."""
Z_LIMIT = ACTIVATION_MAX >> ACTIVATION_BITS
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


class TileSymbols(NamedTuple):
    """The integers that one tile's segment codes."""

    z: Symbols
    """Hyper latent (N, h/4, w/4)."""
    y: tuple[Symbols, ...]
    """Per coding step: symbols (4 positions, h/2, w/2, M/4)."""
    indexes: tuple[Indexes, ...]
    """Per coding step: the table of each symbol, shaped alike."""


Choose = Callable[[int, list[Tensor], list[Tensor]], list[Tensor]]
"""(step, means, indexes) -> symbols, one tensor (B, h/2, w/2, M/4) for each of the four positions."""


class EntropyModel:
    """Integer network and tables of one trained model, on one device.

    Tensors are (B, h, w, C) float64 holding integers. Symbols that the tables cannot tell apart from zero
    (index 0) are zero.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """``tensors``: the ``entropy.*`` and ``tables.*`` entries of ``weights.safetensors``."""
        self.config = config
        self.device = device
        # The shift at the end of a layer is a power of two, so it can be multiplied into weights and bias
        # beforehand: sums are then fractions with 10 binary places, still exact, and `floor` completes it.
        self._weights = {
            name.removeprefix("entropy."): tensor.to(device, torch.float64) * 2.0**-WEIGHT_BITS
            for name, tensor in tensors.items()
            if name.startswith("entropy.")
        }
        for step in range(4):
            for kind in ("weight", "bias"):
                # Rows of each group: means, then table indexes, which shift by three more places.
                head = self._weights[f"heads.{step}.{kind}"]
                head.view(4, 2, -1)[:, 1] *= 2.0 ** -(SUM_BITS - INDEX_BITS - WEIGHT_BITS)
        self.z_tables, self.y_tables = (
            Tables(
                tensors[f"tables.{kind}.frequencies"].numpy(),
                tensors[f"tables.{kind}.lengths"].numpy(),
            )
            for kind in ("z", "y")
        )

    # Layers. `_sum` keeps the full precision; `_floor` goes back to integers in activation units.

    def _sum(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    @staticmethod
    def _floor(sums: Tensor, low: int) -> Tensor:
        return sums.floor_().clamp_(low, ACTIVATION_MAX)

    def _relu(self, name: str, x: Tensor) -> Tensor:
        return self._floor(self._sum(name, x), 0)

    def _spatial(self, name: str, x: Tensor) -> Tensor:
        """Depthwise 3x3 with zero padding, then ReLU."""
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        sums = bias.expand_as(x).clone()
        for i in range(3):
            for j in range(3):
                sums.addcmul_(padded[:, i : i + height, j : j + width], weight[:, 0, i, j])
        return self._floor(sums, 0)

    def _block(self, name: str, x: Tensor) -> Tensor:
        hidden = self._spatial(f"{name}.spatial", self._relu(f"{name}.expand", x))
        branch = self._floor(self._sum(f"{name}.project", hidden), -ACTIVATION_MAX - 1)
        return (x + branch).clamp_(-ACTIVATION_MAX - 1, ACTIVATION_MAX)

    @staticmethod
    def _double(x: Tensor) -> Tensor:
        """Pixel shuffle by two on (B, h, w, 4C), channels in torch's order."""
        return F.pixel_shuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).contiguous()

    def _head(self, step: int, position: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Means (activation units) and table indexes of the group coded at this position."""
        size = self.config.latent_channels // 4
        group = position ^ STEP_XOR[step]
        rows = slice(2 * group * size, 2 * (group + 1) * size)
        sums = F.linear(
            hidden,
            self._weights[f"heads.{step}.weight"][rows],
            self._weights[f"heads.{step}.bias"][rows],
        )
        sums.floor_()
        mean = sums[..., :size].clamp(-ACTIVATION_MAX - 1, ACTIVATION_MAX)
        return mean, sums[..., size:].add(INDEX_OFFSET).clamp_(0, SCALE_COUNT - 1)

    def _walk(self, z: Tensor, choose: Choose) -> Tensor:
        """Run the four steps; `choose` supplies each step's symbols. Returns y_hat (B, h, w, M)."""
        size = self.config.latent_channels // 4
        # Same clamp for whatever a bitstream claims z to be.
        x = z.clamp(-Z_LIMIT, Z_LIMIT).mul_(ACTIVATION_UNIT)
        x = self._double(self._relu("hyper1", x))
        x = self._double(self._relu("hyper2", x))
        hyper = self._block("hyper_block", x)
        base = self._sum("base", hyper)
        y_hat = torch.zeros(
            *hyper.shape[:3], self.config.latent_channels, dtype=torch.float64, device=self.device
        )
        for step in range(4):
            if step == 0:
                hidden = hyper
            else:
                seen = y_hat.clamp(-ACTIVATION_MAX - 1, ACTIVATION_MAX)
                hidden = self._floor(self._sum(f"context.{step - 1}", seen).add_(base), 0)
                for block in range(self.config.context_blocks):
                    hidden = self._block(f"trunk.{block}", hidden)
            means, indexes = zip(
                *(
                    self._head(step, position, hidden[:, i::2, j::2])
                    for position, (i, j) in enumerate(PHASES)
                ),
                strict=True,
            )
            symbols = choose(step, list(means), list(indexes))
            for position, (i, j) in enumerate(PHASES):
                group = position ^ STEP_XOR[step]
                y_hat[:, i::2, j::2, group * size : (group + 1) * size] = (
                    symbols[position] * ACTIVATION_UNIT + means[position]
                )
        return y_hat

    @torch.inference_mode()
    def quantise(self, z: Tensor, y: Tensor) -> list[TileSymbols]:
        """Round a batch: ``z`` (B, N, h/4, w/4) and ``y`` (B, M, h, w) floats after gains.

        Which way a symbol rounds is the encoder's choice and need not be reproducible; what is predicted
        from the symbols is.
        """
        z = z.double().round().clamp(-Z_LIMIT, Z_LIMIT)
        target = y.double().mul(ACTIVATION_UNIT).permute(0, 2, 3, 1)
        size = self.config.latent_channels // 4
        kept_symbols: list[Tensor] = []
        kept_indexes: list[Tensor] = []

        def choose(step: int, means: list[Tensor], indexes: list[Tensor]) -> list[Tensor]:
            out = []
            for position, (i, j) in enumerate(PHASES):
                group = position ^ STEP_XOR[step]
                part = target[:, i::2, j::2, group * size : (group + 1) * size]
                symbols = (part - means[position]).div_(ACTIVATION_UNIT).round_()
                symbols = symbols.clamp_(-SYMBOL_LIMIT, SYMBOL_LIMIT)
                out.append(symbols.masked_fill_(indexes[position] == SKIP_INDEX, 0))
            kept_symbols.append(torch.stack(out, 1).to(torch.int16).cpu())
            kept_indexes.append(torch.stack(indexes, 1).to(torch.uint8).cpu())
            return out

        self._walk(z.permute(0, 2, 3, 1), choose)
        z_symbols = z.to(torch.int16).cpu().numpy()
        return [
            TileSymbols(
                z_symbols[item],
                tuple(step[item].numpy() for step in kept_symbols),
                tuple(step[item].numpy() for step in kept_indexes),
            )
            for item in range(len(z_symbols))
        ]

    def pack(self, tile: TileSymbols) -> bytes:
        """Entropy-code one tile."""
        encoder = SymbolEncoder()
        encoder.write(self.z_tables, tile.z.reshape(-1), self._z_indexes(tile.z.shape[1:]))
        for symbols, indexes in zip(tile.y, tile.indexes, strict=True):
            coded = indexes != SKIP_INDEX
            encoder.write(self.y_tables, symbols[coded], indexes[coded])
        return encoder.finish()

    @torch.inference_mode()
    def unpack(self, segment: bytes, height: int, width: int) -> tuple[TileSymbols, Tensor]:
        """Decode one tile of latent size ``height`` x ``width`` (multiples of 4).

        Returns its symbols and y_hat, (M, height, width) float32 (before the inverse gains).

        Raises:
            MalformedBitstreamError: the segment is not a tile of this size.
        """
        decoder = SymbolDecoder(segment)
        shape = (height // 4, width // 4)
        z = decoder.read(self.z_tables, self._z_indexes(shape))
        z = z.reshape(self.config.hyper_channels, *shape)
        kept: list[tuple[Symbols, Indexes]] = []

        def choose(step: int, means: list[Tensor], indexes: list[Tensor]) -> list[Tensor]:
            del step, means
            index = torch.cat(indexes).to(torch.uint8).cpu().numpy()
            coded = index != SKIP_INDEX
            symbols = np.zeros(index.shape, np.int16)
            symbols[coded] = decoder.read(self.y_tables, index[coded])
            kept.append((symbols, index))
            return list(torch.from_numpy(symbols).to(self.device, torch.float64).split(1))

        start = torch.from_numpy(z).to(self.device, torch.float64).permute(1, 2, 0)[None]
        y_hat = self._walk(start, choose)
        decoder.finish()
        tile = TileSymbols(z, tuple(s for s, _ in kept), tuple(i for _, i in kept))
        return tile, y_hat[0].permute(2, 0, 1).float() / ACTIVATION_UNIT

    def _z_indexes(self, shape: tuple[int, ...]) -> Indexes:
        return np.repeat(np.arange(self.config.hyper_channels, dtype=np.uint8), int(np.prod(shape)))

"""What the entropy model says a latent costs, before any coder runs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ugicm.codec.codec import Latent
from ugicm.codec.coder import SYMBOL_LIMIT, TOTAL, Indexes, Symbols
from ugicm.codec.conditioning import rate_of
from ugicm.codec.entropy import SCALE_COUNT, SKIP_INDEX
from ugicm.codec.hyper_prior import HyperPrior
from ugicm.codec.trellis import TrellisTables, rows

ESCAPE_BITS = math.log2(2 * SYMBOL_LIMIT + 1)


class _Costs:
    """Bits of every symbol of every table."""

    def __init__(self, frequencies: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
        self._bits = -np.log2(frequencies / TOTAL)
        self._starts = np.cumsum(lengths) - lengths
        self._radii = lengths // 2 - 1

    def sum(self, symbols: Symbols, indexes: Indexes) -> float:
        radii = self._radii[indexes]
        outside = np.abs(symbols.astype(np.int64)) > radii
        entries = self._starts[indexes] + radii + np.where(outside, radii + 1, symbols)
        return float(self._bits[entries].sum()) + ESCAPE_BITS * int(outside.sum())


class CodeLength:
    """Ideal code length under a model's integer tables: -log2 of the frequencies, no coder, no container."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """``tensors``: of the stored model."""
        self._prior = HyperPrior(tensors)
        self._z, self._y, self._rest = (
            _Costs(
                tensors[f"tables.{kind}.frequencies"].numpy(),
                tensors[f"tables.{kind}.lengths"].numpy(),
            )
            for kind in ("z", "y", "rest")
        )
        self._trellis = TrellisTables.load(tensors, SCALE_COUNT)

    def bits(self, latent: Latent) -> float:
        """Bits of all symbols of a picture's latent."""
        total, rate = 0.0, rate_of(latent.header.quality)
        for tile in latent.tiles:
            for mask, chosen in self._prior.indexes(tile.z, rate):
                total += self._z.sum(tile.z[:, mask], chosen)
            for symbols, indexes in zip(tile.y, tile.indexes, strict=True):
                flat, index = symbols.reshape(-1), indexes.reshape(-1)
                places = rows(index, self._trellis.first)
                alone = index != SKIP_INDEX
                alone[places] = False
                total += self._y.sum(flat[alone], index[alone])
                branches, zeros, rest = self._trellis.split(flat[places], index[places])
                total -= float(np.log2(np.where(branches, TOTAL - zeros, zeros) / TOTAL).sum())
                total += self._rest.sum(*rest)
        return total

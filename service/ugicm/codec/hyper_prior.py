"""How the hyper latent is coded: which table each of its symbols has.

Positions come in three phases: those of even row and column, then those of odd row and column, then the
rest. From the second phase on, the four nearest neighbours of a symbol in its own channel are known (the
diagonal ones, then the adjacent ones), and their sum says where the symbol is likely to be. Tables also
differ by channel and by quality. All of that chooses among a few tables; nothing is computed from a float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ugicm.codec.coder import Indexes, SymbolDecoder, SymbolEncoder, Symbols, make_tables
from ugicm.codec.errors import ModelStoreError

_LIMITS = (-4, -2, 0, 1, 3, 5)
"""Sums of neighbours from each of these on are told apart from those below."""
CONTEXTS = 1 + 2 * (len(_LIMITS) + 1)
"""No neighbours; then by the sum of the diagonal ones; then by that of the adjacent ones."""

Mask = NDArray[np.bool_]


def phases(height: int, width: int) -> tuple[Mask, Mask, Mask]:
    """Which positions (height, width) are coded first, second and last."""
    odd_row, odd_column = np.arange(height)[:, None] % 2 == 1, np.arange(width) % 2 == 1
    return ~odd_row & ~odd_column, odd_row & odd_column, odd_row ^ odd_column


def contexts(z: Symbols, phase: int) -> Indexes:
    """Context of every position if it is coded in `phase`: (N, h, w) -> the same shape, 0 .. CONTEXTS - 1.

    Only symbols of earlier phases are looked at by the positions of `phase`; beyond the edge there are zeros.
    """
    if phase == 0:
        return np.zeros(z.shape, np.uint8)
    padded = np.pad(z.astype(np.int32), ((0, 0), (1, 1), (1, 1)))
    if phase == 1:
        columns = padded[:, :, :-2] + padded[:, :, 2:]
        around = columns[:, :-2] + columns[:, 2:]
    else:
        around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    first = 1 + (phase - 1) * (len(_LIMITS) + 1)
    return (first + np.digitize(around, _LIMITS)).astype(np.uint8)


def by_phase(z: Symbols) -> Iterator[tuple[Mask, Indexes]]:
    """Phase by phase: its positions, and the contexts of their symbols, (N, n).

    What has been asked for may be filled into `z` meanwhile.
    """
    for phase, mask in enumerate(phases(*z.shape[1:])):
        yield mask, contexts(z, phase)[:, mask]


class HyperPrior:
    """Tables of the hyper latent of one model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """``tensors``: ``tables.z.frequencies`` and ``lengths`` of all tables; ``tables.z.choice``, uint8:
        the table by level (1 or more, evenly spread over the qualities), context (1 for all, or `CONTEXTS`)
        and channel.

        Raises:
            ModelStoreError: the three do not fit each other.
        """
        frequencies, lengths, choice = (
            tensors[f"tables.z.{part}"].numpy() for part in ("frequencies", "lengths", "choice")
        )
        if choice.dtype != np.uint8:
            raise ModelStoreError(f"the choice of hyper tables is uint8, got {choice.dtype}")
        if choice.ndim != 3 or choice.shape[1] not in (1, CONTEXTS) or int(choice.max()) >= len(lengths):
            raise ModelStoreError(
                f"the choice of hyper tables has shape {choice.shape} and names table {choice.max()} of "
                f"{len(lengths)}; expected (levels, 1 or {CONTEXTS}, channels)"
            )
        self._tables = make_tables(frequencies, lengths)
        self._choice = np.broadcast_to(choice, (len(choice), CONTEXTS, choice.shape[2]))

    def indexes(self, z: Symbols, rate: float) -> Iterator[tuple[Mask, Indexes]]:
        """As `by_phase`, with tables instead of contexts; ``rate``: 0 (lowest quality) to 1 (highest)."""
        level = round(rate * (len(self._choice) - 1))
        choice, channels = self._choice[level], np.arange(len(z))[:, None]
        for mask, context in by_phase(z):
            yield mask, choice[context, channels]

    def write(self, encoder: SymbolEncoder, z: Symbols, rate: float) -> None:
        """Code (N, h, w) symbols."""
        for mask, indexes in self.indexes(z, rate):
            encoder.write(self._tables, z[:, mask].reshape(-1), indexes.reshape(-1))

    def read(self, decoder: SymbolDecoder, shape: tuple[int, int, int], rate: float) -> Symbols:
        """(N, h, w) symbols that `write` coded."""
        z = np.zeros(shape, np.int16)
        for mask, indexes in self.indexes(z, rate):
            z[:, mask] = decoder.read(self._tables, indexes.reshape(-1)).reshape(indexes.shape)
        return z

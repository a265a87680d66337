"""Symbols of large scale, along the paths of a trellis: entropy-coded trellis-coded quantisation.

Rounding each number alone fills space with cubes. Here a number may become any whole number of steps, but
those before it decide whether it must be even or odd (Marcellin and Fischer, "Trellis coded quantization of
memoryless and Gauss-Markov sources", IEEE Trans. Communications 38, 1990; with entropy coding, Fischer and
Wang, "Entropy-constrained trellis-coded quantization", IEEE Trans. Information Theory 38, 1992). An encoder
finds the nearest of all such sequences with Viterbi's algorithm. Where a distribution is wide against the
step, the squared error is 1.2 dB smaller at equal density; 1.53 dB is what any shape of cells could save.

Symbols of a coding step are cut into rows, and a path goes along each. Of each number t a branch is coded,
its second lowest bit; how likely it is 0 follows from the scale and the lowest bit, which the state of the
trellis tells. The rest, t / 4 rounded down, is coded when all branches are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ugicm.codec.coder import (
    DAMAGED,
    SYMBOL_LIMIT,
    TOTAL,
    Indexes,
    Places,
    SymbolDecoder,
    SymbolEncoder,
    Symbols,
    Table,
    make_tables,
    sorted_places,
    weigh,
)
from ugicm.codec.errors import MalformedBitstreamError
from ugicm.codec.viterbi import NEXT, STATES, cut

STEP_MAX = 128
"""Largest step, in units of the means: `SYMBOL_LIMIT` of them are exact in float32."""
# By twice the state, to which a branch can be added; whether it is odd, for both weights.
_AFTER = 2 * NEXT.reshape(-1).astype(np.int32)
_ODD = np.repeat(np.arange(2 * STATES)[:, None] & 2 > 0, 2, axis=1)
_EVEN_ODDS = weigh(np.array(TOTAL // 2))


def rows(indexes: Indexes, first: int) -> Places:
    """Places (n, length) of the symbols that lie on paths, of one coding step whose tables are `indexes`.

    Those of table `first` and above, by table. Some of the narrowest tables, fewer than a row, stay alone.
    """
    return cut(sorted_places(indexes, first))


def parted(indexes: Indexes, lowest: int, first: int) -> tuple[Places, Places]:
    """Places of the symbols of table `lowest` and above: those not on paths, by table, and the `rows`."""
    order = sorted_places(indexes, lowest)
    on_paths = cut(order[np.searchsorted(indexes[order], np.uint8(first)) :])
    return order[: len(order) - on_paths.size], on_paths


class Parts(NamedTuple):
    """What is coded of the numbers t of n rows."""

    branches: NDArray[np.int32]
    """Their second lowest bits, (length n,), all first ones of a row before all second ones."""
    zeros: NDArray[np.int32]
    """In how many of `coder.TOTAL` parts these are 0."""
    rest: tuple[Symbols, Indexes]
    """t / 4 rounded down, and the tables of these, (n length,)."""


class TrellisTables(NamedTuple):
    """Tables of a model's paths."""

    step: int
    """In units of the means."""
    first: int
    """Table of y from which on symbols lie on paths."""
    zeros: NDArray[np.int32]
    """In how many of `coder.TOTAL` parts even numbers are multiples of four, by table of y."""
    rest: list[Table]
    """Of t / 4 rounded down: by table of y, then by the two lowest bits."""

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], count: int) -> TrellisTables:
        """From a model's tensors; ``count``: tables of y.

        Raises:
            KeyError, ValueError: they are missing or do not fit each other.
        """
        rest = make_tables(tensors["tables.rest.frequencies"].numpy(), tensors["tables.rest.lengths"].numpy())
        zeros, step = tensors["tables.branches"].numpy(), tensors["tables.step"].numpy()
        if zeros.ndim != 1 or zeros.dtype != np.int32 or len(rest) != 4 * len(zeros) or len(zeros) >= count:
            raise ValueError(f"{len(rest)} tables and branches {zeros.shape} for {count} tables of y")
        if len(zeros) and not 0 < zeros.min() <= zeros.max() < TOTAL:
            raise ValueError(f"branches must be in 1..{TOTAL - 1}, got {zeros.min()} to {zeros.max()}")
        if step.ndim or step.dtype != np.int32 or not 1 <= step <= STEP_MAX:
            raise ValueError(f"step must be in 1..{STEP_MAX}, got {step}")
        return cls(int(step), count - len(zeros), zeros, rest)

    def split(self, points: Symbols, indexes: Indexes) -> Parts:
        """What is coded of ``points`` (n, length), the numbers of which have the tables of y ``indexes``."""
        table = (indexes - self.first).astype(np.intp)
        zeros = np.where(points & 1, TOTAL // 2, self.zeros[table])
        return Parts(
            ((points.T >> 1) & 1).reshape(-1).astype(np.int32),
            zeros.T.reshape(-1).astype(np.int32),
            ((points >> 2).reshape(-1), (4 * table + (points & 3)).reshape(-1).astype(np.uint8)),
        )

    def write(self, encoder: SymbolEncoder, points: Symbols, indexes: Indexes) -> None:
        """Code paths ``points`` (n, length), each number by the table that ``indexes`` selects."""
        branches, zeros, rest = self.split(points, indexes)
        encoder.write_bits(branches, weigh(zeros))
        encoder.write(self.rest, *rest)

    def read(self, decoder: SymbolDecoder, indexes: Indexes) -> Symbols:
        """Paths (n, length) of ``indexes``.

        Raises:
            MalformedBitstreamError: `write` wrote no such thing.
        """
        table = (indexes - self.first).astype(np.intp)
        # Twice the state, plus the branch.
        taken = np.empty(table.T.shape, np.int32)
        state = np.zeros(len(table), np.int32)
        for row, weights in zip(taken, weigh(self.zeros[table.T]), strict=True):
            np.putmask(weights, _ODD.take(state, 0), _EVEN_ODDS)
            np.add(state, decoder.read_bits(weights), out=row)
            state = _AFTER.take(row)
        bits = (2 * (taken & 1) + (taken >> 1 & 1)).T
        rest = decoder.read(self.rest, (4 * table + bits).reshape(-1).astype(np.uint8))
        points = 4 * rest.reshape(table.shape).astype(np.int32) + bits
        if points.size and np.abs(points).max() > SYMBOL_LIMIT:
            raise MalformedBitstreamError(DAMAGED)
        return points.astype(np.int16)

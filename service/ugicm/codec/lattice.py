"""Symbols of large scale, sixteen at a time: points of the Barnes-Wall lattice in place of whole numbers.

Rounding each number alone fills space with cubes. Those of the densest known lattice in 16 dimensions (Barnes
and Wall, 1959; Conway and Sloane, "Sphere Packings, Lattices and Groups", ch. 4 and 20) are rounder: at equal
density the squared error is .86 dB smaller, as long as a distribution is wide against the step.

A point is 16 whole numbers t, in half steps. Which of them are odd says a word of the Reed-Muller code
RM(1,4), one of 32, and their sum is a multiple of four. So a block is coded as the number of the word, 15
symbols s of t = 2 s + (0 or 1), and of the last one only u of t = 4 u + r, as r follows from the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ugicm.codec.coder import (
    DAMAGED,
    SYMBOL_LIMIT,
    Indexes,
    SymbolDecoder,
    SymbolEncoder,
    Symbols,
    Table,
    make_tables,
)
from ugicm.codec.errors import MalformedBitstreamError

BLOCK = 16
"""Dimensions of the lattice."""
HALF_STEP_MAX = 128
"""Largest half step, in units of the means: `SYMBOL_LIMIT` of them are exact in float32."""
CELL = math.sqrt(12 * 0.1932)
"""Width in half steps of uniform noise as large as a number's error where a distribution is wide; the mean
square of that error is .0683 times 2^(2 12 / 16)."""
CANDIDATES = 3
"""Words tried for each block; with more, points are hardly nearer."""
_DIGITS = (0, 1, 2, 4, 8)
"""Places at which a word tells its number."""


def _words() -> NDArray[np.uint8]:
    """RM(1,4), (32, 16): bit i of word a is a0 + a1 i1 + ... + a4 i4 modulo 2, the digits of a and i."""
    place = np.arange(BLOCK)
    return np.stack(
        [
            (number + sum((number >> (1 + digit)) * (place >> digit) for digit in range(4))) & 1
            for number in range(2 * BLOCK)
        ]
    ).astype(np.uint8)


WORDS = _words()


def blocks(indexes: Indexes, first: int) -> NDArray[np.intp]:
    """Places (n, 16) of the symbols that are coded together, of one coding step whose tables are `indexes`.

    Those of table `first` and above, by table. Fewer than 16, of the narrowest tables, stay alone.
    """
    order = np.argsort(indexes, kind="stable")
    order = order[np.searchsorted(indexes[order], first) :]
    return order[len(order) % BLOCK :].reshape(-1, BLOCK)


def nearest(x: Tensor) -> Tensor:
    """The nearest of some points near ``x`` (n, 16), which is in half steps; whole numbers, shaped alike."""
    words = torch.from_numpy(WORDS).to(x)
    # Distances to the nearest even and odd number.
    even, odd = ((x - part - 2 * ((x - part) / 2).round()).square() for part in (0, 1))
    best, least = torch.empty_like(x), x.new_full((len(x), 1), torch.inf)
    for number in ((even - odd) @ words.T).topk(CANDIDATES, 1).indices.T:
        odds = words[number]
        point = 2 * ((x - odds) / 2).round() + odds
        error = x - point
        # The cheapest change that makes the sum a multiple of four: two towards x where it is farthest.
        farthest = error.abs().argmax(1, keepdim=True)
        change = torch.where(error.gather(1, farthest) < 0, -2.0, 2.0).to(x)
        change *= point.sum(1, keepdim=True).remainder(4) != 0
        point.scatter_add_(1, farthest, change)
        distance = (x - point).square().sum(1, keepdim=True)
        best = torch.where(distance < least, point, best)
        least = torch.minimum(least, distance)
    return best


class Parts(NamedTuple):
    """What is coded of n points."""

    words: tuple[Symbols, Indexes]
    """Numbers of their words, less 16, and the tables of these, (n,)."""
    inner: tuple[Symbols, Indexes]
    """s of their first 15 numbers, and the tables of these, (15 n,)."""
    last: tuple[Symbols, Indexes]
    """u of their last ones, and the tables of these, (n,)."""


def split(points: Symbols, indexes: Indexes, first: int) -> Parts:
    """What is coded of ``points`` (n, 16), the numbers of which have the tables of y ``indexes`` (n, 16)."""
    odds = points & 1
    digits = odds[:, _DIGITS].astype(np.int64)
    digits[:, 1:] ^= digits[:, :1]
    table = (indexes - first).astype(np.uint8)
    head, end = np.s_[:, :-1], np.s_[:, -1]
    words = digits @ (1 << np.arange(len(_DIGITS))) - BLOCK
    return Parts(
        (words.astype(np.int16), table[:, 0]),
        ((points[head] >> 1).reshape(-1), (2 * table[head] + odds[head]).astype(np.uint8).reshape(-1)),
        (points[end] >> 2, (4 * table[end] + (points[end] & 3)).astype(np.uint8)),
    )


class LatticeTables(NamedTuple):
    """Tables of a model's blocks."""

    half_step: int
    """In units of the means."""
    first: int
    """Table of y from which on symbols are coded in blocks."""
    words: list[Table]
    """Of words' numbers, less 16: by table of y of the block's narrowest symbol, its first."""
    inner: list[Table]
    """Of s: by table of y, then by whether t is odd."""
    last: list[Table]
    """Of u: by table of y, then by r."""

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], count: int) -> LatticeTables:
        """From a model's tensors; ``count``: tables of y.

        Raises:
            KeyError, ValueError: they are missing or do not fit each other.
        """
        words, inner, last = (
            make_tables(
                tensors[f"tables.{part}.frequencies"].numpy(), tensors[f"tables.{part}.lengths"].numpy()
            )
            for part in ("words", "inner", "last")
        )
        first, half_step = count - len(words), int(tensors["tables.half_step"])
        if (len(inner), len(last)) != (2 * len(words), 4 * len(words)) or first < 1:
            counts = f"{len(words)}, {len(inner)} and {len(last)}"
            raise ValueError(f"{counts} tables of blocks for {count} tables of y")
        if not 1 <= half_step <= HALF_STEP_MAX:
            raise ValueError(f"half_step must be in 1..{HALF_STEP_MAX}, got {half_step}")
        return cls(half_step, first, words, inner, last)

    def write(self, encoder: SymbolEncoder, points: Symbols, indexes: Indexes) -> None:
        """Code ``points`` (n, 16), each number by the table that ``indexes`` (n, 16) selects."""
        parts = split(points, indexes, self.first)
        encoder.write(self.words, *parts.words)
        encoder.write(self.inner, *parts.inner)
        encoder.write(self.last, *parts.last)

    def read(self, decoder: SymbolDecoder, indexes: Indexes) -> Symbols:
        """Points (n, 16) of ``indexes`` (n, 16).

        Raises:
            MalformedBitstreamError: `write` wrote no such thing.
        """
        table = (indexes - self.first).astype(np.uint8)
        words = decoder.read(self.words, table[:, 0]).astype(np.int64) + BLOCK
        if len(words) and not 0 <= words.min() <= words.max() < len(WORDS):
            raise MalformedBitstreamError(DAMAGED)
        odds = WORDS[words].astype(np.int64)
        points = np.empty(indexes.shape, np.int64)
        head, end = np.s_[:, :-1], np.s_[:, -1]
        inner = decoder.read(self.inner, (2 * table[head] + odds[head]).astype(np.uint8).reshape(-1))
        points[head] = 2 * inner.reshape(points[head].shape).astype(np.int64) + odds[head]
        rest = -points[head].sum(1) & 3
        last = decoder.read(self.last, (4 * table[end] + rest).astype(np.uint8))
        points[end] = 4 * last.astype(np.int64) + rest
        if len(points) and np.abs(points).max() > SYMBOL_LIMIT:
            raise MalformedBitstreamError(DAMAGED)
        return points.astype(np.int16)

"""Number grids of the exact entropy model, and the proof that its sums are exact in float32.

Everything is an integer times a power of two. Activations live on the grids below. A layer's weights are
int16 with a number of binary places of their own for each output row (`bits`), as many as the bound of that
row's sums leaves; a sum, and so a bias, has the places of weight and activation together. A layer ends in a
floor to the next grid and a clamp; the half that makes the floor round is part of the stored bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SUM_LIMIT = 1 << 24
"""Integers up to this magnitude are exact in float32, and so are sums that stay below it in any order."""
BITS_MIN, BITS_MAX = 4, 12
"""Fewest and most binary places of a weight. The fewest leave no sum coarser than `BASE`."""


class Grid(NamedTuple):
    """Multiples of 2^-bits in -limit <= x < limit."""

    bits: int
    limit: int

    @property
    def end(self) -> int:
        """The limit in units of the grid: the largest magnitude."""
        return self.limit << self.bits


Z = Grid(0, 512)
HYPER1 = Grid(5, 32)
HYPER = Grid(6, 16)
TRUNK = Grid(6, 64)
HIDDEN = Grid(6, 64)
SPATIAL = Grid(7, 32)
SEEN = Grid(5, 256)
"""The latent as the context layers see it."""
BASE = Grid(8, 128)
"""What the hyper latent adds to the context layers' sums."""
MEAN = Grid(6, 512)
INDEX_BITS = 3


def input_grid(layer: str) -> Grid:
    """Grid of what a layer reads; ``layer`` is its name, as in ``entropy.NAME.weight``."""
    match layer.split("."):
        case ["hyper1"]:
            return Z
        case ["hyper2"]:
            return HYPER1
        case [_, "spatial"] | [_, _, "spatial"]:
            return HIDDEN
        case [_, "project"] | [_, _, "project"]:
            return SPATIAL
        case ["context", _]:
            return SEEN
        case ["trunk", _, "expand"] | ["heads", "1" | "2" | "3"]:
            return TRUNK
        case ["hyper_block", "expand"] | ["base"] | ["heads", "0"]:
            return HYPER
    raise ValueError(f"no layer {layer!r}")


def output_bits(layer: str, rows: int) -> Tensor:
    """Binary places that the floor at the end of a layer leaves, int64 (rows,)."""
    match layer.split("."):
        case ["heads", _]:
            # Rows of each channel group: means, then table indexes.
            return torch.tensor([MEAN.bits, INDEX_BITS], device="cpu").repeat(4).repeat_interleave(rows // 8)
        case ["hyper1"]:
            bits = HYPER1.bits
        case ["hyper2"] | ["hyper_block", "project"]:
            bits = HYPER.bits
        case ["base"]:
            bits = BASE.bits
        case [_, "expand"] | [_, _, "expand"]:
            bits = HIDDEN.bits
        case [_, "spatial"] | [_, _, "spatial"]:
            bits = SPATIAL.bits
        case _:
            bits = TRUNK.bits
    return torch.full((rows,), bits, device="cpu")


def sum_bits(layer: str, bits: Tensor) -> Tensor:
    """Binary places of a layer's sums and biases, int64 (rows,); ``bits`` are those of its weights."""
    return bits.long() + input_grid(layer).bits


def rounding_half(layer: str, bits: Tensor) -> Tensor:
    """What turns the floor at the end of a layer into rounding, in units of its sums, float64 (rows,)."""
    return torch.exp2((sum_bits(layer, bits) - output_bits(layer, len(bits)) - 1).double())


def largest_sums(layer: str, weight: Tensor, bias: Tensor, bits: Tensor) -> Tensor:
    """Bound of every partial sum of each row, whatever the input, in units of its sums, int64 (rows,).

    Args:
        weight: integers (rows, ...).
        bias: integers (rows,).
        bits: binary places of the rows' weights, (rows,).
    """
    bound = weight.long().abs().flatten(1).sum(1) * input_grid(layer).end + bias.long().abs()
    if layer.startswith("context."):
        bound += BASE.limit << sum_bits(layer, bits)
    return bound

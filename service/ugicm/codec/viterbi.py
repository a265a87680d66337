"""The trellis of `ugicm.codec.trellis`, and its nearest path by Viterbi's algorithm."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STATES = 64
CHECKS = (0o103, 0o024)
"""Parity checks of the lowest and of the second lowest bits; bit i of a check is about the number i places
before (Ungerboeck, "Channel coding with multilevel/phase signals", IEEE Trans. Information Theory 28, 1982,
table I).
"""
NEXT = np.array(
    [
        [state >> 1 ^ (state & 1) * (CHECKS[0] >> 1) ^ branch * (CHECKS[1] >> 1) for branch in (0, 1)]
        for state in range(STATES)
    ],
    np.intp,
)
"""State after a branch, (states, 2); where the state is odd, so is t. Paths start in state 0."""
LONGEST, SHORTEST, ROWS = 256, 32, 32
"""Longest and shortest row; between them, there are so many. Longer ones are better, more are faster."""


def _incoming() -> NDArray[np.intp]:
    """For the search, states in another order: first those that even numbers lead to, 0 first of all.

    Returns:
        the place of the state before, by branch and place of the state after, (2, states).
    """
    before = np.empty((2, STATES), np.intp)
    for branch in (0, 1):
        before[branch, NEXT[:, branch]] = np.arange(STATES)
    order = np.argsort(before[0] & 1, kind="stable")
    return np.argsort(order)[before[:, order]]


BEFORE = _incoming()


def cut(order: NDArray[np.intp]) -> NDArray[np.intp]:
    """Rows (n, length) of the places of symbols that lie on paths; some of the first ones stay alone."""
    length = min(max(len(order) // ROWS, SHORTEST), LONGEST)
    return order[len(order) % length :].reshape(-1, length)


def nearest(x: NDArray[np.float32], lengths: NDArray[np.intp] | None = None) -> NDArray[np.float32]:
    """The paths nearest to the rows of ``x`` (n, length), which is in steps; whole numbers, shaped alike.

    ``lengths`` (n,): how much of each row counts, if not all. Rows of several pictures take hardly longer;
    which of two paths that are equally near is found may depend on them.
    """
    x = np.ascontiguousarray(x.T)
    length, count = x.shape
    # By the second lowest and the lowest bit of a number: its squared distance, in 4 steps, to the nearest
    # with such bits.
    distances = np.empty((length, 4, 1, count), np.float32)
    for bits in range(4):
        error = (x - bits) / 4
        error -= np.rint(error)
        distances[:, bits, 0] = error * error
    if lengths is not None:
        distances *= (np.arange(length)[:, None] < lengths)[:, None, None]
    least = np.full((STATES, count), np.inf, np.float32)
    least[0] = 0
    both = np.empty((2 * STATES, count), np.float32)
    first, second, by_bits = both[:STATES], both[STATES:], both.reshape(4, STATES // 2, count)
    chosen = np.empty((length, STATES, count), np.bool_)
    # These arrays are small: what is not done by slices and by `take` along one axis costs more than sums.
    before = BEFORE.reshape(-1)
    for distance, second_is_nearer in zip(distances, chosen, strict=True):
        least.take(before, 0, both, "clip")
        np.add(by_bits, distance, by_bits)
        np.less(second, first, second_is_nearer)
        np.minimum(first, second, out=least)
    # Back along the paths, by places in (states, n).
    column = np.arange(count)
    by_first, by_second = (BEFORE[..., None] * count + column).reshape(2, -1)
    end = least.argmin(0) * count + column
    ends, branches = [], []
    for second_is_nearer in chosen.reshape(length, -1)[::-1]:
        ends.append(end)
        branches.append(second_is_nearer[end])
        end, other = by_first[end], by_second[end]
        np.putmask(end, branches[-1], other)
    points = 2.0 * np.array(branches[::-1]) + (np.array(ends[::-1]) >= STATES // 2 * count)
    points += 4 * np.rint((x - points) / 4)
    return np.ascontiguousarray(points.T, np.float32)

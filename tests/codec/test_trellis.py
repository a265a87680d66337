"""Symbols on paths of the trellis: coded exactly, nearer than whole numbers at equal density."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ugicm.codec.coder import SYMBOL_LIMIT, TOTAL, SymbolDecoder, SymbolEncoder, Symbols
from ugicm.codec.entropy import SCALE_COUNT
from ugicm.codec.errors import MalformedBitstreamError
from ugicm.codec.trellis import TrellisTables, rows
from ugicm.codec.viterbi import CHECKS, NEXT, STATES, nearest
from ugicm_train.export import latent_tables


@pytest.fixture(scope="module")
def tables() -> TrellisTables:
    return TrellisTables.load(latent_tables(), SCALE_COUNT)


def is_path(points: Symbols) -> bool:
    """Whether the parity checks of the code hold along every row, which starts after zeros."""
    sums = np.zeros_like(points)
    for check, bits in zip(CHECKS, (points & 1, points >> 1 & 1), strict=True):
        for delay in range(check.bit_length()):
            if check >> delay & 1:
                sums[:, delay:] += bits[:, : points.shape[1] - delay]
    return not (sums & 1).any()


def search(x: NDArray[np.float64]) -> Symbols:
    return nearest(x.astype(np.float32)).astype(np.int16)


def test_code_has_its_published_free_distance() -> None:
    """14 squared steps: Ungerboeck's table I, 64 states. From a number to the next with its bits it is 16."""
    weights = {(0, 0): 0, (1, 0): 1, (0, 1): 4, (1, 1): 1}
    queue = [(4, int(NEXT[0, 1]))]
    seen = set[int]()
    while queue:
        distance, state = heapq.heappop(queue)
        if state == 0:
            break
        if state not in seen:
            seen.add(state)
            for branch in (0, 1):
                step = weights[state & 1, branch]
                heapq.heappush(queue, (distance + step, int(NEXT[state, branch])))
    assert state == 0
    assert distance == 14
    assert sorted(NEXT.reshape(-1).tolist()) == sorted(2 * list(range(STATES)))


def test_the_nearest_of_all_paths_is_found() -> None:
    random = np.random.default_rng(0)
    x = random.uniform(-6, 6, (20, 9))
    found = search(x)
    assert is_path(found)
    least = np.full(len(x), np.inf)
    for branches in itertools.product((0, 1), repeat=x.shape[1]):
        state, distance = 0, np.zeros(len(x))
        for column, branch in zip(x.T, branches, strict=True):
            bits = 2 * branch + (state & 1)
            distance += (column - bits - 4 * np.rint((column - bits) / 4)) ** 2
            state = NEXT[state, branch]
        least = np.minimum(least, distance)
    np.testing.assert_allclose(((x - found) ** 2).sum(1), least, rtol=1e-5)


def test_paths_are_nearer_than_whole_numbers_of_equal_density() -> None:
    x = np.random.default_rng(0).uniform(-20, 20, (200, 256))
    points = search(x)
    assert is_path(points)
    # Each number is one of every second: as dense as multiples of two, whose squared error is a third.
    gain = 10 * np.log10(1 / 3 / ((x - points) ** 2).mean())
    assert 1.15 < gain < 1.25


def test_rows_of_several_lengths_are_searched_together() -> None:
    random = np.random.default_rng(0)
    x = random.uniform(-20, 20, (12, 90)).astype(np.float32)
    lengths = random.integers(10, 91, len(x))
    for row, length, points in zip(x, lengths, nearest(x, lengths), strict=True):
        np.testing.assert_array_equal(points[:length], nearest(row[None, :length])[0])


def test_rows_are_the_widest_symbols() -> None:
    indexes = np.random.default_rng(0).integers(0, SCALE_COUNT, 20_000).astype(np.uint8)
    for count, length in ((1000, 32), (2000, 51), (20_000, 256)):
        some = indexes[:count]
        places = rows(some, 12)
        wide = np.sort(some[some >= 12])
        assert places.shape == (len(wide) // length, length)
        np.testing.assert_array_equal(some[places.reshape(-1)], wide[len(wide) % length :])
    assert not len(rows(indexes[:31], 0))
    assert not len(rows(indexes[:0], 12))


def test_round_trip_with_escapes(tables: TrellisTables) -> None:
    random = np.random.default_rng(0)
    indexes = random.integers(tables.first, SCALE_COUNT, (50, 100)).astype(np.uint8)
    points = search((random.standard_cauchy(indexes.shape) * 20).clip(4 - SYMBOL_LIMIT, SYMBOL_LIMIT - 4))
    assert np.abs(points).max() > 5000
    encoder = SymbolEncoder()
    tables.write(encoder, points, indexes)
    tables.write(encoder, points[:0], indexes[:0])
    payload = encoder.finish()
    decoder = SymbolDecoder(payload)
    np.testing.assert_array_equal(tables.read(decoder, indexes), points)
    assert tables.read(decoder, indexes[:0]).shape == (0, 100)
    decoder.finish()


def test_noise_is_a_path_or_an_error(tables: TrellisTables) -> None:
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(50):
        indexes = random.integers(tables.first, SCALE_COUNT, (10, 40)).astype(np.uint8)
        decoder = SymbolDecoder(random.bytes(500))
        try:
            points = tables.read(decoder, indexes)
        except MalformedBitstreamError:
            refused += 1
        else:
            assert is_path(points)
    assert refused < 50


def test_numbers_that_no_symbol_may_have_are_refused(tables: TrellisTables) -> None:
    indexes = np.full((1, 32), tables.first, np.uint8)
    points = np.zeros((1, 32), np.int64)
    points[0, 0] = 4 * (SYMBOL_LIMIT // 4 + 1)
    encoder = SymbolEncoder()
    # Written as numbers of more than 16 bits.
    tables.write(encoder, points, indexes)
    with pytest.raises(MalformedBitstreamError, match="damaged"):
        tables.read(SymbolDecoder(encoder.finish()), indexes)


def test_rate_is_that_of_the_distribution(tables: TrellisTables) -> None:
    """A number costs what its share of the density does where that is wide; somewhat more where it is not."""
    random = np.random.default_rng(2)
    for index, above in ((16, 0.14), (24, 0.03), (36, 0.01)):
        sigma = 2.0 ** ((index - 20) * 5 / 32)
        x = random.logistic(0, sigma * np.sqrt(3) / np.pi, (200, 256)) * 64 / tables.step
        points = search(x)
        encoder = SymbolEncoder()
        tables.write(encoder, points, np.full(points.shape, index, np.uint8))
        bits = 8 * len(encoder.finish()) / points.size
        # Differential entropy of the distribution, less the logarithm of a number's share of a cell.
        ideal = np.log2(sigma * np.sqrt(3) / np.pi) + 2 / np.log(2)
        ideal -= np.log2(tables.step / 64) + 1
        assert ideal - 0.01 < bits < ideal + above


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables.step": torch.tensor(0, dtype=torch.int32)}, r"step must be in 1\.\.128, got 0"),
        ({"tables.step": torch.tensor(129, dtype=torch.int32)}, r"step must be in 1\.\.128, got 129"),
        (
            {"tables.branches": latent_tables()["tables.branches"][1:]},
            r"216 tables and branches \(53,\) for 64 tables of y",
        ),
        (
            {"tables.branches": torch.tensor(TOTAL // 2, dtype=torch.int32)},
            r"216 tables and branches \(\) for 64 tables of y",
        ),
        ({"tables.step": torch.tensor(33.7)}, r"step must be in 1\.\.128, got 33\.7"),
        (
            {"tables.branches": torch.full((54,), TOTAL, dtype=torch.int32)},
            f"branches must be in 1..{TOTAL - 1}, got {TOTAL} to {TOTAL}",
        ),
        (
            {"tables.branches": torch.zeros(54, dtype=torch.int32)},
            f"branches must be in 1..{TOTAL - 1}, got 0 to 0",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrellisTables.load(latent_tables() | change, SCALE_COUNT)


def test_some_tables_are_not_on_paths() -> None:
    with pytest.raises(ValueError, match=r"216 tables and branches \(54,\) for 54 tables of y"):
        TrellisTables.load(latent_tables(), 54)

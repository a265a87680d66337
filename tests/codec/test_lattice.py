"""Blocks of symbols: points of the lattice, coded exactly, nearer than whole numbers at equal density."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ugicm.codec.coder import SYMBOL_LIMIT, SymbolDecoder, SymbolEncoder
from ugicm.codec.entropy import SCALE_COUNT
from ugicm.codec.errors import MalformedBitstreamError
from ugicm.codec.lattice import BLOCK, WORDS, LatticeTables, blocks, nearest
from ugicm_train.export import latent_tables


@pytest.fixture(scope="module")
def tables() -> LatticeTables:
    return LatticeTables.load(latent_tables(), SCALE_COUNT)


def is_point(points: torch.Tensor) -> bool:
    words = {tuple(word) for word in WORDS.tolist()}
    odds = {tuple(word) for word in points.long().remainder(2).tolist()}
    return odds <= words and not points.sum(1).remainder(4).any()


def test_words_are_32_and_differ_in_at_least_8_places() -> None:
    distances = {int((one != other).sum()) for one, other in itertools.combinations(WORDS, 2)}
    assert len(WORDS) == 32
    assert distances == {8, 16}


def test_points_have_the_lattices_density_and_least_distance() -> None:
    """Center density 1/16 at minimal norm 4 in its usual scale (Conway and Sloane, table 1.3)."""
    # Vectors of minimal norm: 480 with two places of +-2, 3840 with eight of +-1.
    pairs = [
        (i, j, a, b)
        for i, j in itertools.combinations(range(BLOCK), 2)
        for a, b in itertools.product((-2, 2), repeat=2)
    ]
    first = torch.zeros(len(pairs), BLOCK)
    for row, (i, j, a, b) in zip(first, pairs, strict=True):
        row[i], row[j] = a, b
    eights = []
    for word in WORDS:
        if word.sum() == 8:
            for signs in itertools.product((-1.0, 1.0), repeat=8):
                vector = np.zeros(BLOCK)
                vector[word == 1] = signs
                if vector.sum() % 4 == 0:
                    eights.append(vector)
    shortest = torch.cat([first, torch.tensor(np.array(eights), dtype=torch.float32)])
    assert len(shortest) == 4320
    assert is_point(shortest)
    assert torch.equal(nearest(shortest), shortest)
    # Less than half way from a point, that point is the nearest.
    assert not nearest(0.49 * shortest).any()
    assert torch.equal(nearest(0.51 * shortest), shortest)


def test_a_point_is_nearer_than_whole_numbers_of_equal_density() -> None:
    x = 40 * torch.rand(20_000, BLOCK, generator=torch.Generator().manual_seed(0))
    points = nearest(x)
    assert is_point(points)
    # A cell holds 2^16 / 32 * 2 of the cubes of side 1: a number's share of it is 2^(12 / 16).
    cubes = 2 ** (2 * 12 / BLOCK) / 12
    gain = 10 * np.log10(cubes / float((x - points).square().mean()))
    # .86 dB, were each point the nearest of all.
    assert 0.8 < gain < 0.87


def test_blocks_are_the_widest_symbols() -> None:
    indexes = np.array([5, 30, 12, 11, *range(13, 48)], np.uint8)
    places = blocks(indexes, 12)
    assert places.shape == (2, BLOCK)
    wide = np.sort(indexes[indexes >= 12])
    np.testing.assert_array_equal(np.sort(indexes[places.reshape(-1)]), wide[len(wide) % BLOCK :])
    assert not len(blocks(indexes[:15], 12))
    assert not len(blocks(indexes[:0], 12))


def test_round_trip_with_escapes(tables: LatticeTables) -> None:
    random = np.random.default_rng(0)
    indexes = random.integers(tables.first, SCALE_COUNT, (500, BLOCK)).astype(np.uint8)
    x = torch.from_numpy(random.standard_cauchy(indexes.shape) * 20).clamp(4 - SYMBOL_LIMIT, SYMBOL_LIMIT - 4)
    points = nearest(x.float()).to(torch.int16).numpy()
    assert np.abs(points).max() > 5000
    encoder = SymbolEncoder()
    tables.write(encoder, points, indexes)
    tables.write(encoder, points[:0], indexes[:0])
    payload = encoder.finish()
    decoder = SymbolDecoder(payload)
    np.testing.assert_array_equal(tables.read(decoder, indexes), points)
    assert tables.read(decoder, indexes[:0]).shape == (0, BLOCK)
    decoder.finish()


def test_noise_is_points_or_an_error(tables: LatticeTables) -> None:
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(50):
        indexes = random.integers(tables.first, SCALE_COUNT, (20, BLOCK)).astype(np.uint8)
        decoder = SymbolDecoder(random.bytes(400))
        try:
            points = tables.read(decoder, indexes)
        except MalformedBitstreamError:
            refused += 1
        else:
            assert is_point(torch.from_numpy(points))
    assert refused < 50


def test_rate_is_that_of_the_distribution(tables: LatticeTables) -> None:
    """A point costs what its share of the density does where that is wide; somewhat more where it is not."""
    random = np.random.default_rng(2)
    for index, above in ((16, 0.14), (24, 0.03), (36, 0.01)):
        sigma = 2.0 ** ((index - 20) * 5 / 32)
        x = random.logistic(0, sigma * np.sqrt(3) / np.pi, (3000, BLOCK)) * 64 / tables.half_step
        points = nearest(torch.from_numpy(x).float()).to(torch.int16).numpy()
        encoder = SymbolEncoder()
        tables.write(encoder, points, np.full(points.shape, index, np.uint8))
        bits = 8 * len(encoder.finish()) / points.size
        # Differential entropy of the distribution, less the logarithm of a number's share of a cell.
        ideal = np.log2(sigma * np.sqrt(3) / np.pi) + 2 / np.log(2)
        ideal -= np.log2(tables.half_step / 64) + 12 / BLOCK
        assert ideal - 0.01 < bits < ideal + above


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables.half_step": torch.tensor(0)}, r"half_step must be in 1\.\.128, got 0"),
        ({"tables.half_step": torch.tensor(129)}, r"half_step must be in 1\.\.128, got 129"),
        (
            {
                f"tables.inner.{part}": latent_tables()[f"tables.y.{part}"]
                for part in ("frequencies", "lengths")
            },
            "52, 64 and 208 tables of blocks for 64 tables of y",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatticeTables.load(latent_tables() | change, SCALE_COUNT)

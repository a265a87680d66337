"""The entropy coder: integer tables are used as they are, escapes work, rates are right."""

from __future__ import annotations

import numpy as np
import pytest

from ugicm.codec.coder import (
    SYMBOL_LIMIT,
    TOTAL,
    SymbolDecoder,
    SymbolEncoder,
    Table,
    make_table,
    make_tables,
    weigh,
)
from ugicm.codec.errors import MalformedBitstreamError
from ugicm_train.export import latent_tables, to_frequencies


@pytest.fixture(scope="module")
def tables() -> list[Table]:
    made = latent_tables()
    return make_tables(made["tables.y.frequencies"].numpy(), made["tables.y.lengths"].numpy())


def test_round_trip_with_escapes(tables: list[Table]) -> None:
    random = np.random.default_rng(0)
    indexes = random.integers(0, 64, 20_000).astype(np.uint8)
    symbols = np.rint(random.standard_cauchy(20_000) * 3).clip(-SYMBOL_LIMIT, SYMBOL_LIMIT)
    symbols = symbols.astype(np.int16)
    symbols[:2] = SYMBOL_LIMIT, -SYMBOL_LIMIT
    encoder = SymbolEncoder()
    encoder.write(tables, symbols[:5000], indexes[:5000])
    encoder.write(tables, symbols[5000:], indexes[5000:])
    decoder = SymbolDecoder(encoder.finish())
    np.testing.assert_array_equal(decoder.read(tables, indexes[:5000]), symbols[:5000])
    np.testing.assert_array_equal(decoder.read(tables, indexes[5000:]), symbols[5000:])
    decoder.finish()


@pytest.mark.parametrize(
    "frequencies",
    [
        [TOTAL - 7, 1, 5, 1],
        [1, TOTAL - 3, 1, 1],
        [TOTAL // 4] * 4,
        [1, 12_345, TOTAL - 12_345 - 1000 - 1, 1000],
    ],
)
def test_rate_is_that_of_the_integer_table(frequencies: list[int]) -> None:
    """A run of one symbol costs exactly -log2(frequency / total) each: the library adds nothing."""
    tables = make_tables(np.array(frequencies, np.int32), np.array([len(frequencies)], np.int32))
    count = 4000
    for symbol, frequency in zip((-1, 0, 1), frequencies, strict=False):
        encoder = SymbolEncoder()
        encoder.write(tables, np.full(count, symbol, np.int16), np.zeros(count, np.uint8))
        bits = len(encoder.finish()) * 8
        expected = -count * np.log2(frequency / TOTAL)
        assert expected - 1 <= bits <= expected + 96


def test_bits_cost_what_their_weights_say() -> None:
    random = np.random.default_rng(3)
    zeros = random.integers(1, TOTAL, 20_000).astype(np.int32)
    zeros[:4] = 1, 2, TOTAL - 2, TOTAL - 1
    bits = (random.random(len(zeros)) * TOTAL >= zeros).astype(np.int32)
    bits[:4] = 1, 0, 1, 0
    encoder = SymbolEncoder()
    encoder.write_bits(bits, weigh(zeros))
    payload = encoder.finish()
    ideal = -np.log2(np.where(bits, TOTAL - zeros, zeros) / TOTAL).sum()
    assert ideal <= 8 * len(payload) <= ideal + 64
    decoder = SymbolDecoder(payload)
    np.testing.assert_array_equal(decoder.read_bits(weigh(zeros)), bits)
    decoder.finish()


def test_rate_is_near_entropy(tables: list[Table]) -> None:
    random = np.random.default_rng(1)
    for index in (4, 20, 40, 63):
        sigma = 2.0 ** ((index - 20) * 5 / 32)
        symbols = np.rint(random.standard_normal(20_000) * sigma).astype(np.int16)
        encoder = SymbolEncoder()
        encoder.write(tables, symbols, np.full(20_000, index, np.uint8))
        _, counts = np.unique(symbols, return_counts=True)
        share = counts / counts.sum()
        entropy = -np.sum(counts * np.log2(share))
        assert entropy * 0.995 - 64 < len(encoder.finish()) * 8 < entropy * 1.02 + 200


def test_frequencies_sum_to_the_total() -> None:
    frequencies = to_frequencies(np.array([0.0, 1e-12, 0.7, 0.3]))
    assert frequencies.sum() == TOTAL
    assert frequencies.min() == 1


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to"):
        make_table(np.array([1, 2, 3, 4], np.int32))
    with pytest.raises(ValueError, match="at least 1"):
        make_table(np.array([0, TOTAL // 2, TOTAL // 2, 0], np.int32))
    with pytest.raises(ValueError, match="even number"):
        make_table(np.array([1, 2, 3], np.int32))
    with pytest.raises(ValueError, match="do not match"):
        make_tables(np.array([1, TOTAL - 1], np.int32), np.array([4], np.int32))


def test_left_over_and_odd_payloads_are_refused(tables: list[Table]) -> None:
    encoder = SymbolEncoder()
    encoder.write(tables, np.zeros(10, np.int16), np.full(10, 30, np.uint8))
    decoder = SymbolDecoder(encoder.finish() + b"\x01\x02\x03\x04" * 4)
    decoder.read(tables, np.full(10, 30, np.uint8))
    with pytest.raises(MalformedBitstreamError, match="after the last symbol"):
        decoder.finish()
    with pytest.raises(MalformedBitstreamError, match="multiple of 4"):
        SymbolDecoder(b"abc")

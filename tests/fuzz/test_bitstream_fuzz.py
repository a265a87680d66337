"""Property tests of the container: what goes in comes out; damage is refused or changes nothing."""

from __future__ import annotations

import contextlib

import google_crc32c
from hypothesis import given
from hypothesis import strategies as st

from ugicm.codec.bitstream import MAGIC, MAX_HEADER_BYTES, Bitstream, Header, parse, peek, serialise
from ugicm.codec.errors import LimitExceededError, MalformedBitstreamError

MAX_PIXELS = 1 << 32
REFUSED = (MalformedBitstreamError, LimitExceededError)


@st.composite
def bitstreams(draw: st.DrawFn) -> Bitstream:
    tile_side = draw(st.sampled_from([0, 1, 100, 512]))
    side = st.integers(1, 4 * tile_side or 1 << 16)
    header = Header(
        version=1,
        width=draw(side),
        height=draw(side),
        quality=draw(st.floats(1, 100)),
        model_digest=draw(st.binary(min_size=8, max_size=8)),
        tile_side=tile_side,
    )
    count = header.tiles_x * header.tiles_y
    return Bitstream(header, tuple(draw(st.lists(st.binary(max_size=40), min_size=count, max_size=count))))


@given(bitstreams())
def test_round_trip(value: Bitstream) -> None:
    data = serialise(*value)
    assert parse(data, max_pixels=MAX_PIXELS) == value
    assert peek(data[:MAX_HEADER_BYTES]) == value.header


@given(bitstreams(), st.data())
def test_mutations_are_refused(value: Bitstream, data: st.DataObject) -> None:
    """Up to three edits anywhere: CRC-32C detects them all at these lengths (Hamming distance >= 4)."""
    mutated = bytearray(serialise(*value))
    original = bytes(mutated)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert parse(bytes(mutated), max_pixels=MAX_PIXELS) == value
        assert bytes(mutated) == original  # edits that undid each other
    except REFUSED:
        assert bytes(mutated) != original


@given(bitstreams(), st.data())
def test_splices_are_refused_or_harmless(value: Bitstream, data: st.DataObject) -> None:
    original = serialise(*value)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(original))] * 2)))
    mutated = original[:start] + data.draw(st.binary(max_size=20)) + original[stop:]
    try:
        assert parse(mutated, max_pixels=MAX_PIXELS) == value
    except REFUSED:
        assert mutated != original


@given(st.binary(max_size=200), st.booleans())
def test_hostile_bodies_with_a_valid_checksum(body: bytes, tiled: bool) -> None:
    """Past magic, version and flags anything may follow; what parses is written back identically."""
    data = MAGIC + bytes([1, tiled]) + body
    data += google_crc32c.value(data).to_bytes(4, "little")
    with contextlib.suppress(*REFUSED):
        assert serialise(*parse(data, max_pixels=MAX_PIXELS)) == data


@given(st.binary(max_size=200))
def test_foreign_bytes(data: bytes) -> None:
    with contextlib.suppress(MalformedBitstreamError):
        peek(data)
        assert data.startswith(MAGIC)

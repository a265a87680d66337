"""Property tests of the container: what goes in comes out; damage is refused or changes nothing."""

from __future__ import annotations

import google_crc32c
from hypothesis import find, given
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
    segments = st.lists(st.binary(max_size=40), min_size=header.tiles, max_size=header.tiles)
    return Bitstream(header, tuple(draw(segments)))


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


def varint(value: int, padding: int = 0) -> bytes:
    """LEB128, with so many bytes more than it needs."""
    parts = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)] + [0] * padding
    return bytes([*(part | 0x80 for part in parts[:-1]), parts[-1]])


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Fields of about the right sizes, with a checksum that is right."""
    flags = draw(st.integers(0, 3))
    sides = draw(st.lists(st.integers(0, 300), min_size=2 + (flags & 1), max_size=2 + (flags & 1)))
    tile = sides[2] if flags & 1 and sides[2] else max(1, *sides)
    count = -(-sides[0] // tile) * -(-sides[1] // tile)
    count = max(0, count + draw(st.sampled_from([0, 0, 0, -1, 1])))
    lengths = draw(st.lists(st.integers(0, 9), min_size=min(count, 99), max_size=min(count, 99)))
    padding = draw(st.sampled_from([0, 0, 0, 1]))
    size = max(0, sum(lengths) + draw(st.sampled_from([0, 0, 0, -1, 1])))
    data = MAGIC + bytes([1, flags]) + draw(st.integers(0, 26_000)).to_bytes(2, "little")
    data += draw(st.binary(min_size=8, max_size=8)) + b"".join(varint(side) for side in sides[:-1])
    data += varint(sides[-1], padding) + b"".join(map(varint, lengths))
    data += draw(st.binary(min_size=size, max_size=size))
    return data + google_crc32c.value(data).to_bytes(4, "little")


def parses(data: bytes) -> bool:
    try:
        parse(data, max_pixels=MAX_PIXELS)
    except REFUSED:
        return False
    return True


@given(hostile())
def test_what_parses_is_written_back(data: bytes) -> None:
    if parses(data):
        assert serialise(*parse(data, max_pixels=MAX_PIXELS)) == data


def test_some_of_it_parses() -> None:
    for flags in range(3):
        find(hostile(), lambda data, flags=flags: parses(data) and data[9] == flags)


@given(st.binary(max_size=200) | st.binary(max_size=40).map(MAGIC.__add__) | hostile())
def test_foreign_bytes(data: bytes) -> None:
    """Only what begins as a header does is taken for one."""
    try:
        header = peek(data)
    except MalformedBitstreamError:
        return
    assert data.startswith(MAGIC + bytes([header.version]))
    assert header.model_digest == data[12:20]

"""Hostile segments under a valid checksum: the promised picture or one clear error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ugicm.codec import lossless
from ugicm.codec.bitstream import parse, serialise
from ugicm.codec.codec import Codec
from ugicm.codec.errors import MalformedBitstreamError

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def bitstream(tiny_codec: Codec, photo: NDArray[np.uint8]) -> bytes:
    return tiny_codec.encode([photo[100:170, 150:250]], 60.0)[0]


def decode_segment(codec: Codec, bitstream: bytes, segment: bytes, **changes: Any) -> None:
    header, _ = parse(bitstream, max_pixels=codec.max_pixels)
    header = replace(header, **changes)
    try:
        (picture,) = codec.decode([serialise(header, [segment] * header.tiles)])
    except MalformedBitstreamError:
        return
    assert picture.shape == (header.height, header.width, 3)
    assert picture.dtype == np.uint8


@FUZZ
@given(data=st.data())
def test_damaged_segment(tiny_codec: Codec, bitstream: bytes, data: st.DataObject) -> None:
    segment = bytearray(parse(bitstream, max_pixels=1 << 20).segments[0])
    for _ in range(data.draw(st.integers(1, 4))):
        segment[data.draw(st.integers(0, len(segment) - 1))] = data.draw(st.integers(0, 255))
    decode_segment(tiny_codec, bitstream, bytes(segment))


@FUZZ
@given(segment=st.binary(max_size=400))
def test_foreign_segment(tiny_codec: Codec, bitstream: bytes, segment: bytes) -> None:
    decode_segment(tiny_codec, bitstream, segment)
    decode_segment(tiny_codec, bitstream, segment[: len(segment) // 4 * 4])


@FUZZ
@given(width=st.integers(1, 300), height=st.integers(1, 300), cut=st.integers(0, 60))
def test_segment_of_another_size(
    tiny_codec: Codec, bitstream: bytes, width: int, height: int, cut: int
) -> None:
    segment = parse(bitstream, max_pixels=1 << 20).segments[0]
    decode_segment(tiny_codec, bitstream, segment[: len(segment) - 4 * cut], width=width, height=height)


SIDES = st.one_of(st.sampled_from([0, 1, 8, 63, 64, 65, 128, 1000, 1024, 1 << 20]), st.integers(0, 1 << 20))


@FUZZ
@given(width=st.integers(1, 1500), height=st.integers(1, 1500), tile_side=SIDES)
def test_tiles_of_another_size(
    tiny_codec: Codec, bitstream: bytes, width: int, height: int, tile_side: int
) -> None:
    segment = parse(bitstream, max_pixels=1 << 20).segments[0]
    tile_side = tile_side and max(tile_side, max(width, height) // 16)  # not too many tiles to serialise
    decode_segment(tiny_codec, bitstream, segment, width=width, height=height, tile_side=tile_side)


@FUZZ
@given(data=st.data())
def test_damaged_lossless_picture(tiny_codec: Codec, bitstream: bytes, data: st.DataObject) -> None:
    picture = np.random.default_rng(0).integers(0, 4, (70, 100, 3), np.uint8)
    segment = bytearray(lossless.compress(picture))
    for _ in range(data.draw(st.integers(0, 4))):
        segment[data.draw(st.integers(0, len(segment) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(segment)))
    decode_segment(tiny_codec, bitstream, bytes(segment[cut:]), lossless=True)
    decode_segment(tiny_codec, bitstream, bytes(segment[:cut]), lossless=True)

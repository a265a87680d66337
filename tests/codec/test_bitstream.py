"""The container: round trip, layout, limits, and one clear error for every kind of damage."""

from __future__ import annotations

import pickle
import subprocess
import sys

import google_crc32c
import pytest

from ugicm.codec import bitstream
from ugicm.codec.bitstream import MAGIC, MAX_HEADER_BYTES, Header, parse, peek, serialise
from ugicm.codec.errors import CodecError, LimitExceededError, MalformedBitstreamError, ModelMismatchError

DIGEST = bytes(range(8))
MAX_PIXELS = 1 << 24


def header(**changes: object) -> Header:
    values = {"version": 1, "width": 640, "height": 480, "quality": 50.0, "model_digest": DIGEST}
    return Header(**{**values, **changes})  # type: ignore[arg-type]


def sealed(body: bytes) -> bytes:
    """`body` with a valid checksum."""
    return body + google_crc32c.value(body).to_bytes(4, "little")


PLAIN = serialise(header(), [b"payload"])
TILED = serialise(header(tile_side=256), [bytes([i]) * i for i in range(6)])


def test_layout_is_fixed() -> None:
    expected = b"\x89UGIC\r\n\x1a\x01\x00" + b"\x00\x32" + DIGEST + b"\x80\x05\xe0\x03" + b"\x07payload"
    assert sealed(expected) == PLAIN


def test_crc_is_castagnoli() -> None:
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of CRC-32C


def test_tiles_are_row_major_and_ceil_divided() -> None:
    parsed = parse(TILED, max_pixels=MAX_PIXELS)
    assert parsed.header.tiles == 3 * 2
    assert parsed.segments == tuple(bytes([i]) * i for i in range(6))


def test_overhead_of_an_untiled_image_is_at_most_32_bytes() -> None:
    payload = bytes(1 << 21)
    assert len(serialise(header(width=16383, height=16383), [payload])) - len(payload) <= 32


def test_quality_is_rounded_once() -> None:
    original = header(quality=33.3333)
    assert original.quality == 8533 / 256
    assert parse(serialise(original, [b""]), max_pixels=MAX_PIXELS).header == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, this program reads 1"),
        ({"width": 0}, r"width must be 1\.\.1048576, got 0"),
        ({"height": (1 << 20) + 1}, r"height must be 1\.\.1048576, got 1048577"),
        ({"tile_side": -1}, r"tile_side must be 0\.\.1048576, got -1"),
        ({"quality": 0.99}, r"quality must be 1\.\.100, got 0\.99"),
        ({"quality": 100.01}, "quality must be"),
        ({"quality": float("nan")}, "quality must be"),
        ({"model_digest": b"short"}, "must have 8 bytes, got 5"),
    ],
)
def test_header_refuses_values_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        header(**changes)


def test_serialise_needs_one_segment_per_tile() -> None:
    with pytest.raises(ValueError, match="needs 6 segments, got 1"):
        serialise(header(tile_side=256), [b""])


def test_peek_needs_only_the_first_bytes() -> None:
    widest = header(width=1 << 20, height=1 << 20, tile_side=1 << 20)
    data = serialise(widest, [b"x" * 100])
    assert peek(data[:MAX_HEADER_BYTES]) == widest
    with pytest.raises(MalformedBitstreamError, match="truncated"):
        peek(data[: MAX_HEADER_BYTES - 1])
    assert peek(PLAIN[:24]) == header()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not a ugicm bitstream"),
        (PLAIN[1:].replace(b"UGIC", b"JPEG"), "not a ugicm bitstream"),
        (PLAIN.replace(b"\r\n", b"\n"), "text-mode"),
        (PLAIN.replace(b"\n", b"\r\n"), "text-mode"),
        (bytes(b & 0x7F for b in PLAIN), "text-mode"),
        (PLAIN.decode("latin-1").encode("utf-8"), "text-mode"),
        (PLAIN.decode("utf-8", errors="replace").encode("utf-8"), "text-mode"),
        (MAGIC + b"\x02" + PLAIN[9:], "version 2, this program reads 1"),
        (b"", "truncated: expected at least 20 bytes, got 0"),
        (PLAIN[:5], "truncated: expected at least 20 bytes, got 5"),
        (PLAIN[:-1], f"truncated: expected {len(PLAIN)} bytes, got {len(PLAIN) - 1}"),
        (PLAIN + b"\0\0", "2 trailing bytes"),
        (PLAIN[:-5] + b"D" + PLAIN[-4:], "checksum mismatch"),
        (PLAIN[:9] + b"\x82" + PLAIN[10:], "unknown flags 0x82"),
        # The rest carries a valid checksum, as a hostile sender would write it.
        (sealed(PLAIN[:10] + b"\0\0" + PLAIN[12:-4]), r"quality must be 1\.\.100, got 0"),
        (sealed(PLAIN[:20] + b"\0" + PLAIN[22:-4]), "width must be"),
        (sealed(PLAIN[:20] + b"\x80\x80\x80\x01" + PLAIN[22:-4]), "width must be"),
        (sealed(PLAIN[:20] + b"\x80\x00" + PLAIN[22:-4]), "shortest form"),
        (sealed(PLAIN[:20] + b"\x80" * 5 + b"\x01"), "longer than 5 bytes"),
        (sealed(TILED[:24] + b"\0" + TILED[26:-4]), "the tile side is 0"),
        (sealed(TILED[:24] + b"\x01"), "truncated: expected at least 307229 bytes, got 29"),
        (sealed(PLAIN[:24] + b"\xff\xff\xff\xff\x7f"), "truncated: expected 34359738400 bytes, got 33"),
    ],
)
def test_damage_gives_one_clear_error(data: bytes, message: str) -> None:
    with pytest.raises(MalformedBitstreamError, match=message):
        parse(data, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("bit", range(2, 8))
def test_flags_of_later_versions_are_refused(bit: int) -> None:
    with pytest.raises(MalformedBitstreamError, match=f"unknown flags {1 << bit:#04x}"):
        peek(PLAIN[:9] + bytes([1 << bit]) + PLAIN[10:])


def test_every_truncation_is_noticed() -> None:
    for data in (PLAIN, TILED):
        for size in range(len(data)):
            with pytest.raises(MalformedBitstreamError, match="truncated"):
                parse(data[:size], max_pixels=MAX_PIXELS)


def test_pixel_limit_names_its_setting() -> None:
    assert parse(PLAIN, max_pixels=640 * 480).header == header()
    with pytest.raises(LimitExceededError, match=r"640x480.*307200.*307199.*UGICM_MAX_PIXELS"):
        parse(PLAIN, max_pixels=640 * 480 - 1)


def test_errors_are_value_errors() -> None:
    assert issubclass(MalformedBitstreamError, CodecError)
    assert issubclass(CodecError, ValueError)


def test_module_needs_no_torch() -> None:
    script = f"import sys, {bitstream.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_errors_travel_between_processes() -> None:
    for error in (
        ModelMismatchError("aa", "bb"),
        LimitExceededError("bytes of a body", limit=10, actual=20, setting="UGICM_MAX_BYTES"),
    ):
        other = pickle.loads(pickle.dumps(error))
        assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))

"""The container around the segments: serialise, parse, peek. No torch, no I/O.

Layout, integers little-endian, varints LEB128 (shortest form, at most 5 bytes)::

    magic 8 | version u8 | flags u8 (bit 0: tiled, bit 1: lossless) | quality u16 (1/256 steps)
    model digest 8
    width varint | height varint | tile_side varint (only if tiled)
    length varint per segment | segments | CRC-32C u32 over everything before it

The sum is at most 32 bytes around an untiled image with sides below 16384. Every size is checked against
its limit and against the bytes that are there before anything of that size is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import google_crc32c

from ugicm.codec.errors import MalformedBitstreamError, check_pixels

MAGIC = b"\x89UGIC\r\n\x1a"
"""As in PNG: a byte above 127, a CR LF pair and a DOS end-of-file mark, so text-mode transfer is noticed."""
MEDIA_TYPE = "application/vnd.ugicm"
SUFFIX = ".ugic"
VERSION = 1
MAX_SIDE = 1 << 20
"""Largest width, height and tile side in pixels."""
MAX_HEADER_BYTES = 29
"""`peek` needs at most this many bytes from the start of a bitstream."""

_FIXED = struct.Struct("<8sBBH8s")
_CRC = struct.Struct("<I")
_TILED, _LOSSLESS = 1, 2
QUALITY_STEPS = 256
"""Steps of the stored quality for each unit of it."""
_MAX_VARINT_BYTES = 5


@dataclass(frozen=True)
class Header:
    """What a bitstream says about itself. Values out of range raise ``ValueError``."""

    version: int
    width: int
    height: int
    quality: float
    """1..100; rounded to 1/256 on construction, so that encoder and decoder use the same number."""
    model_digest: bytes
    """First 8 bytes of the digest of the model that wrote the segments."""
    tile_side: int = 0
    """Pixels per side of a tile; 0 = the image is a single tile."""
    lossless: bool = False
    """The one segment is the exact picture (`ugicm.codec.lossless`), not an entropy-coded latent."""

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"the bitstream has version {self.version}, this program reads {VERSION}")
        for name, low in (("width", 1), ("height", 1), ("tile_side", 0)):
            if not low <= getattr(self, name) <= MAX_SIDE:
                raise ValueError(f"{name} must be {low}..{MAX_SIDE}, got {getattr(self, name)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1..100, got {self.quality}")
        if len(self.model_digest) != 8:
            raise ValueError(f"the model digest must have 8 bytes, got {len(self.model_digest)}")
        if self.lossless and self.tile_side:
            raise ValueError("a lossless picture has no tiles")
        object.__setattr__(self, "quality", round(self.quality * QUALITY_STEPS) / QUALITY_STEPS)

    @property
    def tiles(self) -> int:
        """Number of tiles, and so of segments."""
        if not self.tile_side:
            return 1
        return -(-self.width // self.tile_side) * -(-self.height // self.tile_side)


class Bitstream(NamedTuple):
    """A parsed bitstream."""

    header: Header
    segments: tuple[bytes, ...]
    """One payload per tile, row-major."""


def serialise(header: Header, segments: Sequence[bytes]) -> bytes:
    """Pack into one bitstream; ``ValueError`` unless there is one segment per tile."""
    if len(segments) != header.tiles:
        raise ValueError(f"the header needs {header.tiles} segments, got {len(segments)}")
    out = bytearray(
        _FIXED.pack(
            MAGIC,
            header.version,
            (_TILED if header.tile_side else 0) | (_LOSSLESS if header.lossless else 0),
            round(header.quality * QUALITY_STEPS),
            header.model_digest,
        )
    )
    sides = [header.width, header.height] + ([header.tile_side] if header.tile_side else [])
    for value in [*sides, *map(len, segments)]:
        out += _varint(value)
    for segment in segments:
        out += segment
    out += _CRC.pack(google_crc32c.value(bytes(out)))
    return bytes(out)


def parse(data: bytes, *, max_pixels: int) -> Bitstream:
    """Check everything and split into header and segments.

    Raises:
        MalformedBitstreamError: not a whole, undamaged bitstream of this version.
        LimitExceededError: the image has more than `max_pixels` pixels.
    """
    header, position = _read_header(data)
    check_pixels(header.width, header.height, max_pixels)
    _need(data, position + header.tiles + _CRC.size, at_least=True)  # a length takes at least one byte
    lengths = []
    for _ in range(header.tiles):
        length, position = _read_varint(data, position)
        lengths.append(length)
    end = position + sum(lengths)
    _need(data, end + _CRC.size)
    if (trailing := len(data) - end - _CRC.size) > 0:
        raise MalformedBitstreamError(f"{trailing} trailing bytes after the end of the bitstream")
    if google_crc32c.value(data[:end]) != _CRC.unpack_from(data, end)[0]:
        raise MalformedBitstreamError("checksum mismatch: the bitstream is damaged")
    segments = []
    for length in lengths:
        segments.append(data[position : position + length])
        position += length
    return Bitstream(header, tuple(segments))


def peek(data: bytes) -> Header:
    """Header from the first `MAX_HEADER_BYTES` bytes or more, without checksum and pixel limit.

    Raises:
        MalformedBitstreamError: the bytes do not start with a header of this version.
    """
    return _read_header(data)[0]


def _read_header(data: bytes) -> tuple[Header, int]:
    """Header and the position of the first segment length."""
    if not MAGIC.startswith(data[: len(MAGIC)]):
        # Lost or doubled CR, stripped or re-encoded high byte: all leave the letters near the start.
        if b"UGIC" in data[:7]:
            raise MalformedBitstreamError(
                "damaged, perhaps by a text-mode transfer (line ends translated or characters re-encoded)"
            )
        raise MalformedBitstreamError("not a ugicm bitstream")
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise MalformedBitstreamError(
            f"the bitstream has version {data[len(MAGIC)]}, this program reads {VERSION}"
        )
    _need(data, _FIXED.size, at_least=True)
    _, version, flags, quality, digest = _FIXED.unpack_from(data)
    if flags & ~(_TILED | _LOSSLESS):
        raise MalformedBitstreamError(f"unknown flags {flags:#04x}")
    width, position = _read_varint(data, _FIXED.size)
    height, position = _read_varint(data, position)
    tile_side = 0
    if flags & _TILED:
        tile_side, position = _read_varint(data, position)
        if tile_side == 0:
            raise MalformedBitstreamError("tiled, but the tile side is 0")
    try:
        header = Header(
            version, width, height, quality / QUALITY_STEPS, digest, tile_side, bool(flags & _LOSSLESS)
        )
    except ValueError as error:
        raise MalformedBitstreamError(str(error)) from None
    return header, position


def _need(data: bytes, size: int, *, at_least: bool = False) -> None:
    if len(data) < size:
        expected = f"at least {size}" if at_least else f"{size}"
        raise MalformedBitstreamError(f"truncated: expected {expected} bytes, got {len(data)}")


def _varint(value: int) -> bytes:
    if value >> 7 * _MAX_VARINT_BYTES:
        raise ValueError(f"{value} does not fit a varint of {_MAX_VARINT_BYTES} bytes")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Value and the position after it."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        _need(data, position + index + 1, at_least=True)
        byte = data[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if byte == 0 and index > 0:
                raise MalformedBitstreamError(f"the number at byte {position} is not in its shortest form")
            return value, position + index + 1
    raise MalformedBitstreamError(f"the number at byte {position} is longer than {_MAX_VARINT_BYTES} bytes")

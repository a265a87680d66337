"""Image files to RGB arrays and back, with Pillow. No HTTP.

What `read_image` makes of an image file:

- PNG, JPEG, WebP, AVIF, BMP, TIFF, GIF; nothing else is opened. Of several frames or pages, the first.
- All metadata is dropped. The rest is `ugicm.pixels`.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Mapping

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from ugicm.choices import ImageFormat
from ugicm.codec.errors import CodecError, check_pixels
from ugicm.pixels import EXIF_BYTES, Pixels, to_rgb
from ugicm.server.isolated import read_isolated

MEDIA_TYPES: Mapping[ImageFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "npy": "application/x-npy",
}
"""What `write_image` writes."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
"""What `read_image` reads, in Pillow's words."""
ACCEPTED_MEDIA_TYPES = tuple(f"image/{name.lower()}" for name in FORMATS)
MAX_SIDE: Mapping[ImageFormat, int] = {"webp": 16383, "jpeg": 65500}
"""Largest width or height in pixels that a format can hold."""

READS_TO_OPEN = 20_000
"""Most reads of a file until its header is understood; photographs need 6 to 40. Pillow takes a header apart
in Python, piece by piece: millions of empty pieces would keep a core busy for minutes."""
LOAD_READS, BYTES_PER_READ = 200_000, 32
"""Most further reads while its pixels are loaded: so many, and one for so many bytes; a second or two."""
BMP_READS = 4_000_000
"""Most further reads of a BMP file instead: two for each run of a compressed one; some four seconds."""
RLE_PIXELS = 1 << 23
"""Most pixels of a compressed BMP file: Pillow fills what it leaves out byte by byte."""
SCANS, BYTES_PER_SCAN = 256, 1 << 16
"""Most scans of a JPEG file: so many, and one for so many bytes. Photographs have up to twenty; each is a
pass over the whole picture, and may be empty."""
EXIF_SEGMENTS = 64
"""Of a JPEG file: Pillow appends each to all before."""
TAG_VALUES, PLACES = 1 << 18, 1 << 22
"""Most numbers in a tag of a TIFF file, and in one that says where strips and tiles are: each is read by
itself, if the header needs it."""
_PLACES = {
    TiffImagePlugin.STRIPOFFSETS,
    TiffImagePlugin.STRIPBYTECOUNTS,
    TiffImagePlugin.TILEOFFSETS,
    TiffImagePlugin.TILEBYTECOUNTS,
}
_TEXTS = {1, 2, 7}
"""Types of a tag's values that are read at once: bytes and text."""
TILE_PIXELS = 1 << 22
"""Largest tile of a TIFF file that is smaller than one: a whole one is decoded."""

_SAVE_OPTIONS: Mapping[ImageFormat, Mapping[str, object]] = {
    "png": {"compress_level": 1},  # level 6 is 4 % smaller at best and takes 3 times as long
    "webp": {"lossless": True, "quality": 0, "method": 0},  # 25 % smaller than the PNG, and faster
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
}
# Pillow's own limit only warns up to twice its value and is one for the whole process; read_image checks.
Image.MAX_IMAGE_PIXELS = None


BAD_HEADER = "the header of the image is damaged, truncated or of a kind that is not supported"


class MalformedImageError(CodecError):
    """The bytes start like an image of an accepted format but cannot be decoded."""


class UnsupportedImageError(CodecError):
    """The bytes are not an image of an accepted format."""


class _BoundedReads(io.BytesIO):
    """A file that can be read `limit` times; more often raises `MalformedImageError`."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.limit, self._reads = READS_TO_OPEN, 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > self.limit:
            raise MalformedImageError(f"the image is in too many pieces: more than {self.limit} reads")
        return super().read(size)


def size_of_image(data: bytes) -> tuple[int, int]:
    """Width and height by the image's header; 0 if unreadable, `read_image` then says what is wrong."""
    try:
        if len(data) > EXIF_BYTES and b"Exif" in data and _is_avif(data):  # which Pillow looks at
            return read_isolated(data, 0).size or (0, 0)
        _check_parts(data)
        with Image.open(_BoundedReads(data), formats=FORMATS) as image:
            return image.width, image.height
    except Exception:
        return 0, 0


def read_image(data: bytes, *, max_pixels: int) -> Pixels:
    """Decode an image file to uint8 RGB (H, W, 3).

    Raises:
        UnsupportedImageError: none of the formats in `FORMATS`.
        MalformedImageError: damaged, truncated, or in so many pieces that reading them would take long.
        LimitExceededError: more than `max_pixels`; noticed in the header, before anything is decoded.
    """
    if _is_avif(data):
        return _read_avif(data, max_pixels)
    image = _open(data, max_pixels)
    try:
        return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # a kind of picture that Pillow opens and cannot convert
        raise MalformedImageError(f"the pixels of the image cannot be read ({error})") from error


def holds(width: int, height: int, format: ImageFormat) -> bool:
    """Whether a picture of this size in pixels can be written in a format."""
    return max(width, height) <= MAX_SIDE.get(format, math.inf)


def check_side(width: int, height: int, format: ImageFormat) -> None:
    """Refuse a picture that `write_image` could not write, by its size in pixels.

    Raises:
        CodecError: the picture is wider or higher than the format allows.
    """
    if not holds(width, height, format):
        raise CodecError(
            f"format={format} holds at most {MAX_SIDE[format]} pixels per side, "
            f"the picture has {width}x{height}; format=png holds it"
        )


def write_image(rgb: Pixels, format: ImageFormat) -> bytes:
    """Encode uint8 RGB (H, W, 3) as an image file; all but ``jpeg`` (quality 95, 4:4:4) are lossless.

    Raises:
        CodecError: the picture is wider or higher than the format allows.
    """
    check_side(rgb.shape[1], rgb.shape[0], format)
    out = io.BytesIO()
    if format == "npy":
        np.lib.format.write_array(out, rgb, allow_pickle=False)
        return out.getvalue()
    Image.fromarray(rgb).save(out, format, **_SAVE_OPTIONS[format])
    return out.getvalue()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its pixels loaded."""
    file = _BoundedReads(data)
    _check_parts(data)
    try:
        image = Image.open(file, formats=FORMATS)
        check_pixels(*image.size, max_pixels)
        _check_tiles(image)
        _check_runs(image)
        file.limit += BMP_READS if image.format == "BMP" else LOAD_READS + len(data) // BYTES_PER_READ
        image.load()
    except (CodecError, MemoryError):
        raise
    except UnidentifiedImageError:
        if _starts_like_an_image(data):
            raise MalformedImageError(BAD_HEADER) from None
        raise UnsupportedImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged files, Pillow's parsers raise nearly anything
        raise MalformedImageError(f"the image is damaged or truncated ({error})") from error
    return image


def _is_avif(data: bytes) -> bool:
    accept = Image.OPEN["AVIF"][1]
    return accept is not None and accept(data[:16]) is True


def _read_avif(data: bytes, max_pixels: int) -> Pixels:
    answer = read_isolated(data, max_pixels)
    if answer.size is None:
        raise MalformedImageError(f"{BAD_HEADER} ({answer.error})")
    check_pixels(*answer.size, max_pixels)
    if answer.pixels is None:
        raise MalformedImageError(f"the image is damaged or truncated ({answer.error})")
    return answer.pixels


def _check_parts(data: bytes) -> None:
    """Refuse files that are small and would keep Pillow busy for minutes, before it sees them.

    Raises:
        MalformedImageError: too many scans, EXIF segments or numbers in a tag.
    """
    if data.startswith(b"\xff\xd8"):
        # Nowhere but at a scan's head in what is coded; by chance in metadata, if they are large.
        limit = SCANS + len(data) // BYTES_PER_SCAN
        if (scans := data.count(b"\xff\xda")) > limit:
            raise MalformedImageError(
                f"the JPEG file has {scans} scans; {limit} are taken of {len(data)} bytes"
            )
        if (segments := data.count(b"Exif\0\0")) > EXIF_SEGMENTS:
            raise MalformedImageError(
                f"the JPEG file has {segments} EXIF segments, {EXIF_SEGMENTS} are taken"
            )
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        with contextlib.suppress(struct.error):  # truncated, as Pillow will say
            _check_tags(data)


def _check_tags(data: bytes) -> None:
    order, large = "<>"[data[0] == ord("M")], b"+" in data[:4]  # BigTIFF
    place, count = struct.Struct(order + "IQ"[large]), struct.Struct(order + "HQ"[large])
    entry = struct.Struct(f"{order}HH{'IQ'[large]}{place.size}x")
    (start,) = place.unpack_from(data, place.size)
    (entries,) = count.unpack_from(data, start)
    for index in range(min(entries, READS_TO_OPEN)):  # each is a read, when Pillow's turn comes
        tag, kind, values = entry.unpack_from(data, start + count.size + index * entry.size)
        limit = PLACES if tag in _PLACES else TAG_VALUES
        if kind not in _TEXTS and values > limit:
            raise MalformedImageError(f"tag {tag} of the TIFF file has {values} values, {limit} are taken")


def _check_tiles(image: Image.Image) -> None:
    if isinstance(image, TiffImageFile) and image.tag_v2.get(TiffImagePlugin.TILEWIDTH):
        width, height = (
            int(image.tag_v2.get(tag, 0)) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)
        )
        if width * height > max(TILE_PIXELS, image.width * image.height):
            raise MalformedImageError(
                f"tiles of {width}x{height} pixels are larger than the {image.width}x{image.height} image "
                f"and than {TILE_PIXELS} pixels"
            )


def _check_runs(image: Image.Image) -> None:
    pixels = image.width * image.height
    if image.format == "BMP" and image.info.get("compression") and pixels > RLE_PIXELS:
        raise MalformedImageError(
            f"a compressed BMP file has at most {RLE_PIXELS} pixels here, this one {pixels}"
        )


def _starts_like_an_image(data: bytes) -> bool:
    accepts = (Image.OPEN[name][1] for name in FORMATS)
    return any(accept is not None and accept(data[:16]) for accept in accepts)

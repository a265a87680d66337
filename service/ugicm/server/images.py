"""Image files to RGB arrays and back, with Pillow. No HTTP.

What `read_image` makes of an image file:

- PNG, JPEG, WebP, AVIF, BMP, TIFF, GIF; nothing else is opened. Of several frames or pages, the first.
- All metadata is dropped. The rest is `ugicm.pixels`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ugicm.choices import ImageFormat
from ugicm.codec.errors import CodecError, check_pixels
from ugicm.pixels import Pixels, load, to_rgb

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

_SAVE_OPTIONS: Mapping[ImageFormat, Mapping[str, object]] = {
    "png": {"compress_level": 1},  # level 6 is 4 % smaller at best and takes 3 times as long
    "webp": {"lossless": True, "quality": 0, "method": 0},  # 25 % smaller than the PNG, and faster
    "jpeg": {"quality": 95, "subsampling": "4:4:4"},
}
# Pillow's own limit only warns up to twice its value and is one for the whole process; read_image checks.
Image.MAX_IMAGE_PIXELS = None
# Profiles and descriptions of a few megabytes are usual.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20


class MalformedImageError(CodecError):
    """The bytes start like an image of an accepted format but cannot be decoded."""


class UnsupportedImageError(CodecError):
    """The bytes are not an image of an accepted format."""


def read_image(data: bytes, *, max_pixels: int) -> Pixels:
    """Decode an image file to uint8 RGB (H, W, 3).

    There is no limit to what a hostile file may take: for such, `ugicm.server.isolated`.

    Raises:
        UnsupportedImageError: none of the formats in `FORMATS`.
        MalformedImageError: damaged or truncated.
        LimitExceededError: more than `max_pixels`; noticed in the header, before anything is decoded.
    """
    image = open_image(data)
    check_pixels(*image.size, max_pixels)
    return load_pixels(image)


def open_image(data: bytes) -> Image.Image:
    """An image file of which the header is read.

    Raises:
        UnsupportedImageError: none of the formats in `FORMATS`.
        MalformedImageError: damaged, or truncated within the header.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        if _starts_like_an_image(data):
            raise MalformedImageError(
                "the header of the image is damaged, truncated or of a kind that is not supported"
            ) from None
        raise UnsupportedImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged files, Pillow's parsers raise nearly anything
        raise MalformedImageError(f"the image is damaged or truncated ({error})") from error


def load_pixels(image: Image.Image) -> Pixels:
    """uint8 RGB (H, W, 3) of an image that is open.

    Raises:
        MalformedImageError: damaged, truncated, or of a kind that cannot be converted.
    """
    try:
        load(image)
    except MemoryError:
        raise
    except Exception as error:
        raise MalformedImageError(f"the image is damaged or truncated ({error})") from error
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


def _starts_like_an_image(data: bytes) -> bool:
    accepts = (Image.OPEN[name][1] for name in FORMATS)
    return any(accept is not None and accept(data[:16]) for accept in accepts)

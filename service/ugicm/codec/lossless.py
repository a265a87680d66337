"""Pictures that are cheaper kept exactly: drawn ones, as the data of a lossless WebP without its container.

Learned transforms are poor at pictures of few colours and hard edges (1-pixel stripes, pixel art, some
screenshots), which a lossless format keeps in a few hundred bytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PillowImage
from PIL import _webp

from ugicm.codec.errors import MalformedBitstreamError

if TYPE_CHECKING:  # imported, it would change how the program's Pillow reads TIFF
    from ugicm.pixels import Pixels as Image

MAX_SIDE = 16383
"""Longest side in pixels of a WebP."""
PROMISING_BPP = 4.0
"""Pictures are tried whose sample needs fewer bits per pixel with zlib; photos need 4 to 24."""
THOROUGH_PIXELS = 10_000_000
"""Larger pictures are coded faster, which costs text a third of the bytes: where a pattern repeats, libwebp
takes a time that grows with the square of the pixels, and cannot be stopped."""
_BANDS, _BAND_ROWS = 4, 4
_SIGNATURE = 0x2F
_HEAD = struct.Struct("<BI")
_RIFF = struct.Struct("<4sI4s4sI")


def promising(image: Image) -> bool:
    """Whether `compress` is worth its time: a look at some rows, about 1 ms a megapixel."""
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        return False
    starts = np.linspace(0, max(height - _BAND_ROWS, 0), _BANDS).astype(int)
    sample = np.concatenate([image[start : start + _BAND_ROWS] for start in starts])
    return 8 * len(zlib.compress(sample.tobytes(), 1)) < PROMISING_BPP * sample.shape[0] * width


def compress(image: Image) -> bytes:
    """The data of a VP8L chunk (RFC 9649)."""
    out = io.BytesIO()
    method = 4 if image.shape[0] * image.shape[1] <= THOROUGH_PIXELS else 0
    PillowImage.fromarray(image).save(out, "WEBP", lossless=True, quality=80, method=method, exact=True)
    data = out.getvalue()
    *_, chunk, size = _RIFF.unpack_from(data)
    if chunk != b"VP8L":
        raise RuntimeError(f"Pillow wrote a WebP with a chunk {chunk!r} first")
    return data[_RIFF.size : _RIFF.size + size]


def decompress(data: bytes, width: int, height: int) -> Image:
    """Inverse of `compress`; what may follow the picture's data is not looked at.

    Raises:
        MalformedBitstreamError: damaged, or another size than `width` x `height`.
    """
    if len(data) < _HEAD.size:
        raise MalformedBitstreamError(f"truncated: a lossless picture has {len(data)} bytes")
    # The sizes are compared before the decoder allocates anything.
    signature, bits = _HEAD.unpack_from(data)
    size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if signature != _SIGNATURE or size != (width, height):
        raise MalformedBitstreamError(f"the lossless data are not those of a {width}x{height} picture")
    body = data + bytes(len(data) % 2)
    file = _RIFF.pack(b"RIFF", _RIFF.size - 8 + len(body), b"WEBP", b"VP8L", len(data)) + body
    try:
        # Not by Pillow's `open`, which has a limit of pixels for the whole program; the codec has its own.
        decoder = _webp.WebPAnimDecoder(file)
        size, frame = decoder.get_info()[:2], decoder.get_next()
    except MemoryError:
        raise
    except Exception as error:  # on damaged files, Pillow's parsers raise nearly anything
        raise MalformedBitstreamError(f"the lossless picture is damaged ({error})") from error
    if frame is None:
        raise MalformedBitstreamError("the lossless picture is damaged")
    rgba = np.frombuffer(frame[0], np.uint8)
    if rgba.size != 4 * height * width:
        raise MalformedBitstreamError(f"the lossless picture came out as {size}")
    return rgba.reshape(height, width, 4)[..., :3].copy()

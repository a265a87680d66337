"""RGB arrays of pictures that Pillow has opened, the same for the service, for training and for measuring.

- EXIF orientation is applied.
- Colours are converted to sRGB by the embedded ICC profile; a profile that is damaged, does not fit the
  pixels, or has elements of its own to compute with (``D2B0``: they may take any time) is ignored, and so
  are other colour hints (PNG gamma).
- 8 bits per channel: 16-bit grey is rounded from 0..65535, 12-bit grey (TIFF) from 0..4095, 16-bit colour
  keeps its upper byte, floating point is clipped to 0..1.
- Grey, palette and CMYK become RGB; transparent pixels are blended with white.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin
from PIL.TiffImagePlugin import TiffImageFile

Pixels = NDArray[np.uint8]
"""RGB picture (H, W, 3)."""

# Pillow's own reader takes 16 bits of separate planes for 8.
TiffImagePlugin.READ_LIBTIFF = True

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it."""
_ICC_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}


EXIF_BYTES = 1 << 20
"""Longer metadata are not looked at: a single number of theirs may be millions."""


_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
"""Raw modes of Pillow for big-endian numbers -> those for numbers as the processor has them."""


def load(image: Image.Image) -> None:
    """Load the pixels of a picture that Pillow has opened."""
    if isinstance(image, TiffImageFile):
        # libtiff has brought compressed numbers into our order already, which Pillow forgets for these.
        image.tile = [
            tile._replace(args=(_NATIVE.get(tile.args[0], tile.args[0]), *tile.args[1:]))
            if tile.codec_name == "libtiff" and isinstance(tile.args, tuple)
            else tile
            for tile in image.tile
        ]
    image.load()


def to_rgb(image: Image.Image) -> Pixels:
    """uint8 RGB (H, W, 3) of a picture whose pixels are loaded."""
    profile, orientation = image.info.get("icc_profile"), _orientation(image)
    image = image.convert("LA") if image.mode == "La" else _to_8_bit(image)
    alpha = None
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # Of a PNG with 16 bits, of which Pillow keeps the upper 8.
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = image.convert("L") if image.mode in ("1", "L", "LA") else rgba.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in _ICC_SPACES:
        image = image.convert("RGB")
    image = _to_srgb(image, profile)
    if alpha is not None:
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=alpha)
        image = canvas
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.array(image)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Mode L from 16-bit or 32-bit integers (0..65535) or from floating point (0..1); others as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float32)
    top = 1.0 if image.mode == "F" else 65535.0
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        # Pillow leaves both to us: how many of the bits there are, and whether 0 is white.
        top = 2.0 ** image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0] - 1
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            values = top - values
    transparent = values == image.info.get("transparency")  # a grey value, if any
    values = np.clip(np.nan_to_num(values, copy=False), 0, top) * (255.0 / top)
    grey = Image.fromarray((values + 0.5).astype(np.uint8))
    if not np.any(transparent):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; after loading, as TIFF files are turned by Pillow then."""
    if len(image.info.get("exif") or b"") > EXIF_BYTES:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata must not cost the picture
        return 1
    return value if isinstance(value, int) else 1


def _tags(profile: bytes) -> Iterator[bytes]:
    """Name, place and length of each of an ICC profile's tags, those that lcms looks at."""
    count = min(100, int.from_bytes(profile[128:132]))
    return (profile[at : at + 12] for at in range(132, 132 + 12 * count, 12))


def _changes(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform from RGB to sRGB moves any colour by more than rounding does."""
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3)
    moved = ImageCms.applyTransform(Image.fromarray(cube), transform)
    return bool(np.abs(np.asarray(moved).astype(int) - cube).max() > 1)


def _to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """RGB from a picture of mode L, RGB or CMYK."""
    # A TIFF's may be anything.
    if isinstance(profile, bytes) and not any(tag.startswith(b"D2B") for tag in _tags(profile)):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space == _ICC_SPACES[image.mode]:
                target = ImageCms.createProfile("sRGB")
                transform = ImageCms.buildTransform(source, target, image.mode, "RGB")
                if image.mode != "RGB" or _changes(transform):
                    return ImageCms.applyTransform(image, transform) or image.convert("RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert("RGB")

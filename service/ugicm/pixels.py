"""What reading image files has in common, whoever reads them."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_8_bit(image: Image.Image) -> Image.Image:
    """Mode L from 16-bit or 32-bit integers (0..65535) or from floating point (0..1); others as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float32)
    top = 1.0 if image.mode == "F" else 65535.0
    values = np.nan_to_num(values, copy=False).clip(0, top) * (255 / top)
    return Image.fromarray((values + 0.5).astype(np.uint8))

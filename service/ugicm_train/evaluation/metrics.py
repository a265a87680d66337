"""Distance of a decoded picture from its original."""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""RGB picture (H, W, 3)."""

LOSSLESS_DB = 100.0
"""Stands for the infinite PSNR of equal pictures, so that averages stay finite."""
MS_SSIM_MIN_SIDE = 161
"""Shortest side for five scales of an 11-pixel window."""
BUTTERAUGLI = "butteraugli"
"""Program of the Debian package of the same name (google/butteraugli)."""
BUTTERAUGLI_MIN_SIDE = 32


def bits_per_pixel(data: bytes, image: Image) -> float:
    """Of what codes a picture, everything counted."""
    return 8 * len(data) / (image.shape[0] * image.shape[1])


def psnr_db(original: Image, decoded: Image) -> float:
    """10 log10(255^2 / MSE) over all pixels and the three channels, at most `LOSSLESS_DB`."""
    if original.shape != decoded.shape:
        raise ValueError(f"pictures of different sizes: {original.shape} and {decoded.shape}")
    mse = float(np.mean(np.square(original.astype(np.float32) - decoded), dtype=np.float64))
    return min(LOSSLESS_DB, 10 * math.log10(255**2 / mse)) if mse else LOSSLESS_DB


def ms_ssim(original: Image, decoded: Image) -> float | None:
    """MS-SSIM (Wang et al. 2003) of the 8-bit RGB pictures, 0..1, the mean of the channels.

    None where a side is shorter than `MS_SSIM_MIN_SIDE`.
    """
    if min(original.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    import torch
    from pytorch_msssim import ms_ssim as ms_ssim_of

    x, y = (torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() for p in (original, decoded))
    return float(ms_ssim_of(x, y, data_range=255.0))


def butteraugli_installed() -> bool:
    """Whether the program `BUTTERAUGLI` is there."""
    return shutil.which(BUTTERAUGLI) is not None


def butteraugli(original: Image, decoded: Image) -> float | None:
    """Butteraugli distance, 0 for equal pictures, about 1 at the limit of visibility.

    None for pictures smaller than the program takes, `BUTTERAUGLI_MIN_SIDE`.
    """
    if min(original.shape[:2]) < BUTTERAUGLI_MIN_SIDE:
        return None
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "original.png", Path(folder) / "decoded.png"]
        for path, picture in zip(paths, (original, decoded), strict=True):
            PIL.Image.fromarray(picture).save(path, compress_level=0)
        result = subprocess.run(  # noqa: S603  fixed program, own files
            [BUTTERAUGLI, *map(str, paths)], capture_output=True, text=True, check=False
        )
    if result.returncode:
        raise OSError(f"{BUTTERAUGLI} failed ({result.returncode}): {result.stderr.strip()}")
    return float(result.stdout)

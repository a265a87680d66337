"""Published rate-distortion points of other codecs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ugicm_train.evaluation.bdrate import Curve, decibels
from ugicm_train.files import read_rows

LABELS = {
    "jpeg": "JPEG",
    "jpeg2000": "JPEG 2000",
    "webp": "WebP",
    "avif": "AVIF",
    "av1": "AV1",
    "jxl": "JPEG XL",
    "hm": "HM (HEVC)",
    "bpg-444": "BPG 4:4:4",
    "vtm": "VTM (VVC)",
}
"""How reports spell the codecs; others appear under their own names."""
METRICS = {"psnr_db": "PSNR", "ms_ssim": "MS-SSIM"}


class Point(NamedTuple):
    """A codec at one setting, averaged over a data set."""

    bpp: float
    psnr_db: float
    ms_ssim: float | None = None


def read_anchors(path: Path) -> dict[str, list[Point]]:
    """Points by codec, from a CSV with the columns codec, bpp, psnr_db and ms_ssim (0..1, may be empty).

    Raises:
        ValueError: a row that is no point of a curve; the message has it.
    """
    codecs: dict[str, list[Point]] = {}
    for row in read_rows(path):
        try:
            ms_ssim = float(row["ms_ssim"]) if row.get("ms_ssim") else None
            point = Point(float(row["bpp"]), float(row["psnr_db"]), ms_ssim)
            if not (point.bpp > 0 and all(math.isfinite(value or 0.0) for value in point)):
                raise ValueError("a rate above 0 and finite values are needed")
            if not 0 <= (ms_ssim or 0.0) <= 1:
                raise ValueError("an MS-SSIM is in 0..1, not in dB")
            codecs.setdefault(row["codec"], []).append(point)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a row of codec, bpp, psnr_db, ms_ssim: {row} ({error})") from error
    return {codec: sorted(points) for codec, points in codecs.items()}


def curve(points: Sequence[Point], metric: str) -> Curve | None:
    """Curve of a metric (a key of `METRICS`), in dB; None where fewer than two different values are known."""
    known = [(p.bpp, p.psnr_db if metric == "psnr_db" else p.ms_ssim) for p in points]
    pairs = [
        (bpp, value if metric == "psnr_db" else decibels(value)) for bpp, value in known if value is not None
    ]
    return Curve(*zip(*pairs, strict=True)) if len({quality for _, quality in pairs}) > 1 else None


def points_of(measured: Mapping[str, Any]) -> list[Point]:
    """Points of one of the ``curves`` of rd.json."""
    return [Point(p["bpp"], p["psnr_db"], p["ms_ssim"]) for p in measured["points"]]

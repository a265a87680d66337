"""``ugicm-train robustness``: pictures that are not photos, coded beside JPEG at the same size.

The pictures are generated, the same on every run, so that nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ugicm_train.evaluation.coders import Coder, pillow_coder, ugicm_coder
from ugicm_train.evaluation.metrics import Image, psnr_db

SIDE = 512
"""Pixels per side of the generated pictures."""
QUALITY = 50.0
MAX_LOSS_DB = 3.0
"""How far below JPEG's PSNR at the same size a picture may come out."""
MAX_SHIFT = 1.0
"""Largest mean error of a colour channel of a grey picture, in 1/255."""
GREY = ("grey ramp", "flat grey", "stripes", "checkerboard")
"""Pictures without colour, on which a colour shift is measured."""

_SENTENCE = "The quick brown fox jumps over the lazy dog 0123456789 (){}[]<>;:=+*/ "
_INK = ((20, 20, 20), (0, 90, 180), (160, 30, 30), (20, 120, 40))


class Result(NamedTuple):
    """One picture through our codec and through JPEG."""

    picture: str
    bytes: int
    psnr_db: float
    jpeg_bytes: int
    """Of the smallest JPEG that is at least as large as ours, or of the largest there is."""
    jpeg_psnr_db: float
    shift: float | None
    """Largest mean signed error of a channel in 1/255; grey pictures only."""

    @property
    def passed(self) -> bool:
        """Within `MAX_LOSS_DB` of JPEG and, if grey, within `MAX_SHIFT`."""
        level = self.shift is None or self.shift < MAX_SHIFT
        return level and self.psnr_db >= self.jpeg_psnr_db - MAX_LOSS_DB


def synthetic_pictures(side: int = SIDE) -> dict[str, Image]:
    """RGB pictures (side, side, 3) by name; equal on every call."""
    generator = np.random.default_rng(20250101)
    y, x = np.mgrid[:side, :side]
    ramp = 255 * x / (side - 1)
    colour_ramp = np.stack([ramp, 255 * y / (side - 1), 255 - ramp], -1)
    noise = generator.integers(0, 256, (side, side, 3))
    grain = 128 + 20 * generator.standard_normal((side, side, 3))
    squares = np.where((x // 32 + y // 32)[..., None] % 2, (230, 30, 40), (20, 60, 220))
    return {
        "screenshot": _screenshot(side),
        "line art": _line_art(side),
        "flat grey": _grey(np.full((side, side), 119)),
        "flat red": _picture(np.full((side, side, 3), (230, 30, 40))),
        "colour squares": _picture(squares),
        "noise": _picture(noise),
        "grain": _picture(grain),
        "grey ramp": _grey(ramp),
        "colour gradient": _picture(colour_ramp),
        "stripes": _grey(255 * (x % 2)),
        "colour stripes": _picture(np.where(y[..., None] % 2, (255, 0, 255), (0, 255, 0))),
        "checkerboard": _grey(255 * ((x + y) % 2)),
    }


def measure(ours: Coder, jpeg: Coder, pictures: dict[str, Image]) -> Iterable[Result]:
    """Code every picture at `QUALITY` and find the JPEG of the same size."""
    for name, picture in pictures.items():
        data = ours.encode(picture, QUALITY)
        decoded = ours.decode(data, 0.0)
        candidates = [jpeg.encode(picture, quality) for quality in range(1, 101)]
        larger = [candidate for candidate in candidates if len(candidate) >= len(data)]
        peer = min(larger, key=len) if larger else max(candidates, key=len)
        shift = None
        if name in GREY:
            error = decoded.astype(np.float64) - picture
            shift = float(np.abs(error.mean((0, 1))).max())
        yield Result(
            name,
            len(data),
            psnr_db(picture, decoded),
            len(peer),
            psnr_db(picture, jpeg.decode(peer, 0.0)),
            shift,
        )


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = [
        "| picture | bytes | PSNR (dB) | JPEG bytes | JPEG PSNR (dB) | gain (dB) | grey shift | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in results:
        shift = "" if r.shift is None else f"{r.shift:.2f}"
        lines.append(
            f"| {r.picture} | {r.bytes} | {r.psnr_db:.2f} | {r.jpeg_bytes} | {r.jpeg_psnr_db:.2f} | "
            f"{r.psnr_db - r.jpeg_psnr_db:+.2f} | {shift} | {'ok' if r.passed else 'fails'} |"
        )
    return "\n".join([*lines, ""])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train robustness``."""
    parser.add_argument("model", help="name of a model in the store, or its folder")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 1 if a picture fails."""
    from ugicm.codec.store import load_codec, model_path

    folder = model_path(arguments.model)
    codec = load_codec(folder, device=arguments.device, precision=arguments.precision)
    results = list(measure(ugicm_coder(codec, folder), pillow_coder("jpeg"), synthetic_pictures()))
    text = table(results)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    return 0 if all(result.passed for result in results) else 1


def _picture(values: np.typing.NDArray[np.generic]) -> Image:
    return np.clip(np.rint(values.astype(np.float64)), 0, 255).astype(np.uint8)


def _grey(values: np.typing.NDArray[np.generic]) -> Image:
    return np.repeat(_picture(values)[..., None], 3, 2)


def _screenshot(side: int) -> Image:
    """A window with a title bar and lines of text in several sizes and colours."""
    image = PIL.Image.new("RGB", (side, side), (250, 250, 248))
    draw = PIL.ImageDraw.Draw(image)
    draw.rectangle((0, 0, side, 24), fill=(45, 55, 72))
    draw.ellipse((side - 20, 6, side - 8, 18), fill=(230, 80, 70))
    draw.text((8, 5), "document.txt", fill=(240, 240, 240), font=PIL.ImageFont.load_default(13))
    top = 32
    for line in range(side):
        size = 10 + 2 * (line % 4)
        if top + size > side:
            break
        text = (_SENTENCE * 3)[line:]
        draw.text((10, top), text, fill=_INK[line % 4], font=PIL.ImageFont.load_default(size))
        top += size + 4
    return np.asarray(image)


def _line_art(side: int) -> Image:
    """Thin black curves on white: circles, rays, a sine."""
    image = PIL.Image.new("RGB", (side, side), "white")
    draw = PIL.ImageDraw.Draw(image)
    middle = side // 2
    for radius in range(8, middle, 12):
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), outline="black")
    for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
        end = middle * (1 + np.cos(angle)), middle * (1 + np.sin(angle))
        draw.line((middle, middle, *end), fill="black")
    wave = [(x, middle + side / 4 * np.sin(x / 20)) for x in range(side)]
    draw.line(wave, fill="black", width=2)
    return np.asarray(image)

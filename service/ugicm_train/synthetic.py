"""Pictures that no camera takes: flat colour, gradients, stripes, text, line art, noise.

A few of them among the photographs keep a codec from failing on screenshots, drawings and test patterns.
"""

from __future__ import annotations

import string
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
"""(size, size, 3)."""

_LETTERS = string.ascii_letters + string.digits + string.punctuation + "     "
FONT_SIZE_MIN, FONT_SIZE_MAX = 9, 28
WIDTH_MAX = 16
"""Widest stripes, longest side of a checkerboard's squares and longest wave, in pixels."""
GREY_SHARE = 0.4


def _colour(random: Generator) -> NDArray[np.uint8]:
    """(3,), grey or black or white more often than chance."""
    kind = random.random()
    if kind < GREY_SHARE:
        return np.full(3, random.integers(256), np.uint8)
    if kind < GREY_SHARE + 0.2:
        return np.full(3, random.choice((0, 255)), np.uint8)
    return random.integers(256, size=3, dtype=np.uint8)


def _fill(random: Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in _colour(random))
    return red, green, blue


def flat(random: Generator, size: int) -> Picture:
    return np.full((size, size, 3), _colour(random))


def gradient(random: Generator, size: int) -> Picture:
    """Between two colours, along a line or around a point."""
    y, x = np.mgrid[:size, :size] / size
    if random.random() < 0.5:
        angle = random.uniform(0, 2 * np.pi)
        ramp = x * np.cos(angle) + y * np.sin(angle)
    else:
        ramp = np.hypot(x - random.random(), y - random.random())
    ramp = (ramp - ramp.min()) / np.ptp(ramp)
    first, second = _colour(random).astype(float), _colour(random).astype(float)
    return (first + (second - first) * ramp[..., None] + random.random()).clip(0, 255).astype(np.uint8)


def _width(random: Generator) -> int:
    """Narrow stripes are the hard ones: every second pattern has one or two pixels."""
    return int(random.integers(1, 3)) if random.random() < 0.5 else int(random.integers(3, WIDTH_MAX + 1))


def _pattern(random: Generator, on: NDArray[np.bool_]) -> Picture:
    """Two colours of any contrast: full contrast alone is too far from photographs to be learned."""
    first, second = _colour(random).astype(float), _colour(random).astype(float)
    second = first + random.random() * (second - first)
    return np.where(on[..., None], first, second).astype(np.uint8)


def stripes(random: Generator, size: int) -> Picture:
    on = np.broadcast_to((np.arange(size) // _width(random)) % 2 == 1, (size, size))
    return _pattern(random, on if random.random() < 0.5 else on.T)


def checkerboard(random: Generator, size: int) -> Picture:
    on = np.arange(size) // _width(random)
    return _pattern(random, (on[:, None] + on) % 2 == 1)


def grating(random: Generator, size: int) -> Picture:
    """Waves in any direction, closer here than there, from smooth to sharp: fabrics, blinds, screens."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle, bend = random.uniform(0, 2 * np.pi), random.uniform(-0.3, 0.3, 3)
    along = x * np.cos(angle) + y * np.sin(angle)
    # Frequencies, not periods, evenly: half of the periods are below four pixels.
    frequency = random.uniform(1 / WIDTH_MAX, 1 / 2)
    phase = 2 * np.pi * size * frequency * (along + bend[0] * x * y + bend[1] * x**2 + bend[2] * y**2)
    wave = np.tanh(np.exp(random.uniform(-2, 2)) * np.sin(phase))
    share = 0.5 + 0.5 * wave / np.abs(wave).max()
    first, second = gradient(random, size).astype(float), _colour(random).astype(float)
    strength = random.random()
    return (first + strength * share[..., None] * (second - first)).astype(np.uint8)


def noise(random: Generator, size: int) -> Picture:
    """Grey or coloured noise of any strength over a colour."""
    shape = (size, size, 1 if random.random() < 0.5 else 3)
    noisy = _colour(random) + random.normal(0, np.exp(random.uniform(0, 4)), shape)
    return noisy.clip(0, 255).astype(np.uint8)


def _write(draw: ImageDraw.ImageDraw, random: Generator, box: tuple[int, int, int, int]) -> None:
    """Lines of random characters in one colour from the top left of the box (left, top, right, bottom)."""
    size = int(random.integers(FONT_SIZE_MIN, FONT_SIZE_MAX + 1))
    font = ImageFont.load_default(size)
    fill, (left, top, right, bottom) = _fill(random), box
    for y in range(top, bottom, round(size * 1.3)):
        letters = random.choice(list(_LETTERS), size=max(1, 2 * (right - left) // size))
        draw.text((left, y), "".join(letters), fill=fill, font=font)


def text(random: Generator, size: int) -> Picture:
    image = Image.fromarray(flat(random, size))
    _write(ImageDraw.Draw(image), random, (int(random.integers(16)), int(random.integers(16)), size, size))
    return np.array(image)


def line_art(random: Generator, size: int) -> Picture:
    image = Image.fromarray(flat(random, size))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(4, 40))):
        (x0, x1), (y0, y1) = (sorted(random.integers(-20, size + 20, 2).tolist()) for _ in range(2))
        fill, width = _fill(random), int(random.integers(1, 5))
        kind = random.integers(3)
        if kind == 0:
            start, end = ((x0, y0), (x1, y1)) if random.random() < 0.5 else ((x0, y1), (x1, y0))
            draw.line((start, end), fill=fill, width=width)
        elif kind == 1:
            draw.ellipse((x0, y0, x1, y1), outline=fill, width=width)
        else:
            draw.rectangle((x0, y0, x1, y1), outline=fill, width=width)
    return np.array(image)


def screenshot(random: Generator, size: int) -> Picture:
    """Overlapping boxes of flat colour or gradient, some with text."""
    image = Image.fromarray(flat(random, size))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(3, 12))):
        (left, right), (top, bottom) = (sorted(random.integers(0, size, 2).tolist()) for _ in range(2))
        if right - left < 8 or bottom - top < 8:
            continue
        if random.random() < 0.2:
            part = Image.fromarray(gradient(random, size)).resize((right - left, bottom - top))
            image.paste(part, (left, top))
        else:
            draw.rectangle((left, top, right, bottom), fill=_fill(random))
        if random.random() < 0.6:
            _write(draw, random, (left + 3, top + 3, right, bottom))
    return np.array(image)


KINDS: tuple[Callable[[Generator, int], Picture], ...] = (
    flat, gradient, stripes, checkerboard, grating, noise, text, line_art, screenshot,
)  # fmt: skip


def draw_synthetic(random: Generator, size: int) -> Picture:
    """A picture of a random kind, uint8 (size, size, 3)."""
    kind = KINDS[int(random.integers(len(KINDS)))]
    return kind(random, size)

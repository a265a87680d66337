"""AVIF files, read in a process of their own with limits of time and memory.

Their decoders do not keep to what the header says: pictures of any size are scaled to the header's, and all
frames are decoded for the first. No check of the file could tell what that takes.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import struct
import subprocess
import sys
from typing import NamedTuple

import numpy as np
from PIL import AvifImagePlugin, Image

from ugicm.pixels import Pixels, to_rgb

SECONDS, SECONDS_PER_PIXEL = 5, 1e-6
"""Of a processor that reading may take; a megapixel takes hundredths."""
MEMORY, MEMORY_PER_PIXEL = 768 << 20, 64
"""Bytes that reading may take, the interpreter included."""
_SIZE = struct.Struct("<QQ")
_CODE = "import sys; sys.path[:] = {path!r}; from ugicm.server.isolated import main; main()"


class Answer(NamedTuple):
    """What the other process found."""

    size: tuple[int, int] | None
    """Width and height by the header; None if there is none that can be read."""
    pixels: Pixels | None
    """uint8 RGB (H, W, 3); None if only the size was asked for, it was too large, or something failed."""
    error: str
    """Why there are no pixels."""


def read_isolated(data: bytes, max_pixels: int) -> Answer:
    """Read a file; of one with more than `max_pixels`, and with 0 of any, the size alone."""
    done = subprocess.run(  # noqa: S603  this program, and no word of a caller's
        [sys.executable, "-c", _CODE.format(path=sys.path), str(max_pixels)],
        input=data,
        capture_output=True,
        check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # it would make room for all processors' threads
    )
    output = memoryview(done.stdout)
    if len(output) < _SIZE.size:
        return Answer(None, None, _reason(done))
    size = _SIZE.unpack_from(output)
    if len(output) < 2 * _SIZE.size:
        return Answer(size, None, _reason(done))
    height, width = _SIZE.unpack_from(output, _SIZE.size)
    pixels = np.frombuffer(output[2 * _SIZE.size :], np.uint8)
    if done.returncode or pixels.size != 3 * height * width:
        return Answer(size, None, _reason(done))
    return Answer(size, pixels.reshape(height, width, 3), "")


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "reading it takes too long"
    if lines and "MemoryError" in lines[-1]:
        return "reading it takes too much memory"
    return lines[-1] if lines else f"exit status {done.returncode}"


def _limit(pixels: int, most: int) -> None:
    """Time and memory for a picture of so many pixels, to be raised later to those for `most`."""
    for kind, base, each in (
        (resource.RLIMIT_CPU, SECONDS, SECONDS_PER_PIXEL),
        (resource.RLIMIT_DATA, MEMORY, MEMORY_PER_PIXEL),
    ):
        limits = (int(base + each * pixels), int(base + each * min(most, 1 << 40)) + 1)
        if (highest := resource.getrlimit(kind)[1]) != resource.RLIM_INFINITY:  # set from outside
            limits = (min(limits[0], highest), min(limits[1], highest))
        resource.setrlimit(kind, limits)


def main() -> None:
    """What the other process does: the file from standard input, size and pixels to standard output."""
    max_pixels = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(0, max_pixels)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=("AVIF",)) as image:
        pixels = image.width * image.height
        sys.stdout.buffer.write(_SIZE.pack(*image.size))
        sys.stdout.buffer.flush()
        if pixels > max_pixels:
            return
        _limit(pixels, max_pixels)
        image.load()
        rgb = to_rgb(image)
    sys.stdout.buffer.write(_SIZE.pack(*rgb.shape[:2]))
    sys.stdout.buffer.write(rgb.tobytes())

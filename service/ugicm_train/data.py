"""Training photos: decoded once into memory as uint8, from image files or from packed shards.

Needs only torch, numpy, Pillow and safetensors.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ugicm.pixels import Pixels, load, to_rgb
from ugicm_train.files import written_whole
from ugicm_train.synthetic import draw_synthetic

IMAGE_SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SHARD_SUFFIX = ".shard.safetensors"
"""Packed photos: one uint8 tensor (3, H, W) a photo, named by its file."""

MEDIAN_CROPS, MEDIAN_BATCH = 64, 8
"""Crops that `medians` are of, and how many of them are measured at a time."""


class DataError(ValueError):
    """The training data cannot be used; the message says why."""


def read_image(file: Path | IO[bytes]) -> Pixels:
    """An image file as uint8 RGB (H, W, 3), for training and measuring alike, as the service reads it.

    Raises:
        DataError: no picture, or a damaged one.
    """
    try:
        with Image.open(file) as image:
            load(image)
            return to_rgb(image)
    except Exception as error:  # Pillow's are of many kinds, and most do not name the file
        raise DataError(f"{file} cannot be read as a picture: {error}") from error


def _decode(path: Path) -> Tensor:
    return torch.from_numpy(read_image(path)).permute(2, 0, 1).contiguous()


def _decoded(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Photos in this order, decoded on all processors, few ahead: all may be more than memory holds."""
    count = os.cpu_count() or 1
    ahead: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(count) as pool:
        for path in paths:
            ahead.append(pool.submit(_decode, path))
            if len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def files_under(folder: Path) -> list[Path]:
    """All files, sorted; those of linked folders as well, but none that is hidden."""
    found, seen = [], set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(inside)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(inside, name) for name in names if not name.startswith(".")]
    return sorted(found)


def is_picture(path: Path) -> bool:
    """Whether it is a file that is called like a picture."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source} is neither a folder nor a file")
    return [
        path
        for path in files_under(source)
        if is_picture(path) or (path.name.endswith(SHARD_SUFFIX) and path.is_file())
    ]


def read_photos(sources: Sequence[Path], *, min_side: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, (3, H, W) uint8) of every photo whose shorter side is at least `min_side` pixels.

    `sources` are folders of images, folders of shards, or single files.

    Raises:
        DataError: no such source, nothing in any, or a file that is damaged or of another kind; the message
            names it.
    """
    listed = [(source, _files(source)) for source in sources]
    if not any(files for _, files in listed):
        raise DataError(f"no photo in {', '.join(map(str, sources))}")
    for source, files in listed:
        shards = [path for path in files if path.name.endswith(SHARD_SUFFIX)]
        for shard in shards:
            try:
                packed = load_file(shard)
            except SafetensorError as error:
                raise DataError(f"{shard} is damaged ({error}): pack the photos again") from error
            for name, photo in packed.items():
                if photo.dtype != torch.uint8 or photo.ndim != 3 or len(photo) != 3:
                    kind = f"{tuple(photo.shape)} of {photo.dtype}"
                    raise DataError(
                        f"{shard} holds no photos: {name} is {kind}, not (3, H, W) of torch.uint8"
                    )
                if min(photo.shape[1:]) >= min_side:
                    yield name, photo
        images = [path for path in files if path not in set(shards)]
        for path, photo in zip(images, _decoded(images), strict=True):
            if min(photo.shape[1:]) >= min_side:
                yield str(path.relative_to(source)) if source.is_dir() else path.name, photo


def pack(sources: Sequence[Path], out: Path, *, max_bytes: int, min_side: int) -> list[Path]:
    """Write the photos as shards of at most about `max_bytes` each; returns the shard paths.

    Raises:
        DataError: no photos, `out` holds shards of before, which would be read with the new ones, or lies
            in a source, which would then hold its photos twice.
        OSError: a shard cannot be written.
    """
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise DataError(f"{out} lies in {source}, which would hold its photos twice: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob(f"*{SHARD_SUFFIX}")):
        raise DataError(f"{out} holds shards already: remove them, or give another --out")
    shards: list[Path] = []
    pending: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal pending, size
        if pending:
            shard = out / f"{len(shards):05d}{SHARD_SUFFIX}"
            with written_whole(shard) as beside:
                try:
                    beside.touch()
                    mode = beside.stat().st_mode
                    save_file(pending, beside)  # for its owner alone: it writes another file and moves it
                    beside.chmod(mode)
                except SafetensorError as error:  # a full disk, too
                    raise OSError(f"cannot write {shard}: {error}") from error
            shards.append(shard)
            pending, size = {}, 0

    for name, photo in read_photos(sources, min_side=min_side):
        if pending and size + photo.numel() > max_bytes:
            flush()
        key, number = name, 1
        while key in pending:  # photos of two sources may have the same name
            number += 1
            key = f"{name} ({number})"
        pending[key] = photo
        size += photo.numel()
    flush()
    if not shards:
        raise DataError(f"no photo of at least {min_side} pixels a side in {', '.join(map(str, sources))}")
    return shards


class CropSampler:
    """Random square crops with flips and sizes, as float batches on the device that holds the photos.

    Photos are drawn in proportion to the square root of their area, so that a few huge ones neither
    dominate nor are wasted.
    """

    def __init__(
        self,
        photos: Sequence[Tensor],
        *,
        size: int,
        seed: int,
        synthetic_share: float = 0.0,
        min_scale: float = 1.0,
        drawn_before: int = 0,
    ) -> None:
        """A sampler of crops.

        Args:
            photos: (3, H, W) uint8 each.
            size: side of the crops in pixels.
            seed: of everything random.
            synthetic_share: part of the crops that are drawn instead (`ugicm_train.synthetic`).
            min_scale: photos are shrunk to between this and 1 of their size (log-uniform), as far as a crop
                still fits.
            drawn_before: draw that many crops now and choose from them, instead of a new one each time.
        """
        self.photos = [photo for photo in photos if min(photo.shape[1:]) >= size]
        if not self.photos:
            raise DataError(
                f"no photo is at least {size} pixels a side; lower --crop (calibrate: --size) or add photos"
            )
        self.size = size
        self.synthetic_share = synthetic_share
        self.min_scale = min_scale
        self._random = np.random.default_rng(seed)
        area = np.array([photo.shape[1] * photo.shape[2] for photo in self.photos], dtype=np.float64)
        self._share = np.sqrt(area) / np.sqrt(area).sum()
        self._drawn = [self._draw() for _ in range(drawn_before if synthetic_share else 0)]

    def batch(self, count: int) -> Tensor:
        """(count, 3, size, size) float32 in [0, 1], channels last."""
        crops = []
        for index in self._random.choice(len(self.photos), size=count, p=self._share):
            photo = self.photos[index]
            if self._random.random() < self.synthetic_share:
                drawn = self._drawn
                crops.append(drawn[self._random.integers(len(drawn))] if drawn else self._draw())
                continue
            window = self._window(photo)
            top, left = (int(self._random.integers(0, side - window + 1)) for side in photo.shape[1:])
            crop = photo[:, top : top + window, left : left + window]
            if window > self.size:
                crop = shrink(crop, self.size)
            crops.append(crop.flip(2) if self._random.random() < 0.5 else crop)
        batch = torch.stack(crops).contiguous(memory_format=torch.channels_last)
        return batch.float().div_(255)

    def _draw(self) -> Tensor:
        """A synthetic crop, (3, size, size) uint8, where the photos are."""
        drawn = torch.from_numpy(draw_synthetic(self._random, self.size)).permute(2, 0, 1)
        return drawn.to(self.photos[0].device)

    def _window(self, photo: Tensor) -> int:
        """Side of the part of the photo that becomes a crop."""
        if self.min_scale == 1:
            return self.size
        scale = self.min_scale ** self._random.random()
        return min(round(self.size / scale), *photo.shape[1:])


@torch.no_grad()
def medians(measure: Callable[[Tensor, Tensor], Tensor], sampler: CropSampler, *, levels: int) -> Tensor:
    """Median over some crops, the same at each level, of what is measured of each, (levels,).

    ``measure``: crops (B, 3, size, size) in [0, 1] and the level of each (B,), all the same -> (B,).
    """
    batches = sampler.batch(MEDIAN_CROPS).split(MEDIAN_BATCH)
    measured = [
        torch.cat([measure(crops, crops.new_full((len(crops),), level)) for crops in batches])
        for level in range(levels)
    ]
    return torch.stack(measured).median(1).values


def shrink(crop: Tensor, size: int) -> Tensor:
    """(3, side, side) uint8 -> (3, size, size) uint8, filtered against aliasing."""
    small = F.interpolate(crop[None].float(), size=(size, size), mode="bicubic", antialias=True)[0]
    return small.round_().clamp_(0, 255).to(torch.uint8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train pack``."""
    parser.add_argument("sources", type=Path, nargs="+", help="folders of photos, or single ones")
    parser.add_argument("--out", type=Path, required=True, help="folder to write shards into")
    parser.add_argument("--max-mb", type=float, default=60.0, help="size of a shard in MB")
    parser.add_argument("--min-side", type=int, default=256, help="skip photos with a shorter side")


def run(arguments: argparse.Namespace) -> int:
    """Pack, and print the shards."""
    if not 0 < arguments.max_mb < math.inf:
        raise ValueError(f"max-mb must be finite and above 0, got {arguments.max_mb}")
    max_bytes = int(arguments.max_mb * 1e6)
    for shard in pack(arguments.sources, arguments.out, max_bytes=max_bytes, min_side=arguments.min_side):
        print(shard)
    return 0

"""Pictures through codecs: what every file costs and how good its decodes are."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ugicm_train.data import files_under, is_picture, read_image
from ugicm_train.evaluation import metrics
from ugicm_train.evaluation.coders import Coder
from ugicm_train.evaluation.metrics import Image
from ugicm_train.evaluation.parts import Part
from ugicm_train.evaluation.progress import Progress

RATE_TARGETS = (0.2, 0.4, 0.8)
"""Bits per pixel that rate control is checked at."""


class Row(NamedTuple):
    """One picture, one setting, one view."""

    codec: str
    view: str
    quality: float
    image: str
    bytes: int
    bpp: float
    psnr_db: float
    ms_ssim: float | None
    butteraugli: float | None
    estimated_bpp: float | None
    encode_s: float
    decode_s: float

    @property
    def key(self) -> tuple[str, str, float, str]:
        return self.codec, self.view, self.quality, self.image


class RateTarget(NamedTuple):
    """One picture coded to a given size."""

    codec: str
    image: str
    target_bpp: float
    bpp: float | None
    """None where the target is outside what the codec's qualities reach."""


class Measurement(NamedTuple):
    """Everything measured, and on what."""

    images: dict[str, str]
    """SHA-256 of the pixels by name."""
    rows: list[Row]
    targets: list[RateTarget]


def joined(measurements: Iterable[Measurement]) -> Measurement:
    """All of them together; of two for one setting, or with other pixels of one name, the first counts."""
    images: dict[str, str] = {}
    rows: dict[tuple[str, str, float, str], Row] = {}
    targets: dict[tuple[str, str, float], RateTarget] = {}
    for measured in measurements:
        same = {name for name, pixels in measured.images.items() if images.setdefault(name, pixels) == pixels}
        for row in measured.rows:
            if row.image in same:
                rows.setdefault(row.key, row)
        for target in measured.targets:
            if target.image in same:
                targets.setdefault(target[:3], target)
    return Measurement(images, [*rows.values()], [*targets.values()])


def measure_image(coder: Coder, name: str, image: Image, *, butteraugli: bool = False) -> Iterator[Row]:
    """All qualities and views of one picture; each quality is encoded once."""
    pixels = image.shape[0] * image.shape[1]
    for quality in coder.qualities:
        started = time.perf_counter()
        data = coder.encode(image, quality)
        encode_s = time.perf_counter() - started
        bits = coder.estimate_bits(image, quality, data) if coder.estimate_bits else None
        for view, strength in coder.views.items():
            started = time.perf_counter()
            decoded = coder.decode(data, strength)
            decode_s = time.perf_counter() - started
            yield Row(
                codec=coder.name,
                view=view,
                quality=quality,
                image=name,
                bytes=len(data),
                bpp=round(8 * len(data) / pixels, 6),
                psnr_db=round(metrics.psnr_db(image, decoded), 4),
                ms_ssim=rounded(metrics.ms_ssim(image, decoded)),
                butteraugli=metrics.butteraugli(image, decoded) if butteraugli else None,
                estimated_bpp=rounded(None if bits is None else bits / pixels),
                encode_s=round(encode_s, 5),
                decode_s=round(decode_s, 5),
            )


def measure_targets(coder: Coder, name: str, image: Image) -> Iterator[RateTarget]:
    """Sizes that the codec reaches for `RATE_TARGETS`; nothing where it has no rate control."""
    if coder.encode_to_bpp is not None:
        for target in RATE_TARGETS:
            data = coder.encode_to_bpp(image, target)
            bpp = None if data is None else metrics.bits_per_pixel(data, image)
            yield RateTarget(coder.name, name, target, rounded(bpp))


def read_images(folder: Path) -> list[Path]:
    """Picture files under a folder, sorted; ``ValueError`` where there are none."""
    paths = list(filter(is_picture, files_under(folder)))
    if not paths:
        raise ValueError(f"no pictures in {folder}")
    return paths


def measure(
    coders: Sequence[Coder],
    folder: Path,
    *,
    part: Part | None = None,
    butteraugli: bool = False,
    known: Measurement | None = None,
    save: Callable[[Measurement], object] = lambda _: None,
) -> Measurement:
    """Measure every codec on every picture of a folder; what was asked for is returned.

    Args:
        coders: our codec and its peers.
        folder: pictures, searched recursively.
        part: measure a part of them only.
        butteraugli: also run the `butteraugli` program (slow).
        known: earlier results of the same codecs on the same machine; what they cover is not repeated.
        save: called after every picture with what there is, what is known but not asked for included.
    """
    known = known or Measurement({}, [], [])
    result = Measurement({}, [], [])
    paths = read_images(folder)
    if part is not None:
        paths = part.of(paths)
        known = _only(known, {path.relative_to(folder).as_posix() for path in paths})
    known_rows = {row.key: row for row in known.rows}
    warm: set[str] = set()
    for path in _track(paths):
        name = path.relative_to(folder).as_posix()
        image = read_image(path)
        result.images[name] = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        seen = known.images.get(name) == result.images[name]
        for coder in coders:
            keys = [
                (coder.name, view, q, name) for q, view in itertools.product(coder.qualities, coder.views)
            ]
            rows = {key: known_rows[key] for key in keys if seen and key in known_rows}
            if butteraugli:
                rows = {key: row for key, row in rows.items() if row.butteraugli is not None}
            lacking = tuple(dict.fromkeys(key[2] for key in keys if key not in rows))
            if lacking:
                if coder.name not in warm:
                    data = coder.encode(image, lacking[0])
                    for strength in coder.views.values():
                        coder.decode(data, strength)
                    warm.add(coder.name)
                fresh = measure_image(replace(coder, qualities=lacking), name, image, butteraugli=butteraugli)
                rows |= {row.key: row for row in fresh}
            result.rows.extend(rows[key] for key in keys)
            targets = [t for t in known.targets if seen and t[:2] == (coder.name, name)]
            result.targets.extend(targets or measure_targets(coder, name, image))
        # What else is known would be lost with an earlier file in the same place.
        save(joined([result, known]))
    return result


def _only(measured: Measurement, names: Container[str]) -> Measurement:
    """What was measured of these pictures."""
    return Measurement(
        {name: pixels for name, pixels in measured.images.items() if name in names},
        [row for row in measured.rows if row.image in names],
        [target for target in measured.targets if target.image in names],
    )


def rounded(value: float | None) -> float | None:
    """To six decimals."""
    return None if value is None else round(value, 6)


def _track(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, and how far they are."""
    with closing(Progress()) as progress:
        progress.start("pictures", len(paths))
        for index, path in enumerate(paths, 1):
            yield path
            progress.advance(f"[{index}/{len(paths)}] {path.name}")

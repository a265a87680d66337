"""The measurement behind ``ugicm bench``."""

from __future__ import annotations

import contextlib
import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from ugicm.bench.peers import Peer, learned_peers, pillow_peers
from ugicm.bench.stages import STAGES, TRANSFORMS, StageClock, macs_per_pixel, observed
from ugicm.codec.bitstream import peek
from ugicm.codec.codec import Codec, Image
from ugicm.codec.config import HYPER_STRIDE
from ugicm.codec.dense import dense
from ugicm.codec.errors import CodecError, check_pixels
from ugicm.server.images import read_image, write_image

PEER_MEGAPIXELS = 1.0
"""Peers are timed up to this size."""
BATCH_MEGAPIXELS = 1.0
"""Several pictures at a time are of this size at most."""
LIMIT_S = 20.0
"""A peer that would need longer for one picture is left out."""
TIMED_S = 1.0
"""Repeat until this much time has been measured, within..."""
REPEATS = (3, 15)


class Options(NamedTuple):
    """What `run` measures."""

    megapixels: Sequence[float]
    batches: Sequence[int]
    """Pictures at a time; more than one up to 1 megapixel only."""
    quality: float
    threads: int
    """0 leaves torch's choice."""
    peers: bool
    """Pillow's formats, too."""
    learned: Sequence[str]
    """CompressAI's models to time as well, names among `peers.LEARNED`."""


class Timing(NamedTuple):
    """Of one operation, in milliseconds."""

    median: float
    low: float
    high: float
    stages: dict[str, float]
    """Median of each stage."""


def measure(work: Callable[[], Any], clock: StageClock | None = None) -> tuple[Any, Timing]:
    """The result of one call and the times of several more, after one to warm up."""
    result = work()
    times: list[float] = []
    stages: list[dict[str, float]] = []
    while len(times) < REPEATS[0] or (sum(times) < TIMED_S and len(times) < REPEATS[1]):
        if clock is not None:
            clock.seconds.clear()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
        if clock is not None:
            stages.append(dict(clock.seconds))
    names = [name for name in STAGES if stages and name in stages[0]]
    return result, Timing(
        1e3 * statistics.median(times),
        1e3 * min(times),
        1e3 * max(times),
        {name: 1e3 * statistics.median(stage[name] for stage in stages) for name in names},
    )


def pictures(paths: Sequence[Path], max_pixels: int) -> list[Image]:
    """The photos given; or one drawn: shapes of all sizes on a smooth ground, with some grain."""
    if paths:
        return [_photo(path, max_pixels) for path in paths]
    random = np.random.default_rng(0)
    side = 1024
    ground = PIL.Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
    canvas = ground.resize((side, side), PIL.Image.Resampling.BICUBIC)
    draw = PIL.ImageDraw.Draw(canvas)
    for _ in range(2000):
        size = 4 + random.pareto(1.5) * 4
        corners = random.uniform(0, side, 2) + random.normal(0, size, (4, 2))
        colour = random.integers(0, 256, 3).tolist()
        draw.polygon([tuple(corner) for corner in corners.tolist()], tuple(colour))
    grain = random.normal(0, 4, (side, side, 1))
    return [(np.asarray(canvas) + grain).clip(0, 255).astype(np.uint8)]


def _photo(path: Path, max_pixels: int) -> Image:
    try:
        return read_image(path.read_bytes(), max_pixels=max_pixels)
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from error


def _shape(megapixels: float) -> tuple[int, int]:
    """Height and width of a picture of about so many megapixels."""
    height, width = (
        max(1, round(math.sqrt(megapixels * 1e6 * ratio) / HYPER_STRIDE)) * HYPER_STRIDE
        for ratio in (2 / 3, 3 / 2)
    )
    return height, width


def resized(photos: Sequence[Image], megapixels: float, number: int) -> Image:
    """A picture of about 3:2 with whole hyper positions, tiled from the photos at their own scale."""
    height, width = _shape(megapixels)
    rows: list[Image] = []
    row_height = 0
    while row_height < height:
        row: list[Image] = []
        row_width = 0
        while row_width < width:
            photo = photos[number % len(photos)]
            # Neighbours of one photo are mirrored, so that no edge shows between them.
            row.append(photo[:, :: -1 if len(row) % 2 else 1])
            row_width += photo.shape[1]
            number += len(photos) > 1
        low = min(part.shape[0] for part in row)
        band = np.concatenate([part[:low] for part in row], 1)[:, :width]
        rows.append(band[:: -1 if len(rows) % 2 else 1])
        row_height += low
    return np.ascontiguousarray(np.concatenate(rows)[:height])


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Best rate of a matrix product in GFLOP/s."""
    best = 0.0
    for side in (1024, 2048, *([8192] if device.type == "cuda" else [])):
        x = torch.randn(side, side, device=device).to(dtype)
        bias = torch.zeros(side, device=device, dtype=dtype)
        for _ in range(6):
            start = time.perf_counter()
            dense(x, x, bias)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - start) / 1e9)
    return best


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def peak_memory(work: Callable[[], Any]) -> int | None:
    """Largest resident memory of this process in bytes while it works, over what it is before; Linux only.

    None where the system does not tell.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        before = _resident("VmRSS")
        work()
        return _resident("VmHWM") - before
    except OSError:
        work()
        return None


def run(codec: Codec, paths: Sequence[Path], options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Time the codec, its stages and its peers; `say` is told what is measured next.

    Returns one object for JSON: ``results`` has a row for every codec, operation, size and batch.

    Raises:
        CodecError: a photo cannot be read, or a size is over the codec's limit.
    """
    sizes = sorted(options.megapixels)
    height, width = _shape(sizes[-1])
    check_pixels(width, height, codec.max_pixels)  # before a picture of it is made
    runs = [
        (batch, size)
        for batch in sorted(options.batches)
        for size in sizes
        if batch == 1 or size <= BATCH_MEGAPIXELS
    ]
    if not runs:
        raise CodecError(
            f"nothing to measure: several pictures at a time are of {BATCH_MEGAPIXELS:g} megapixel at most, "
            f"the smallest size is {sizes[0]:g}"
        )
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    device = torch.device(codec.device)
    dtype: torch.dtype = getattr(torch, codec.precision)
    peers = chain(
        pillow_peers(threads) if options.peers else (),
        learned_peers(options.learned) if options.learned else (),
    )
    photos = pictures(paths, codec.max_pixels)
    say("memory")
    memory = _memory(codec, [resized(photos, size, 0) for size in sizes], options.quality)
    peaks = {str(kind).removeprefix("torch."): matrix_peak(kind, device) for kind in {dtype, torch.float32}}
    macs = macs_per_pixel(codec)
    context = _Context(codec, options.quality, threads, macs, peaks)
    rows: list[dict[str, Any]] = []
    for batch, size in runs:
        say(f"ugicm, {batch} x {size:g} megapixels")
        rows += _own_rows(context, [resized(photos, size, number) for number in range(batch)])
    small = [resized(photos, size, 0) for size in sizes if size <= PEER_MEGAPIXELS]
    for peer in peers:
        say(peer.name)
        rows += _peer_rows(peer, small)
    _add_ratios(rows)
    return {
        "machine": {
            "processor": _processor(),
            "device": codec.device if device.type == "cpu" else torch.cuda.get_device_name(device),
            "threads": threads,
            "peak_gflops": {name: round(value, 1) for name, value in peaks.items()},
        },
        "versions": {name: version(name) for name in ("ugicm", "torch", "pillow")},
        "model": {"name": codec.name, "digest": codec.digest, "precision": codec.precision},
        "quality": options.quality,
        "macs_per_pixel": {stage: round(count, 1) for stage, count in macs.items()},
        "memory": memory,
        "results": rows,
    }


def _memory(codec: Codec, images: Sequence[Image], quality: float) -> list[dict[str, Any]]:
    """Peak memory while each picture is coded, the smallest first, beyond that of codec and pictures."""
    rows = []

    def encode(image: Image, coded: list[bytes]) -> None:
        coded += codec.encode([image], quality)

    for image in images:
        megapixels = image.shape[0] * image.shape[1] / 1e6
        coded: list[bytes] = []
        for op, work in (("encode", partial(encode, image, coded)), ("decode", partial(codec.decode, coded))):
            used = peak_memory(work)
            if used is not None:
                mib = used / 2**20
                rows.append(
                    {
                        "op": op,
                        "megapixels": round(megapixels, 3),
                        "peak_mib": round(mib, 1),
                        "mib_per_megapixel": round(mib / megapixels, 1),
                    }
                )
    return rows


class _Context(NamedTuple):
    codec: Codec
    quality: float
    threads: int
    macs: dict[str, float]
    peaks: dict[str, float]


def _own_rows(context: _Context, images: Sequence[Image]) -> Iterator[dict[str, Any]]:
    codec = context.codec
    sizes = [image.shape[0] * image.shape[1] for image in images]
    pixels = sum(sizes)
    coded = codec.encode(images, context.quality)
    # What is kept lossless is decoded without networks.
    lossy = sum(size for size, data in zip(sizes, coded, strict=True) if not peek(data).lossless)
    operations: dict[str, Callable[[], Any]] = {
        "encode": lambda: codec.encode(images, context.quality),
        "decode": lambda: codec.decode(coded),
    }
    for op, work in operations.items():
        clock = StageClock(torch.device(codec.device))
        with observed(codec, clock.observe):
            _, timing = measure(work, clock)
        row = _row(f"ugicm {codec.name}", op, pixels, len(images), context.threads, timing)
        row["bytes"] = sum(map(len, coded))
        row["stages_ms"] = {name: round(value, 2) for name, value in timing.stages.items()}
        row["stages_ms"]["other"] = round(timing.median - sum(timing.stages.values()), 2)

        if coded_pixels := pixels if op == "encode" else lossy:
            transforms = [name for name in TRANSFORMS if name in timing.stages]
            macs, ms = (sum(each[name] for name in transforms) for each in (context.macs, timing.stages))
            rate = 2 * coded_pixels * macs / ms / 1e6
            row["transform_gflops"] = round(rate, 1)
            row["share_of_peak"] = round(rate / context.peaks[codec.precision], 6)
            macs, ms = context.macs[f"{op}r's entropy model"], timing.stages["entropy model"]
            row["entropy_gflops"] = round(2 * coded_pixels * macs / ms / 1e6, 1)
        yield row
    if len(images) == 1:
        photo = write_image(images[0], "jpeg")
        files: dict[str, Callable[[], Any]] = {
            "read JPEG": lambda: read_image(photo, max_pixels=codec.max_pixels),
            "write PNG": lambda: write_image(images[0], "png"),
        }
        for op, work in files.items():
            result, timing = measure(work)
            row = _row("image file", op, pixels, 1, 1, timing)
            yield {**row, "bytes": len(result if op == "write PNG" else photo)}


def _peer_rows(peer: Peer, images: Sequence[Image]) -> Iterator[dict[str, Any]]:
    """One row each way and size, ascending, until the next size would take too long."""
    seconds_per_pixel = 0.0
    for image in images:
        pixels = image.shape[0] * image.shape[1]
        if seconds_per_pixel * pixels > LIMIT_S:
            return
        coded, encoding = measure(lambda: peer.encode(image))  # noqa: B023  called before the next image
        _, decoding = measure(lambda: peer.decode(coded))  # noqa: B023
        for op, timing in (("encode", encoding), ("decode", decoding)):
            yield {**_row(peer.name, op, pixels, 1, peer.threads, timing), "bytes": peer.size(coded)}
        seconds_per_pixel = max(encoding.median, decoding.median) / 1e3 / pixels


def _row(codec: str, op: str, pixels: int, batch: int, threads: int, timing: Timing) -> dict[str, Any]:
    return {
        "codec": codec,
        "op": op,
        "megapixels": round(pixels / batch / 1e6, 3),
        "batch": batch,
        "threads": threads,
        "median_ms": round(timing.median, 2),
        "low_ms": round(timing.low, 2),
        "high_ms": round(timing.high, 2),
        "ms_per_megapixel": round(timing.median / pixels * 1e6, 2),
        "bytes": 0,
    }


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """``times_ours``: time of a peer over that of this codec for the same picture."""
    own = {
        (row["op"], row["megapixels"]): row["median_ms"]
        for row in rows
        if row["codec"].startswith("ugicm ") and row["batch"] == 1
    }
    for row in rows:
        key = row["op"], row["megapixels"]
        if not row["codec"].startswith("ugicm ") and key in own:
            row["times_ours"] = round(row["median_ms"] / own[key], 2)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report in lines for a terminal."""
    machine, model = report["machine"], report["model"]
    peaks = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in machine["peak_gflops"].items())
    yield f"{machine['processor']}, {machine['device']}, {machine['threads']} threads: {peaks}"
    yield f"{model['name']} {model['digest']}, {model['precision']}, quality {report['quality']:g}"
    yield ""
    yield (
        f"{'codec':<30} {'op':<10} {'MP':>6} {'batch':>5} {'median ms':>10} {'low..high':>17} {'ms/MP':>8} "
        + (f"{'bytes':>9}  notes")
    )
    for row in report["results"]:
        spread = f"{row['low_ms']:.0f}..{row['high_ms']:.0f}"
        notes = []
        if "stages_ms" in row:
            notes += [f"{name} {value:.0f}" for name, value in row["stages_ms"].items()]
        if "transform_gflops" in row:
            notes.append(
                f"transforms {row['transform_gflops']:.0f} GFLOP/s = {row['share_of_peak']:.0%} of peak"
            )
            notes.append(f"entropy model {row['entropy_gflops']:.0f} GFLOP/s")
        if "times_ours" in row:
            notes.append(f"{row['times_ours']:.2f} times ours")
        yield (
            f"{row['codec']:<30} {row['op']:<10} {row['megapixels']:>6.2f} {row['batch']:>5} "
            f"{row['median_ms']:>10.1f} {spread:>17} {row['ms_per_megapixel']:>8.1f} {row['bytes']:>9}  "
            + ", ".join(notes)
        )
    for item in report["memory"]:
        yield (
            f"memory to {item['op']} {item['megapixels']:.2f} MP: {item['peak_mib']:.0f} MiB, "
            f"{item['mib_per_megapixel']:.0f} MiB per megapixel"
        )

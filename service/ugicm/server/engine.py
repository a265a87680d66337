"""Image files to bitstreams and back: files and entropy coding in a pool, networks in one thread."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from ugicm.choices import ImageFormat
from ugicm.codec.bitstream import peek
from ugicm.codec.config import padded_size
from ugicm.codec.errors import CodecError, check_pixels
from ugicm.pixels import Pixels as Image
from ugicm.server.batching import MicroBatcher
from ugicm.server.images import check_side, write_image
from ugicm.server.isolated import read_image, size_of_image
from ugicm.server.latents import LatentCache
from ugicm.server.metrics import Metrics
from ugicm.server.settings import Settings
from ugicm.server.threads import run_while_awaited
from ugicm.server.timings import Timings

Item = TypeVar("Item")
Result = TypeVar("Result")

POOL_NAME = "ugicm-pool"
"""Of threads."""
CPU_BATCH_PIXELS, CUDA_BATCH_PIXELS = 1_000_000, 16_000_000
_MIN_WEIGHT = 1 << 14
"""A picture counts as at least 128x128 pixels: small ones cost more than their pixels."""
_TIMING_OF_STAGE = {
    "image_decode": "image",
    "image_encode": "image",
    "analysis": "analysis",
    "search": "analysis",
    "entropy_encode": "entropy",
    "entropy_decode": "entropy",
    "synthesis": "synthesis",
}


class DeadlineExceededError(TimeoutError):
    """The answer was not made in time."""

    def __init__(self, *, limit_s: float, actual_s: float) -> None:
        super().__init__(f"no answer after {actual_s:.3g} s; the limit is {limit_s:g} s")
        self.limit_s, self.actual_s = limit_s, actual_s


class Codec(Protocol):
    """What the service needs of a codec; `ugicm.codec.codec.Codec` has it."""

    name: str
    digest: str
    device: str
    precision: str
    max_pixels: int

    def analyse(
        self, images: Sequence[Image], quality: Sequence[float], *, stop: Callable[[], bool] = ...
    ) -> Sequence[Any]: ...

    def pack(self, latent: Any, *, stop: Callable[[], bool] = ...) -> bytes: ...

    def unpack(self, data: bytes, *, stop: Callable[[], bool] = ...) -> Any: ...

    def synthesise(
        self, latents: Sequence[Any], strength: Sequence[float], *, stop: Callable[[], bool] = ...
    ) -> Sequence[Image]: ...

    def encode_to_size(
        self,
        image: Image,
        *,
        max_bytes: int | None = None,
        target_bpp: float | None = None,
        stop: Callable[[], bool],
    ) -> bytes: ...


@dataclass(frozen=True)
class RateTarget:
    """How large a bitstream may become: by quality, or by the first of the two sizes that is set."""

    quality: float = 50.0
    max_bytes: int | None = None
    target_bpp: float | None = None

    @property
    def by_size(self) -> bool:
        return self.max_bytes is not None or self.target_bpp is not None


class _Work(NamedTuple, Generic[Item]):
    """What the device's thread is given."""

    item: Item
    gone: threading.Event
    """Set when nobody waits for it any more: large pictures end at their next tile."""


class Engine:
    """Runs one codec for many callers; all methods belong to one event loop."""

    def __init__(self, codec: Codec, settings: Settings, metrics: Metrics) -> None:
        self.codec = codec
        self._settings, self._metrics = settings, metrics
        on_cpu = codec.device == "cpu"
        self.batcher = MicroBatcher(
            budget=settings.batch_pixels or (CPU_BATCH_PIXELS if on_cpu else CUDA_BATCH_PIXELS),
            limit=settings.queue_pixels,
            on_batch=self._on_batch,
        )
        threads = settings.pool_threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=POOL_NAME)
        self._headers = ThreadPoolExecutor(threads, thread_name_prefix=f"{POOL_NAME}-header")
        self._failed = False
        self.latents = LatentCache(settings.latent_cache_bytes, metrics)
        metrics.queue_pixels.set_function(lambda: self.batcher.admitted)
        metrics.model_info.labels(codec.name, codec.digest, codec.device, codec.precision).set(1)

    async def encode(
        self,
        data: bytes,
        target: RateTarget,
        timings: Timings,
        *,
        on_admitted: Callable[[], None] = lambda: None,
    ) -> bytes:
        """Bitstream of an image file.

        Args:
            data: the file.
            target: how large the bitstream may become.
            timings: where to note how long things took.
            on_admitted: called when the picture has its room in the service.

        Raises:
            CodecError: the image cannot be read or is too large, or the target cannot be met.
            OverloadedError: too many pixels are in the service.
            DeadlineExceededError: the deadline passed.
        """
        async with self.deadline():
            weight = self._weight(*await self._size_of(data))
            with self.batcher.admit(weight):
                on_admitted()
                image = await self._read(data, timings)
                if target.by_size:
                    bitstream = await self._search(image, target, timings, weight)
                else:
                    latent = await self._on_device(
                        "analysis", timings, self._analyse, (image, target.quality), weight
                    )
                    bitstream = await self._pooled(
                        "entropy_encode", timings, lambda stop: self.codec.pack(latent, stop=stop)
                    )
        header = peek(bitstream)
        self._metrics.bitstream_bpp.observe(8 * len(bitstream) / (header.width * header.height))
        return bitstream

    async def decode(
        self, id: str, bitstream: bytes, strength: float, image_format: ImageFormat, timings: Timings
    ) -> bytes:
        """Image file of a bitstream, at a preference of 0 (human) to 1 (machine); without a deadline.

        ``id`` is that of the bitstream, under which its latent is kept for other preferences.

        Raises:
            CodecError: the bitstream is damaged, too large, or of another model, or the picture has a side
                that the format does not allow.
            OverloadedError: too many pixels are in the service.
        """
        header = peek(bitstream)
        check_side(header.width, header.height, image_format)
        weight = self._weight(header.width, header.height)
        with self.batcher.admit(weight):
            latent, _ = await self.latents.get(
                id,
                lambda: self._pooled(
                    "entropy_decode", timings, lambda stop: self.codec.unpack(bitstream, stop=stop)
                ),
            )
            image = await self._on_device("synthesis", timings, self._synthesise, (latent, strength), weight)
            return await self._pooled("image_encode", timings, lambda _: write_image(image, image_format))

    async def _search(self, image: Image, target: RateTarget, timings: Timings, weight: int) -> bytes:
        """Bitstream of the size that `target` sets.

        A search is many times the work of an encode. So it is a function of its own to the batcher: in one
        batch, searches would wait for the last of them.
        """

        def search(works: Sequence[_Work[Image]]) -> list[bytes]:
            return [
                self.codec.encode_to_size(
                    work.item, max_bytes=target.max_bytes, target_bpp=target.target_bpp, stop=work.gone.is_set
                )
                for work in works
            ]

        bitstream: bytes = await self._on_device("search", timings, search, image, weight)
        return bitstream

    async def probe(self) -> None:
        """One round trip of a noisy picture, from file to file; raises what the codec raises."""
        picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        data = write_image(picture, "png")
        timings, weight = Timings(), self._weight(*await self._size_of(data))
        image = await self._read(data, timings)
        latent = await self._on_device("analysis", timings, self._analyse, (image, 50.0), weight)
        latent = self.codec.unpack(self.codec.pack(latent))
        for strength in (0.0, 1.0):
            await self._on_device("synthesis", timings, self._synthesise, (latent, strength), weight)

    async def healthy(self) -> bool:
        """False if the device failed at its last work and fails again at a probe."""
        if self._failed:
            try:
                await self.probe()
            except Exception:
                return False
        return True

    async def close(self) -> None:
        """Finish what runs on the device, then stop the threads.

        Nobody waits any more for what the others do.
        """
        try:
            await self.batcher.close()
        finally:
            for pool in (self._pool, self._headers):
                pool.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Cancel the block, and raise `DeadlineExceededError`, where it takes longer than a request may."""
        limit_s, started = self._settings.request_timeout_s, time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise DeadlineExceededError(limit_s=limit_s, actual_s=time.monotonic() - started) from None

    async def _size_of(self, data: bytes) -> tuple[int, int]:
        """Width and height of an image file; with threads of its own, so that a refusal does not wait."""
        return await run_while_awaited(self._headers, lambda stop: size_of_image(data, stop=stop))

    async def _read(self, data: bytes, timings: Timings) -> Image:
        max_pixels = self.codec.max_pixels
        return await self._pooled(
            "image_decode", timings, lambda stop: read_image(data, max_pixels=max_pixels, stop=stop)
        )

    def _weight(self, width: int, height: int) -> int:
        check_pixels(width, height, self.codec.max_pixels)
        # A strip a pixel wide is 64 wide to the networks.
        pixels = math.prod(padded_size(width, height))
        return max(_MIN_WEIGHT, min(pixels, self.codec.max_pixels))

    async def _pooled(
        self, stage: str, timings: Timings, work: Callable[[Callable[[], bool]], Result]
    ) -> Result:
        """Result of `work` in the pool, timed; what it is given says whether nobody waits any more."""

        def timed(stop: Callable[[], bool]) -> tuple[Result, float]:
            started = time.perf_counter()
            return work(stop), time.perf_counter() - started

        result, seconds = await run_while_awaited(self._pool, timed)
        self._record(stage, seconds, timings)
        return result

    async def _on_device(
        self,
        stage: str,
        timings: Timings,
        function: Callable[[Sequence[_Work[Any]]], Sequence[Any]],
        item: Any,
        weight: int,
    ) -> Any:
        """Result of `function` for `item` in the device's thread, batched and timed."""
        work = _Work(item, threading.Event())
        try:
            ran = await self.batcher.run(function, work, weight=weight)
        except CodecError:
            raise
        except Exception:
            self._failed = True
            raise
        finally:
            work.gone.set()
        self._failed = False
        timings.add("queue", ran.queue_s)
        self._metrics.queue_seconds.observe(ran.queue_s)
        self._record(stage, ran.run_s, timings)
        return ran.result

    def _record(self, stage: str, seconds: float, timings: Timings) -> None:
        timings.add(_TIMING_OF_STAGE[stage], seconds)
        self._metrics.codec_seconds.labels(stage).observe(seconds)

    def _on_batch(self, items: int, weight: int) -> None:
        self._metrics.batch_images.observe(items)
        self._metrics.batch_pixels.observe(weight)

    # Work of the device's thread

    def _analyse(self, works: Sequence[_Work[tuple[Image, float]]]) -> Sequence[Any]:
        images, qualities = zip(*(work.item for work in works), strict=True)
        return self.codec.analyse(images, qualities, stop=_all_gone(works))

    def _synthesise(self, works: Sequence[_Work[tuple[Any, float]]]) -> Sequence[Image]:
        latents, strengths = zip(*(work.item for work in works), strict=True)
        return self.codec.synthesise(latents, strengths, stop=_all_gone(works))


def _all_gone(works: Sequence[_Work[Any]]) -> Callable[[], bool]:
    """Asks whether nobody waits any more for any of them."""
    return lambda: all(work.gone.is_set() for work in works)

"""Decoded pictures in memory; simultaneous requests for one picture make it once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ugicm.server.cache import ByteLru, Content, hash_of
from ugicm.server.metrics import Metrics


class PictureKey(NamedTuple):
    """What a decoded picture depends on."""

    id: str
    strength: float
    format: str


class Picture(NamedTuple):
    """A decoded picture, as a file."""

    content: Content
    etag: str
    """Strong entity tag, quoted."""


@dataclass
class _Flight:
    """A picture in the making and how many wait for it."""

    task: asyncio.Task[Picture] = field(init=False)
    waiting: int = 0


class PictureCache:
    """Byte-bounded and single-flighted; at most `max_bytes` are kept, 0 keeps none."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._kept: ByteLru[PictureKey] = ByteLru(max_bytes)
        self._flights: dict[PictureKey, _Flight] = {}
        self._metrics = metrics
        metrics.cache_bytes.labels("picture").set_function(lambda: self._kept.size)

    async def get(self, key: PictureKey, make: Callable[[], Awaitable[bytes]]) -> tuple[Picture, bool]:
        """The picture, and whether it was kept; else `make` is awaited once for all who ask meanwhile.

        The making goes on while anybody waits for it and is cancelled when the last one leaves.
        """
        if (kept := self._kept.get(key)) is not None:
            self._metrics.cache_requests.labels("picture", "hit").inc()
            return Picture(*kept), True
        flight = self._flights.get(key)
        if flight is None:
            self._metrics.cache_requests.labels("picture", "miss").inc()
            flight = self._flights[key] = _Flight()
            flight.task = asyncio.create_task(self._make(key, flight, make))
        else:
            self._metrics.cache_requests.labels("picture", "shared").inc()
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task), False
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                self._land(key, flight)

    def forget(self, id: str) -> None:
        """Drop every picture of a bitstream; those in the making are for whoever waits for them alone."""
        for key in [key for key in self._kept if key.id == id]:
            self._kept.delete(key)
        for key in [key for key in self._flights if key.id == id]:
            del self._flights[key]

    async def _make(self, key: PictureKey, flight: _Flight, make: Callable[[], Awaitable[bytes]]) -> Picture:
        try:
            content = await make()
            # Once, as whoever asks for a kept picture asks for its tag.
            etag = f'"{await hash_of(content)}"'
        finally:
            wanted = self._land(key, flight)
        if wanted:
            self._kept.put(key, content, etag)
        return Picture(content, etag)

    def _land(self, key: PictureKey, flight: _Flight) -> bool:
        """Whether it had not been forgotten."""
        if wanted := self._flights.get(key) is flight:
            del self._flights[key]
        return wanted

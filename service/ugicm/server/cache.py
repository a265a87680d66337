"""Where bitstreams stay between encode and decode, under the SHA-256 of their bytes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, Protocol, TypeVar

import structlog

from ugicm.memory import MAP_BYTES, memory_map
from ugicm.server.metrics import Metrics

Value = TypeVar("Value")
Key = TypeVar("Key")
Content = bytes | memoryview
"""Of a kept entry; a view keeps its memory for as long as somebody has it."""

ID_PATTERN = "^[0-9a-f]{64}$"
"""What an id looks like; checked before an id comes near a path or a key."""
MAX_MAPS = 1 << 14
"""Of a cache; a larger one maps larger entries only."""
_LONG_BYTES = 1 << 20
"""Bytes that take about a millisecond to hash."""
_log = structlog.get_logger(__name__)


def reason_of(error: Exception) -> str:
    """Kind and text in a line; of an error of S3, more lines follow, for the authors of its library."""
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")


def bitstream_id(bitstream: Content) -> str:
    """SHA-256 of the bytes, 64 hex digits."""
    return hashlib.sha256(bitstream).hexdigest()


async def hash_of(content: Content) -> str:
    """`bitstream_id` of any bytes, outside of the event loop where it takes longer than going there."""
    if len(content) < _LONG_BYTES:
        return bitstream_id(content)
    return await asyncio.to_thread(bitstream_id, content)


class CacheDownError(Exception):
    """The cache did not answer."""


class BitstreamCache(Protocol):
    """Bytes by id. Methods may raise anything when the store behind them fails."""

    async def get(self, id: str) -> bytes | None:
        """The bitstream, or None."""

    async def put(self, id: str, bitstream: bytes) -> bool | None:
        """Keep it; True if it was there already, None if it is too large to be kept."""

    async def delete(self, id: str) -> bool:
        """Forget it; True if it was there."""

    async def check(self) -> None:
        """Raise unless the store answers."""

    async def close(self) -> None:
        """Release connections."""


class Lru(Generic[Key, Value]):
    """Least recently used values, bounded by the sum of their bytes.

    An entry counts its bytes and `OVERHEAD`, so that many tiny entries are bounded too.
    """

    OVERHEAD = 256

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        """Bytes held now."""
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value, which becomes the most recent one, or None."""
        return self._entries[key][0] if self.touch(key) else None

    def touch(self, key: Key) -> bool:
        """Make the value the most recent one; True if it is there."""
        if key not in self._entries:
            return False
        self._entries.move_to_end(key)
        return True

    def put(self, key: Key, value: Value, size: int) -> bool:
        """Keep a value of `size` bytes and drop the oldest until the sum fits; False if it alone is over the
        bound.
        """
        self.delete(key)
        size += self.OVERHEAD
        if size > self.max_bytes:
            return False
        self._entries[key] = value, size
        self.size += size
        while self.size > self.max_bytes:
            self.delete(next(iter(self._entries)))
        return True

    def delete(self, key: Key) -> bool:
        """Drop the value; True if it was there."""
        if (entry := self._entries.pop(key, None)) is None:
            return False
        self.size -= entry[1]
        return True

    def __iter__(self) -> Iterator[Key]:
        """Keys, oldest first."""
        return iter(self._entries)


def lasting(content: Content, cache_bytes: int) -> Content:
    """What a cache of that size should keep of `content`: if it is large, a copy outside the heap."""
    if not max(MAP_BYTES, cache_bytes // MAX_MAPS) <= len(content) <= cache_bytes:
        return content
    copy = memory_map(len(content))
    copy[:] = content
    return memoryview(copy).toreadonly()


class MemoryCache:
    """A `BitstreamCache` in this process."""

    def __init__(self, max_bytes: int) -> None:
        self._entries: Lru[str, Content] = Lru(max_bytes)

    @property
    def size(self) -> int:
        """Bytes held now."""
        return self._entries.size

    async def get(self, id: str) -> bytes | None:
        found = self._entries.get(id)
        return None if found is None else bytes(found)

    async def put(self, id: str, bitstream: bytes) -> bool | None:
        if self._entries.touch(id):
            return True
        lasts = lasting(bitstream, self._entries.max_bytes)
        return False if self._entries.put(id, lasts, len(bitstream)) else None

    async def delete(self, id: str) -> bool:
        return self._entries.delete(id)

    async def check(self) -> None:
        """Memory always answers."""

    async def close(self) -> None:
        """Nothing to release."""


class GuardedCache:
    """A cache that may be down: bounded in time, measured, and out of the way for a while after a failure.

    Every failure of the store becomes `CacheDownError`.
    """

    PAUSE_S = 5.0
    """After a failure, requests do without the store for this long; a full one can still be read."""
    PROBE_S = 0.5
    """Who asks whether the store is up waits this long: probes of orchestrators give up after a second."""

    def __init__(self, cache: BitstreamCache, metrics: Metrics, *, timeout_s: float) -> None:
        self._cache, self._metrics, self._timeout_s = cache, metrics, timeout_s
        self._no_reads_until = self._no_writes_until = 0.0
        self._reads_work = self._writes_work = True
        self._probing: asyncio.Task[None] | None = None
        metrics.cache_up.set(1)

    async def get(self, id: str) -> bytes | None:
        found = await self._guarded(lambda: self._cache.get(id), writes=False)
        self._metrics.cache_requests.labels("bitstream", "miss" if found is None else "hit").inc()
        return found

    async def put(self, id: str, bitstream: bytes) -> bool | None:
        return await self._guarded(lambda: self._cache.put(id, bitstream), writes=True)

    async def delete(self, id: str) -> bool:
        # A full store takes no more, but this makes room.
        return await self._guarded(lambda: self._cache.delete(id), writes=True, if_full=True)

    async def up(self) -> bool:
        """Whether the store answers now, or did at last if that takes long; one check serves all who ask."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())
        await asyncio.wait({self._probing}, timeout=self.PROBE_S)
        return self._up

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        with contextlib.suppress(Exception):  # of a store that hangs or is gone
            async with asyncio.timeout(self._timeout_s):
                await self._cache.close()

    async def _probe(self) -> None:
        with contextlib.suppress(CacheDownError):
            await self._bounded(self._cache.check, writes=True)  # one that fails may still be read
            self._no_reads_until = self._no_writes_until = 0.0

    async def _guarded(
        self, operation: Callable[[], Awaitable[Value]], *, writes: bool, if_full: bool = False
    ) -> Value:
        paused_until = self._no_writes_until if writes and not if_full else self._no_reads_until
        if time.monotonic() < paused_until:
            raise CacheDownError("the bitstream cache failed a moment ago")
        return await self._bounded(operation, writes=writes, if_full=if_full)

    @property
    def _up(self) -> bool:
        return self._reads_work and self._writes_work

    async def _bounded(
        self, operation: Callable[[], Awaitable[Value]], *, writes: bool, if_full: bool = False
    ) -> Value:
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await operation()
        except Exception as error:
            self._no_writes_until = time.monotonic() + self.PAUSE_S
            if writes:
                self._writes_work = False
            else:
                self._no_reads_until = self._no_writes_until
                self._reads_work = False
            self._metrics.cache_errors.inc()
            self._metrics.cache_up.set(self._up)
            _log.warning("bitstream cache failed", error=reason_of(error))
            raise CacheDownError("the bitstream cache does not answer") from error
        # Reading says nothing of a store that is full, nor does deleting.
        self._reads_work = True
        self._writes_work = self._writes_work or (writes and not if_full)
        self._metrics.cache_up.set(self._up)
        return result

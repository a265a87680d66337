"""What is costly to make is kept in memory; simultaneous requests for the same make it once."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic

from ugicm.server.cache import Key, Lru, Value
from ugicm.server.metrics import Metrics


@dataclass
class _Flight(Generic[Value]):
    """A value in the making and how many wait for it."""

    task: asyncio.Task[Value] = field(init=False)
    waiting: int = 0


class SingleFlightCache(ABC, Generic[Key, Value]):
    """Byte-bounded and single-flighted; at most `max_bytes` are kept, 0 keeps none."""

    tier: str
    """Name in metrics."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._kept: Lru[Key, Value] = Lru(max_bytes)
        self._flights: dict[Key, _Flight[Value]] = {}
        self._metrics = metrics
        metrics.cache_bytes.labels(self.tier).set_function(lambda: self._kept.size)

    @abstractmethod
    def _keep(self, key: Key, value: Value) -> None:
        """Put a value where it is kept."""

    async def get(self, key: Key, make: Callable[[], Awaitable[Value]]) -> tuple[Value, bool]:
        """The value, and whether it was kept; else `make` is awaited once for all who ask meanwhile.

        The making goes on while anybody waits for it and is cancelled when the last one leaves.
        """
        if (kept := self._kept.get(key)) is not None:
            self._count("hit")
            return kept, True
        flight = self._flights.get(key)
        if flight is None:
            self._count("miss")
            flight = self._flights[key] = _Flight()
            flight.task = asyncio.create_task(self._make(key, flight, make))
            flight.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # heard of
        else:
            self._count("shared")
        flight.waiting += 1
        try:
            # Not `asyncio.shield`: once one of several has left, Python 3.14 logs what the making raises.
            await asyncio.wait({flight.task})
            return flight.task.result(), False
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                self._land(key, flight)

    def forget(self, those: Callable[[Key], bool]) -> None:
        """Drop values by their keys; those in the making are for whoever waits for them alone."""
        for key in [key for key in self._kept if those(key)]:
            self._kept.delete(key)
        for key in [key for key in self._flights if those(key)]:
            del self._flights[key]

    async def _make(self, key: Key, flight: _Flight[Value], make: Callable[[], Awaitable[Value]]) -> Value:
        try:
            value = await make()
        finally:
            wanted = self._land(key, flight)
        if wanted:
            self._keep(key, value)
        return value

    def _land(self, key: Key, flight: _Flight[Value]) -> bool:
        """Whether it had not been forgotten."""
        if wanted := self._flights.get(key) is flight:
            del self._flights[key]
        return wanted

    def _count(self, result: str) -> None:
        self._metrics.cache_requests.labels(self.tier, result).inc()

"""Micro-batching by weight, in front of the one thread that may touch the device.

Jobs that wait while the device is busy go together; an idle device starts at once, nothing lingers.
What may be inside is bounded by weight (pixels), from `MicroBatcher.admit` until the answer is made.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from ugicm.server.threads import run_in

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_RETRY_AFTER_S = 60
_DECAY = 0.95
"""Factor on what older admissions weigh in the measured rate, each time that one is finished."""


class OverloadedError(Exception):
    """Admitting more would exceed the weight limit."""

    def __init__(self, *, held: int, weight: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{held} + {weight} is over the limit of {limit}")
        self.held, self.weight, self.limit = held, weight, limit
        self.retry_after_s = retry_after_s


class Ran(NamedTuple, Generic[Result]):
    """A result and how long it took to get it, in seconds."""

    result: Result
    queue_s: float
    run_s: float
    """Of the whole batch."""


@dataclass(frozen=True, eq=False)
class _Job:
    run: Callable[[Sequence[Any]], Sequence[Any]]
    item: Any
    weight: int
    queued_at: float
    done: asyncio.Future[Ran[Any]]


class Rate:
    """Weight per second while there is work, forgetting slowly."""

    def __init__(self) -> None:
        self._weight = self._busy_s = 0.0
        self._since = 0.0

    def start(self) -> None:
        """The service leaves idleness."""
        self._since = time.monotonic()

    def add(self, weight: int) -> None:
        """`weight` was finished."""
        now = time.monotonic()
        self._weight = self._weight * _DECAY + weight
        self._busy_s = self._busy_s * _DECAY + now - self._since
        self._since = now

    @property
    def per_second(self) -> float | None:
        """None before anything was measured."""
        return self._weight / self._busy_s if self._busy_s > 0 else None


class MicroBatcher:
    """Runs functions over batches in one dedicated thread.

    Args:
        budget: largest total weight of a batch; a heavier item goes alone.
        limit: largest total weight admitted at once; anything is admitted when nothing else is inside.
        on_batch: called with the number of items and the weight of each batch, in the device thread.
    """

    def __init__(
        self,
        *,
        budget: int,
        limit: int,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        self.budget, self.limit = budget, limit
        self.admitted = 0
        """Weight inside now."""
        self.rate = Rate()
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="ugicm-device")
        self._worker: asyncio.Task[None] | None = None

    @contextmanager
    def admit(self, weight: int) -> Iterator[None]:
        """Hold `weight` of the limit, or raise `OverloadedError`."""
        if self.admitted and self.admitted + weight > self.limit:
            raise OverloadedError(
                held=self.admitted,
                weight=weight,
                limit=self.limit,
                retry_after_s=self.retry_after_s(),
            )
        if not self.admitted:
            self.rate.start()
        self.admitted += weight
        try:
            yield
            self.rate.add(weight)
        finally:
            self.admitted -= weight

    def retry_after_s(self) -> int:
        """When what is inside will be done, at the measured rate; 1..60 seconds."""
        rate = self.rate.per_second
        seconds = self.admitted / rate if rate else 1.0
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))

    async def run(
        self, function: Callable[[Sequence[Item]], Sequence[Result]], item: Item, *, weight: int
    ) -> Ran[Result]:
        """Result of `function` for `item`, computed together with other waiting items of that function.

        A caller that is cancelled while waiting leaves the queue; its neighbours do not notice. If a batch
        raises, its items are tried one by one, so that each caller gets its own result or error.
        """
        done: asyncio.Future[Ran[Result]] = asyncio.get_running_loop().create_future()
        job = _Job(function, item, weight, time.monotonic(), done)
        self._jobs.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await done
        except asyncio.CancelledError:
            # What `admit` no longer counts must not wait here, picture and all, until the device is free.
            if job in self._jobs:
                self._jobs.remove(job)
            raise

    async def close(self) -> None:
        """Finish what is queued, then stop the thread."""
        if self._worker is not None:
            await asyncio.wait({self._worker})  # a forced exit has cancelled it
        self._executor.shutdown()

    async def _work(self) -> None:
        """Run batches until nothing waits."""
        while batch := self._take():
            started = time.monotonic()
            try:
                outcomes = await run_in(self._executor, partial(self._run, batch))
            except Exception as error:  # there is no thread to be had
                outcomes = [error] * len(batch)
            run_s = time.monotonic() - started
            for job, outcome in zip(batch, outcomes, strict=True):
                if job.done.done():
                    continue
                if isinstance(outcome, Exception):
                    job.done.set_exception(outcome)
                else:
                    job.done.set_result(Ran(outcome, started - job.queued_at, run_s))

    def _take(self) -> list[_Job]:
        """The oldest waiting job and those that fit beside it; jobs without a waiting caller are dropped."""
        batch: list[_Job] = []
        kept: deque[_Job] = deque()
        weight = 0
        for job in self._jobs:
            if job.done.done():
                continue
            if batch and (job.run != batch[0].run or weight + job.weight > self.budget):
                kept.append(job)
                continue
            batch.append(job)
            weight += job.weight
        self._jobs = kept
        return batch

    def _run(self, batch: Sequence[_Job]) -> list[Any]:
        """Results or exceptions, in the device thread."""
        if self._on_batch:
            self._on_batch(len(batch), sum(job.weight for job in batch))
        try:
            results = list(batch[0].run([job.item for job in batch]))
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
            return results
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [self._run([job])[0] for job in batch]

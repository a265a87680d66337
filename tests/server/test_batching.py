"""The micro-batcher: what goes together, in which order, and what departed callers leave behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import no_thread
from ugicm.server.batching import MicroBatcher, OverloadedError, Rate

pytestmark = pytest.mark.anyio


class Device:
    """A function over batches that can be held up; remembers what it saw."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.bad: set[int] = set()

    def double(self, items: Sequence[int]) -> list[int]:
        self._note(items)
        return [2 * item for item in items]

    def negate(self, items: Sequence[int]) -> list[int]:
        self._note(items)
        return [-item for item in items]

    def count_pixels(self, pictures: Sequence[tuple[NDArray[np.uint8]]]) -> list[int]:
        return [pixels.size for (pixels,) in pictures]

    def _note(self, items: Sequence[int]) -> None:
        self.threads.add(threading.get_ident())
        self.batches.append(list(items))
        assert self.gate.wait(10)
        if bad := self.bad & set(items):
            raise ValueError(f"bad {bad}")


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
async def batcher() -> AsyncIterator[MicroBatcher]:
    batcher = MicroBatcher(budget=10, limit=100)
    yield batcher
    await batcher.close()


async def queued(batcher: MicroBatcher, device: Device, *items: int) -> list[asyncio.Task[int]]:
    """Tasks that wait behind a held-up batch of one, the item 0; weight 3 each."""
    device.gate.clear()
    tasks = [asyncio.create_task(_result(batcher, device, 0))]
    while not device.batches:
        await asyncio.sleep(0.001)
    tasks += [asyncio.create_task(_result(batcher, device, item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def test_an_idle_device_starts_at_once(batcher: MicroBatcher, device: Device) -> None:
    ran = await batcher.run(device.double, 21, weight=1)
    assert ran.result == 42
    assert device.batches == [[21]]


async def test_what_waits_goes_together_within_the_budget(batcher: MicroBatcher, device: Device) -> None:
    tasks = await queued(batcher, device, 1, 2, 3, 4)
    device.gate.set()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8]
    assert device.batches == [[0], [1, 2, 3], [4]]
    assert len(device.threads) == 1
    assert threading.get_ident() not in device.threads


async def test_a_batch_may_be_as_heavy_as_the_budget(batcher: MicroBatcher, device: Device) -> None:
    tasks = await queued(batcher, device, 1, 2)
    last = asyncio.create_task(batcher.run(device.double, 3, weight=4))
    await asyncio.sleep(0)
    device.gate.set()
    await asyncio.gather(*tasks, last)
    assert device.batches == [[0], [1, 2, 3]]


async def test_functions_do_not_mix(batcher: MicroBatcher, device: Device) -> None:
    tasks = await queued(batcher, device, 1)
    other = asyncio.create_task(batcher.run(device.negate, 5, weight=3))
    tasks.append(asyncio.create_task(_result(batcher, device, 2)))
    await asyncio.sleep(0)
    device.gate.set()
    assert await asyncio.gather(*tasks) == [0, 2, 4]
    assert (await other).result == -5
    assert device.batches == [[0], [1, 2], [5]]


async def _result(batcher: MicroBatcher, device: Device, item: int) -> int:
    return (await batcher.run(device.double, item, weight=3)).result


async def test_an_item_over_the_budget_goes_alone(batcher: MicroBatcher, device: Device) -> None:
    tasks = await queued(batcher, device, 1)
    heavy = asyncio.create_task(batcher.run(device.double, 9, weight=50))
    await asyncio.sleep(0)
    device.gate.set()
    await asyncio.gather(*tasks)
    assert (await heavy).result == 18
    assert device.batches == [[0], [1], [9]]


async def test_a_departed_caller_is_dropped_and_its_neighbours_are_served(
    batcher: MicroBatcher, device: Device
) -> None:
    tasks = await queued(batcher, device, 1, 2)
    tasks[1].cancel()
    await asyncio.sleep(0)
    device.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    assert (results[0], results[2]) == (0, 4)
    assert device.batches == [[0], [2]]


async def test_a_departed_caller_leaves_nothing_behind(batcher: MicroBatcher, device: Device) -> None:
    tasks = await queued(batcher, device)
    first, second = ((np.zeros((2, 2), np.uint8),) for _ in range(2))  # comparing these would raise
    waiting = [
        asyncio.create_task(batcher.run(device.count_pixels, item, weight=3)) for item in (first, second)
    ]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.gather(waiting[1], return_exceptions=True)
    assert [job.item is first for job in batcher._jobs] == [True]
    device.gate.set()
    assert (await waiting[0]).result == 4
    assert await tasks[0] == 0


async def test_departing_while_running_harms_nobody(batcher: MicroBatcher, device: Device) -> None:
    tasks = await queued(batcher, device, 1)
    tasks[0].cancel()
    device.gate.set()
    assert await tasks[1] == 2


async def test_one_bad_item_fails_alone(batcher: MicroBatcher, device: Device) -> None:
    device.bad = {2}
    tasks = await queued(batcher, device, 1, 2, 3)
    device.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[2], ValueError)
    assert [results[0], results[1], results[3]] == [0, 2, 6]


async def test_a_wrong_number_of_results_is_an_error(batcher: MicroBatcher) -> None:
    with pytest.raises(RuntimeError, match="0 results"):
        await batcher.run(lambda items: [], 1, weight=1)


async def test_admission_is_bounded_by_weight(batcher: MicroBatcher) -> None:
    with batcher.admit(60), batcher.admit(40):
        assert batcher.admitted == 100
        with pytest.raises(OverloadedError) as caught, batcher.admit(1):
            pass
        assert (caught.value.held, caught.value.weight, caught.value.limit) == (100, 1, 100)
        assert caught.value.retry_after_s >= 1
    assert batcher.admitted == 0
    with batcher.admit(1000):
        assert batcher.admitted == 1000


async def test_retry_after_is_what_is_inside_over_the_measured_rate(
    batcher: MicroBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("ugicm.server.batching.time.monotonic", lambda: now)
    with batcher.admit(50):
        now += 10  # 5 per second
    now += 1000  # idleness does not count
    with batcher.admit(60), batcher.admit(40):
        assert batcher.rate.per_second == pytest.approx(5)
        assert batcher.retry_after_s() == 20
    with batcher.admit(10_000):
        assert batcher.retry_after_s() == 60


async def test_the_rate_follows_a_change_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ugicm.server.batching.time.monotonic", lambda: now)
    rate = Rate()
    for seconds, expected in ((1.0, 10.0), (0.1, 100.0)):
        for _ in range(200):
            now += seconds
            rate.add(10)
        assert rate.per_second == pytest.approx(expected, rel=0.01)


async def test_failed_work_does_not_count_as_throughput(batcher: MicroBatcher) -> None:
    with pytest.raises(ValueError, match="no image"), batcher.admit(50):
        raise ValueError("no image")
    assert batcher.rate.per_second is None
    assert batcher.admitted == 0


async def test_close_finishes_what_is_queued(device: Device) -> None:
    batcher = MicroBatcher(budget=10, limit=100)
    tasks = await queued(batcher, device, 1, 2)
    device.gate.set()
    await batcher.close()
    assert [task.done() for task in tasks[:1]] == [True]
    assert await asyncio.gather(*tasks) == [0, 2, 4]


async def test_callers_are_told_where_there_is_no_thread_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batcher = MicroBatcher(budget=9, limit=9)
    monkeypatch.setattr(batcher._executor, "submit", no_thread)
    async with asyncio.timeout(5):
        with pytest.raises(RuntimeError, match="new thread"):
            await batcher.run(lambda items: items, 1, weight=1)
        monkeypatch.undo()
        assert (await batcher.run(lambda items: items, 1, weight=1)).result == 1


async def test_what_found_no_thread_is_not_done_later(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = MicroBatcher(budget=9, limit=9)
    done: list[int] = []

    def work(items: Sequence[int]) -> list[None]:
        done.extend(items)
        return [None] * len(items)

    monkeypatch.setattr("threading.Thread.start", no_thread)  # which leaves it in the pool's queue
    with pytest.raises(RuntimeError, match="new thread"):
        await batcher.run(work, 1, weight=1)
    monkeypatch.undo()
    await batcher.run(work, 2, weight=1)
    assert done == [2]
    await batcher.close()

"""Bitstream caches in memory, and the guard around a cache that is down."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ugicm.memory import MAP_BYTES
from ugicm.server.cache import (
    MAX_MAPS,
    CacheDownError,
    Content,
    GuardedCache,
    Lru,
    MemoryCache,
    bitstream_id,
    lasting,
)
from ugicm.server.metrics import Metrics
from ugicm.server.pictures import Picture, PictureCache, PictureKey

pytestmark = pytest.mark.anyio


class BrokenCache(MemoryCache):
    """Raises, or hangs, while `broken`."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.broken = True
        self.hang = False
        self.asked = 0

    async def check(self) -> None:
        self.asked += 1
        if self.hang:
            await asyncio.sleep(60)
        if self.broken:
            raise ConnectionError("refused")

    async def get(self, id: str) -> bytes | None:
        await self.check()
        return await super().get(id)

    async def put(self, id: str, bitstream: bytes) -> bool | None:
        await self.check()
        return await super().put(id, bitstream)


@pytest.fixture
def broken() -> BrokenCache:
    return BrokenCache()


def test_large_entries_live_apart_from_the_heap() -> None:
    large, small = bytes(range(256)) * 512, b"small"
    lasts = lasting(large, 1 << 20)
    assert lasts == large
    assert lasts is not large
    assert memoryview(lasts).readonly
    assert lasting(small, 1 << 20) is small
    assert lasting(large, len(large) - 1) is large  # will not be kept


async def test_a_large_entry_is_not_copied_and_outlives_its_place() -> None:
    cache = PictureCache(1 << 20, Metrics())
    large, key = bytes(range(256)) * 512, PictureKey("a", 0.0, "png")

    async def make() -> Picture:
        return await Picture.of(large)

    async def get() -> Content:
        return (await cache.get(key, make))[0].content

    await get()
    first, second = await get(), await get()
    assert first is second is not large
    cache.forget(lambda _: True)
    del second
    assert first == large


def test_a_large_cache_does_not_use_up_the_maps_of_the_process() -> None:
    content = bytes(MAP_BYTES)
    assert lasting(content, MAX_MAPS << 20) is content


def test_the_lru_is_bounded_by_bytes() -> None:
    overhead = Lru.OVERHEAD
    lru: Lru[str, str] = Lru(3 * (100 + overhead))
    for name in "abc":
        lru.put(name, name, 100)
    assert lru.get("a") == "a"  # now b is the oldest
    lru.put("d", "d", 100)
    assert list(lru) == ["c", "a", "d"]
    assert lru.size == 3 * (100 + overhead)
    lru.put("e", "e", 200)
    assert list(lru) == ["d", "e"]
    assert lru.put("too large", "", 10_000) is False
    assert lru.get("too large") is None
    lru.put("d", "", 0)
    assert lru.size == 200 + 2 * overhead
    assert (lru.delete("d"), lru.delete("d")) == (True, False)


def test_many_tiny_entries_are_bounded_too() -> None:
    lru: Lru[int, None] = Lru(10 * Lru.OVERHEAD)
    for key in range(1000):
        lru.put(key, None, 0)
    assert len(list(lru)) == 10


async def test_memory_cache() -> None:
    cache = MemoryCache(10_000)
    id = bitstream_id(b"bits")
    assert await cache.get(id) is None
    assert await cache.put(id, b"bits") is False
    assert await cache.put(id, b"bits") is True
    assert await cache.get(id) == b"bits"
    assert (await cache.delete(id), await cache.delete(id)) == (True, False)
    assert await cache.put("large", bytes(10_000)) is None
    assert await cache.get("large") is None


async def test_storing_again_is_a_use() -> None:
    cache = MemoryCache(2 * (4 + Lru.OVERHEAD))
    for id in ("a", "b", "a", "c"):
        await cache.put(id, b"bits")
    assert [id for id in "abc" if await cache.get(id)] == ["a", "c"]


@pytest.mark.parametrize("url", ["memory:", "file://{}"])
def test_what_is_not_kept_is_not_called_stored(
    make_client: Any, image_file: Any, tmp_path: Path, url: str
) -> None:
    client = make_client(cache_url=url.format(tmp_path), cache_bytes=5000)
    small, large = (client.post("/encode", content=image_file(side, 8)) for side in (4, 600))
    assert large.json()["size"] > 5000
    assert (large.status_code, large.json()["stored"], large.json()["cached"]) == (200, False, False)
    assert "location" not in large.headers
    assert client.get(f"/bitstreams/{large.json()['id']}").status_code == 404
    assert small.json()["stored"] is True
    assert client.get(small.headers["location"]).status_code == 200


async def test_a_broken_cache_is_named_and_then_left_alone(broken: BrokenCache) -> None:
    metrics = Metrics()
    guarded = GuardedCache(broken, metrics, timeout_s=1)
    for _ in range(3):
        with pytest.raises(CacheDownError):
            await guarded.get("a" * 64)
    for operation in (guarded.put("a" * 64, b"bits"), guarded.delete("a" * 64)):
        with pytest.raises(CacheDownError):
            await operation
    assert broken.asked == 1
    assert metrics.registry.get_sample_value("ugicm_cache_errors_total") == 1
    assert metrics.registry.get_sample_value("ugicm_cache_up") == 0
    assert await guarded.up() is False
    broken.broken = False
    assert await guarded.up() is True
    assert await guarded.get("a" * 64) is None
    assert metrics.registry.get_sample_value("ugicm_cache_up") == 1


async def test_a_store_is_asked_again_after_a_while(
    broken: BrokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("ugicm.server.cache.time.monotonic", lambda: now)
    guarded = GuardedCache(broken, Metrics(), timeout_s=1)
    with pytest.raises(CacheDownError):
        await guarded.get("a" * 64)
    broken.broken = False
    now += GuardedCache.PAUSE_S - 0.1
    with pytest.raises(CacheDownError):
        await guarded.get("a" * 64)
    now += 0.2
    assert await guarded.get("a" * 64) is None
    assert await guarded.put("a" * 64, b"bits") is False


async def test_a_full_store_can_still_be_read() -> None:
    class Full(MemoryCache):
        async def put(self, id: str, bitstream: bytes) -> bool | None:
            raise OSError(28, "No space left on device")

        async def check(self) -> None:
            raise OSError(28, "No space left on device")

    metrics = Metrics()
    guarded = GuardedCache(Full(1000), metrics, timeout_s=1)
    for _ in range(2):
        with pytest.raises(CacheDownError):
            await guarded.put("a" * 64, b"bits")
    assert await guarded.up() is False
    assert await guarded.get("b" * 64) is None
    assert await guarded.delete("b" * 64) is False  # which may make room
    assert metrics.registry.get_sample_value("ugicm_cache_up") == 0


async def test_one_failed_read_does_not_call_a_store_down_that_is_only_read(broken: BrokenCache) -> None:
    metrics = Metrics()
    guarded = GuardedCache(broken, metrics, timeout_s=1)
    guarded.PAUSE_S = 0  # type: ignore[misc]
    with pytest.raises(CacheDownError):
        await guarded.get("a" * 64)
    broken.broken = False
    assert await guarded.get("a" * 64) is None
    assert metrics.registry.get_sample_value("ugicm_cache_up") == 1


async def test_probes_do_not_wait_for_a_store_that_hangs(broken: BrokenCache) -> None:
    guarded = GuardedCache(broken, Metrics(), timeout_s=GuardedCache.PROBE_S + 0.2)
    broken.hang = True
    async with asyncio.timeout(GuardedCache.PROBE_S + 0.1):
        assert await asyncio.gather(*(guarded.up() for _ in range(5))) == [True] * 5
    assert broken.asked == 1
    assert await guarded.up() is False
    broken.hang = broken.broken = False
    assert await guarded.up() is True


async def test_a_cache_that_hangs_is_bounded_in_time(broken: BrokenCache) -> None:
    broken.hang = True
    with pytest.raises(CacheDownError):
        await GuardedCache(broken, Metrics(), timeout_s=0.01).get("a" * 64)


async def test_a_store_that_hangs_does_not_hold_up_the_end(broken: BrokenCache) -> None:
    class Hanging(BrokenCache):
        async def close(self) -> None:
            await asyncio.sleep(60)

    async with asyncio.timeout(30):
        await GuardedCache(Hanging(), Metrics(), timeout_s=0.01).close()


def test_pictures_are_forgotten_even_where_the_bitstream_cannot_be(make_client: Any, image_file: Any) -> None:
    class Unforgetting(MemoryCache):
        async def delete(self, id: str) -> bool:
            raise ConnectionError("refused")

    client = make_client(Unforgetting(1 << 20))
    path = f"/bitstreams/{client.post('/encode', content=image_file()).json()['id']}"
    made = [client.get(f"{path}/image").headers["cache-status"] for _ in range(2)]
    assert client.delete(path).json()["code"] == "cache-unavailable"
    made.append(client.get(f"{path}/image").headers["cache-status"])
    assert made == ["ugicm; fwd=miss", "ugicm; hit", "ugicm; fwd=miss"]


def test_the_service_works_without_its_cache(make_client: Any, image_file: Any, broken: BrokenCache) -> None:
    client = make_client(broken)
    encoded = client.post("/encode", content=image_file())
    assert encoded.status_code == 200
    assert encoded.json()["stored"] is False
    bits = client.post("/encode", content=image_file(), headers={"Accept": "application/vnd.ugicm"})
    assert client.post("/decode", content=bits.content).status_code == 200
    by_id = client.post("/decode", json={"id": encoded.json()["id"]})
    assert (by_id.status_code, by_id.json()["code"]) == (503, "cache-unavailable")
    assert by_id.headers["retry-after"]
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "cache": "down"})
    broken.broken = False
    assert client.get("/readyz").json()["cache"] == "up"
    assert client.post("/encode", content=image_file()).json()["stored"] is True

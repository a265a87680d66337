"""Many clients at once: batches, overload, one flight per picture, clients that leave."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import anyio.to_thread
import httpx2
import numpy as np
import pytest
from fastapi import FastAPI, Request
from starlette.datastructures import UploadFile

from tests.conftest import no_thread
from tests.live import until
from ugicm.codec.codec import Codec
from ugicm.codec.entropy import EntropyModel
from ugicm.codec.errors import CodecError
from ugicm.server.deps import FORM_SLICE_BYTES, open_form
from ugicm.server.engine import CPU_BATCH_PIXELS, CUDA_BATCH_PIXELS, RateTarget
from ugicm.server.isolated import size_of_image
from ugicm.server.latents import LatentCache
from ugicm.server.metrics import Metrics
from ugicm.server.pictures import Picture, PictureCache, PictureKey
from ugicm.server.timings import Timings

pytestmark = pytest.mark.anyio

MakeAsyncClient = Callable[..., Any]


@pytest.fixture
async def make_async_client(make_app: Any) -> AsyncIterator[MakeAsyncClient]:
    """``await make_async_client(**settings)``: a client of the started application."""
    async with AsyncExitStack() as stack:

        async def make(**settings: Any) -> httpx2.AsyncClient:
            app: FastAPI = make_app(**settings)
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
            client = httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=30)
            client.app = app  # type: ignore[attr-defined]
            return await stack.enter_async_context(client)

        yield make


def sample(client: Any, name: str, **labels: str) -> float:
    registry = client.app.state.services.metrics.registry
    return registry.get_sample_value(name, labels) or 0.0


def start(requests: Iterable[Awaitable[httpx2.Response]]) -> list[asyncio.Task[httpx2.Response]]:
    return [asyncio.ensure_future(request) for request in requests]


async def statuses(tasks: list[asyncio.Task[httpx2.Response]]) -> list[int]:
    return sorted(response.status_code for response in await asyncio.gather(*tasks))


async def test_what_is_deleted_while_it_is_decoded_is_not_kept(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client()
    path = (await client.post("/encode", content=image_file())).json()["links"]["bitstream"]
    codec.gate.clear()
    (asked,) = start([client.get(f"{path}/image")])
    await until(lambda: looked_up(client, "picture", "miss") == 1)
    assert (await client.delete(path)).status_code == 204
    codec.gate.set()
    assert (await asked).status_code == 200
    await client.post("/encode", content=image_file())
    again = await client.get(f"{path}/image")
    assert again.headers["cache-status"] == "ugicm; fwd=miss"


async def test_what_waits_for_the_device_goes_together_in_one_thread(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False, pool_threads=4)
    jobs = client.app.state.services.engine.batcher
    codec.gate.clear()
    images = [image_file(40 + i, 30, seed=i) for i in range(12)]
    tasks = start(client.post("/encode", content=data) for data in images[:1])
    await until(lambda: codec.calls == [("analyse", 1)])
    tasks += start(client.post("/encode", content=data) for data in images[1:])
    await until(lambda: len(jobs._jobs) == 11)
    codec.gate.set()
    responses = await asyncio.gather(*tasks)
    assert [response.json()["width"] for response in responses] == [40 + i for i in range(12)]
    assert codec.calls == [("analyse", 1), ("analyse", 11)]
    assert len(codec.threads) == 1
    assert sample(client, "ugicm_batch_images_sum") == 12


async def test_overload_is_refused_with_a_computed_wait(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(queue_pixels=3 * 128 * 128)
    codec.gate.clear()
    tasks = start(client.post("/encode", content=image_file(seed=i)) for i in range(10))
    await until(lambda: sum(task.done() for task in tasks) == 7)
    assert sample(client, "ugicm_queue_pixels") == 3 * 128 * 128
    codec.gate.set()
    assert await statuses(tasks) == [200] * 3 + [503] * 7
    refused = next(task.result() for task in tasks if task.result().status_code == 503)
    assert refused.json()["code"] == "overloaded"
    assert refused.json()["setting"] == "UGICM_QUEUE_PIXELS"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert sample(client, "ugicm_rejected_total", code="overloaded") == 7
    assert (await client.post("/encode", content=image_file())).status_code == 200
    assert sample(client, "ugicm_queue_pixels") == 0


async def test_what_is_too_large_for_good_is_not_told_to_come_again(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(queue_pixels=3 * 128 * 128)
    codec.gate.clear()
    tasks = start(client.post("/encode", content=image_file(seed=i)) for i in range(3))
    await until(lambda: sample(client, "ugicm_queue_pixels") == 3 * 128 * 128)
    too_large = await client.post("/encode", content=image_file(1001, 1000))
    assert (too_large.status_code, too_large.json()["code"]) == (413, "too-many-pixels")
    codec.gate.set()
    assert await statuses(tasks) == [200] * 3


async def test_nor_where_one_picture_is_more_than_the_queue(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(queue_pixels=1000)
    codec.gate.clear()
    tasks = start([client.post("/encode", content=image_file())])
    await until(lambda: sample(client, "ugicm_queue_pixels") > 1000)
    too_large = await client.post("/encode", content=image_file(1001, 1000))
    assert (too_large.status_code, too_large.json()["code"]) == (413, "too-many-pixels")
    codec.gate.set()
    assert await statuses(tasks) == [200]


@pytest.mark.parametrize(
    ("device", "setting", "budget"),
    [("cpu", {}, CPU_BATCH_PIXELS), ("cuda:0", {}, CUDA_BATCH_PIXELS), ("cpu", {"batch_pixels": 7}, 7)],
)
async def test_the_device_decides_how_large_batches_are(
    make_async_client: MakeAsyncClient, codec: Any, device: str, setting: dict[str, int], budget: int
) -> None:
    codec.device = device
    client = await make_async_client(**setting)
    assert client.app.state.services.engine.batcher.budget == budget


async def test_a_strip_counts_as_what_the_networks_see(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client()
    codec.gate.clear()
    (work,) = start([client.post("/encode", content=image_file(1000, 1))])
    await until(lambda: sample(client, "ugicm_queue_pixels") == 1024 * 64)
    codec.gate.set()
    assert (await work).status_code == 200


async def test_a_header_that_takes_long_holds_up_nobody_else(
    make_async_client: MakeAsyncClient, image_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await make_async_client()
    answered = threading.Event()

    def slow(data: bytes, *, stop: Callable[[], bool]) -> tuple[int, int]:
        assert answered.wait(10)
        return 1, 1

    monkeypatch.setattr("ugicm.server.engine.size_of_image", slow)
    (work,) = start([client.post("/encode", content=image_file())])
    await asyncio.sleep(0)
    assert (await client.get("/livez")).status_code == 200
    answered.set()
    assert (await work).status_code == 200


def batch_of(*images: bytes) -> dict[str, Any]:
    return {"files": [("images", (f"{i}.png", data)) for i, data in enumerate(images)]}


async def test_images_of_a_batch_wait_for_each_other(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(queue_pixels=2 * 128 * 128)
    response = await client.post("/encode/batch", **batch_of(*(image_file(seed=i) for i in range(7))))
    assert [sorted(json.loads(line)) for line in response.text.splitlines()] == [
        ["filename", "index", "result"]
    ] * 7


async def test_a_batch_is_refused_what_others_hold(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(queue_pixels=128 * 128)
    codec.gate.clear()
    (other,) = start([client.post("/encode", content=image_file())])
    await until(lambda: sample(client, "ugicm_queue_pixels") == 128 * 128)
    response = await client.post("/encode/batch", **batch_of(image_file(seed=1), image_file(seed=2)))
    problems = [json.loads(line)["problem"] for line in response.text.splitlines()]
    assert [problem["code"] for problem in problems] == ["overloaded"] * 2
    assert all(1 <= problem["retry_after_s"] <= 60 for problem in problems)
    codec.gate.set()
    assert (await other).status_code == 200


async def test_images_that_are_refused_do_not_wait_for_each_other(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await make_async_client(queue_pixels=128 * 128, pool_threads=1)
    codec.gate.clear()
    (other,) = start([client.post("/encode", content=image_file())])
    await until(lambda: sample(client, "ugicm_queue_pixels") == 128 * 128)
    headers: list[bytes] = []

    def slow(data: bytes, *, stop: Callable[[], bool]) -> tuple[int, int]:
        headers.append(data)
        time.sleep(0.02)
        return 48, 32

    monkeypatch.setattr("ugicm.server.engine.size_of_image", slow)
    (batch,) = start([client.post("/encode/batch", **batch_of(*(image_file(seed=i) for i in range(5))))])
    await until(lambda: batch.done() or len(headers) > 20)
    assert len(headers) == 5
    codec.gate.set()
    problems = [json.loads(line)["problem"] for line in (await batch).text.splitlines()]
    assert [problem["code"] for problem in problems] == ["overloaded"] * 5
    assert (await other).status_code == 200


async def test_requests_beyond_the_limit_are_refused_but_health_checks_are_not(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(max_requests=2, warm_up=False)
    codec.gate.clear()
    work = start(client.post("/encode", content=image_file()) for _ in range(2))
    await until(lambda: codec.calls != [])
    refused = await client.get("/info")
    assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["setting"] == "UGICM_MAX_REQUESTS"
    assert (await client.get("/readyz")).status_code == 200
    codec.gate.set()
    assert await statuses(work) == [200, 200]
    assert (await client.get("/info")).status_code == 200


async def test_a_failed_request_leaves_the_queue(make_async_client: MakeAsyncClient, image_file: Any) -> None:
    client = await make_async_client(queue_pixels=128 * 128)
    for _ in range(3):
        response = await client.post("/encode", content=image_file()[:80])
        assert response.json()["code"] == "malformed-image"
    assert sample(client, "ugicm_queue_pixels") == 0


def shared(client: Any) -> float:
    return looked_up(client, "picture", "shared")


def looked_up(client: Any, tier: str, result: str) -> float:
    return sample(client, "ugicm_cache_requests_total", tier=tier, result=result)


async def test_fifty_decodes_of_one_picture_run_the_network_once(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client()
    id = (await client.post("/encode", content=image_file())).json()["id"]
    codec.calls.clear()
    codec.gate.clear()
    ask = {"params": {"preference": "machine"}, "json": {"id": id}}
    tasks = start(client.post("/decode", **ask) for _ in range(50))
    await until(lambda: shared(client) == 49)
    codec.gate.set()
    assert await statuses(tasks) == [200] * 50
    assert len({task.result().content for task in tasks}) == 1
    assert codec.calls == [("synthesise", 1)]
    assert tasks[0].result().headers["cache-status"] == "ugicm; fwd=miss"
    again = await client.post("/decode", **ask)
    assert again.headers["cache-status"] == "ugicm; hit"
    assert codec.calls == [("synthesise", 1)]


async def test_what_is_deleted_before_its_making_begins_is_still_answered() -> None:
    pictures = PictureCache(1000, Metrics())

    async def make() -> Picture:
        return await Picture.of(b"picture")

    key = PictureKey("a", 0.0, "png")
    asked = asyncio.create_task(pictures.get(key, make))
    asyncio.get_running_loop().call_soon(pictures.forget, lambda key: key.id == "a")
    picture, _ = await asked
    assert picture.content == b"picture"
    assert (await pictures.get(key, make))[1] is False


async def test_others_are_seen_to_while_a_form_is_taken_apart() -> None:
    content = bytes(10 * FORM_SLICE_BYTES)
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = head + content + b"\r\n--b--"

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    async with open_form(Request({"type": "http", "headers": headers}, receive), max_files=1) as form:
        counter.cancel()
        part = form["image"]
        assert isinstance(part, UploadFile)
        assert await part.read() == content
    assert turns >= 10


async def test_a_flight_survives_the_client_that_started_it(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    codec.gate.clear()
    first, second = start(client.post("/decode", json={"id": id}) for _ in range(2))
    await until(lambda: codec.count("synthesise") == 1 and shared(client) == 1)
    first.cancel()
    codec.gate.set()
    assert (await second).status_code == 200
    assert codec.count("synthesise") == 1


async def test_who_joins_a_flight_has_a_deadline_of_its_own(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False, request_timeout_s=1)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    codec.gate.clear()
    (first,) = start([client.post("/decode", json={"id": id})])
    await asyncio.sleep(0.5)
    (second,) = start([client.post("/decode", json={"id": id})])
    assert (await first).status_code == 504
    codec.gate.set()
    assert (await second).status_code == 200
    assert codec.count("synthesise") == 1


async def test_a_flight_that_everybody_left_is_dropped(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    codec.gate.clear()
    blocking = start([client.post("/encode", content=image_file(seed=1))])
    await until(lambda: codec.count("analyse") == 2)
    leaving = start(client.post("/decode", json={"id": id}) for _ in range(2))
    await until(lambda: len(client.app.state.services.engine.batcher._jobs) == 1)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await until(lambda: sample(client, "ugicm_queue_pixels") == 128 * 128)
    codec.gate.set()
    assert await statuses(blocking) == [200]
    assert codec.count("synthesise") == 0
    assert (await client.post("/decode", json={"id": id})).status_code == 200


async def test_a_departed_client_leaves_no_picture_in_the_pool(
    make_async_client: MakeAsyncClient, image_file: Any
) -> None:
    client = await make_async_client(pool_threads=1, warm_up=False)
    engine, free = client.app.state.services.engine, threading.Event()
    engine._pool.submit(free.wait, 10)
    data = image_file()
    before = sys.getrefcount(data)
    leaving = asyncio.create_task(engine.encode(data, RateTarget(), Timings()))
    await until(lambda: engine._pool._work_queue.qsize() == 1)
    leaving.cancel()
    await asyncio.wait([leaving])
    del leaving
    gc.collect()
    assert sys.getrefcount(data) == before
    free.set()


@pytest.mark.parametrize("path", ["/encode", "/encode?max_bytes=100000", "/decode"])
async def test_work_is_stopped_when_its_time_is_up(
    path: str, make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(request_timeout_s=2, warm_up=False)
    content = image_file()
    size_of_image(content)  # starts the process that reads images, which may take a while
    if path == "/decode":
        content = codec.pack(codec.analyse([np.zeros((8, 8, 3), np.uint8)], [50.0])[0])
    codec.gate.clear()
    codec.stop = None
    (late,) = start([client.post(path, content=content)])
    await until(lambda: codec.stop is not None)
    assert not codec.stop()
    assert (await late).status_code == 504
    assert codec.stop()
    codec.gate.set()


async def test_a_batch_is_stopped_when_nobody_waits_for_it(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False)
    engine = client.app.state.services.engine
    codec.gate.clear()
    first = asyncio.create_task(engine.encode(image_file(), RateTarget(), Timings()))
    await until(lambda: codec.count("analyse") == 1)
    both = [asyncio.create_task(engine.encode(image_file(seed=i), RateTarget(), Timings())) for i in (1, 2)]
    await until(lambda: len(engine.batcher._jobs) == 2)
    stops = []
    gate, codec.gate = codec.gate, threading.Event()
    gate.set()
    await first
    await until(lambda: ("analyse", 2) in codec.calls)
    for task in both:
        task.cancel()
        await asyncio.wait([task])
        stops.append(codec.stop())
    codec.gate.set()
    assert stops == [False, True]


@pytest.mark.parametrize("stage", ["pack", "unpack"])
async def test_work_in_the_pool_is_stopped_when_nobody_waits_for_it(
    stage: str, make_async_client: MakeAsyncClient, codec: Any, image_file: Any, monkeypatch: Any
) -> None:
    client = await make_async_client(warm_up=False)
    engine = client.app.state.services.engine
    data = codec.pack(codec.analyse([np.zeros((8, 8, 3), np.uint8)], [50.0])[0])
    begun, stopped = threading.Event(), threading.Event()

    def work(_: Any, *, stop: Any) -> Any:
        begun.set()
        while not stop():
            time.sleep(0.01)
        stopped.set()
        raise CodecError("stopped")

    monkeypatch.setattr(codec, stage, work)
    if stage == "pack":
        task = asyncio.create_task(engine.encode(image_file(), RateTarget(), Timings()))
    else:
        task = asyncio.create_task(engine.decode("id", data, 0.0, "png", Timings()))
    await until(begun.is_set)
    assert not stopped.is_set()
    task.cancel()
    await asyncio.wait([task])
    await until(stopped.is_set)


async def test_the_end_does_not_wait_for_a_file(make_async_client: MakeAsyncClient, codec: Any) -> None:
    client = await make_async_client(warm_up=False)
    engine = client.app.state.services.engine
    begun, free = threading.Event(), threading.Event()
    engine._pool.submit(lambda: (begun.set(), free.wait()))
    await until(begun.is_set)
    await engine.close()
    assert not free.is_set()
    free.set()


async def test_searches_do_not_wait_for_each_other(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False)
    batcher = client.app.state.services.engine.batcher
    codec.gate.clear()
    sizes = ({"max_bytes": limit} for limit in (99_999, 3, 99_999))
    tasks = start(client.post("/encode", params=size, content=image_file()) for size in sizes)
    await until(lambda: codec.count("search") == 1 and len(batcher._jobs) == 2)
    codec.gate.set()
    assert await statuses(tasks) == [200, 200, 422]
    assert codec.count("search") == 3  # in a batch with the one that fails, another would have run twice
    assert sample(client, "ugicm_batch_images_count") == 3


def test_the_codec_stops_a_search(tiny_codec: Codec, photo: Any) -> None:
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) == 4)
        return asked[-1]

    with pytest.raises(CodecError, match="stopped"):
        tiny_codec.encode_to_size(photo, max_bytes=20_000, stop=stop)
    assert asked == [False] * 4 + [True]


def test_the_codec_stops_between_tiles(tiny_codec: Codec) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1000, 1100, 3), np.uint8)
    (data,) = tiny_codec.encode([picture])
    latent = tiny_codec.unpack(data)
    assert latent.header.tiles == 2
    analysed = tiny_codec.analyse([picture])[0]
    for work in (
        lambda stop: tiny_codec.analyse([picture], stop=stop),
        lambda stop: tiny_codec.pack(analysed, stop=stop),
        lambda stop: tiny_codec.unpack(data, stop=stop),
        lambda stop: tiny_codec.synthesise([latent], stop=stop),
    ):
        asked = iter([False, True])
        with pytest.raises(CodecError, match="stopped"):
            work(asked.__next__)
        assert not list(asked)


@pytest.mark.parametrize(("number", "transforms", "coded"), [(1, 1, 0), (2, 2, 0), (3, 2, 0), (4, 2, 1)])
def test_a_search_goes_on_to_the_end_of_a_tile_alone(
    tiny_codec: Codec, photo: Any, monkeypatch: pytest.MonkeyPatch, number: int, transforms: int, coded: int
) -> None:
    transformed: list[Any] = []
    packed: list[Any] = []
    transform, pack = Codec._transform, EntropyModel.pack
    monkeypatch.setattr("ugicm.codec.codec.TILE_SIDE", 128)
    monkeypatch.setattr(Codec, "_transform", lambda *given: transformed.append(given) or transform(*given))
    monkeypatch.setattr(EntropyModel, "pack", lambda *given: packed.append(given) or pack(*given))
    asked = iter([False] * (number - 1) + [True])
    with pytest.raises(CodecError, match="stopped"):
        tiny_codec.encode_to_size(photo[:128, :256], max_bytes=20_000, stop=asked.__next__)
    assert (len(transformed), len(packed)) == (transforms, coded)


def test_the_codec_stops_before_lossless_coding(tiny_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.zeros((64, 64, 3), np.uint8)
    (latent,) = tiny_codec.analyse([drawn])
    monkeypatch.setattr("ugicm.codec.lossless.compress", None)
    asked = iter([False, True])
    with pytest.raises(CodecError, match="stopped"):
        tiny_codec.pack(latent, stop=asked.__next__)
    with pytest.raises(CodecError, match="stopped"):
        tiny_codec.encode_to_size(drawn, max_bytes=20_000, stop=lambda: True)


async def test_a_flight_that_fails_is_not_remembered(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client()
    id = (await client.post("/encode", content=image_file())).json()["id"]
    codec.gate.clear()
    codec.fail = RuntimeError("lost")
    tasks = start(client.post("/decode", json={"id": id}) for _ in range(3))
    await until(lambda: shared(client) == 2)
    codec.gate.set()
    assert await statuses(tasks) == [500] * 3
    codec.fail = None
    assert (await client.post("/decode", json={"id": id})).status_code == 200


async def test_views_of_a_bitstream_share_its_latent(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any, pixels: Any
) -> None:
    client = await make_async_client(warm_up=False)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    human = await client.post("/decode", json={"id": id})
    assert "entropy" in human.headers["server-timing"]
    machine = await client.post("/decode?preference=machine", json={"id": id})
    assert "entropy" not in machine.headers["server-timing"]
    assert np.array_equal(255 - pixels(human.content), pixels(machine.content))
    assert codec.unpacked == 1
    assert looked_up(client, "latent", "hit") == 1
    assert sample(client, "ugicm_cache_bytes", tier="latent") > 0


async def test_simultaneous_views_of_a_bitstream_share_the_work(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    tasks = start(client.post("/decode", json={"id": id}, params={"strength": n / 9}) for n in range(10))
    assert await statuses(tasks) == [200] * 10
    assert codec.unpacked == 1


async def test_what_is_deleted_leaves_no_latent(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    bitstream = (await client.get(f"/bitstreams/{id}")).content
    await client.post("/decode", json={"id": id})
    await client.delete(f"/bitstreams/{id}")
    assert sample(client, "ugicm_cache_bytes", tier="latent") == 0
    await client.post("/decode?preference=machine", content=bitstream)
    assert codec.unpacked == 2


@pytest.mark.parametrize("limit", [0, 1000])
async def test_latents_beyond_their_limit_are_not_kept(
    limit: int, make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(latent_cache_bytes=limit, warm_up=False)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    for preference in ("human", "machine"):
        assert (await client.post(f"/decode?preference={preference}", json={"id": id})).status_code == 200
    assert codec.unpacked == 2


async def test_without_a_picture_cache_every_decode_runs(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(picture_cache_bytes=0, warm_up=False)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    for _ in range(2):
        await client.post("/decode", json={"id": id})
    assert codec.count("synthesise") == 2


async def test_too_many_pixels_are_refused_without_the_pool(
    make_async_client: MakeAsyncClient,
    image_file: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = await make_async_client(max_pixels=1 << 14)
    monkeypatch.setattr("ugicm.server.engine.read_image", no_thread)
    answer = await client.post("/encode", content=image_file(1100, 1000))
    assert answer.status_code == 413
    assert answer.json()["limit"] == client.app.state.services.engine.codec.max_pixels


async def test_parameters_need_no_thread(
    make_async_client: MakeAsyncClient,
    image_file: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = await make_async_client()

    monkeypatch.setattr(anyio.to_thread, "run_sync", no_thread)
    id = (await client.post("/encode?quality=40", content=image_file())).json()["id"]
    assert (await client.get(f"/bitstreams/{id}/image?strength=0.5")).status_code == 200
    assert (await client.get("/readyz")).status_code == 200


async def test_who_leaves_does_not_hear_of_what_fails_for_others() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    cache, go = LatentCache(0, Metrics()), asyncio.Event()

    async def make() -> None:
        await go.wait()
        raise CodecError("damaged")

    asked = start(cache.get("id", make) for _ in range(3))
    await asyncio.sleep(0)
    asked[0].cancel()
    await asyncio.sleep(0)
    go.set()
    kinds = [type(answer) for answer in await asyncio.gather(*asked, return_exceptions=True)]
    assert kinds == [asyncio.CancelledError, CodecError, CodecError]
    del asked
    gc.collect()
    assert not told

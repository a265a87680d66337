"""Many clients at once: batches, overload, one flight per picture, clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

pytestmark = pytest.mark.anyio

MakeAsyncClient = Callable[..., Any]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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


async def test_simultaneous_encodes_form_batches_in_one_thread(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(warm_up=False, pool_threads=4)
    codec.device_s = 0.2
    images = [image_file(40 + i, 30, seed=i) for i in range(12)]
    responses = await asyncio.gather(*(client.post("/encode", content=data) for data in images))
    assert [response.status_code for response in responses] == [200] * 12
    assert [response.json()["width"] for response in responses] == [40 + i for i in range(12)]
    assert sum(items for _, items in codec.calls) == 12
    assert codec.count("analyse") < 12
    assert len(codec.threads) == 1
    assert sample(client, "ugicm_batch_images_count") == codec.count("analyse")


async def test_overload_is_refused_with_a_computed_wait(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(queue_pixels=3 * 128 * 128)
    codec.device_s = 0.2
    responses = await asyncio.gather(*(client.post("/encode", content=image_file(seed=i)) for i in range(10)))
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 3 + [503] * 7
    refused = next(response for response in responses if response.status_code == 503)
    assert refused.json()["code"] == "overloaded"
    assert refused.json()["setting"] == "UGICM_QUEUE_PIXELS"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert sample(client, "ugicm_rejected_total", code="overloaded") == 7
    assert (await client.post("/encode", content=image_file())).status_code == 200
    assert sample(client, "ugicm_queue_pixels") == 0


async def test_requests_beyond_the_limit_are_refused_but_health_checks_are_not(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(max_requests=2)
    codec.device_s = 0.3
    work = [asyncio.create_task(client.post("/encode", content=image_file())) for _ in range(2)]
    await asyncio.sleep(0.1)
    refused = await client.get("/info")
    assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["setting"] == "UGICM_MAX_REQUESTS"
    assert (await client.get("/readyz")).status_code == 200
    assert [response.status_code for response in await asyncio.gather(*work)] == [200, 200]
    assert (await client.get("/info")).status_code == 200


async def test_a_failed_request_leaves_the_queue(make_async_client: MakeAsyncClient, image_file: Any) -> None:
    client = await make_async_client(queue_pixels=128 * 128)
    for _ in range(3):
        response = await client.post("/encode", content=image_file()[:80])
        assert response.json()["code"] == "malformed-image"
    assert sample(client, "ugicm_queue_pixels") == 0


async def test_fifty_decodes_of_one_picture_run_the_network_once(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client()
    id = (await client.post("/encode", content=image_file())).json()["id"]
    codec.calls.clear()
    codec.device_s = 0.1
    ask = {"params": {"preference": "machine"}, "json": {"id": id}}
    responses = await asyncio.gather(*(client.post("/decode", **ask) for _ in range(50)))
    assert {response.status_code for response in responses} == {200}
    assert len({response.content for response in responses}) == 1
    assert codec.calls == [("synthesise", 1)]
    again = await client.post("/decode", **ask)
    assert again.headers["cache-status"] == "ugicm; hit"
    assert responses[0].headers["cache-status"] == "ugicm; fwd=miss"
    assert codec.count("synthesise") == 1
    assert sample(client, "ugicm_cache_requests_total", tier="picture", result="shared") == 49


async def test_a_flight_survives_the_client_that_started_it(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client()
    id = (await client.post("/encode", content=image_file())).json()["id"]
    codec.device_s = 0.2
    first, second = (asyncio.create_task(client.post("/decode", json={"id": id})) for _ in range(2))
    await asyncio.sleep(0.1)
    first.cancel()
    assert (await second).status_code == 200
    assert codec.count("synthesise") == 2 + 1  # the warm-up's and this one


async def test_a_flight_that_fails_is_not_remembered(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client()
    id = (await client.post("/encode", content=image_file())).json()["id"]
    codec.fail, codec.device_s = RuntimeError("lost"), 0.1
    responses = await asyncio.gather(*(client.post("/decode", json={"id": id}) for _ in range(3)))
    assert {response.status_code for response in responses} == {500}
    codec.fail = None
    assert (await client.post("/decode", json={"id": id})).status_code == 200


async def test_without_a_picture_cache_every_decode_runs(
    make_async_client: MakeAsyncClient, codec: Any, image_file: Any
) -> None:
    client = await make_async_client(picture_cache_bytes=0, warm_up=False)
    id = (await client.post("/encode", content=image_file())).json()["id"]
    for _ in range(2):
        await client.post("/decode", json={"id": id})
    assert codec.count("synthesise") == 2

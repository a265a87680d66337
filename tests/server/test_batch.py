"""Several images in one request: lines in order, failures apart."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message

from tests.server.asgi import Client, chunk
from ugicm.server.engine import Engine
from ugicm.server.routes.batch import PARALLEL


def lines(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def parts(*images: bytes) -> list[Any]:
    return [("images", (f"{index}.png", data)) for index, data in enumerate(images)]


def test_one_line_per_image_in_order(client: Any, image_file: Any) -> None:
    images = [image_file(20 + i, 10, seed=i) for i in range(9)]
    answer = lines(client.post("/encode/batch", params={"quality": 30}, files=parts(*images)))
    assert [line["index"] for line in answer] == list(range(9))
    assert [line["filename"] for line in answer] == [f"{i}.png" for i in range(9)]
    assert [line["result"]["width"] for line in answer] == [20 + i for i in range(9)]
    single = client.post("/encode", params={"quality": 30}, content=images[3]).json()
    assert single["cached"] is True
    assert answer[3]["result"] == {**single, "cached": False}


def test_images_of_a_batch_are_made_few_at_a_time(
    client: Any, image_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[int] = []
    peak: list[int] = []
    encode = Engine.encode

    async def counted(*given: Any, **more: Any) -> bytes:
        inside.append(1)
        peak.append(len(inside))
        try:
            return await encode(*given, **more)
        finally:
            inside.pop()

    monkeypatch.setattr(Engine, "encode", counted)
    assert len(lines(client.post("/encode/batch", files=parts(*[image_file()] * 9)))) == len(peak) == 9
    assert max(peak) == PARALLEL


def test_a_batch_without_storing(client: Any, image_file: Any) -> None:
    answer = client.post("/encode/batch", params={"store": False}, files=parts(image_file()))
    (line,) = lines(answer)
    assert line["result"]["stored"] is False
    assert client.get(line["result"]["links"]["bitstream"]).status_code == 404
    assert answer.headers["cache-control"] == "no-store"


def test_a_bad_image_fails_alone(client: Any, image_file: Any) -> None:
    answer = lines(client.post("/encode/batch", files=parts(image_file(), b"junk", image_file(2000, 2000))))
    assert "result" in answer[0]
    assert answer[1]["problem"]["code"] == "unsupported-media-type"
    assert answer[2]["problem"]["code"] == "too-many-pixels"
    assert answer[2]["problem"]["limit"] == 1_000_000
    assert answer[1]["problem"]["instance"] == "/encode/batch"


def test_the_device_failing_is_told_apart(client: Any, codec: Any, image_file: Any, log: Any) -> None:
    codec.fail = RuntimeError("lost")
    (line,) = lines(client.post("/encode/batch", files=parts(image_file())))
    assert line["problem"]["code"] == "internal"
    assert [entry["index"] for entry in log if entry["event"] == "image of a batch failed"] == [0]


def test_too_many_images(make_client: Any, image_file: Any) -> None:
    client = make_client(max_batch_images=2)
    assert len(lines(client.post("/encode/batch", files=parts(*[image_file()] * 2)))) == 2
    body = client.post("/encode/batch", files=parts(*[image_file()] * 3)).json()
    assert (body["status"], body["code"], body["limit"], body["actual"]) == (413, "too-many-images", 2, 3)
    assert body["setting"] == "UGICM_MAX_BATCH_IMAGES"


def test_no_images_and_no_form(client: Any, image_file: Any) -> None:
    response = client.post("/encode/batch", files={"image": ("a", b"x")})
    assert response.json()["code"] == "invalid-parameter"
    response = client.post("/encode/batch", files=[*parts(image_file()), ("images", (None, "a text"))])
    assert response.json()["code"] == "invalid-parameter"
    assert "each with a file name" in response.json()["detail"]
    broken = {"Content-Type": "multipart/form-data; boundary=b"}
    response = client.post("/encode/batch", content=b"junk", headers=broken)
    assert response.json()["code"] == "malformed-body"
    response = client.post("/encode/batch", content=b"junk", headers={"Content-Type": "image/png"})
    assert response.json()["code"] == "unsupported-media-type"


def scope_and_body(client: Any, image_file: Any, images: int) -> tuple[dict[str, Any], bytes]:
    """Of a request, as a server hands it to the application."""
    files = parts(*(image_file(seed=seed) for seed in range(images)))
    request = client.build_request("POST", "/encode/batch", files=files)
    headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/encode/batch",
        "query_string": b"",
        "headers": headers,
    }
    return scope, request.read()


def test_nothing_is_encoded_for_a_client_that_left_before_the_answer(
    client: Any, codec: Any, image_file: Any
) -> None:
    scope, body = scope_and_body(client, image_file, 4)

    async def ask() -> None:
        sender = Client(chunk(body))

        async def send(message: Message) -> None:
            sender.gone.set()
            await asyncio.sleep(60)  # it takes nothing

        await client.app(scope, sender.receive, send)
        await asyncio.sleep(0.1)

    before = list(codec.calls)
    client.portal.call(ask)
    assert codec.calls == before


@pytest.mark.parametrize("leaves", [True, False])
def test_no_more_is_encoded_for_a_client_that_takes_no_more_lines(
    make_client: Any, codec: Any, image_file: Any, leaves: bool
) -> None:
    client = make_client(warm_up=False, pool_threads=1, transfer_timeout_s=60 if leaves else 0.05)
    scope, body = scope_and_body(client, image_file, 12)

    async def ask() -> tuple[set[str], set[str]]:
        sender = Client(chunk(body))
        meanwhile: set[str] = set()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                meanwhile.update(names_of_others())
                codec.gate.clear()
                if leaves:
                    sender.gone.set()
                await asyncio.Event().wait()

        before = asyncio.all_tasks()

        def names_of_others() -> set[str]:
            return {task.get_coro().__qualname__ for task in asyncio.all_tasks() - before}

        await client.app(scope, sender.receive, send)
        for _ in range(10):  # what was cancelled ends
            await asyncio.sleep(0)
        names = names_of_others()
        codec.gate.set()
        return meanwhile, names

    meanwhile, after = client.portal.call(ask)
    assert [name for name in meanwhile if "line" in name]
    assert not [name for name in after if "line" in name]

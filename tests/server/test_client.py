"""The thin client against the application, and its patience with an overloaded service."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ugicm import client as client_module
from ugicm.client import AsyncClient, Client, Encoded, ProblemError


@pytest.fixture
def client(make_client: Any) -> Iterator[Client]:
    """Over the transport of the test client, which runs the application."""
    with Client("http://testserver", transport=make_client()._transport) as client:
        yield client


def test_round_trip(client: Client, image_file: Any, pixels: Any) -> None:
    encoded = client.encode(image_file(), quality=40)
    assert (encoded.width, encoded.height, encoded.quality, encoded.stored) == (48, 32, 40.0, True)
    bitstream = client.bitstream(encoded.id)
    assert len(bitstream) == encoded.size
    assert not encoded.lossless
    assert encoded.links["machine"] == f"/bitstreams/{encoded.id}/image?preference=machine"
    by_id = client.decode(encoded.id, preference="machine")
    assert client.decode(bitstream, preference="machine") == by_id
    assert client.decode(encoded.id, strength=1.0) == by_id
    human = client.decode(encoded.id)
    assert client.decode(encoded.id, preference="machine", strength=0.0) == human != by_id
    assert (pixels(by_id) == 255 - pixels(image_file())).all()
    assert client.decode(encoded.id, format="npy").startswith(b"\x93NUMPY")
    client.delete(encoded.id)
    with pytest.raises(ProblemError, match="unknown-bitstream") as caught:
        client.decode(encoded.id)
    assert caught.value.status == 404
    assert client.info()["model"]["name"] == "fake"


def test_a_batch(client: Client, image_file: Any) -> None:
    first, bad, last = client.encode_batch([image_file(), b"junk", image_file(20, 10)], quality=30)
    assert first == dataclasses.replace(client.encode(image_file(), quality=30), cached=False)
    assert isinstance(bad, ProblemError)
    assert (bad.status, bad.code) == (415, "unsupported-media-type")
    assert isinstance(last, Encoded)
    assert (last.width, last.height, last.quality) == (20, 10, 30.0)
    with pytest.raises(ProblemError, match="too-many-images"):
        client.encode_batch([image_file()] * 33)
    assert client.encode_batch([]) == []


def test_descriptions_can_be_counted(client: Client, image_file: Any) -> None:
    client.encode(image_file())
    assert len({client.encode(image_file()), client.encode(image_file())}) == 1


def test_sizes_and_storing(client: Client, image_file: Any) -> None:
    assert client.encode(image_file(), max_bytes=50_000).quality == 1.0
    assert client.encode(image_file(), target_bpp=24).quality == 1.0
    assert client.encode(image_file(seed=5), store=False).stored is False


def test_the_problem_has_its_members(client: Client, image_file: Any) -> None:
    with pytest.raises(ProblemError) as caught:
        client.encode(image_file(1001, 1000))
    assert caught.value.code == "too-many-pixels"
    assert caught.value.members["setting"] == "UGICM_MAX_PIXELS"


def test_a_problem_need_not_repeat_the_status() -> None:
    transport = httpx2.MockTransport(
        lambda _: httpx2.Response(404, json={"code": "unknown-bitstream", "detail": "gone"})
    )
    with pytest.raises(ProblemError, match="404 unknown-bitstream: gone"):
        Client(transport=transport).bitstream("0" * 64)


class Overloaded:
    """Answers 503 a few times, then 200; or something that is no problem at all."""

    def __init__(self, times: int, headers: dict[str, str]) -> None:
        self.left, self.headers = times, headers
        self.bodies: list[bytes] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.bodies.append(request.content)
        if self.left:
            self.left -= 1
            return httpx2.Response(503, headers=self.headers, text="busy")
        return httpx2.Response(200, headers={"Bitstream-Id": "0" * 64}, content=b"picture")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", waits.append)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    return waits


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "7"}, [7.0, 7.0]),
        ({}, [0.5, 1.0]),
        ({"Retry-After": "soon"}, [0.5, 1.0]),
        ({"Retry-After": "9999"}, [60.0, 60.0]),
        ({"Retry-After": "-1"}, [0.0, 0.0]),
        ({"Retry-After": "nan"}, [0.0, 0.0]),
    ],
)
def test_it_waits_as_told(waits: list[float], headers: dict[str, str], expected: list[float]) -> None:
    server = Overloaded(2, headers)
    with Client(transport=httpx2.MockTransport(server)) as client:
        assert client.decode(b"bits") == b"picture"
    assert waits == expected
    assert server.bodies == [b"bits"] * 3


def test_it_gives_up(waits: list[float]) -> None:
    with (
        Client(transport=httpx2.MockTransport(Overloaded(9, {})), retries=2) as client,
        pytest.raises(ProblemError, match="503 unknown: busy"),
    ):
        client.decode(b"bits")
    assert len(waits) == 2


def test_it_does_not_wait_for_a_cache_that_is_down(waits: list[float]) -> None:
    problem = {"status": 503, "code": "cache-unavailable", "detail": "down"}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(503, json=problem))
    with Client(transport=transport) as client, pytest.raises(ProblemError, match="503 cache-unavailable"):
        client.decode("0" * 64)
    assert not waits


def test_an_id_is_no_path(client: Client) -> None:
    for id in ("../info", "..", "a" * 64 + "/image", "?x"):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            client.bitstream(id)
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            client.delete(id)


def test_the_key_is_sent() -> None:
    seen = []

    def server(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("x-api-key"))
        return httpx2.Response(200, json={"model": {}})

    for key in (None, "secret-key"):
        Client(api_key=key, transport=httpx2.MockTransport(server)).info()
    assert seen == [None, "secret-key"]


@pytest.mark.anyio
async def test_the_asynchronous_client_does_the_same(
    make_app: Any, image_file: Any, waits: list[float]
) -> None:
    app = make_app()
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app)
        async with AsyncClient("http://testserver", transport=transport) as client:
            encoded = await client.encode(image_file(), quality=40)
            bitstream = await client.bitstream(encoded.id)
            assert await client.decode(bitstream) == await client.decode(encoded.id)
            assert (await client.info())["model"]["name"] == "fake"
            again, bad = await client.encode_batch([image_file(), b"junk"], quality=40)
            assert again == dataclasses.replace(encoded, cached=True)
            assert isinstance(bad, ProblemError)
            await client.delete(encoded.id)
            with pytest.raises(ProblemError, match="unknown-bitstream"):
                await client.bitstream(encoded.id)
    async with AsyncClient(transport=httpx2.MockTransport(Overloaded(2, {}))) as client:
        assert await client.decode("0" * 64) == b"picture"
    assert [wait for wait in waits if wait] == [0.5, 1.0]  # asyncio itself sleeps for 0


def test_another_server_is_a_problem() -> None:
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, text="<html>Welcome"))
    with Client(transport=transport) as client:
        for call in (
            client.info,
            lambda: client.encode(b"picture"),
            lambda: client.encode_batch([b"picture"]),
            lambda: client.decode(b"bits"),
            lambda: client.bitstream("0" * 64),
            lambda: client.delete("0" * 64),
        ):
            with pytest.raises(ProblemError, match="200 unknown: <html>Welcome"):
                call()
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json={"hello": 1}))
    with Client(transport=transport) as client, pytest.raises(ProblemError, match="200 unknown"):
        client.info()


@pytest.mark.parametrize("status", [200, 404, 503])
@pytest.mark.parametrize(
    ("kind", "content"),
    [("text/html; charset=hex", b"zz"), ("text/plain; charset=idna", b"\xff"), ("", b"[" * 200_000)],
)
def test_answers_that_are_no_text(status: int, kind: str, content: bytes) -> None:
    answer = httpx2.Response(status, content=content, headers={"Content-Type": kind})
    transport = httpx2.MockTransport(lambda _: answer)
    with Client(transport=transport, retries=0) as client, pytest.raises(ProblemError, match="unknown"):
        client.info()


def test_a_key_that_no_header_holds() -> None:
    with pytest.raises(ValueError, match="the API key has characters that are not ASCII"):
        Client(api_key="schlüssel")


@pytest.mark.anyio
async def test_calls_wait_for_a_connection_as_long_as_it_takes() -> None:
    with Client(timeout_s=3) as client:
        async with AsyncClient(timeout_s=3) as other:
            for http in (client._http, other._http):
                assert http.timeout.as_dict() == {"connect": 3, "read": 3, "write": 3, "pool": None}


@pytest.mark.parametrize("lines", [[], [1], [1, 0], [0, 1, 2]])
def test_a_batch_has_an_answer_for_each_image(lines: list[int]) -> None:
    problem = {"status": 503, "code": "overloaded", "detail": "busy"}
    text = "".join(json.dumps({"index": index, "problem": problem}) + "\n" for index in lines)
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, text=text))
    with Client(transport=transport) as client, pytest.raises(ProblemError, match="200 unknown"):
        client.encode_batch([b"one", b"two"])


def test_a_problem_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ProblemError(503, "overloaded", "busy", {"limit": 3})))
    assert (str(error), error.members["limit"]) == ("503 overloaded: busy", 3)


@pytest.mark.parametrize("image", [Path("photo.jpg"), 5, "photo.jpg"])
def test_what_is_no_bytes_is_not_sent(client: Client, image: Any) -> None:
    for call in (client.encode, lambda image: client.encode_batch([image])):
        with pytest.raises(TypeError):
            call(image)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_bytes_will_do(client: Client, image_file: Any, kind: Any) -> None:
    encoded = client.encode(kind(image_file()))
    assert client.encode_batch([kind(image_file())]) == [dataclasses.replace(encoded, cached=True)]
    assert client.decode(kind(client.bitstream(encoded.id))) == client.decode(encoded.id)

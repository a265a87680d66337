"""Middleware against hand-made ASGI traffic."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
import uvicorn
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tests.server.asgi import Client, chunk
from ugicm.server.metrics import Metrics
from ugicm.server.middleware import (
    PIECE_BYTES,
    BodyLimit,
    CancelDeparted,
    Lifecycle,
    PacedAnswer,
    RequestContext,
    RequestLimit,
)
from ugicm.server.problems import ServiceError

pytestmark = pytest.mark.anyio


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def scope(method: str = "POST", **headers: str) -> Scope:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": "/x", "headers": raw}


async def answer(send: Send, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers at once."""
    await answer(send)


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    """One that reads the whole body first."""
    while (await receive())["more_body"]:
        pass
    await answer(send)


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "POST"])
async def test_work_of_a_departed_client_is_cancelled(metrics: Metrics, method: str) -> None:
    cancelled = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if method == "POST":  # bodies of the others are not read
            assert (await receive())["body"] == b"all"
        client.gone.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    client = Client(chunk(b"all"))
    async with asyncio.timeout(30):
        await CancelDeparted(app, metrics)(scope(method), client.receive, client.send)
    assert cancelled.is_set()
    assert client.received == []
    assert metrics.registry.get_sample_value("ugicm_client_disconnects_total") == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_client_that_leaves_after_its_answer_is_no_matter(metrics: Metrics, method: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if method == "POST":
            await receive()
        await answer(send)
        client.gone.set()
        await asyncio.sleep(0.01)

    client = Client(chunk(b""))
    await CancelDeparted(app, metrics)(scope(method), client.receive, client.send)
    assert [message["type"] for message in client.received] == [
        "http.response.start",
        "http.response.body",
    ]
    assert metrics.registry.get_sample_value("ugicm_client_disconnects_total") == 0


@pytest.mark.parametrize("kind", ["application/octet-stream", "multipart/form-data; boundary=b"])
async def test_a_client_that_leaves_during_its_upload_is_no_failure(
    make_app: Any, log: list[Any], kind: str
) -> None:
    app = make_app(warm_up=False)
    async with app.router.lifespan_context(app):
        client = Client(chunk(b"--b\r\n", more=True))
        client.gone.set()
        upload = {**scope(content_type=kind), "path": "/encode", "query_string": b""}
        await app(upload, client.receive, client.send)
        registry = app.state.services.metrics.registry
    assert client.received == []
    assert [(line["event"], line["status"]) for line in log if "status" in line] == [("request", 499)]
    assert not [line for line in log if line["log_level"] == "error"]
    assert registry.get_sample_value("ugicm_client_disconnects_total") == 1


async def test_a_cancelled_server_task_stays_cancelled(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    client = Client()
    task = asyncio.create_task(CancelDeparted(app, metrics)(scope(), client.receive, client.send))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_body_of_exactly_the_limit_passes() -> None:
    client = Client(chunk(b"12345", more=True), chunk(b"67890"))
    await BodyLimit(reading, 10, 60)(scope(content_length="10"), client.receive, client.send)
    assert client.received[0]["status"] == 200


@pytest.mark.parametrize(("length", "status"), [("10", 200), ("11", 413)])
async def test_zeros_in_front_of_a_length_say_nothing(metrics: Metrics, length: str, status: int) -> None:
    """Python converts 4300 digits at most."""

    client = Client()
    limited = RequestContext(BodyLimit(answering, 10, 60), metrics, Lifecycle())
    await limited(scope(content_length=5000 * "0" + length), client.receive, client.send)
    assert client.received[0]["status"] == status


async def test_a_longer_body_stops_at_the_limit() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            await receive()

    client = Client(*[chunk(b"1234", more=True)] * 100)
    with pytest.raises(ServiceError, match="limit is 10"):
        await BodyLimit(app, 10, 60)(scope(), client.receive, client.send)
    assert len(client.messages) == 97


async def test_a_failure_after_the_answer_began_sends_nothing_more(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("too late")

    client = Client()
    await RequestContext(app, metrics, Lifecycle())(scope(), client.receive, client.send)
    assert len(client.received) == 1


async def test_a_failed_request_makes_room_for_the_next(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("lost")

    stack = RequestContext(RequestLimit(app, 1), metrics, Lifecycle())
    for _ in range(2):
        client = Client()
        await stack(scope(), client.receive, client.send)
        assert client.received[0]["status"] == 500


async def test_log_lines_of_a_request_have_its_id(metrics: Metrics) -> None:
    bound: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bound.append(structlog.contextvars.get_contextvars())
        await answer(send)

    client = Client()
    await RequestContext(app, metrics, Lifecycle())(scope(x_request_id="r1"), client.receive, client.send)
    assert bound == [{"request_id": "r1"}]
    assert structlog.contextvars.get_contextvars() == {}


@pytest.mark.parametrize(("path", "level"), [("/readyz", "debug"), ("/metrics", "debug"), ("/info", "info")])
async def test_probes_are_logged_at_debug_level_only(
    metrics: Metrics, log: list[Any], path: str, level: str
) -> None:
    client = Client()
    asked = {**scope("GET"), "path": path}
    await RequestContext(answering, metrics, Lifecycle())(asked, client.receive, client.send)
    assert [(line["path"], line["status"], line["log_level"]) for line in log] == [(path, 200, level)]


async def test_other_protocols_pass_untouched(metrics: Metrics) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope, receive, send))

    client = Client()
    stack = RequestContext(CancelDeparted(BodyLimit(app, 1, 60), metrics), metrics, Lifecycle())
    await stack({"type": "lifespan"}, client.receive, client.send)
    assert seen == [({"type": "lifespan"}, client.receive, client.send)]


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
async def test_an_answer_goes_in_pieces(size: int) -> None:
    body = os.urandom(size)
    client = Client()
    await PacedAnswer(Response(body), 60)(scope(), client.receive, client.send)
    begin, *pieces = client.received
    assert begin["headers"] == Response(body).raw_headers
    assert b"".join(piece["body"] for piece in pieces) == body
    assert [len(piece["body"]) for piece in pieces[:-1]] == [PIECE_BYTES] * (len(pieces) - 1)
    assert [piece.get("more_body", False) for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert len(pieces) == max(1, -(-size // PIECE_BYTES))


@pytest.fixture
async def small_service(metrics: Metrics) -> AsyncIterator[int]:
    """Port of a live server that answers 32 MiB, to one request at a time."""
    answers = RequestLimit(CancelDeparted(PacedAnswer(Response(bytes(32 << 20)), 1), metrics), 1)
    app = RequestContext(answers, metrics, Lifecycle())
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def test_a_client_that_does_not_read_keeps_its_place_for_a_while_only(
    small_service: int, metrics: Metrics, log: list[Any]
) -> None:
    async def ask() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", small_service, limit=1 << 10)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return reader, writer

    async def status(reader: asyncio.StreamReader) -> int:
        return int((await reader.readline()).split()[1])

    reading_little, stalled = await ask()
    assert await status(reading_little) == 200
    refused, other = await ask()
    assert await status(refused) == 503
    async with asyncio.timeout(30):
        while not metrics.registry.get_sample_value("ugicm_client_disconnects_total"):
            await asyncio.sleep(0.05)
    served, third = await ask()
    assert await status(served) == 200
    assert len(await served.read()) > 32 << 20  # with the headers; a client that reads gets everything
    assert len(await reading_little.read()) < 32 << 20
    for writer in (stalled, other, third):
        writer.close()
    (stall,) = (line for line in log if line["event"] == "the client does not read its answer")
    assert stall["limit"] == "1 s, UGICM_TRANSFER_TIMEOUT_S changes it"


async def test_the_application_paces_its_answers_and_limits_its_uploads(
    make_app: Any, image_file: Any
) -> None:
    app = make_app(transfer_timeout_s=0.05, warm_up=False)
    async with app.router.lifespan_context(app):

        async def ask(path: str, query: bytes, *messages: Message) -> list[Message]:
            client = Client(*messages)
            await app({**scope(), "path": path, "query_string": query}, client.receive, client.send)
            return client.received

        bitstream = await ask("/encode", b"", chunk(b"x", more=True))
        assert bitstream[0]["status"] == 408
        headers = scope(accept="application/vnd.ugicm")["headers"]
        client = Client(chunk(image_file(300, 200)))
        encode = {**scope(), "path": "/encode", "query_string": b"", "headers": headers}
        await app(encode, client.receive, client.send)
        bits = b"".join(message.get("body", b"") for message in client.received)
        _, *pieces = await ask("/decode", b"format=npy", chunk(bits))
    assert sum(len(piece["body"]) for piece in pieces) > 300 * 200 * 3
    assert max(len(piece["body"]) for piece in pieces) == PIECE_BYTES


async def test_what_is_cut_off_while_stopping_is_told(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    lifecycle, client = Lifecycle(), Client()
    stack = RequestContext(app, metrics, lifecycle)
    for draining in (False, True):
        lifecycle.draining = draining
        task = asyncio.create_task(stack(scope(), client.receive, client.send))
        await asyncio.sleep(0)
        task.cancel()
        if not draining:  # somebody else's business
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not client.received
    await task
    start, body = client.received
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert b'"code":"stopping"' in body["body"]


async def test_an_answer_that_has_begun_breaks_off_while_stopping(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    lifecycle, client = Lifecycle(), Client()
    lifecycle.draining = True
    task = asyncio.create_task(RequestContext(app, metrics, lifecycle)(scope(), client.receive, client.send))
    await asyncio.sleep(0)
    task.cancel()
    with structlog.testing.capture_logs() as logs:
        await task
    assert [message["type"] for message in client.received] == ["http.response.start"]
    assert logs[0]["event"] == "an answer breaks off, as the service stops"


async def test_a_body_that_stops_arriving_is_given_up(metrics: Metrics) -> None:
    limited = RequestContext(BodyLimit(reading, 10, 0.01), metrics, Lifecycle())
    silent = Client(chunk(b"x", more=True))
    await limited(scope(), silent.receive, silent.send)
    assert silent.received[0]["status"] == 408
    assert b'"setting":"UGICM_TRANSFER_TIMEOUT_S"' in silent.received[1]["body"]
    assert (b"connection", b"close") in silent.received[0]["headers"]


class Trickle(Client):
    """Sends a message every 10 ms."""

    async def receive(self) -> Message:
        await asyncio.sleep(0.01)
        return await super().receive()


@pytest.mark.parametrize(("size", "status"), [(1, 408), (PIECE_BYTES // 4, 200)])
async def test_a_body_that_trickles_is_given_up(metrics: Metrics, size: int, status: int) -> None:
    limited = RequestContext(BodyLimit(reading, 1 << 30, 0.5), metrics, Lifecycle())
    client = Trickle(*[chunk(bytes(size), more=True)] * 80, chunk(b""))
    await limited(scope(), client.receive, client.send)
    assert client.received[0]["status"] == status
    if status == 408:
        assert b" bytes of the request body arrived in 0.5 s" in client.received[1]["body"]


async def test_waiting_for_a_disconnect_has_no_limit(metrics: Metrics) -> None:
    asked = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        asked.set()
        assert (await receive())["type"] == "http.disconnect"
        await answer(send)

    client = Client(chunk(b"x"))
    running = asyncio.create_task(BodyLimit(app, 10, 0.01)(scope(), client.receive, client.send))
    await asked.wait()
    await asyncio.sleep(0.05)
    client.gone.set()
    await running
    assert client.received[0]["status"] == 200

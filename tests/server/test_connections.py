"""Connections of the HTTP server, as `ugicm serve` bounds them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.responses import Response

from tests.live import until
from ugicm.server.metrics import Metrics
from ugicm.server.middleware import BodyLimit, CancelDeparted, Lifecycle, PacedAnswer, RequestContext
from ugicm.server.serve import UNSENT_BYTES, _bounded_connection

pytestmark = pytest.mark.anyio
SIZE = 32 << 20
"""Of an answer, far more than the system keeps for a client that does not read."""


@asynccontextmanager
async def serving(
    transfer_timeout_s: float,
    request: bytes = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    keep_alive_s: float = 1000,
    metrics: Metrics | None = None,
    room: int = 4096,
) -> AsyncIterator[tuple[uvicorn.Server, socket.socket]]:
    """A live server that answers `SIZE` bytes, and a client that has sent the request and read nothing.

    The system keeps `room` bytes for it.
    """
    metrics = Metrics() if metrics is None else metrics
    limited = BodyLimit(Response(bytes(SIZE)), 10, 60)
    paced = PacedAnswer(limited, transfer_timeout_s)
    app = RequestContext(CancelDeparted(paced, metrics), metrics, Lifecycle())
    config = uvicorn.Config(
        app,
        port=0,
        log_config=None,
        lifespan="off",
        http=_bounded_connection(transfer_timeout_s, keep_alive_s),
        timeout_keep_alive=1000,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        client.connect(server.servers[0].sockets[0].getsockname())
        client.sendall(request)
        await until(lambda: bool(server.server_state.connections))
        yield server, client
    server.should_exit = True
    await task


async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    """Else its connection would stay, though its request is given up."""
    async with serving(transfer_timeout_s=0.1) as (server, _):
        await until(lambda: not server.server_state.connections)


async def test_a_client_that_pauses_is_not() -> None:
    async with serving(transfer_timeout_s=60) as (server, client):
        await until(
            lambda: any(connection.flow.write_paused for connection in server.server_state.connections)
        )
        (connection,) = server.server_state.connections
        assert not connection._unread.cancelled()
        kept_back = connection.transport.get_extra_info("socket")
        assert kept_back.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT_BYTES

        def read() -> int:
            received = 0
            while received < SIZE and (part := client.recv(1 << 20)):
                received += len(part)
            return received

        assert await asyncio.to_thread(read) >= SIZE
        await until(lambda: connection.cycle.response_complete)
        assert connection._unread.cancelled()


async def test_the_rest_of_a_refused_body_is_not_waited_for_as_the_next_request_is() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n"
    async with serving(0.1, head) as (server, client):
        assert (await asyncio.to_thread(client.recv, 100)).startswith(b"HTTP/1.1 413 ")
        await until(lambda: not server.server_state.connections)


async def test_after_the_rest_of_a_refused_body_the_connection_is_kept_as_after_any_answer() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n"
    async with serving(60, head, keep_alive_s=1000) as (server, client):
        assert (await asyncio.to_thread(client.recv, 100)).startswith(b"HTTP/1.1 413 ")
        (connection,) = server.server_state.connections

        def left_s() -> float:
            return float(connection._idle.when() - asyncio.get_running_loop().time())

        await until(lambda: connection.cycle.response_complete)
        assert left_s() <= 60
        client.sendall(b"hello world")
        await until(lambda: left_s() > 900)
        assert server.server_state.connections


async def test_a_refused_body_is_taken_before_the_connection_is_closed() -> None:
    """Else the system would take the answer back."""
    size = 3 << 20
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size
    async with serving(transfer_timeout_s=60, request=head) as (server, client):

        def send_then_read() -> bytes:
            for _ in range(size >> 16):
                client.sendall(bytes(1 << 16))
                time.sleep(0.002)
            answer = b""
            while received := client.recv(1 << 16):
                answer += received
            return answer

        assert (await asyncio.to_thread(send_then_read)).startswith(b"HTTP/1.1 413 ")
        await until(lambda: not server.server_state.connections)


async def test_a_refused_body_that_waits_for_leave_is_not_waited_for() -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
    async with serving(transfer_timeout_s=60, request=head) as (server, client):
        client.sendall(b"Content-Length: 11\r\n\r\n")
        assert (await asyncio.to_thread(client.recv, 1000)).startswith(b"HTTP/1.1 413 ")
        await until(lambda: not server.server_state.connections)


@pytest.mark.parametrize("paused", [False, True])
async def test_a_client_that_leaves_while_it_reads_is_counted(paused: bool) -> None:
    metrics = Metrics()
    async with serving(transfer_timeout_s=60, metrics=metrics, room=1 << 20) as (server, client):

        def read_some_and_leave() -> None:
            received = 0
            while received < 1 << 20:
                received += len(client.recv(1 << 16))
            if paused:
                time.sleep(0.3)
            client.close()

        await asyncio.to_thread(read_some_and_leave)
        await until(lambda: not server.server_state.connections)
        await until(lambda: not server.server_state.tasks)
    assert metrics.registry.get_sample_value("ugicm_client_disconnects_total") == 1

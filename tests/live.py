"""Servers that tests start, and waiting for what they do."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI


def free_port() -> int:
    """Of the loopback; for programs that cannot choose one themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(accepts: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not accepts():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for at most a minute, in the event loop that the condition depends on."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@contextmanager
def served(app: FastAPI) -> Iterator[int]:
    """Port of a live server of the application, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()

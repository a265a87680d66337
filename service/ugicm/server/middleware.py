"""Pure ASGI middleware: request context, limits of bodies and answers, departed clients."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ugicm.server.metrics import Metrics
from ugicm.server.problems import as_service_error, stopped, too_many_bytes, too_many_requests, upload_stalled
from ugicm.server.settings import setting
from ugicm.server.timings import Timings

CLIENT_CLOSED_REQUEST = 499
"""Logged when a client left before its answer; never sent."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
QUIET_PATHS = ("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready", "/metrics")
"""Not limited, and logged at debug level only."""
PIECE_BYTES = 64 << 10
"""Bytes of an answer that are handed to the server at once, and of a body that must arrive in time."""
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_log = structlog.get_logger("ugicm.access")


@dataclass
class Lifecycle:
    """Whether the process is on its way out."""

    draining: bool = False


class RequestContext:
    """Outermost: request id, timings, metrics, one log line, and 500 as a problem."""

    def __init__(self, app: ASGIApp, metrics: Metrics, lifecycle: Lifecycle) -> None:
        self.app, self.metrics, self.lifecycle = app, metrics, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        timings = Timings()
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, timings=timings)
        status = 0
        started = time.perf_counter()

        async def send_with_context(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                if server_timing := timings.header():
                    headers["Server-Timing"] = server_timing
                if self.lifecycle.draining:
                    headers["Connection"] = "close"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_context)
            except asyncio.CancelledError:
                if not self.lifecycle.draining:
                    raise
                # The server cancels what is left when its time to stop is over.
                if status:
                    _log.warning("an answer breaks off, as the service stops", path=scope["path"])
                    return
                await stopped().response(scope)(scope, receive, send_with_context)
            except Exception as error:
                _log.exception("request failed", path=scope["path"])
                if not status:
                    await as_service_error(error).response(scope)(scope, receive, send_with_context)
            finally:
                self._finish(scope, status or CLIENT_CLOSED_REQUEST, time.perf_counter() - started)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.requests.labels(path, method, str(status)).inc()
        self.metrics.request_seconds.labels(path).observe(seconds)
        if problem := scope["state"].get("problem"):
            self.metrics.rejected.labels(problem).inc()
        log = _log.debug if scope["path"] in QUIET_PATHS else _log.info
        fields: dict[str, Any] = {"problem": problem} if problem else {}
        log(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            ms=round(1e3 * seconds, 1),
            **fields,
        )


class RequestLimit:
    """Refuse requests beyond `max_requests` in flight, before their bodies are read."""

    def __init__(self, app: ASGIApp, max_requests: int) -> None:
        self.app, self.max_requests = app, max_requests
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self.app(scope, receive, send)
            return
        if self._in_flight >= self.max_requests:
            await too_many_requests(self.max_requests).response(scope)(scope, receive, send)
            return
        self._in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._in_flight -= 1


class BodyLimit:
    """Refuse request bodies over `max_bytes`: declared ones at once, others as soon as they pass it.

    A body of which neither `PIECE_BYTES` nor the rest arrive in `timeout_s` seconds of waiting is given up:
    idle uploads would use up the requests that may be in flight, and so would a byte now and then, were
    silence alone limited.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self.app, self.max_bytes, self.timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Without zeros in front, of which Python converts only so many.
        declared = Headers(scope=scope).get("content-length", "").lstrip("0")
        if declared.isascii() and declared.isdigit() and int(declared) > self.max_bytes:
            await too_many_bytes(int(declared), self.max_bytes).response(scope)(scope, receive, send)
            return
        received = piece = 0
        left_s, complete = self.timeout_s, False

        async def receive_limited() -> Message:
            nonlocal received, piece, left_s, complete
            started = time.monotonic()
            try:
                async with asyncio.timeout(None if complete else left_s):
                    message = await receive()
            except TimeoutError:
                raise upload_stalled(piece, PIECE_BYTES, self.timeout_s) from None
            left_s -= time.monotonic() - started
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            piece += len(message.get("body", b""))
            if piece >= PIECE_BYTES:
                piece, left_s = 0, self.timeout_s
            if received > self.max_bytes:
                raise too_many_bytes(received, self.max_bytes)
            return message

        await self.app(scope, receive_limited, send)


class PacedAnswer:
    """Hand answers to the server in pieces, at the pace at which the client takes them.

    The server keeps in memory what it was handed, and a request that handed over everything is over: clients
    that do not read would fill memory beyond any limit. One that does not take a piece within `timeout_s`
    seconds is treated as having left, or it would hold one of the requests that may be in flight for good.
    """

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self.app, self.timeout_s = app, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self.timeout_s):
                    await send(message)
            except TimeoutError:
                limit = f"{self.timeout_s:g} s, {setting('transfer_timeout_s')} changes it"
                _log.warning("the client does not read its answer", path=scope["path"], limit=limit)
                raise ClientDisconnect from None

        async def send_in_pieces(message: Message) -> None:
            body = message.get("body", b"")
            last = max(0, len(body) - 1) // PIECE_BYTES * PIECE_BYTES
            for start in range(0, last, PIECE_BYTES):
                piece = bytes(body[start : start + PIECE_BYTES])
                await send_in_time({**message, "body": piece, "more_body": True})
                await asyncio.sleep(0)  # if the client has left, this is when the server notices
            await send_in_time({**message, "body": bytes(body[last:])} if body else message)

        await self.app(scope, receive, send_in_pieces)


class CancelDeparted:
    """End a request whose client disconnects: while it sends, or by cancelling the work after that."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        body_read = asyncio.Event()
        if scope["method"] in ("GET", "HEAD", "DELETE"):
            body_read.set()
        answered = departed = False

        async def receive_body() -> Message:
            if body_read.is_set():  # from here on the watcher listens
                await asyncio.Event().wait()
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                body_read.set()
            return message

        async def send_noting_the_end(message: Message) -> None:
            nonlocal answered
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                answered = True

        async def watch() -> None:
            nonlocal departed
            await body_read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            if not answered:
                departed = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, receive_body, send_noting_the_end)
        except asyncio.CancelledError:
            if not departed:
                raise
            task.uncancel()
            self.metrics.client_disconnects.inc()
        except ClientDisconnect:  # raised by what reads the body, and by `PacedAnswer`
            self.metrics.client_disconnects.inc()
        finally:
            watcher.cancel()

"""Run the service in this process."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, cast

import structlog
import uvicorn
from fastapi import FastAPI
from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ugicm.server import logs
from ugicm.server.app import create_app, load_model
from ugicm.server.backends import open_cache, threads_hang
from ugicm.server.engine import POOL_NAME
from ugicm.server.settings import Settings

_log = structlog.get_logger(__name__)

MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers, but for what arrives at once."""
SECOND_SIGINT_S = 1.0
"""Within this a SIGINT is the same once more, from a parent process; later it means at once."""
UNSENT_BYTES = 16 << 10
"""Of an answer, in the system's buffer of a connection before it takes more."""


class _Lingering:
    """Transport of a request that stays open while a refused body arrives.

    A socket that is closed with bytes unread takes back what it has sent: the client would not learn why.
    """

    def __init__(self, cycle: Any) -> None:
        self._cycle, self._transport = cycle, cycle.transport
        self.body_comes = not cycle.waiting_for_100_continue
        self.is_to_close = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if self._cycle.response_complete and self._cycle.more_body and self.body_comes:
            self.is_to_close = True
        else:
            self._transport.close()


def _bounded_connection(idle_s: float, keep_alive_s: float) -> type[asyncio.Protocol]:
    """Connections that cost little until there is a request, which the application's own limits are for.

    The parser collects a head of any size. A connection may be without a request in progress for `idle_s`
    seconds before the first one and where the rest of a refused body goes on arriving, for `keep_alive_s`
    seconds between two. What is closed waits for its client to take what was written, so one that takes
    nothing is cut off: after twice `idle_s`, as `PacedAnswer`, which gives up the request, waits that long.
    """

    class Connection(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_bytes = 0
            self._idle: asyncio.TimerHandle | None = None
            self._unread: asyncio.TimerHandle | None = None
            self._declined_at: int | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # Else the system takes megabytes at once, and says for as long that the client takes nothing.
            if connection := transport.get_extra_info("socket"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            self._limit_idle(idle_s)

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._idle)
            _cancel(self._unread)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(2 * idle_s, self.transport.abort)

        def resume_writing(self) -> None:
            _cancel(self._unread)
            super().resume_writing()

        def data_received(self, data: bytes) -> None:
            self._head_bytes += len(data)
            super().data_received(data)
            while self._declined_at is not None:
                data, self._declined_at = self._head() + data[self._declined_at :], None
                # A new parser, as after a connection's last message the old one takes no more.
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                super().data_received(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's head is too large.")

        def on_headers_complete(self) -> None:
            self._head_bytes = 0
            _cancel(self._idle)
            if not self._declines():
                super().on_headers_complete()
                self.cycle.transport = cast(asyncio.Transport, _Lingering(self.cycle))

        def on_message_complete(self) -> None:
            if not self._declines():
                super().on_message_complete()
                if self.cycle.response_complete:  # refused already; what was left of the body is here now
                    if cast(_Lingering, self.cycle.transport).is_to_close:
                        self.transport.close()
                    else:
                        self._limit_idle(keep_alive_s)

        def _declines(self) -> bool:
            """Whether the request offers another protocol, as Java's client does (HTTP/2) each time.

            Such an offer may be ignored (RFC 9110, 7.8), but the parser takes all that follows for that
            protocol's. So it gets the head once more, without the offer.
            """
            return self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)

        def _unsupported_upgrade_warning(self) -> None:
            if self._declines():
                upgrade = sys.exception()
                assert isinstance(upgrade, HttpParserUpgrade)
                self._declined_at = upgrade.args[0]  # where the head ends in the data

        def _head(self) -> bytes:
            version = self.parser.get_http_version().encode()
            lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
            lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            return b"\r\n".join([*lines, b"", b""])

        def on_body(self, body: bytes) -> None:
            self._head_bytes = 0
            cast(_Lingering, self.cycle.transport).body_comes = True
            super().on_body(body)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:  # else the next request was here already
                self._limit_idle(idle_s if self.cycle.more_body else keep_alive_s)

        def _limit_idle(self, seconds: float) -> None:
            _cancel(self._idle)
            self._idle = self.loop.call_later(seconds, self.transport.abort)

    return Connection


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _DrainingServer(uvicorn.Server):
    """Goes on accepting for a while after SIGTERM, with readiness off, so that load balancers notice."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_delay_s: float) -> None:
        super().__init__(config)
        self._app, self._drain_delay_s = app, drain_delay_s
        self._exit_at: float | None = None
        self._interrupted_at = -math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.lifecycle.draining = True
        if sig == signal.SIGTERM and self._exit_at is None:
            self._exit_at = time.monotonic() + self._drain_delay_s
        elif sig != signal.SIGINT:
            super().handle_exit(sig, frame)
        elif time.monotonic() - self._interrupted_at > SECOND_SIGINT_S:
            self._interrupted_at = time.monotonic()
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; in-flight requests finish first.

    One process with one model: throughput comes from batching, not from more workers.

    Raises:
        SystemExit: the model cannot be loaded, the cache's URL is wrong, tracing is not installed, or the
            port is taken.
    """
    logs.configure(settings)
    try:
        app = create_app(settings, load_model(settings), open_cache(settings))
    except ValueError as error:
        raise SystemExit(f"ugicm serve: {error}") from error
    config = uvicorn.Config(
        app,
        http=_bounded_connection(settings.transfer_timeout_s, settings.keep_alive_s),
        ws="none",
        timeout_keep_alive=settings.keep_alive_s,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
    )
    status = 0
    try:
        _DrainingServer(config, app, settings.drain_delay_s).run()
    except KeyboardInterrupt:  # uvicorn raises the signals that ended it once more
        status = 128 + signal.SIGINT
        raise
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        raise
    finally:
        if threads_hang(POOL_NAME):
            _log.warning("the file system of the cache keeps a thread; the process ends without it")
            logging.shutdown()
            sys.stdout.flush()
            os._exit(status)

"""Run the service in this process."""

from __future__ import annotations

import signal
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ugicm.server import logs
from ugicm.server.app import create_app, load_model
from ugicm.server.backends import open_cache
from ugicm.server.settings import Settings


class _DrainingServer(uvicorn.Server):
    """Goes on accepting for a while after SIGTERM, with readiness off, so that load balancers notice."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_delay_s: float) -> None:
        super().__init__(config)
        self._app, self._drain_delay_s = app, drain_delay_s
        self._exit_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.lifecycle.draining = True
        if sig == signal.SIGTERM and self._exit_at is None:
            self._exit_at = time.monotonic() + self._drain_delay_s
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; in-flight requests finish first.

    One process with one model: throughput comes from batching, not from more workers.

    Raises:
        SystemExit: the model cannot be loaded, the cache's URL is wrong, or the port is taken.
    """
    logs.configure(settings)
    try:
        app = create_app(settings, load_model(settings), open_cache(settings))
    except ValueError as error:
        raise SystemExit(f"ugicm serve: {error}") from error
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
    )
    _DrainingServer(config, app, settings.drain_delay_s).run()

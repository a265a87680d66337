"""The application factory."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import Depends, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ugicm import __version__
from ugicm.server import openapi, problems
from ugicm.server.auth import require_key
from ugicm.server.backends import FileCache, open_cache
from ugicm.server.cache import BitstreamCache, GuardedCache, MemoryCache
from ugicm.server.deps import Services
from ugicm.server.engine import Codec, Engine
from ugicm.server.metrics import Metrics
from ugicm.server.middleware import (
    QUIET_PATHS,
    BodyLimit,
    CancelDeparted,
    Lifecycle,
    PacedAnswer,
    RequestContext,
    RequestLimit,
)
from ugicm.server.pictures import PictureCache
from ugicm.server.routes import batch, bitstreams, pages, status
from ugicm.server.routes import codec as codec_routes
from ugicm.server.settings import Settings, setting

EXPOSED_HEADERS = (
    "Accept",
    "Allow",
    "Bitstream-Id",
    "Cache-Status",
    "Content-Disposition",
    "Content-Location",
    "Content-Range",
    "ETag",
    "Location",
    "Retry-After",
    "Server-Timing",
    "WWW-Authenticate",
    "X-Request-Id",
)
"""Of answers, besides what browsers always let pages of other origins read."""
_log = structlog.get_logger(__name__)


def create_app(
    settings: Settings, codec: Codec | None = None, cache: BitstreamCache | None = None
) -> FastAPI:
    """The service as an ASGI application. The model is loaded when its lifespan starts.

    Args:
        settings: everything an operator can change.
        codec: instead of the model that the settings name.
        cache: instead of the cache that the settings name.

    Raises:
        ValueError: the settings want something that is not installed.
    """
    if settings.tracing:
        try:
            importlib.import_module("opentelemetry.exporter.otlp.proto.http")
        except ImportError as error:
            raise ValueError(f"{setting('tracing')} needs the extra otel of this package: {error}") from error
    metrics, lifecycle = Metrics(), Lifecycle()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loaded = await asyncio.to_thread(load_model, settings) if codec is None else codec
        engine = Engine(loaded, settings, metrics)
        kept = cache or open_cache(settings)
        if isinstance(kept, MemoryCache | FileCache):
            metrics.cache_bytes.labels("bitstream").set_function(lambda: kept.size)
        guarded = GuardedCache(kept, metrics, timeout_s=settings.cache_timeout_s)
        app.state.services = Services(
            settings,
            engine,
            guarded,
            PictureCache(settings.picture_cache_bytes, metrics),
            metrics,
            lifecycle,
        )
        try:
            if settings.warm_up:
                await engine.probe()
            _log.info("ready", model=loaded.name, digest=loaded.digest, device=loaded.device)
            yield
        finally:
            lifecycle.draining = True
            await engine.close()
            await guarded.close()

    app = FastAPI(
        title="ugicm",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        separate_input_output_schemas=False,
        telemetry={
            "tracing": settings.tracing,
            "metrics": False,  # Prometheus has them
            "logs": False,
            "auto_configure": settings.tracing,
            "exclude": lambda scope: scope["path"] in QUIET_PATHS,
        },
        middleware=[
            *_cross_origin(settings),
            Middleware(RequestContext, metrics=metrics, lifecycle=lifecycle),
            Middleware(RequestLimit, max_requests=settings.max_requests),
            Middleware(CancelDeparted, metrics=metrics),
            Middleware(PacedAnswer, timeout_s=settings.transfer_timeout_s),
            Middleware(BodyLimit, max_bytes=settings.max_bytes, timeout_s=settings.transfer_timeout_s),
        ],
    )
    app.state.lifecycle = lifecycle
    problems.install(app)
    keyed = [Depends(require_key)]
    for router in (codec_routes.router, batch.router, bitstreams.router, status.info_router):
        app.include_router(router, dependencies=keyed)
    app.include_router(status.health_router)
    app.include_router(pages.router)
    app.mount("/static", pages.WholeFiles(directory=pages.STATIC), name="static")
    openapi.install(app, openapi.Keys(bool(settings.api_keys), bool(settings.url_keys)))
    return app


def _cross_origin(settings: Settings) -> list[Middleware]:
    """Outermost, so that pages of other origins can read every problem, too."""
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )
    ]


def load_model(settings: Settings) -> Codec:
    """The model that the settings name; imports torch."""
    from ugicm.codec.store import load_codec

    return load_codec(
        settings.model,
        store=settings.model_store,
        device=settings.device,
        precision=settings.precision,
        max_pixels=settings.max_pixels,
    )

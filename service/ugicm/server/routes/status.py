"""What runs here, and how it is. Health never asks for a key."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ugicm import __version__
from ugicm.codec.config import QUALITY_MAX, QUALITY_MIN
from ugicm.server.deps import ServicesDep
from ugicm.server.models import (
    Health,
    HealthStatus,
    ImageFormat,
    Info,
    Limits,
    Live,
    ModelInfo,
    Preference,
)
from ugicm.server.openapi import problems

info_router = APIRouter(tags=["service"])
health_router = APIRouter(tags=["service"])

NO_STORE = {"Cache-Control": "no-store"}
_READ = ["GET", "HEAD"]


@info_router.head("/info", include_in_schema=False)
@info_router.get("/info", operation_id="getInfo", summary="Model, device and limits", responses=problems())
async def get_info(response: Response, services: ServicesDep) -> Info:
    response.headers.update(NO_STORE)
    codec, settings = services.engine.codec, services.settings
    return Info(
        version=__version__,
        model=ModelInfo(name=codec.name, digest=codec.digest, device=codec.device, precision=codec.precision),
        quality_min=QUALITY_MIN,
        quality_max=QUALITY_MAX,
        preferences=list(Preference),
        formats=list(ImageFormat),
        limits=Limits(
            max_bytes=settings.max_bytes,
            max_pixels=codec.max_pixels,
            max_batch_images=settings.max_batch_images,
            queue_pixels=settings.queue_pixels,
            request_timeout_s=settings.request_timeout_s,
        ),
        pixels_per_s=services.engine.batcher.rate.per_second,
    )


@health_router.api_route("/v2/health/live", methods=_READ, include_in_schema=False)
@health_router.head("/livez", include_in_schema=False)
@health_router.get("/livez", operation_id="getLive", summary="Whether the process answers")
async def get_live(response: Response) -> Live:
    response.headers.update(NO_STORE)
    return Live(status="live")


@health_router.api_route("/v2/health/ready", methods=_READ, include_in_schema=False)
@health_router.api_route("/health", methods=_READ, include_in_schema=False)
@health_router.head("/readyz", include_in_schema=False)
@health_router.get(
    "/readyz",
    operation_id="getReady",
    summary="Whether to send requests here",
    description="503 while draining after SIGTERM, and when the device fails. A cache that is down does "
    "not make the service unready.",
    response_model=Health,
    responses={503: {"model": Health, "description": "Send no requests here."}},
)
async def get_ready(services: ServicesDep) -> Response:
    cache = "up" if await services.cache.up() else "down"
    if services.lifecycle.draining:
        status = HealthStatus.draining
    elif await services.engine.healthy():
        status = HealthStatus.ready
    else:
        status = HealthStatus.unhealthy
    return Response(
        Health(status=status, cache=cache).model_dump_json(),
        200 if status is HealthStatus.ready else 503,
        NO_STORE,
        "application/json",
    )


@health_router.api_route("/metrics", methods=_READ, include_in_schema=False)
async def get_metrics(services: ServicesDep) -> Response:
    return Response(generate_latest(services.metrics.registry), 200, NO_STORE, CONTENT_TYPE_LATEST)

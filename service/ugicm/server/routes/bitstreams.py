"""Kept bitstreams."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from ugicm.codec.bitstream import MEDIA_TYPE as BITSTREAM_MEDIA_TYPE
from ugicm.server.auth import EXPIRY
from ugicm.server.cache import ID_PATTERN
from ugicm.server.conditional import respond
from ugicm.server.deps import Services, ServicesDep, TimingsDep, ViewDep
from ugicm.server.models import BitstreamInfo
from ugicm.server.openapi import BITSTREAM, IMAGE, problems
from ugicm.server.problems import Code, ServiceError
from ugicm.server.routes.codec import bitstream_disposition, decoded, describe, fitting, kept, picture_headers

router = APIRouter(prefix="/bitstreams/{id}", tags=["bitstreams"])

BITSTREAM_AGE_S = 365 * 86400
"""A bitstream never changes under its id."""
PICTURE_AGE_S = 3600
"""A picture may change when the model's synthesis is improved; its ETag tells."""

Id = Annotated[str, Path(pattern=ID_PATTERN, description="As `POST /encode` answered.")]
_COMMON = (Code.UNKNOWN_BITSTREAM, Code.INVALID_PARAMETER, Code.UNAVAILABLE)
_READING = (Code.MALFORMED_BITSTREAM, *_COMMON)
"""Another release, of another version of the container, may have stored it in a shared cache."""


@router.head("", include_in_schema=False)
@router.get(
    "",
    operation_id="getBitstream",
    summary="Get a bitstream",
    response_class=Response,
    responses={
        **BITSTREAM,
        **problems(Code.RANGE_NOT_SATISFIABLE, *_COMMON),
    },
)
async def get_bitstream(request: Request, id: Id, services: ServicesDep, timings: TimingsDep) -> Response:
    bitstream = await kept(services, id, timings)
    headers = {
        "Bitstream-Id": id,
        "Cache-Control": f"{_cache_control(request, services, BITSTREAM_AGE_S)}, immutable",
        "Cache-Status": "ugicm; hit",
        "Content-Disposition": bitstream_disposition(id),
    }
    return respond(request, bitstream, etag=f'"{id}"', media_type=BITSTREAM_MEDIA_TYPE, headers=headers)


@router.head("/info", include_in_schema=False)
@router.get(
    "/info",
    operation_id="getBitstreamInfo",
    summary="Describe a bitstream",
    description="Read from the bitstream's header; no network runs.",
    responses=problems(*_READING),
)
async def get_bitstream_info(
    request: Request, response: Response, id: Id, services: ServicesDep, timings: TimingsDep
) -> BitstreamInfo:
    info = describe(id, await kept(services, id, timings))
    response.headers["Cache-Control"] = _cache_control(request, services, BITSTREAM_AGE_S)
    return info


@router.head("/image", include_in_schema=False)
@router.get(
    "/image",
    operation_id="getImage",
    summary="Decode a kept bitstream",
    response_class=Response,
    responses={
        **IMAGE,
        **problems(
            Code.NOT_ACCEPTABLE,
            Code.MODEL_MISMATCH,
            Code.TOO_MANY_PIXELS,
            Code.RANGE_NOT_SATISFIABLE,
            Code.TIMEOUT,
            *_READING,
        ),
    },
)
async def get_image(
    request: Request, id: Id, view: ViewDep, services: ServicesDep, timings: TimingsDep
) -> Response:
    bitstream = await kept(services, id, timings)
    view = fitting(view, bitstream)
    picture, hit = await decoded(services, id, bitstream, view, timings)
    cache_control = _cache_control(request, services, PICTURE_AGE_S)
    headers = {**picture_headers(id, view, hit=hit), "Cache-Control": cache_control}
    return respond(request, picture.content, etag=picture.etag, media_type=view.media_type, headers=headers)


@router.delete(
    "",
    operation_id="deleteBitstream",
    summary="Forget a bitstream",
    status_code=204,
    response_class=Response,
    responses=problems(*_COMMON),
)
async def delete_bitstream(id: Id, services: ServicesDep) -> None:
    try:
        deleted = await services.cache.delete(id)
    finally:
        services.pictures.forget(lambda key: key.id == id)
        services.engine.latents.forget(lambda key: key == id)
    if not deleted:
        raise ServiceError(Code.UNKNOWN_BITSTREAM, f"{id} is not in the cache")


def _cache_control(request: Request, services: Services, age_s: int) -> str:
    """Shared caches may keep what needs no key, and what a signed link gets until the link expires."""
    if not services.settings.api_keys:
        return f"public, max-age={age_s}"
    if request.state.by_link:
        left_s = int(request.query_params[EXPIRY]) - int(time.time())
        return f"public, max-age={max(0, min(age_s, left_s))}"
    return f"private, max-age={age_s}"

"""Images to bitstreams and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request, Response

from ugicm.choices import ImageFormat
from ugicm.codec.bitstream import MEDIA_TYPE as BITSTREAM_MEDIA_TYPE
from ugicm.codec.bitstream import SUFFIX, peek
from ugicm.codec.config import QUALITY_MAX, QUALITY_MIN
from ugicm.server.auth import sign
from ugicm.server.cache import CacheDownError, hash_of
from ugicm.server.deps import (
    BitstreamBody,
    ImageBody,
    Services,
    ServicesDep,
    TimingsDep,
    View,
    ViewDep,
    accepts_bitstream,
)
from ugicm.server.engine import RateTarget
from ugicm.server.models import BitstreamInfo, BitstreamLinks, BitstreamRef, EncodeResult
from ugicm.server.openapi import DECODED, ENCODED, body, problems
from ugicm.server.pictures import Picture, PictureKey
from ugicm.server.problems import Code, ServiceError
from ugicm.server.settings import Settings, setting
from ugicm.server.timings import Timings

router = APIRouter(tags=["codec"])

_BODY_PROBLEMS = (
    Code.MALFORMED_BODY,
    Code.UPLOAD_STALLED,
    Code.TOO_MANY_BYTES,
    Code.TOO_MANY_PIXELS,
    Code.UNSUPPORTED_MEDIA_TYPE,
    Code.INVALID_PARAMETER,
    Code.TIMEOUT,
)


async def get_target(
    quality: Annotated[
        float,
        Query(ge=QUALITY_MIN, le=QUALITY_MAX, description="1 (smallest) to 100 (best).", examples=[50]),
    ] = 50.0,
    target_bpp: Annotated[
        float | None,
        Query(
            gt=0,
            le=24,
            description="Bits per pixel: the best quality that fits decides; overrides `quality`.",
            examples=[0.5],
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        Query(
            ge=1,
            le=2**40,
            description="Bytes: the best quality that fits decides; overrides `quality`.",
            examples=[20000],
        ),
    ] = None,
) -> RateTarget:
    """How large the bitstream may become."""
    if target_bpp is not None and max_bytes is not None:
        raise ServiceError(Code.INVALID_PARAMETER, "give target_bpp or max_bytes, not both")
    return RateTarget(quality, max_bytes, target_bpp)


TargetDep = Annotated[RateTarget, Depends(get_target)]
StoreParam = Annotated[bool, Query(description="Keep the bitstream, to decode it by id.")]


async def encode_image(
    services: Services,
    data: bytes,
    target: RateTarget,
    timings: Timings,
    *,
    store: bool,
    on_admitted: Callable[[], None] = lambda: None,
) -> tuple[EncodeResult, bytes]:
    """Encode one image file and keep its bitstream, if asked to and if the cache can."""
    bitstream = await services.engine.encode(data, target, timings, on_admitted=on_admitted)
    id = await hash_of(bitstream)
    cached = stored = False
    if store:
        try:
            with timings.measure("cache"):
                found = await services.cache.put(id, bitstream)
            cached, stored = bool(found), found is not None
        except CacheDownError:
            pass
    result = EncodeResult(
        **describe(id, bitstream).model_dump(),
        cached=cached,
        stored=stored,
        links=links(services.settings, id),
    )
    return result, bitstream


def describe(id: str, bitstream: bytes) -> BitstreamInfo:
    """What the header says."""
    header = peek(bitstream)
    return BitstreamInfo(
        id=id,
        size=len(bitstream),
        bpp=8 * len(bitstream) / (header.width * header.height),
        width=header.width,
        height=header.height,
        quality=header.quality,
        model=header.model_digest.hex(),
        tiles=header.tiles,
        lossless=header.lossless,
    )


def links(settings: Settings, id: str) -> BitstreamLinks:
    """Paths of a bitstream and its two views, signed if there is a key to sign with."""
    expires_at = int(time.time()) + settings.url_ttl_s

    def link(path: str, **query: str) -> str:
        if settings.url_keys:
            return sign(path, query, settings.url_keys[0], expires_at)
        return f"{path}?{urlencode(query)}" if query else path

    path = f"/bitstreams/{id}"
    return BitstreamLinks(
        bitstream=link(path),
        human=link(f"{path}/image", preference="human"),
        machine=link(f"{path}/image", preference="machine"),
    )


@router.post(
    "/encode",
    operation_id="encode",
    summary="Encode an image",
    description="The answer describes the bitstream and says under which id it is kept. "
    f"With `Accept: {BITSTREAM_MEDIA_TYPE}` it is the bitstream itself.",
    response_model=EncodeResult,
    responses={200: ENCODED, **problems(Code.MALFORMED_IMAGE, *_BODY_PROBLEMS)},
    openapi_extra=body("EncodeForm"),
)
async def encode(
    request: Request,
    data: ImageBody,
    target: TargetDep,
    services: ServicesDep,
    timings: TimingsDep,
    store: StoreParam = True,
) -> Response:
    result, bitstream = await encode_image(services, data, target, timings, store=store)
    headers = {
        "Bitstream-Id": result.id,
        "ETag": f'"{result.id}"',
        "Cache-Status": "ugicm; hit" if result.cached else "ugicm; fwd=miss",
        "Cache-Control": "no-store",
        "Vary": "Accept",
    }
    if result.stored:
        headers["Location"] = f"/bitstreams/{result.id}"
    if accepts_bitstream(request):
        headers["Content-Disposition"] = bitstream_disposition(result.id)
        return Response(bitstream, headers=headers, media_type=BITSTREAM_MEDIA_TYPE)
    return Response(result.model_dump_json(), headers=headers, media_type="application/json")


@router.post(
    "/decode",
    operation_id="decode",
    summary="Decode a bitstream",
    description='Send the bitstream, or `{"id": ...}` of a kept one.',
    response_class=Response,
    responses={
        200: DECODED,
        **problems(
            Code.MALFORMED_BITSTREAM,
            Code.UNKNOWN_BITSTREAM,
            Code.NOT_ACCEPTABLE,
            Code.MODEL_MISMATCH,
            Code.UNAVAILABLE,
            *_BODY_PROBLEMS,
        ),
    },
    openapi_extra=body("DecodeForm", json_schema="BitstreamRef"),
)
async def decode(
    content: BitstreamBody, view: ViewDep, services: ServicesDep, timings: TimingsDep
) -> Response:
    if isinstance(content, BitstreamRef):
        id, bitstream = content.id, await kept(services, content.id, timings)
    else:
        id, bitstream = await hash_of(content), content
    view = fitting(view, bitstream)
    picture, hit = await decoded(services, id, bitstream, view, timings)
    headers = {**picture_headers(id, view, hit=hit), "Cache-Control": "no-store"}
    if isinstance(content, BitstreamRef):
        headers["Content-Location"] = (
            f"/bitstreams/{id}/image?strength={view.strength:g}&format={view.format.value}"
        )
    return Response(picture.content, headers=headers, media_type=view.media_type)


async def kept(services: Services, id: str, timings: Timings) -> bytes:
    """The kept bitstream of this id, or 404."""
    with timings.measure("cache"):
        bitstream = await services.cache.get(id)
    if bitstream is None:
        raise ServiceError(
            Code.UNKNOWN_BITSTREAM,
            f"{id} is not in the cache: never stored here, or dropped to make room "
            f"({setting('cache_bytes')}, {setting('cache_url')}); encode again or send the bitstream",
        )
    return bitstream


def fitting(view: View, bitstream: bytes) -> View:
    """The view without formats that the picture is too large for, where others will do."""
    header = peek(bitstream)
    return view.holding(header.width, header.height)


async def decoded(
    services: Services, id: str, bitstream: bytes, view: View, timings: Timings
) -> tuple[Picture, bool]:
    """The picture, and whether it was at hand."""
    format: ImageFormat = view.format.value

    async def make() -> Picture:
        return await Picture.of(await services.engine.decode(id, bitstream, view.strength, format, timings))

    async with services.engine.deadline():  # of each who waits: the picture may be in the making already
        return await services.pictures.get(PictureKey(id, view.strength, format), make)


def bitstream_disposition(id: str) -> str:
    """Not inline: no browser shows it, and Swagger UI would save it re-encoded as text."""
    return f'attachment; filename="{id[:8]}{SUFFIX}"'


def picture_headers(id: str, view: View, *, hit: bool) -> dict[str, str]:
    """Response headers of a decoded picture."""
    shown = "attachment" if view.format.value == "npy" else "inline"  # see `bitstream_disposition`
    headers = {
        "Bitstream-Id": id,
        "Cache-Status": "ugicm; hit" if hit else "ugicm; fwd=miss",
        "Content-Disposition": f'{shown}; filename="{id[:8]}-{view.label}.{view.format.value}"',
    }
    if view.negotiated:
        headers["Vary"] = "Accept"
    return headers

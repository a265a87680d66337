"""Many images in one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from typing import Annotated, NamedTuple

import structlog
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile
from starlette.types import Send

from ugicm.server.batching import OverloadedError
from ugicm.server.deps import ServicesDep, media_type_of, open_form, unsupported
from ugicm.server.models import BatchLine, EncodeResult
from ugicm.server.openapi import binary_answer, body, problems
from ugicm.server.problems import Code, ServiceError, as_service_error
from ugicm.server.routes.codec import StoreParam, TargetDep, encode_image
from ugicm.server.settings import setting
from ugicm.server.timings import Timings

router = APIRouter(tags=["codec"])

NDJSON = "application/x-ndjson"
FORM = "multipart/form-data"
PARALLEL = 4
"""Images of one request in the engine at once; the rest wait without holding pixels of the queue."""

_log = structlog.get_logger(__name__)


class Part(NamedTuple):
    """One uploaded image."""

    filename: str | None
    data: bytes


async def read_parts(request: Request, services: ServicesDep) -> list[Part]:
    """The file parts ``images`` of a form."""
    if (kind := media_type_of(request)) != FORM:
        raise unsupported(kind, FORM)
    most, name = services.settings.max_batch_images, setting("max_batch_images")
    try:
        async with open_form(request, max_files=most) as form:
            items = form.getlist("images")
            files = [item for item in items if isinstance(item, UploadFile)]
            parts = [Part(file.filename, await file.read()) for file in files]
    except ServiceError as error:
        if error.detail.startswith("Too many files"):
            raise ServiceError(
                Code.TOO_MANY_IMAGES,
                f"{most + 1} images or more; the limit is {most}, {name} changes it",
                limit=most,
                actual=most + 1,
                setting=name,
            ) from None
        raise
    if not parts or len(parts) < len(items):  # one that is left out would shift the lines of the others
        raise ServiceError(
            Code.INVALID_PARAMETER, "the form needs file parts named 'images', each with a file name"
        )
    return parts


class _Lines(StreamingResponse):
    """Lines of an answer; when it ends early, its generator does at once, not when it is collected."""

    def __init__(self, lines: AsyncGenerator[str, None]) -> None:
        super().__init__(lines, media_type=NDJSON, headers={"Cache-Control": "no-store"})
        self._lines = lines

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._lines):
            await super().stream_response(send)


PartsDep = Annotated[list[Part], Depends(read_parts)]


@router.post(
    "/encode/batch",
    operation_id="encodeBatch",
    summary="Encode several images",
    description="The answer has one JSON line per image, in order, as soon as it is ready: a `result` or a "
    "`problem`. One bad image does not harm the others.",
    response_class=Response,
    responses={
        200: binary_answer("One `BatchLine` per image, as JSON and a line feed.", (NDJSON,)),
        **problems(
            Code.MALFORMED_BODY,
            Code.UPLOAD_STALLED,
            Code.TOO_MANY_BYTES,
            Code.TOO_MANY_IMAGES,
            Code.UNSUPPORTED_MEDIA_TYPE,
            Code.INVALID_PARAMETER,
        ),
    },
    openapi_extra=body("BatchForm", raw=False),
)
async def encode_batch(
    request: Request,
    parts: PartsDep,
    target: TargetDep,
    services: ServicesDep,
    store: StoreParam = True,
) -> Response:
    places = asyncio.Semaphore(PARALLEL)
    inside: set[asyncio.Future[None]] = set()
    request_id: str = request.state.request_id

    async def encoded_with_room(part: Part) -> EncodeResult:
        """Images of one request wait for each other; only what others hold can refuse them."""
        while True:
            left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            enter = partial(inside.add, left)
            try:
                result, _ = await encode_image(
                    services, part.data, target, Timings(), store=store, on_admitted=enter
                )
                return result
            except OverloadedError:
                if not inside:
                    raise
            finally:
                inside.discard(left)
                left.set_result(None)
            await asyncio.wait(inside, return_when=asyncio.FIRST_COMPLETED)

    async def line(index: int, part: Part) -> BatchLine:
        answer = BatchLine(index=index, filename=part.filename)
        try:
            async with places:
                answer.result = await encoded_with_room(part)
        except Exception as error:
            problem = as_service_error(error)
            if problem.kind is Code.INTERNAL:
                _log.exception("image of a batch failed", index=index)
            services.metrics.rejected.labels(problem.kind.code).inc()
            answer.problem = problem.problem(instance=request.scope["path"], request_id=request_id)
        return answer

    return _Lines(_made([partial(line, index, part) for index, part in enumerate(parts)]))


async def _made(
    makers: Sequence[Callable[[], Coroutine[None, None, BatchLine]]],
) -> AsyncGenerator[str, None]:
    """Lines in order, made at the same time; what is not sent when the client leaves is cancelled."""
    # Started here: of a client that left before, nobody would cancel them.
    tasks = [asyncio.create_task(make()) for make in makers]
    try:
        for task in tasks:
            yield (await task).model_dump_json(exclude_none=True) + "\n"
    finally:
        for task in tasks:
            task.cancel()

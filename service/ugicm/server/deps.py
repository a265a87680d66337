"""What routes ask for by type."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated

import structlog
from fastapi import Depends, Query, Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from ugicm.codec.bitstream import MEDIA_TYPE as BITSTREAM_MEDIA_TYPE
from ugicm.server.cache import GuardedCache
from ugicm.server.engine import Engine
from ugicm.server.images import MEDIA_TYPES, holds
from ugicm.server.metrics import Metrics
from ugicm.server.middleware import Lifecycle
from ugicm.server.models import BitstreamRef, ImageFormat, Preference
from ugicm.server.openapi import OCTETS
from ugicm.server.pictures import PictureCache
from ugicm.server.problems import Code, ServiceError, shown
from ugicm.server.settings import Settings
from ugicm.server.timings import Timings

_log = structlog.get_logger(__name__)

CURL_DEFAULT = "application/x-www-form-urlencoded"
"""What ``curl --data-binary`` says of any file; taken as raw bytes."""
FORM_SLICE_BYTES = 16 << 10
"""Of a form that are taken apart at once: four milliseconds of Python where they are all but its boundary."""
MAX_REFERENCE_BYTES = 1 << 10
"""Of a JSON body with an id; parsing millions of values would hold up the event loop for seconds."""
STRENGTH_DIGITS = 2
"""Strengths are rounded to this many decimals, so that a slider's pictures can be cached."""


@dataclass(frozen=True)
class Services:
    """The parts of a running application."""

    settings: Settings
    engine: Engine
    cache: GuardedCache
    pictures: PictureCache
    metrics: Metrics
    lifecycle: Lifecycle


async def get_services(request: Request) -> Services:
    """Parts made by the application's lifespan."""
    services: Services = request.app.state.services
    return services


async def get_timings(request: Request) -> Timings:
    """Of this request."""
    timings: Timings = request.state.timings
    return timings


ServicesDep = Annotated[Services, Depends(get_services)]
TimingsDep = Annotated[Timings, Depends(get_timings)]


@dataclass(frozen=True)
class View:
    """How a bitstream shall be decoded."""

    strength: float
    """0 (human) to 1 (machine)."""
    formats: tuple[ImageFormat, ...]
    """Any of these will do, the first one best."""
    negotiated: bool
    """The Accept header decided on the format."""

    @property
    def format(self) -> ImageFormat:
        """The best one."""
        return self.formats[0]

    def holding(self, width: int, height: int) -> View:
        """With only the formats that hold a picture of this size, unless none does."""
        held = tuple(name for name in self.formats if holds(width, height, name.value))
        return replace(self, formats=held or self.formats)

    @property
    def label(self) -> str:
        """For file names."""
        return {0.0: "human", 1.0: "machine"}.get(self.strength, f"{self.strength:g}")

    @property
    def media_type(self) -> str:
        """Of the picture."""
        return MEDIA_TYPES[self.format.value]


async def get_view(
    request: Request,
    preference: Annotated[
        Preference, Query(description="Whom the picture is for.", examples=["machine"])
    ] = Preference.human,
    strength: Annotated[
        float | None,
        Query(
            ge=0,
            le=1,
            description="0 (human) to 1 (machine), rounded to hundredths; overrides `preference`.",
            examples=[0.5],
        ),
    ] = None,
    format: Annotated[
        ImageFormat | None,
        Query(description="File format; without it the Accept header decides, else PNG.", examples=["png"]),
    ] = None,
) -> View:
    """Preference and format of the picture."""
    if strength is None:
        strength = 1.0 if preference is Preference.machine else 0.0
    return View(
        round(strength, STRENGTH_DIGITS),
        (format,) if format else _acceptable_formats(_accept(request)),
        format is None,
    )


ViewDep = Annotated[View, Depends(get_view)]


async def read_image_body(request: Request) -> bytes:
    """The image of `POST /encode`: the raw body, or the file part ``image`` of a form."""
    kind = media_type_of(request)
    if kind == "multipart/form-data":
        return await _file_part(request, "image")
    if kind in ("", OCTETS, CURL_DEFAULT) or kind.startswith("image/"):
        return await _raw_body(request)
    raise unsupported(kind, f"image/*, {OCTETS}, multipart/form-data")


async def read_bitstream_body(request: Request) -> bytes | BitstreamRef:
    """The bitstream of `POST /decode`: the raw body, the file part ``bitstream``, or JSON with an id."""
    kind = media_type_of(request)
    if kind == "multipart/form-data":
        return await _file_part(request, "bitstream")
    if kind == "application/json":
        reference = await request.body()
        if len(reference) > MAX_REFERENCE_BYTES:
            raise ServiceError(
                Code.INVALID_PARAMETER, f'the JSON body must be {{"id": ...}}, got {len(reference)} bytes'
            )
        try:
            return BitstreamRef.model_validate_json(reference)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "json_invalid":
                raise ServiceError(Code.MALFORMED_BODY, f"the body is no JSON: {first['msg']}") from None
            raise ServiceError(
                Code.INVALID_PARAMETER,
                f'the JSON body must be {{"id": ...}}: {first["msg"]}, got {shown(first["input"])}',
            ) from None
    if kind in ("", OCTETS, CURL_DEFAULT, BITSTREAM_MEDIA_TYPE):
        return await _raw_body(request)
    raise unsupported(kind, f"{BITSTREAM_MEDIA_TYPE}, {OCTETS}, multipart/form-data, application/json")


ImageBody = Annotated[bytes, Depends(read_image_body)]
BitstreamBody = Annotated[bytes | BitstreamRef, Depends(read_bitstream_body)]


def media_type_of(request: Request) -> str:
    """Of the body, without parameters.

    Raises:
        ServiceError: 415, the body is compressed.
    """
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise ServiceError(
            Code.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Encoding {shown(coding)} is not supported; send the body as it is",
            headers={"Accept-Encoding": "identity"},
        )
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _raw_body(request: Request) -> bytes:
    body = await request.body()
    if not body:
        raise ServiceError(Code.MALFORMED_BODY, "the request has no body")
    return body


FORM_CHARSETS = {
    *("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "iso8859-1", "latin-1", "latin1"),
    *("windows-1252", "cp1252"),
}
"""Of texts in forms. Others of Python's take minutes for a megabyte (punycode), and it remembers all that it
does not know."""


def _check_charset(name: str) -> None:
    if name.lower() not in FORM_CHARSETS:
        raise ServiceError(
            Code.MALFORMED_BODY,
            f"the charset of a form must be utf-8, us-ascii or iso-8859-1, got {shown(name)}",
        )


class _Slices:
    """The messages of a form in slices, between which the event loop sees to others.

    The parser takes what is left of a form that breaks off, but for its last part; so its end is noted here.
    """

    def __init__(self, receive: Receive, boundary: bytes) -> None:
        self._receive, self._end = receive, b"--" + boundary + b"--"
        self._pending, self._more_body = memoryview(b""), True
        self._tail = b""
        self.ended = False
        """Whether the closing boundary has come."""

    async def __call__(self) -> Message:
        if self._pending:
            await asyncio.sleep(0)
        else:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._pending = memoryview(message.get("body", b""))
            self._more_body = message.get("more_body", False)
        piece, self._pending = bytes(self._pending[:FORM_SLICE_BYTES]), self._pending[FORM_SLICE_BYTES:]
        joined = self._tail + piece
        self.ended = self.ended or self._end in joined
        self._tail = joined[1 - len(self._end) :]
        return {"type": "http.request", "body": piece, "more_body": self._more_body or bool(self._pending)}


NOT_WRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE),
}
"""Of a folder: it is full, gone, or not ours; or too many files are open."""


FILE_PARTS = "file parts have a file name (filename=...)"
PARAMETERS = {"quality", "target_bpp", "max_bytes", "store", "preference", "strength", "format"}
"""Of the query; a form with such a field would be taken without it."""


@asynccontextmanager
async def open_form(request: Request, *, max_files: int) -> AsyncIterator[FormData]:
    """The multipart form that the body is."""
    _, options = parse_options_header(request.headers.get("content-type"))
    _check_charset(options.get(b"charset", b"utf-8").decode("latin-1"))
    slices = _Slices(request.receive, options.get(b"boundary", b""))
    try:
        async with Request(request.scope, slices).form(max_files=max_files, max_fields=8) as form:
            if not slices.ended:
                raise ServiceError(Code.MALFORMED_BODY, "the form ends before its closing boundary")
            for name in sorted(PARAMETERS & form.keys()):
                raise ServiceError(
                    Code.INVALID_PARAMETER,
                    f"{name} is a field of the form; parameters belong in the query (?{name}=...)",
                )
            yield form
    except HTTPException as error:
        if str(error.detail).startswith("Part exceeded maximum size"):  # it holds for texts alone
            raise ServiceError(
                Code.INVALID_PARAMETER, f"a part without a file name is too large for a text; {FILE_PARTS}"
            ) from None
        raise ServiceError(Code.MALFORMED_BODY, str(error.detail)) from None
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        _log.warning("the files of a form cannot be written", error=str(error))
        why = os.strerror(error.errno).lower()
        raise ServiceError(
            Code.OVERLOADED,
            f"the folder in which files of forms wait cannot be written ({why}); "
            "send the image as the body, or try again (TMPDIR says where that folder is)",
            setting="TMPDIR",
            retry_after_s=1,
        ) from error


async def _file_part(request: Request, name: str) -> bytes:
    """Bytes of the file part of that name."""
    async with open_form(request, max_files=1) as form:
        part = form.get(name)
        if isinstance(part, UploadFile):
            if data := await part.read():
                return data
            raise ServiceError(Code.MALFORMED_BODY, f"the file part {name!r} is empty")
    raise ServiceError(Code.INVALID_PARAMETER, f"the form needs a file part named {name!r}; {FILE_PARTS}")


def unsupported(kind: str, accepted: str) -> ServiceError:
    """415 that lists what is accepted."""
    return ServiceError(
        Code.UNSUPPORTED_MEDIA_TYPE,
        f"Content-Type {kind!r} is not supported; send one of: {accepted}",
        headers={"Accept": accepted},
    )


def accepts_bitstream(request: Request) -> bool:
    """Whether the Accept header names our media type and likes JSON no better."""
    accept = _accept(request)
    weight = _weight(accept, BITSTREAM_MEDIA_TYPE)
    named = BITSTREAM_MEDIA_TYPE in accept.lower()
    return named and weight > 0 and weight >= _weight(accept, "application/json")


def _accept(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))


def _acceptable_formats(accept: str) -> tuple[ImageFormat, ...]:
    """The formats that an Accept header likes, best first; in our order where it likes several the same."""
    weights = {name: _weight(accept.strip() or "*/*", MEDIA_TYPES[name.value]) for name in ImageFormat}
    liked = sorted((name for name in ImageFormat if weights[name] > 0), key=lambda name: -weights[name])
    if liked:
        return tuple(liked)
    if _weight(accept, OCTETS) > 0:
        return (ImageFormat.png,)
    raise ServiceError(
        Code.NOT_ACCEPTABLE,
        f"Accept: {accept} allows none of {', '.join(MEDIA_TYPES.values())}; "
        "the format parameter decides regardless of Accept",
    )


def _weight(accept: str, media_type: str) -> float:
    """q of the most specific range of an Accept header that covers a media type (RFC 9110, 12.5.1)."""
    ranges = ("*/*", media_type.partition("/")[0] + "/*", media_type)
    best = (-1, 0.0)
    for item in accept.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        if name in ranges:
            quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
            try:
                best = max(best, (ranges.index(name), float(quality)))
            except ValueError:
                continue
    return best[1]

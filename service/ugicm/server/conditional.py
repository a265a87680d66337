"""Conditional and range requests (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from ugicm.server.cache import Content
from ugicm.server.problems import Code, ServiceError

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
"""Numbers of more digits are no sizes, and Python converts only so many."""


def respond(
    request: Request, content: Content, *, etag: str, media_type: str, headers: Mapping[str, str]
) -> Response:
    """200, 206, 304 or, by exception, 416; without a body for HEAD.

    Args:
        request: GET or HEAD; ranges apply to GET only.
        content: the whole representation.
        etag: its strong entity tag, quoted.
        media_type: of the representation.
        headers: further response headers.
    """
    common = {"ETag": etag, "Accept-Ranges": "bytes", **headers}
    if _matches(", ".join(request.headers.getlist("if-none-match")), etag):
        return Response(status_code=304, headers=common)
    if request.method == "HEAD":
        return Response(headers={**common, "Content-Length": str(len(content))}, media_type=media_type)
    span = None
    if request.headers.get("if-range", etag) == etag:
        span = byte_range(request.headers.get("range", ""), len(content))
    if span is None:
        return Response(content, headers=common, media_type=media_type)
    content_range = f"bytes {span.start}-{span.stop - 1}/{len(content)}"
    return Response(
        content[span.start : span.stop],
        206,
        {**common, "Content-Range": content_range},
        media_type,
    )


def byte_range(header: str, size: int) -> range | None:
    """Bytes that a ``Range`` header asks for; None if it is absent, malformed, or asks for several.

    Raises:
        ServiceError: 416, no byte of the range exists.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match.group() == "bytes=-":
        return None
    first, last = match.groups()
    if first:
        span = range(int(first), min(int(last) + 1, size) if last else size)
        if last and int(last) < int(first):
            return None
    else:
        span = range(max(0, size - int(last)), size)
    if not span:
        raise ServiceError(
            Code.RANGE_NOT_SATISFIABLE,
            f"{header} asks for bytes outside of the {size} there are",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return span


def _matches(if_none_match: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags

"""Errors as RFC 9457 problem details: one JSON shape for everything that can go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Mount

from ugicm.codec.errors import (
    CodecError,
    LimitExceededError,
    MalformedBitstreamError,
    ModelMismatchError,
)
from ugicm.server.batching import OverloadedError
from ugicm.server.cache import CacheDownError
from ugicm.server.engine import DeadlineExceededError
from ugicm.server.images import ACCEPTED_MEDIA_TYPES, MalformedImageError, UnsupportedImageError
from ugicm.server.isolated import ReaderLostError
from ugicm.server.settings import PREFIX, setting

MEDIA_TYPE = "application/problem+json"
CACHE_RETRY_AFTER_S = 10


class _Kind(NamedTuple):
    status: int
    code: str
    title: str


class Code(_Kind, Enum):
    """Every kind of problem: HTTP status, stable machine-readable code, title."""

    MALFORMED_BITSTREAM = 400, "malformed-bitstream", "Malformed bitstream"
    MALFORMED_IMAGE = 400, "malformed-image", "Malformed image"
    MALFORMED_BODY = 400, "malformed-body", "Malformed request body"
    MISSING_API_KEY = 401, "missing-api-key", "API key required"
    BAD_API_KEY = 403, "bad-api-key", "API key not accepted"
    BAD_SIGNATURE = 403, "bad-signature", "Signed link not accepted"
    NOT_FOUND = 404, "not-found", "No such resource"
    UNKNOWN_BITSTREAM = 404, "unknown-bitstream", "Bitstream not in the cache"
    METHOD_NOT_ALLOWED = 405, "method-not-allowed", "Method not allowed"
    NOT_ACCEPTABLE = 406, "not-acceptable", "No acceptable format"
    MODEL_MISMATCH = 409, "model-mismatch", "Bitstream of another model"
    UPLOAD_STALLED = 408, "upload-stalled", "Request body does not arrive"
    TOO_MANY_BYTES = 413, "too-many-bytes", "Request body too large"
    TOO_MANY_IMAGES = 413, "too-many-images", "Too many images"
    TOO_MANY_PIXELS = 413, "too-many-pixels", "Image too large"
    UNSUPPORTED_MEDIA_TYPE = 415, "unsupported-media-type", "Unsupported media type"
    RANGE_NOT_SATISFIABLE = 416, "range-not-satisfiable", "Range not satisfiable"
    INVALID_PARAMETER = 422, "invalid-parameter", "Invalid parameter"
    INTERNAL = 500, "internal", "Internal error"
    OVERLOADED = 503, "overloaded", "Overloaded"
    STOPPING = 503, "stopping", "Service stopping"
    UNAVAILABLE = 503, "cache-unavailable", "Bitstream cache unavailable"
    TIMEOUT = 504, "timeout", "Deadline exceeded"


class InvalidField(BaseModel):
    """One invalid parameter."""

    loc: str = Field(description="JSON pointer to the parameter.", examples=["/query/quality"])
    message: str = Field(examples=["Input should be less than or equal to 100, got '101'"])


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:ugicm:problem:too-many-pixels",
                    "title": "Image too large",
                    "status": 413,
                    "detail": "pixels of a 9000x6000 image: 54000000 is over the limit of 50000000; "
                    "UGICM_MAX_PIXELS changes it",
                    "instance": "/encode",
                    "code": "too-many-pixels",
                    "request_id": "b2c0a8c0d1f94c0e",
                    "limit": 50000000,
                    "actual": 54000000,
                    "setting": "UGICM_MAX_PIXELS",
                }
            ]
        }
    )

    type: str = Field(description="`urn:ugicm:problem:` and the code.")
    title: str
    status: int
    detail: str
    instance: str = Field(description="Path of the request, quoted as in a URI.")
    code: str = Field(description="Stable, machine-readable.")
    request_id: str
    limit: int | float | None = Field(default=None, description="The limit that was exceeded.")
    actual: int | float | None = Field(default=None, description="The value that exceeded it.")
    setting: str | None = Field(default=None, description="The server setting that changes the limit.")
    retry_after_s: int | None = Field(
        default=None, description="When to try again, as in `Retry-After`; images of a batch have it too."
    )
    needed: str | None = Field(default=None, description="Digest of the model that wrote the bitstream.")
    loaded: str | None = Field(default=None, description="Model that this server runs.")
    errors: list[InvalidField] | None = None


class ServiceError(Exception):
    """Raise anywhere in a request to answer with a problem.

    Args:
        kind: what went wrong.
        detail: one sentence for people, with the values seen.
        headers: further response headers.
        members: further members of `Problem` (``limit``, ``actual``, ``setting`` ...);
            ``retry_after_s`` becomes a header as well.
    """

    def __init__(
        self, kind: Code, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.headers, self.members = kind, detail, dict(headers or {}), members
        if "retry_after_s" in members:
            self.headers["Retry-After"] = str(members["retry_after_s"])

    def problem(self, *, instance: str, request_id: str) -> Problem:
        """The body of the answer to a request of this path, which may hold any character."""
        return Problem(
            type=f"urn:ugicm:problem:{self.kind.code}",
            title=self.kind.title,
            status=self.kind.status,
            detail=self.detail,
            instance=quote(instance),
            code=self.kind.code,
            request_id=request_id,
            **self.members,
        )

    def response(self, scope: Mapping[str, Any]) -> Response:
        """The whole answer to the request of this ASGI scope; never cached."""
        state = scope.get("state", {})
        body = self.problem(instance=scope["path"], request_id=state.get("request_id", ""))
        state["problem"] = self.kind.code
        return Response(
            body.model_dump_json(exclude_none=True),
            self.kind.status,
            {"Cache-Control": "no-store", **self.headers},
            MEDIA_TYPE,
        )


def shown(value: object) -> str:
    """An invalid value, quoted, cut after 80 characters."""
    return repr(str(value)[:80])


def too_many_bytes(actual: int, limit: int) -> ServiceError:
    """The request body is larger than `limit` bytes; `actual` is what was declared or has arrived."""
    name = setting("max_bytes")
    return ServiceError(
        Code.TOO_MANY_BYTES,
        f"the request body has {actual} bytes or more; the limit is {limit}, {name} changes it",
        limit=limit,
        actual=actual,
        setting=name,
    )


def upload_stalled(actual: int, least: int, limit_s: float) -> ServiceError:
    """Of the request body, `actual` bytes came in `limit_s` seconds, neither `least` nor the rest of it."""
    name = setting("transfer_timeout_s")
    return ServiceError(
        Code.UPLOAD_STALLED,
        f"{actual} bytes of the request body arrived in {limit_s:g} s, the limit for {least} of them or the "
        f"rest; {name} changes it",
        headers={"Connection": "close"},
        limit=limit_s,
        setting=name,
    )


def too_many_requests(limit: int) -> ServiceError:
    """More than `limit` requests are in flight."""
    name = setting("max_requests")
    return ServiceError(
        Code.OVERLOADED,
        f"{limit} requests are in flight, the limit; {name} changes it",
        retry_after_s=1,
        limit=limit,
        actual=limit + 1,
        setting=name,
    )


def stopped() -> ServiceError:
    """The service stops before it has the answer."""
    name = setting("shutdown_timeout_s")
    detail = f"the service is stopping and has not done this within {name}; try again"
    return ServiceError(Code.STOPPING, detail, setting=name, retry_after_s=1)


def as_service_error(error: Exception) -> ServiceError:
    """The problem that an exception of the codec, the engine or the framework stands for."""
    match error:
        case ServiceError():
            return error
        case LimitExceededError():
            return ServiceError(
                Code.TOO_MANY_PIXELS,
                str(error),
                limit=error.limit,
                actual=error.actual,
                setting=error.setting if error.setting.startswith(PREFIX) else None,
            )
        case ModelMismatchError():
            return ServiceError(Code.MODEL_MISMATCH, str(error), needed=error.needed, loaded=error.loaded)
        case MalformedBitstreamError():
            return ServiceError(Code.MALFORMED_BITSTREAM, str(error))
        case MalformedImageError():
            return ServiceError(Code.MALFORMED_IMAGE, str(error))
        case ReaderLostError():
            return ServiceError(Code.OVERLOADED, str(error), retry_after_s=1)
        case UnsupportedImageError():
            accepted = ", ".join(ACCEPTED_MEDIA_TYPES)
            return ServiceError(Code.UNSUPPORTED_MEDIA_TYPE, str(error), headers={"Accept": accepted})
        case CodecError():
            return ServiceError(Code.INVALID_PARAMETER, str(error))
        case OverloadedError():
            name = setting("queue_pixels")
            return ServiceError(
                Code.OVERLOADED,
                f"{error.held} pixels are in the service and {error.weight} more are over the limit of "
                f"{error.limit}; {name} changes it",
                retry_after_s=error.retry_after_s,
                limit=error.limit,
                actual=error.held + error.weight,
                setting=name,
            )
        case CacheDownError():
            name = setting("cache_url")
            return ServiceError(
                Code.UNAVAILABLE,
                f"{error}; decode by sending the bitstream itself, or try again ({name} says where it is)",
                setting=name,
                retry_after_s=CACHE_RETRY_AFTER_S,
            )
        case DeadlineExceededError():
            name = setting("request_timeout_s")
            return ServiceError(
                Code.TIMEOUT,
                f"{error}; {name} changes it",
                limit=error.limit_s,
                actual=round(error.actual_s, 3),
                setting=name,
            )
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return _from_framework(error)
    return ServiceError(Code.INTERNAL, "the service failed; its log has the request id")


def install(app: FastAPI) -> None:
    """Answer every exception of a request with a problem.

    Starlette's ``HTTPException`` is registered, not FastAPI's subclass, or 404 and 405 would escape.
    Unexpected exceptions pass on to `RequestContext`, which logs them.
    """

    async def answer(request: Request, error: Exception) -> Response:
        refused = isinstance(error, HTTPException) and error.status_code == HTTPStatus.METHOD_NOT_ALLOWED
        if refused and (methods := _methods(request)):
            error = HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": ", ".join(methods)})
        return as_service_error(error).response(request.scope)

    for kind in (
        ServiceError,
        CodecError,
        OverloadedError,
        CacheDownError,
        DeadlineExceededError,
        ReaderLostError,
        HTTPException,
        RequestValidationError,
    ):
        app.add_exception_handler(kind, answer)


def _methods(request: Request) -> list[str]:
    """What the path takes; the framework names the methods of the first of its routes only."""
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]
    return [
        method
        for method in ("GET", "HEAD", "POST", "DELETE")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


def _invalid(error: RequestValidationError) -> ServiceError:
    fields = [
        InvalidField(
            loc="/" + "/".join(map(str, item["loc"])),
            message=f"{item['msg']}, got {shown(item['input'])}",
        )
        for item in error.errors()
    ]
    detail = "; ".join(f"{field.loc}: {field.message}" for field in fields)
    return ServiceError(Code.INVALID_PARAMETER, detail, errors=fields)


def _from_framework(error: HTTPException) -> ServiceError:
    status = error.status_code
    kinds = {
        400: Code.MALFORMED_BODY,
        404: Code.NOT_FOUND,
        405: Code.METHOD_NOT_ALLOWED,
        415: Code.UNSUPPORTED_MEDIA_TYPE,
        422: Code.INVALID_PARAMETER,
    }
    allowed = (error.headers or {}).get("Allow", "other methods")
    details = {404: "there is nothing at this path", 405: f"this path takes {allowed} only"}
    detail = details.get(status) or str(error.detail) or HTTPStatus(status).phrase
    return ServiceError(kinds.get(status, Code.INTERNAL), detail, headers=error.headers)

"""The OpenAPI document, in the shape that generated clients survive.

FastAPI's own schema for files lacks ``format: binary``, with which generators send strings; a body or an
answer with only a vendor media type is dropped by some. So bodies and binary answers are written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ugicm.codec.bitstream import MEDIA_TYPE as BITSTREAM_MEDIA_TYPE
from ugicm.server.images import MEDIA_TYPES
from ugicm.server.models import BatchLine, BitstreamRef
from ugicm.server.problems import MEDIA_TYPE as PROBLEM_MEDIA_TYPE
from ugicm.server.problems import Code, Problem

OCTETS = "application/octet-stream"
BINARY = {"type": "string", "format": "binary"}

_FILE_PART = {**BINARY, "description": "A part with a file name (`filename=...`), whatever it is."}
_FORMS: dict[str, dict[str, Any]] = {
    "EncodeForm": {"image": _FILE_PART},
    "DecodeForm": {"bitstream": _FILE_PART},
    "BatchForm": {"images": {"type": "array", "items": _FILE_PART}},
}
_MODELS = (Problem, BitstreamRef, BatchLine)
"""What the hand-written parts refer to besides the forms."""

_DESCRIPTION = """
A neural image codec as a service: one bitstream per image, two views.

`POST /encode` turns an image into a bitstream and keeps it under its content hash.
`POST /decode` turns a bitstream, or the id of one, into an image for human eyes
(`preference=human`), for machine vision (`preference=machine`), or anything between (`strength`).
""".strip()

_TAGS = [
    {"name": "codec", "description": "Images to bitstreams and back."},
    {"name": "bitstreams", "description": "Kept bitstreams, by content hash."},
    {"name": "service", "description": "What runs here, and how it is."},
]


_HEADERS = {401: "WWW-Authenticate", 415: "Accept", 416: "Content-Range", 503: "Retry-After"}
"""Of problems, by status."""


class Keys(NamedTuple):
    """What lets a request in."""

    api: bool
    """Operations ask for an API key."""
    links: bool
    """Signed links need none."""


def problems(*kinds: Code) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of these problems and of those that any request can meet, but health checks."""
    common = (Code.TOO_MANY_BYTES, Code.OVERLOADED, Code.STOPPING, Code.INTERNAL)
    return _problems(*dict.fromkeys((*kinds, *common)))


def _problems(*kinds: Code) -> dict[int | str, dict[str, Any]]:
    by_status: dict[int | str, dict[str, Any]] = {}
    for kind in sorted(kinds, key=lambda kind: kind.status):
        content = {PROBLEM_MEDIA_TYPE: {"schema": _reference("Problem")}}
        headers = _headers(*filter(None, [_HEADERS.get(kind.status)]))
        new = {"description": "", "headers": headers, "content": content}
        entry = by_status.setdefault(kind.status, new)
        line = f"{kind.title} (`{kind.code}`)"
        entry["description"] = "; ".join(filter(None, [entry["description"], line]))
    return by_status


def body(form: str, *, raw: bool = True, json_schema: str | None = None) -> dict[str, Any]:
    """``openapi_extra`` of a request body: the multipart `form`, `raw` bytes, or JSON of that schema."""
    content: dict[str, Any] = {OCTETS: {"schema": BINARY}} if raw else {}
    content["multipart/form-data"] = {"schema": _reference(form)}
    if json_schema:
        content["application/json"] = {"schema": _reference(json_schema)}
    return {"requestBody": {"required": True, "content": content}}


def binary_answer(description: str, media_types: tuple[str, ...], *headers: str) -> dict[str, Any]:
    """``responses=`` entry of a binary answer; ``application/octet-stream`` stands beside the others."""
    return {
        "description": description,
        "headers": _headers(*headers),
        "content": {media_type: {"schema": BINARY} for media_type in (*media_types, OCTETS)},
    }


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"schema": {"type": "string"}} for name in names}


IMAGE_TYPES = tuple(MEDIA_TYPES.values())
_ANY = ("Cache-Control", "Server-Timing", "X-Request-Id")
"""Headers of answers to anything."""
_CODED = ("Bitstream-Id", "Cache-Status", "Content-Disposition")
DECODED = binary_answer("The decoded image.", IMAGE_TYPES, *_CODED, "Content-Location", "Vary")
ENCODED = {
    "description": "The encoded image.",
    "headers": _headers(*_CODED, "ETag", "Location", "Vary"),
    "content": {BITSTREAM_MEDIA_TYPE: {"schema": BINARY}},
}


def _kept(what: str, media_types: tuple[str, ...], *headers: str) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of conditional requests and of ranges."""
    whole = binary_answer(f"The {what}.", media_types, *_CODED, "Accept-Ranges", "ETag", *headers)
    part_headers = {**whole["headers"], **_headers("Content-Range")}
    return {
        200: whole,
        206: {
            **whole,
            "description": f"The range of the {what} that was asked for.",
            "headers": part_headers,
        },
        304: {"description": "Not modified.", "headers": whole["headers"]},
    }


BITSTREAM = _kept("bitstream", (BITSTREAM_MEDIA_TYPE,))
IMAGE = _kept("image", IMAGE_TYPES, "Vary")


def install(app: FastAPI, keys: Keys) -> None:
    """Replace ``app.openapi``; `keys` are what the operations ask for."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=_DESCRIPTION,
                routes=app.routes,
                tags=_TAGS,
                license_info={"name": "MIT", "identifier": "MIT"},
                contact={"name": "ugicm"},
                servers=[{"url": "/"}],
            )
            _complete(schema, keys)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(schema: dict[str, Any], keys: Keys) -> None:
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    for model in _MODELS:
        own = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(own.pop("$defs", {}))
        schemas[model.__name__] = own
    for name, properties in _FORMS.items():
        schemas[name] = {
            "title": name,
            "type": "object",
            "required": list(properties),
            "properties": properties,
        }
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for _, operation in _operations(schema):
        for parameter in operation.get("parameters", ()):
            _drop_null(parameter["schema"])
        invalid = operation["responses"].get("422", {})
        if "application/json" in invalid.get("content", {}):
            operation["responses"]["422"] = _problems(Code.INVALID_PARAMETER)[422]
    if keys.api:
        _ask_for_keys(schema, links=keys.links)
    for _, operation in _operations(schema):
        for answer in operation["responses"].values():
            answer["headers"] = {**answer.get("headers", {}), **_headers(*_ANY)}


def _ask_for_keys(schema: dict[str, Any], *, links: bool) -> None:
    schemes = {
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "bearer": {"type": "http", "scheme": "bearer", "description": "The same keys."},
    }
    link = {
        "type": "apiKey",
        "in": "query",
        "name": "sig",
        "description": "In the `links` of an encoded image, which are used as they are; no key is needed.",
    }
    schema["components"]["securitySchemes"] = {**schemes, **({"link": link} if links else {})}
    for method, operation in _operations(schema):
        if operation["tags"] != ["service"] or operation["operationId"] == "getInfo":
            signed = links and method == "get" and operation["tags"] == ["bitstreams"]
            operation["security"] = [{name: []} for name in (*schemes, *(["link"] if signed else []))]
            refusals = _problems(
                Code.MISSING_API_KEY, Code.BAD_API_KEY, *([Code.BAD_SIGNATURE] if method == "get" else [])
            )
            operation["responses"].update({str(status): one for status, one in refusals.items()})


def _drop_null(schema: dict[str, Any]) -> None:
    """An optional parameter may be absent; it is never null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema.update(kinds[0])


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Method and operation."""
    for path in schema["paths"].values():
        yield from path.items()


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}

"""The viewer and the API documentation: static files, no other host is asked for anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

STATIC = Path(__file__).resolve().parents[1] / "static"
HEADERS = {
    "Accept-Ranges": "none",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
}
"""Swagger UI styles its elements inline; scripts come from files only."""


class WholeFiles(StaticFiles):
    """Files of a folder, never parts of them, and never older ones than the page that wants them."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        for name in ("Accept-Ranges", "Cache-Control"):
            response.headers[name] = HEADERS[name]
        return response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Servers may ignore ranges (RFC 9110, 14.2); Starlette answers wrong ones with text, no problem.
        kept = [(name, value) for name, value in scope["headers"] if name not in (b"range", b"if-range")]
        await super().__call__({**scope, "headers": kept}, receive, send)


router = APIRouter(include_in_schema=False)


@router.head("/")
@router.get("/")
async def get_viewer() -> Response:
    return HTMLResponse((STATIC / "viewer.html").read_bytes(), headers=HEADERS)


@router.head("/docs")
@router.get("/docs")
async def get_docs() -> Response:
    return HTMLResponse((STATIC / "docs.html").read_bytes(), headers=HEADERS)

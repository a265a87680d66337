"""The viewer and the API documentation: static files, no other host is asked for anything."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

STATIC = Path(__file__).resolve().parents[1] / "static"
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
}
"""Swagger UI styles its elements inline; scripts come from files only."""

router = APIRouter(include_in_schema=False)


@router.head("/")
@router.get("/")
async def get_viewer() -> FileResponse:
    return FileResponse(STATIC / "viewer.html", headers=HEADERS)


@router.head("/docs")
@router.get("/docs")
async def get_docs() -> FileResponse:
    return FileResponse(STATIC / "docs.html", headers=HEADERS)

"""API keys, and signed links that work without one."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from fastapi import Request
from pydantic import SecretStr

from ugicm.server.deps import ServicesDep
from ugicm.server.problems import Code, ServiceError
from ugicm.server.settings import setting

EXPIRY, SIGNATURE = "exp", "sig"
"""Query parameters of a signed link: Unix time in seconds, HMAC-SHA256 in hex."""


def sign(path: str, query: Mapping[str, str], key: SecretStr, expires_at: int) -> str:
    """``path?query`` that GET accepts without an API key until `expires_at` (Unix time, seconds)."""
    signed = {**query, EXPIRY: str(expires_at)}
    return f"{path}?{urlencode({**signed, SIGNATURE: _signature(path, signed, key)})}"


async def require_key(request: Request, services: ServicesDep) -> None:
    """Refuse requests without a key, if keys are configured; a valid signed link needs none.

    Afterwards ``request.state.by_link`` says whether the link was what counted.
    """
    settings = services.settings
    request.state.by_link = False
    if not settings.api_keys:
        return
    given = _given_key(request)
    if given is not None and _is_key(given, settings.api_keys):
        return
    if SIGNATURE in request.query_params and request.method in ("GET", "HEAD"):
        # Not the path of `request.url`, which is made of the Host header, too.
        _check_link(request.scope["path"], dict(request.query_params), settings.url_keys)
        request.state.by_link = True
        return
    if given is None:
        raise ServiceError(
            Code.MISSING_API_KEY,
            "send a key as X-API-Key or as Authorization: Bearer",
            headers={"WWW-Authenticate": "Bearer"},
        )
    raise ServiceError(Code.BAD_API_KEY, "this API key is not accepted here")


def _is_key(given: str, keys: Sequence[SecretStr]) -> bool:
    # Every key is compared, so that the time says nothing about which one is near.
    accepted = [_equal(given, key.get_secret_value()) for key in keys]
    return any(accepted)


def _check_link(path: str, query: dict[str, str], keys: Sequence[SecretStr]) -> None:
    given = query.pop(SIGNATURE)
    accepted = [_equal(given, _signature(path, query, key)) for key in keys]
    if not any(accepted):
        raise ServiceError(Code.BAD_SIGNATURE, "the signature does not belong to this link")
    expiry = query.get(EXPIRY, "")
    if not (expiry.isascii() and expiry.isdigit() and time.time() < int(expiry)):
        name = setting("url_ttl_s")
        raise ServiceError(
            Code.BAD_SIGNATURE,
            f"the link has expired: {EXPIRY} is {expiry!r}, now is {int(time.time())}; "
            f"{name} changes how long links work",
            setting=name,
        )


def _given_key(request: Request) -> str | None:
    if key := request.headers.get("x-api-key"):
        return key
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" and key.strip() else None


def _signature(path: str, query: Mapping[str, str], key: SecretStr) -> str:
    message = f"{path}?{urlencode(sorted(query.items()))}"
    return hmac.new(key.get_secret_value().encode(), message.encode(), hashlib.sha256).hexdigest()


def _equal(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(), other.encode())

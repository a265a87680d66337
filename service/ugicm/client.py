"""A thin client of the service, synchronous and asynchronous; needs ``pip install 'ugicm[client]'``.

Example::

    with Client("http://127.0.0.1:8000") as client:
        encoded = client.encode(Path("photo.jpg").read_bytes(), quality=40)
        picture = client.decode(encoded.id, preference="machine")
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import httpx2

from ugicm.choices import ImageFormat, Preference

DEFAULT_URL = "http://127.0.0.1:8000"

_MAX_WAIT_S = 60.0
_NOT_RETRIED = "cache-unavailable"
"""Kind of 503 that seconds do not mend."""


class ProblemError(Exception):
    """The service answered with a problem."""

    def __init__(self, status: int, code: str, detail: str, members: Mapping[str, Any]) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail = status, code, detail
        self.members = members
        """The whole RFC 9457 body: ``limit``, ``actual``, ``setting``, ``request_id`` ..."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, self.detail, dict(self.members))


@dataclass(frozen=True)
class Encoded:
    """An encoded image, as the service describes it."""

    id: str
    """SHA-256 of the bitstream, hex."""
    size: int
    """Bytes of the bitstream."""
    bpp: float
    width: int
    height: int
    quality: float
    model: str
    """Digest of the model that wrote it."""
    cached: bool
    """The bitstream was kept already; not looked up if `store` was false."""
    stored: bool
    """The bitstream is kept now: `Client.decode` takes its id."""
    lossless: bool
    """Both views equal the original."""
    links: Mapping[str, str] = field(hash=False)
    """Paths of ``bitstream``, ``human`` and ``machine``; signed where the service signs links."""


class _Call(NamedTuple):
    """A request that can be sent again: arguments of httpx2's ``request``."""

    method: str
    url: str
    params: Mapping[str, str | int | float | bool]
    content: bytes | None = None
    json: Mapping[str, str] | None = None
    files: list[tuple[str, bytes]] | None = None
    headers: Mapping[str, str] = {}


def _encode_params(
    quality: float, target_bpp: float | None, max_bytes: int | None, store: bool
) -> dict[str, Any]:
    return {"quality": quality, "store": store, **_given({"target_bpp": target_bpp, "max_bytes": max_bytes})}


def _encode_call(image: bytes, params: Mapping[str, Any]) -> _Call:
    return _Call("POST", "/encode", params, content=_bytes(image), headers=_OCTETS)


def _batch_call(images: Iterable[bytes], params: Mapping[str, Any]) -> _Call:
    return _Call("POST", "/encode/batch", params, files=[("images", _bytes(image)) for image in images])


def _decode_call(
    source: bytes | str, preference: Preference, strength: float | None, format: ImageFormat
) -> _Call:
    params = {"preference": preference, "format": format, **_given({"strength": strength})}
    if isinstance(source, str):
        return _Call("POST", "/decode", params, json={"id": source})
    return _Call("POST", "/decode", params, content=_bytes(source), headers=_OCTETS)


def _bytes(content: bytes) -> bytes:
    """Of any buffer; ``bytes()`` would take the name of a `Path`, and a number for a size."""
    return bytes(memoryview(content))


def _path(id: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", id):  # else it might be the path of something else
        raise ValueError(f"the id of a bitstream is 64 hexadecimal digits, got {id!r}")
    return f"/bitstreams/{id}"


_OCTETS = {"Content-Type": "application/octet-stream"}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _encoded(body: Mapping[str, Any]) -> Encoded:
    return Encoded(**{field.name: body[field.name] for field in fields(Encoded)})


@contextmanager
def _understood(response: httpx2.Response) -> Iterator[None]:
    """A success that does not read as one of this service's is a problem, too: of a wrong address."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _unknown(response) from None


def _text(response: httpx2.Response) -> str:
    """Whatever charset an answer names, which may be none of texts."""
    return response.content.decode("utf-8", "replace")


def _unknown(response: httpx2.Response) -> ProblemError:
    return ProblemError(response.status_code, "unknown", _text(response)[:200], {})


def _result(response: httpx2.Response) -> Encoded:
    with _understood(response):
        return _encoded(response.json())


def _batch(response: httpx2.Response, count: int) -> list[Encoded | ProblemError]:
    with _understood(response):
        lines = [json.loads(line) for line in response.content.splitlines()]
        if [line["index"] for line in lines] != list(range(count)):
            raise ValueError
        return [
            _encoded(line["result"])
            if "result" in line
            else _problem(line["problem"]["status"], line["problem"])
            for line in lines
        ]


def _content(response: httpx2.Response) -> bytes:
    if "bitstream-id" not in response.headers:  # the service names what it sends
        raise _unknown(response)
    return response.content


def _deleted(response: httpx2.Response) -> None:
    if response.status_code != 204:
        raise _unknown(response)


def _info(response: httpx2.Response) -> dict[str, Any]:
    with _understood(response):
        info = dict(response.json())
        info["model"]
        return info


def _problem(status: int, body: Mapping[str, Any]) -> ProblemError:
    return ProblemError(status, body["code"], body["detail"], body)


def _is_temporary(response: httpx2.Response) -> bool:
    return response.status_code == 503 and _NOT_RETRIED not in _text(response)


def _wait_s(response: httpx2.Response, attempt: int) -> float:
    """What the service asks for, else twice as long each time."""
    try:
        wait = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        wait = 0.5 * 2**attempt
    return min(_MAX_WAIT_S, max(0.0, wait))


def _checked(response: httpx2.Response) -> httpx2.Response:
    if response.is_success:
        return response
    try:
        raise _problem(response.status_code, response.json())
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _unknown(response) from None


def _options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    if not (api_key or "").isascii():
        raise ValueError("the API key has characters that are not ASCII, which no header holds")
    headers = {"X-API-Key": api_key} if api_key else {}
    # However many calls are made at once, those that wait for a connection have sent nothing yet.
    return {"base_url": url, "headers": headers, "timeout": httpx2.Timeout(timeout_s, pool=None)}


class Client:
    """Synchronous client.

    Args:
        url: of the service.
        api_key: if the service asks for one.
        timeout_s: for each step of a request.
        retries: how often a service that is overloaded or just stopping (503, but for that of its cache) is
            asked again, after the wait it names.
        transport: of httpx2, for tests.

    Every method raises `ProblemError` for an answer that is no success of this service's, and httpx2's errors
    for none.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 3,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._http = httpx2.Client(**_options(url, api_key, timeout_s), transport=transport)
        self._retries = retries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def encode(
        self,
        image: bytes,
        *,
        quality: float = 50.0,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        store: bool = True,
    ) -> Encoded:
        """Encode an image file (PNG, JPEG, WebP ...); a size, if given, overrides the quality."""
        call = _encode_call(image, _encode_params(quality, target_bpp, max_bytes, store))
        return _result(self._send(call))

    def encode_batch(
        self,
        images: Iterable[bytes],
        *,
        quality: float = 50.0,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        store: bool = True,
    ) -> list[Encoded | ProblemError]:
        """Encode several image files in one request, each as `encode` would; in their order, what became of
        each."""
        if not (images := list(images)):
            return []
        call = _batch_call(images, _encode_params(quality, target_bpp, max_bytes, store))
        return _batch(self._send(call), len(images))

    def decode(
        self,
        source: bytes | str,
        *,
        preference: Preference = "human",
        strength: float | None = None,
        format: ImageFormat = "png",
    ) -> bytes:
        """Image file of a bitstream (bytes) or of the id of a kept one (str)."""
        return _content(self._send(_decode_call(source, preference, strength, format)))

    def bitstream(self, id: str) -> bytes:
        """A kept bitstream. ``ValueError`` if `id` cannot be one."""
        return _content(self._send(_Call("GET", _path(id), {})))

    def delete(self, id: str) -> None:
        """Forget a kept bitstream. ``ValueError`` if `id` cannot be one."""
        _deleted(self._send(_Call("DELETE", _path(id), {})))

    def info(self) -> dict[str, Any]:
        """Model, device and limits of the service."""
        return _info(self._send(_Call("GET", "/info", {})))

    def _send(self, call: _Call) -> httpx2.Response:
        for attempt in range(self._retries):
            response = self._http.request(**call._asdict())
            if not _is_temporary(response):
                return _checked(response)
            time.sleep(_wait_s(response, attempt))
        return _checked(self._http.request(**call._asdict()))


class AsyncClient:
    """`Client` for asyncio; the same arguments and methods."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 3,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx2.AsyncClient(**_options(url, api_key, timeout_s), transport=transport)
        self._retries = retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close connections."""
        await self._http.aclose()

    async def encode(
        self,
        image: bytes,
        *,
        quality: float = 50.0,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        store: bool = True,
    ) -> Encoded:
        """Encode an image file (PNG, JPEG, WebP ...); a size, if given, overrides the quality."""
        call = _encode_call(image, _encode_params(quality, target_bpp, max_bytes, store))
        return _result(await self._send(call))

    async def encode_batch(
        self,
        images: Iterable[bytes],
        *,
        quality: float = 50.0,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        store: bool = True,
    ) -> list[Encoded | ProblemError]:
        """Encode several image files in one request, each as `encode` would; in their order, what became of
        each."""
        if not (images := list(images)):
            return []
        call = _batch_call(images, _encode_params(quality, target_bpp, max_bytes, store))
        return _batch(await self._send(call), len(images))

    async def decode(
        self,
        source: bytes | str,
        *,
        preference: Preference = "human",
        strength: float | None = None,
        format: ImageFormat = "png",
    ) -> bytes:
        """Image file of a bitstream (bytes) or of the id of a kept one (str)."""
        return _content(await self._send(_decode_call(source, preference, strength, format)))

    async def bitstream(self, id: str) -> bytes:
        """A kept bitstream. ``ValueError`` if `id` cannot be one."""
        return _content(await self._send(_Call("GET", _path(id), {})))

    async def delete(self, id: str) -> None:
        """Forget a kept bitstream. ``ValueError`` if `id` cannot be one."""
        _deleted(await self._send(_Call("DELETE", _path(id), {})))

    async def info(self) -> dict[str, Any]:
        """Model, device and limits of the service."""
        return _info(await self._send(_Call("GET", "/info", {})))

    async def _send(self, call: _Call) -> httpx2.Response:
        for attempt in range(self._retries):
            response = await self._http.request(**call._asdict())
            if not _is_temporary(response):
                return _checked(response)
            await asyncio.sleep(_wait_s(response, attempt))
        return _checked(await self._http.request(**call._asdict()))

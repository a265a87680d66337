"""Settings of the service: environment variables with the prefix ``UGICM_``, or keyword arguments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ugicm.server.kubernetes import DEFAULT_PORT, port_or_default

PREFIX = "UGICM_"


def _split(value: object) -> object:
    """``"a, b"`` -> ``("a", "b")``: lists are comma-separated in the environment."""
    if isinstance(value, str):
        return tuple(part for item in value.split(",") if (part := item.strip()))
    return value


def _split_secrets(value: object) -> object:
    """As `_split`, but at least one: a template that was rendered wrong would open the service."""
    secrets = _split(value)
    if value and not secrets:
        raise ValueError("no key in it; leave it unset to ask for none")
    return secrets


def _as_sent(origin: object) -> object:
    """As browsers send it: in lower case, without the port that the scheme has anyway."""
    if not isinstance(origin, str):
        return origin
    origin = origin.lower()
    default = {"http": ":80", "https": ":443"}.get(origin.partition("://")[0], "")
    return origin.removesuffix(default)


Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_secrets)]
Origin = Annotated[str, BeforeValidator(_as_sent), Field(pattern=r"^(\*|https?://[^/*\s]+)$")]
Origins = Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_split)]
Bytes = Annotated[ByteSize, Field(gt=0)]


class Settings(BaseSettings):
    """Everything that an operator can change.

    Sizes accept units (``64MiB``, ``1.5GB``); lists are comma-separated; an empty variable counts as unset.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # it is all settings, keys among them
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    host: str = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` for all interfaces (the container image sets that)."""
    port: Annotated[int, BeforeValidator(port_or_default)] = Field(default=DEFAULT_PORT, ge=0, le=65535)
    """TCP port to listen on; 0 lets the system choose one."""

    model: str = "ugicm-s"
    """Name of a model in the model store, or the path of a model folder."""
    model_store: Path | None = None
    """Folder of models; unset: the one shipped with the package."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1`` ..., or ``auto``: CUDA where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the transforms; ``auto`` is bfloat16 where that is fast: on a processor where a start-up
    probe finds it faster, on a GPU from compute capability 8.0 on."""
    warm_up: bool = True
    """Run both transforms once before the service reports ready."""

    max_bytes: Bytes = ByteSize(64 << 20)
    """Largest request body in bytes, counted while it arrives; protects memory and disk."""
    max_pixels: int = Field(default=50_000_000, ge=1 << 14)
    """Largest picture, width * height, checked in the header before anything is decoded; at least 16,384, as
    `ugicm check` tries a picture of that size."""
    max_batch_images: int = Field(default=32, ge=1, le=1000)
    """Most images in one ``POST /encode/batch``."""

    batch_pixels: int | None = Field(default=None, ge=1)
    """Pixels that go through the network together; more is faster on a GPU and slower to answer.
    Unset: 1 megapixel on a CPU, 16 on CUDA."""
    queue_pixels: int = Field(default=64_000_000, ge=1)
    """Pixels of all the pictures in the service at once; beyond it the answer is 503 with a computed
    Retry-After. Low refuses sooner, high lets clients wait longer and takes more memory. A single larger
    picture is still accepted when the service is idle."""
    pool_threads: int | None = Field(default=None, ge=1)
    """Threads for reading and writing images and for entropy coding; unset: one for each processor that the
    process may use."""
    max_requests: int = Field(default=256, ge=1)
    """Requests in flight, uploads included; more are answered 503 at once. Bodies take at most twice
    this many times ``max_bytes`` of memory, a file system in memory at /tmp included. Health checks do not
    count."""
    transfer_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Longest time for 64 KiB of a request body, or the rest of it, to arrive, in seconds, beyond it the
    answer is 408; and for a client to take 64 KiB of its answer, or to send the head of its first request,
    beyond it the connection is closed."""
    keep_alive_s: int = Field(default=75, ge=1)
    """How long a connection may wait for the head of its next request, in seconds. Should be longer than a
    proxy in front keeps unused connections (60 seconds usually), or now and then a request meets one that is
    just being closed, and the proxy answers 502."""
    request_timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Longest time from the end of an upload to the answer, in seconds; beyond it the answer is 504. In a
    batch, for each image from when its turn comes."""

    cache_url: str = "memory:"
    """Where bitstreams are kept between encode and decode: ``memory:``, ``file:///path``,
    ``redis://host:6379/0`` (or ``rediss://``, ``valkey://``), ``s3://bucket/prefix``."""
    cache_bytes: Bytes = ByteSize(256 << 20)
    """Size limit of a ``memory:`` or ``file:`` cache, oldest use dropped first. Redis has ``maxmemory``,
    S3 has lifecycle rules."""
    cache_ttl_s: int = Field(default=7 * 86400, ge=1)
    """How long Redis keeps a bitstream after it was stored, in seconds."""
    cache_timeout_s: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Longest time to wait for the bitstream cache before going on without it, in seconds."""
    picture_cache_bytes: ByteSize = Field(default=ByteSize(128 << 20), ge=0)
    """Size limit of the decoded pictures kept in memory, in bytes; 0 keeps none."""
    latent_cache_bytes: ByteSize = Field(default=ByteSize(64 << 20), ge=0, le=4 << 30)
    """Size limit of the decoded latents kept in memory, in bytes, so that another view of a bitstream needs
    no entropy decoding; 4 bytes a pixel. 0 keeps none; at most 4 GiB, as most latents take a memory map
    each, of which a process has 65,530 by default."""

    api_keys: Secrets = ()
    """Keys that clients must send as ``X-API-Key`` or ``Authorization: Bearer``; several allow rotation.
    At least 8 ASCII characters each, no spaces. Unset: no key is asked for."""
    url_keys: Secrets = ()
    """Secrets that sign GET links (``exp`` and ``sig`` parameters), so that they work without an API key.
    The first one signs; all are accepted, which allows rotation. At least 8 characters each."""
    url_ttl_s: int = Field(default=86400, ge=1)
    """How long a signed link works, in seconds."""
    cors_origins: Origins = ()
    """Origins (``https://app.example.com``) whose pages may call the service from a browser (CORS); ``*`` for
    any. Unset: pages that the service's own host and port serve."""

    drain_delay_s: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """After SIGTERM, go on accepting for this long with ``/readyz`` at 503, so that load balancers notice.
    SIGINT (Ctrl-C) does not wait."""
    shutdown_timeout_s: int = Field(default=30, ge=0)
    """Then give requests in flight this many seconds to finish."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line to print."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """``auto`` is coloured text on a terminal and JSON lines elsewhere."""
    tracing: bool = False
    """OpenTelemetry spans of requests, sent by OTLP over HTTP to ``OTEL_EXPORTER_OTLP_ENDPOINT``; needs the
    extra ``ugicm[otel]``."""

    @model_validator(mode="after")
    def _keys_are_usable(self) -> Settings:
        for name in ("api_keys", "url_keys"):
            if any(len(key.get_secret_value()) < 8 for key in getattr(self, name)):
                raise ValueError(f"{setting(name)}: a key needs at least 8 characters")
        if any(not re.fullmatch("[!-~]+", key.get_secret_value()) for key in self.api_keys):
            raise ValueError(f"{setting('api_keys')}: a key goes into a header: ASCII characters, no spaces")
        return self


def setting(field: str) -> str:
    """Name of the environment variable of a field, for messages. ``KeyError`` if there is no such field."""
    Settings.model_fields[field]
    return PREFIX + field.upper()

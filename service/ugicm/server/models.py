"""What goes over the wire as JSON."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from ugicm.server.cache import ID_PATTERN
from ugicm.server.problems import Problem

_ID = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0bfb8f1b3f6d3b1b0f00a8"


class Preference(StrEnum):
    """For whom a picture is decoded."""

    human = "human"
    machine = "machine"


class ImageFormat(StrEnum):
    """File format of a decoded picture."""

    png = "png"
    webp = "webp"
    jpeg = "jpeg"
    npy = "npy"


class BitstreamRef(BaseModel):
    """A kept bitstream."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=ID_PATTERN, description="As `POST /encode` answered.", examples=[_ID])


class BitstreamLinks(BaseModel):
    """Where a kept bitstream and its two views are; signed if the server signs links."""

    bitstream: str = Field(examples=[f"/bitstreams/{_ID}"])
    human: str = Field(examples=[f"/bitstreams/{_ID}/image?preference=human"])
    machine: str = Field(examples=[f"/bitstreams/{_ID}/image?preference=machine"])


class BitstreamInfo(BaseModel):
    """What a bitstream says about itself."""

    id: str = Field(description="SHA-256 of the bitstream, hex.", examples=[_ID])
    size: int = Field(description="Bytes of the bitstream.", examples=[25214])
    bpp: float = Field(description="Bits per pixel, everything counted.", examples=[0.513])
    width: int = Field(examples=[768])
    height: int = Field(examples=[512])
    quality: float = Field(description="1 (smallest) to 100 (best).", examples=[50.0])
    model: str = Field(description="Digest of the model that wrote it.", examples=["8c1f0a6be2d94b57"])
    tiles: int = Field(description="Independently coded tiles.", examples=[1])
    lossless: bool = Field(
        description="The exact picture, for drawn ones that this keeps smaller; both views are equal to it.",
        examples=[False],
    )


class EncodeResult(BitstreamInfo):
    """An encoded image."""

    cached: bool = Field(
        description="The bitstream was kept already; not looked up if `store` is false.", examples=[False]
    )
    stored: bool = Field(
        description="The bitstream is kept now, so that its id can be decoded.", examples=[True]
    )
    links: BitstreamLinks


class BatchLine(BaseModel):
    """One line of the answer to a batch: a result or a problem."""

    index: int = Field(description="Position of the image in the request.", examples=[0])
    filename: str | None = Field(default=None, examples=["kodim01.png"])
    result: EncodeResult | None = None
    problem: Problem | None = None


class ModelInfo(BaseModel):
    """The loaded model."""

    name: str = Field(examples=["ugicm-s"])
    digest: str = Field(examples=["8c1f0a6be2d94b57"])
    device: str = Field(examples=["cpu"])
    precision: str = Field(examples=["bfloat16"])


class Limits(BaseModel):
    """What the server accepts."""

    max_bytes: int = Field(description="Request body, bytes.", examples=[67108864])
    max_pixels: int = Field(description="Picture, width * height.", examples=[50000000])
    max_batch_images: int = Field(examples=[32])
    queue_pixels: int = Field(description="All pictures in the service at once.", examples=[64000000])
    request_timeout_s: float = Field(examples=[60.0])


class Info(BaseModel):
    """What runs here."""

    version: str = Field(examples=["0.1.0"])
    model: ModelInfo
    quality_min: float = Field(examples=[1.0])
    quality_max: float = Field(examples=[100.0])
    preferences: list[Preference]
    formats: list[ImageFormat]
    limits: Limits
    pixels_per_s: float | None = Field(
        description="Measured while busy; null before the first request.", examples=[4200000.0]
    )


class HealthStatus(StrEnum):
    """State of the service."""

    ready = "ready"
    draining = "draining"
    unhealthy = "unhealthy"


class Health(BaseModel):
    """State of the service and of the parts it can do without."""

    status: HealthStatus
    cache: str = Field(description="`up`, or `down`: then nothing is kept, all else works.", examples=["up"])


class Live(BaseModel):
    """The process answers."""

    status: str = Field(examples=["live"])

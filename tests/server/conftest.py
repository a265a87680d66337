"""A codec without a network, and the application around it."""

from __future__ import annotations

import io
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pytest
import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image as PillowImage

from ugicm.codec.bitstream import VERSION, Header, parse, serialise
from ugicm.codec.errors import CodecError, ModelMismatchError
from ugicm.server.app import create_app
from ugicm.server.cache import BitstreamCache
from ugicm.server.settings import Settings

Image = NDArray[np.uint8]


class FakeLatent(NamedTuple):
    header: Header
    image: Image

    @property
    def nbytes(self) -> int:
        return self.image.nbytes


class FakeCodec:
    """Deterministic and obvious: bitstreams are zlib, the machine view is the negative.

    The device works while `gate` is set; `fail` makes it raise; `calls`, `threads`, `unpacked` and `stop` (of
    the last search) say what it was asked.
    """

    name, digest, device, precision = "fake", "00112233aabbccdd", "cpu", "float32"

    def __init__(self, max_pixels: int = 1_000_000) -> None:
        self.max_pixels = max_pixels
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Exception | None = None
        self.calls: list[tuple[str, int]] = []
        self.threads: set[int] = set()
        self.unpacked = 0
        self.stop: Callable[[], bool] | None = None

    def _on_device(self, name: str, items: int) -> None:
        self.calls.append((name, items))
        self.threads.add(threading.get_ident())
        assert self.gate.wait(60)
        if self.fail:
            raise self.fail

    def count(self, name: str) -> int:
        return sum(call == name for call, _ in self.calls)

    def analyse(
        self,
        images: Sequence[Image],
        quality: Sequence[float],
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[FakeLatent]:
        self.stop = stop
        self._on_device("analyse", len(images))
        digest = bytes.fromhex(self.digest)
        return [
            FakeLatent(Header(VERSION, image.shape[1], image.shape[0], value, digest), image)
            for image, value in zip(images, quality, strict=True)
        ]

    def pack(self, latent: FakeLatent, *, stop: Callable[[], bool] = lambda: False) -> bytes:
        return serialise(latent.header, [zlib.compress(latent.image.tobytes())])

    def unpack(self, data: bytes, *, stop: Callable[[], bool] = lambda: False) -> FakeLatent:
        self.unpacked += 1
        header, (segment,) = parse(data, max_pixels=self.max_pixels)
        if header.model_digest.hex() != self.digest:
            raise ModelMismatchError(header.model_digest.hex(), self.digest)
        pixels = np.frombuffer(zlib.decompress(segment), np.uint8)
        return FakeLatent(header, pixels.reshape(header.height, header.width, 3))

    def synthesise(
        self,
        latents: Sequence[FakeLatent],
        strength: Sequence[float],
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Image]:
        self.stop = stop
        self._on_device("synthesise", len(latents))
        return [
            np.rint(latent.image * (1 - value) + (255 - latent.image) * value).astype(np.uint8)
            for latent, value in zip(latents, strength, strict=True)
        ]

    def encode_to_size(
        self,
        image: Image,
        *,
        max_bytes: int | None = None,
        target_bpp: float | None = None,
        stop: Callable[[], bool],
    ) -> bytes:
        self.stop = stop
        self._on_device("search", 1)
        if max_bytes is None:
            assert target_bpp is not None
            max_bytes = int(target_bpp * image.shape[0] * image.shape[1] / 8)
        data = self.pack(self.analyse([image], [1.0])[0])
        if len(data) > max_bytes:
            raise CodecError(f"the picture needs {len(data)} bytes, over the budget of {max_bytes}")
        return data


def image_file(
    width: int = 48, height: int = 32, *, seed: int = 0, format: str = "PNG", **options: Any
) -> bytes:
    """A smooth random picture as a file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    PillowImage.fromarray(coarse).resize((width, height)).save(out, format, **options)
    return out.getvalue()


def pixels(data: bytes) -> Image:
    """RGB of an image file."""
    return np.asarray(PillowImage.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def anyio_backend() -> str:
    """What asynchronous tests run on."""
    return "asyncio"


@pytest.fixture(name="image_file")
def _image_file() -> Callable[..., bytes]:
    return image_file


@pytest.fixture(name="pixels")
def _pixels() -> Callable[[bytes], Image]:
    return pixels


@pytest.fixture(autouse=True)
def log() -> Iterator[list[structlog.typing.EventDict]]:
    """Log lines of the test, instead of their text."""
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture
def codec() -> FakeCodec:
    return FakeCodec()


MakeApp = Callable[..., FastAPI]
MakeClient = Callable[..., TestClient]


@pytest.fixture
def make_app(codec: FakeCodec) -> MakeApp:
    """``make_app(cache=None, **settings)``: the application on the fake codec."""

    def make(cache: BitstreamCache | None = None, **settings: Any) -> FastAPI:
        return create_app(Settings(**settings), codec, cache)

    return make


@pytest.fixture
def make_client(make_app: MakeApp) -> Iterator[MakeClient]:
    """``make_client(cache=None, **settings)``: a client of the started application."""
    with ExitStack() as stack:

        def make(cache: BitstreamCache | None = None, **settings: Any) -> TestClient:
            app = make_app(cache, **settings)
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()

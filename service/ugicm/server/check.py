"""What ``ugicm check`` and ``ugicm health`` do. Heavy imports wait until they are needed."""

from __future__ import annotations

import asyncio
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ugicm.server.kubernetes import DEFAULT_PORT, VARIABLES

if TYPE_CHECKING:
    from ugicm.server.engine import Codec
    from ugicm.server.settings import Settings

MIN_PSNR_DB = 20.0
"""Of the round trip's smooth test picture; any trained model is far above."""


class Finding(NamedTuple):
    """What one check found."""

    name: str
    ok: bool
    detail: str


def health(host: str = "127.0.0.1", port: int = DEFAULT_PORT, *, timeout_s: float = 5.0) -> Finding:
    """Ask the service at this address whether it is ready; standard library only, so it starts at once."""
    # Where it listens on all interfaces; we are on the same host.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/readyz"
    # A proxy from the environment has no business between a container and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            return Finding("health", True, answer.read().decode())
    except urllib.error.HTTPError as error:
        return Finding("health", False, error.read().decode(errors="replace"))
    except (OSError, ValueError, http.client.HTTPException) as error:  # no answer, none of HTTP, no address
        return Finding("health", False, f"{url}: {error}")


def check(settings: Settings) -> Iterator[Finding]:
    """Check names of variables, model, cache, and a round trip, in this order; each finding when it is there.

    The generator ends early where going on makes no sense.
    """
    from ugicm.codec.errors import CodecError
    from ugicm.server.app import load_model

    yield _check_names()
    try:
        codec = load_model(settings)
    except CodecError as error:
        yield Finding("model", False, str(error))
        return
    yield Finding("model", True, f"{codec.name} ({codec.digest}) on {codec.device}, {codec.precision}")
    yield asyncio.run(_check_cache(settings))
    try:
        yield _check_round_trip(codec)
    except Exception as error:  # of a device that fails
        yield Finding("round trip", False, f"{type(error).__name__}: {error}")


def _check_names() -> Finding:
    """Variables with our prefix that no setting reads: most likely misspelt."""
    from ugicm.server.settings import PREFIX, Settings, setting

    known = {setting(field) for field in Settings.model_fields}
    unknown = sorted(
        name
        for name in os.environ
        # Settings are read in any case.
        if (upper := name.upper()).startswith(PREFIX) and upper not in known and not VARIABLES.fullmatch(name)
    )
    if unknown:
        return Finding("settings", False, f"no setting reads {', '.join(unknown)}")
    return Finding("settings", True, "every variable is known")


async def _check_cache(settings: Settings) -> Finding:
    from ugicm.server.backends import open_cache
    from ugicm.server.cache import bitstream_id, reason_of
    from ugicm.server.settings import setting

    scheme = settings.cache_url.partition(":")[0]
    try:
        async with asyncio.timeout(settings.cache_timeout_s):
            cache = open_cache(settings)
            probe = os.urandom(32)
            try:
                await cache.check()
                if await cache.put(bitstream_id(probe), probe) is None:
                    return Finding(
                        "cache",
                        False,
                        f"{scheme}: {len(probe)} bytes are too many for it; raise {setting('cache_bytes')}",
                    )
                intact = await cache.get(bitstream_id(probe)) == probe
                await cache.delete(bitstream_id(probe))
            finally:
                await cache.close()
    except Exception as error:
        return Finding(
            "cache", False, f"{scheme}: {reason_of(error)}; {setting('cache_url')} says where it is"
        )
    return Finding("cache", intact, f"{scheme}: {'keeps what it is given' if intact else 'lost an entry'}")


def _check_round_trip(codec: Codec) -> Finding:
    import numpy as np

    from ugicm.server.images import write_image
    from ugicm.server.isolated import read_image

    ramp = np.linspace(40, 215, 128).astype(np.uint8)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), axis=-1)
    # Noise, so that the picture is not one that lossless coding keeps smaller.
    image = image + np.random.default_rng(0).integers(0, 8, image.shape, np.uint8)
    image = read_image(write_image(image, "png"), max_pixels=codec.max_pixels)  # in another process
    bitstream = codec.pack(codec.analyse([image], [75.0])[0])
    (decoded,) = codec.synthesise([codec.unpack(bitstream)], [0.0])
    mse = np.mean((image.astype(float) - decoded) ** 2)
    psnr = 10 * np.log10(255**2 / max(mse, 1e-9))
    return Finding("round trip", bool(psnr >= MIN_PSNR_DB), f"{len(bitstream)} bytes, PSNR {psnr:.1f} dB")

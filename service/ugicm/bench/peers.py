"""Other codecs, to be timed in the same run: those that Pillow has, and CompressAI's where asked for.

CompressAI's networks have random weights: the time of a network does not depend on them, and none are
downloaded. What they write is no measure of their compression.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from PIL import features

from ugicm.codec.codec import Image
from ugicm.codec.errors import CodecError

LEARNED = ("bmshj2018-hyperprior", "mbt2018-mean", "cheng2020-anchor", "elic2022")
"""Models of CompressAI."""
LEARNED_QUALITY = 5
"""Of CompressAI's 1..8 or 1..6."""


THREADS = {"max_threads", "num_threads"}
"""What Pillow's formats that use several call their number; the others use one."""


class Peer(NamedTuple):
    name: str
    encode: Callable[[Image], Any]
    decode: Callable[[Any], Image]
    size: Callable[[Any], int]
    """Bytes of what `encode` returns."""
    threads: int


def pillow_peers(threads: int) -> Iterator[Peer]:
    """JPEG, WebP, AVIF and, where its plugin is installed, JPEG XL, with Pillow's own quality."""
    settings: list[tuple[str, str, dict[str, Any]]] = [("Pillow JPEG", "JPEG", {})]
    settings += [(f"Pillow WebP method {method}", "WEBP", {"method": method}) for method in (4, 6)]
    if features.check("avif"):
        settings += [
            (f"Pillow AVIF speed {speed}", "AVIF", {"speed": speed, "max_threads": threads})
            for speed in (6, 8)
        ]
    try:
        import pillow_jxl  # noqa: F401  registers the format

        settings.append(("pillow-jxl-plugin", "JXL", {"num_threads": threads}))
    except ImportError:
        pass

    def peer(name: str, kind: str, options: dict[str, Any]) -> Peer:
        def encode(image: Image) -> bytes:
            file = io.BytesIO()
            PIL.Image.fromarray(image).save(file, kind, **options)
            return file.getvalue()

        def decode(data: bytes) -> Image:
            with PIL.Image.open(io.BytesIO(data)) as picture:
                return np.asarray(picture.convert("RGB"))

        return Peer(name, encode, decode, len, threads if options.keys() & THREADS else 1)

    yield from (peer(*setting) for setting in settings)


def learned_peers(names: Sequence[str]) -> Iterator[Peer]:
    """Models of CompressAI on the CPU. ``CodecError`` where it is not installed."""
    try:
        from compressai.models import Elic2022Official
        from compressai.zoo import image_models
    except ImportError as error:
        raise CodecError(f"--learned wants CompressAI ({error}): pip install 'ugicm[bench]'") from error

    def peer(name: str) -> Peer:
        torch.manual_seed(0)
        network = (
            Elic2022Official()
            if name == "elic2022"
            else image_models[name](quality=LEARNED_QUALITY, pretrained=False)
        )
        network.eval().update(force=True)

        @torch.inference_mode()
        def encode(image: Image) -> dict[str, Any]:
            x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            coded: dict[str, Any] = network.compress(x)
            return coded

        @torch.inference_mode()
        def decode(coded: dict[str, Any]) -> Image:
            x = network.decompress(coded["strings"], coded["shape"])["x_hat"][0].clamp(0, 1)
            picture: Image = (x * 255).round().byte().permute(1, 2, 0).numpy()
            return picture

        return Peer(f"CompressAI {name}", encode, decode, _bytes_of, torch.get_num_threads())

    return (peer(name) for name in names)


def _bytes_of(coded: Any) -> int:
    """Bytes of all strings in CompressAI's nested lists."""
    if isinstance(coded, dict):
        return _bytes_of(coded["strings"])
    return len(coded) if isinstance(coded, bytes) else sum(map(_bytes_of, coded))

"""Codecs as the evaluation sees them: pixels to bytes and back, ours and its peers alike."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import PIL.Image
from PIL import features

from ugicm.codec.config import QUALITY_MAX, QUALITY_MIN
from ugicm_train.evaluation.metrics import Image

if TYPE_CHECKING:
    from ugicm.codec.codec import Codec

HUMAN_ONLY: Mapping[str, float] = {"human": 0.0}
PREFERENCES: Mapping[str, float] = {"human": 0.0, "machine": 1.0}
DEFAULT_QUALITIES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)


@dataclass(frozen=True)
class Coder:
    """One codec to measure."""

    name: str
    identity: str
    """Version and settings; rows measured with another identity are not reused."""
    qualities: tuple[float, ...]
    """Settings to measure."""
    encode: Callable[[Image, float], bytes]
    """(picture, quality) -> everything a decoder needs."""
    decode: Callable[[bytes, float], Image]
    """(bytes, strength) -> picture."""
    views: Mapping[str, float] = field(default_factory=lambda: HUMAN_ONLY)
    """Strengths to decode the same bytes with, by name."""
    estimate_bits: Callable[[Image, float, bytes], float | None] | None = None
    """(picture, quality, its bitstream) -> bits that the entropy model predicts, or None: no latent in it."""
    encode_to_bpp: Callable[[Image, float], bytes | None] | None = None
    """(picture, bits per pixel) -> at most so many bits, or None where no quality spends about so many."""


def checked_qualities(qualities: Iterable[float], *, least: int = 1) -> tuple[float, ...]:
    """The different ones among qualities of ours, sorted.

    Raises:
        ValueError: one that there is not, or fewer than `least`.
    """
    chosen = tuple(sorted(set(qualities)))
    if wrong := [quality for quality in chosen if not QUALITY_MIN <= quality <= QUALITY_MAX]:
        raise ValueError(f"a quality must be in {QUALITY_MIN:g}..{QUALITY_MAX:g}, got {wrong[0]:g}")
    if len(chosen) < least:
        raise ValueError(f"at least {least} different qualities are needed, got {len(chosen)}")
    return chosen


def ugicm_coder(codec: Codec, folder: Path, qualities: tuple[float, ...] = DEFAULT_QUALITIES) -> Coder:
    """Our codec; `folder` is where its model was loaded from."""
    from ugicm.codec.bitstream import peek
    from ugicm.codec.errors import CodecError
    from ugicm.codec.store import read_model
    from ugicm_train.evaluation.estimate import CodeLength

    code_length = CodeLength(read_model(folder).tensors)

    def encode_to_bpp(image: Image, bpp: float) -> bytes | None:
        try:
            data = codec.encode_to_size(image, target_bpp=bpp)
        except CodecError:  # even the lowest quality is larger
            return None
        return None if peek(data).quality > QUALITY_MAX - 0.1 else data

    def estimate_bits(image: Image, quality: float, data: bytes) -> float | None:
        if peek(data).lossless:  # no latent is in it
            return None
        return code_length.bits(codec.analyse([image], quality)[0])

    return Coder(
        name=codec.name,
        identity=f"{codec.weights_sha256} {codec.device} {codec.precision}",
        qualities=qualities,
        encode=lambda image, quality: codec.encode([image], quality)[0],
        decode=lambda data, strength: codec.decode([data], strength)[0],
        views=PREFERENCES,
        estimate_bits=estimate_bits,
        encode_to_bpp=encode_to_bpp,
    )


def refined_coder(plain: Coder, codec: Codec, steps: int, qualities: tuple[float, ...]) -> Coder:
    """Our coder of `codec` with refinement of every picture (`ugicm.codec.refine`)."""
    return replace(
        plain,
        name=f"{plain.name}, refined in {steps} steps",
        identity=f"{plain.identity} refine {steps}",
        qualities=qualities,
        encode=lambda image, quality: codec.encode([image], quality, refine=steps)[0],
        estimate_bits=None,
        encode_to_bpp=None,
    )


def pillow_coder(name: str) -> Coder:
    """A peer that Pillow writes, one of `PEERS`.

    Raises:
        ValueError: no such peer, or this Pillow lacks it.
    """
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    _, qualities, options = PEERS[name]
    if (library := _library(name)) is None:
        reason = "pillow-jxl-plugin is not installed" if name == "jxl" else f"Pillow was built without {name}"
        raise ValueError(f"{reason}; leave it out of --peers")

    def encode(image: Image, quality: float) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, name, quality=round(quality), **options)
        return buffer.getvalue()

    def decode(data: bytes, strength: float) -> Image:
        del strength
        with PIL.Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))

    settings = [f"{key} {value}" for key, value in options.items()]
    return Coder(
        name=name,
        identity=", ".join([library, *settings]),
        qualities=qualities,
        encode=encode,
        decode=decode,
    )


def installed_peers() -> list[str]:
    """Those of `PEERS` that this Pillow can write."""
    return [name for name in PEERS if _library(name) is not None]


def add_peers_argument(parser: argparse.ArgumentParser) -> None:
    """Option of the commands that compare."""
    parser.add_argument(
        "--peers",
        nargs="*",
        default=installed_peers(),
        choices=list(PEERS),
        help="none named: none coded (default: those installed)",
    )


def _library(name: str) -> str | None:
    """What writes a peer, and its version; None where it is not installed."""
    if name == "jxl":
        try:
            import pillow_jxl  # noqa: F401  registers the format
        except ImportError:
            return None
        return f"pillow-jxl-plugin {metadata.version('pillow-jxl-plugin')}"
    feature = PEERS[name][0]
    if not features.check(feature):
        return None
    library = "libjpeg_turbo" if name == "jpeg" and features.check("libjpeg_turbo") else feature
    return f"Pillow {PIL.__version__}, {library} {features.version(library)}"


PEERS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "jpeg": ("jpg", (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95), {"subsampling": "4:2:0"}),
    "webp": ("webp", (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95), {"method": 6}),
    "avif": ("avif", (10, 20, 30, 40, 50, 60, 70, 80, 90), {"speed": 6, "subsampling": "4:2:0"}),
    "jxl": ("jxl", (5, 15, 30, 45, 60, 70, 80, 90, 95), {}),
}
"""Pillow's feature, qualities and options of each peer."""

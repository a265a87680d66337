"""The shape of a codec: everything that must be known before its weights can be read."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUALITY_MIN, QUALITY_MAX = 1.0, 100.0
PATCH = 8
"""Pixels per side of the patch that the analysis transform unfolds into channels."""
LATENT_STRIDE = 16
"""Pixels per side of one position of the latent ``y``."""
HYPER_STRIDE = 64
"""Pixels per side of one position of the hyper latent ``z``; images are padded to a multiple of it."""
STEP_XOR = (0, 3, 2, 1)
"""In coding step k, position p of every 2x2 square of the latent codes channel group p XOR STEP_XOR[k]."""


def padded_size(width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels of what the networks see of a picture: whole positions of z."""
    across, down = (math.ceil(side / HYPER_STRIDE) * HYPER_STRIDE for side in (width, height))
    return across, down


_KINDS = {"str": (str,), "int": (int,), "float": (int, float)}
"""What a field of each type may hold: JSON may have whole numbers where others are meant."""


_MOST = {
    "channels": 2048,
    "latent_channels": 4096,
    "hyper_channels": 256,
    "entropy_channels": 2048,
    "encoder_blocks": 64,
    "decoder_blocks": 64,
    "context_blocks": 64,
    "levels": 256,
}
"""A damaged file must not ask for all memory: networks are made before weights are compared."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transforms and of the entropy model, as stored in ``config.json``.

    The two preset shapes, ``ugicm-s`` and ``ugicm-b``, differ only in these numbers.
    """

    name: str
    channels: int = 128
    """Channels of the transforms at 1/8 resolution (C)."""
    latent_channels: int = 256
    """Channels of the latent y at 1/16 resolution (M); a multiple of 4."""
    hyper_channels: int = 96
    """Channels of the hyper latent z at 1/64 resolution (N)."""
    entropy_channels: int = 192
    """Hidden channels of the entropy model (W)."""
    encoder_blocks: int = 3
    decoder_blocks: int = 4
    context_blocks: int = 2
    """Blocks of the context trunk, evaluated once for each of the last three coding steps."""
    levels: int = 8
    """Anchor levels of the rate gains; quality 1..100 is interpolated between them."""
    lambda_min: float = 0.0004
    """Rate-distortion trade-off of quality 1 (bits per pixel against 255^2 * MSE)."""
    lambda_max: float = 0.17
    """Rate-distortion trade-off of quality 100."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if type(value) not in _KINDS[kind]:
                raise ValueError(f"{field.name} must be of type {kind}, got {value!r}")
            if field.name != "name" and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value!r}")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if self.latent_channels % 4:
            raise ValueError(f"latent_channels must be a multiple of 4, got {self.latent_channels}")
        if not (self.name and self.name.isprintable()):
            raise ValueError(f"name must be of printable characters, got {self.name!r}")
        if not self.lambda_min < self.lambda_max <= sys.float_info.max:
            raise ValueError(
                f"lambda_max must be finite and above lambda_min, got {self.lambda_min} and {self.lambda_max}"
            )
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from parsed JSON; unknown keys are an error (``ValueError``)."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown keys in the model config: {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_json(cls, path: Path) -> ModelConfig:
        """Read ``config.json``."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8"))["model"])

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes."""
        return dataclasses.asdict(self)


PRESETS = {
    "ugicm-s": ModelConfig(name="ugicm-s"),
    "ugicm-b": ModelConfig(
        name="ugicm-b", channels=192, encoder_blocks=6, decoder_blocks=8, context_blocks=4
    ),
}
"""Shapes that ``ugicm-train run --config NAME`` knows by name."""

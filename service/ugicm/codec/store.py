"""Find, verify and load a model from the model store.

A model is a folder of data: ``config.json`` (shape and the SHA-256 of the weights), ``weights.safetensors``,
``README.md`` (model card). Nothing in it is executed and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ugicm.codec.config import ModelConfig
from ugicm.codec.errors import ModelStoreError

if TYPE_CHECKING:
    from torch import Tensor

    from ugicm.codec.codec import Codec

CONFIG_FILE, WEIGHTS_FILE = "config.json", "weights.safetensors"
STORE_VARIABLE = "UGICM_MODEL_STORE"
FORMAT = 7
"""Version of the layout of the model folder."""
BITSTREAM = 6
"""Version of what the bytes of a bitstream mean, besides the model; part of the digest."""
DEFAULT_MODEL = "ugicm-s"
DEFAULT_MAX_PIXELS = 120_000_000


class StoredModel(NamedTuple):
    """A verified model: shape, tensors and the digest that its bitstreams carry."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    digest: bytes
    """First 8 bytes of the SHA-256 over what decides the meaning of a bitstream."""
    weights_sha256: str
    """Identity of the whole model, hex: also of how its bitstreams look when decoded."""


def find_store() -> Path:
    """The model store: $UGICM_MODEL_STORE, else the one shipped with the package or its checkout."""
    if named := os.environ.get(STORE_VARIABLE):
        return Path(named)
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "_model_store", package.parents[1] / "model_store")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise ModelStoreError(
        f"no model store found beside the package; set {STORE_VARIABLE} to a folder of models"
    )


def available(store: Path) -> list[str]:
    """Names of the models in a store."""
    return sorted(path.parent.name for path in store.glob(f"*/{CONFIG_FILE}"))


def model_path(name_or_path: str | Path, store: Path | None = None) -> Path:
    """Folder of a model given by name, or by a path to its folder; a bare name is one of the store first.

    Raises:
        ModelStoreError: there is no such model; the message lists those there are.
    """
    path = Path(name_or_path)
    try:
        here = (path / CONFIG_FILE).is_file()
        if here and (isinstance(name_or_path, Path) or name_or_path != path.name):
            return path
        try:
            store = store or find_store()
        except ModelStoreError:
            if here:
                return path
            raise
        if (store / path / CONFIG_FILE).is_file():
            return store / path
        if here:
            return path
        names = ", ".join(available(store)) or "none"
    except OSError as error:
        raise ModelStoreError(f"cannot look for the model {str(name_or_path)!r}: {error}") from error
    raise ModelStoreError(f"no model {str(name_or_path)!r} in {store}; there: {names}")


def read_model(folder: Path) -> StoredModel:
    """Read and verify a model folder.

    Raises:
        ModelStoreError: a file is missing, damaged or of another layout.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        data = (folder / WEIGHTS_FILE).read_bytes()
    except (OSError, ValueError, RecursionError) as error:  # not JSON, or not even text
        raise ModelStoreError(f"cannot read the model in {folder}: {error}") from error
    if not isinstance(description, dict):
        raise ModelStoreError(f"{folder / CONFIG_FILE} is not a JSON object")
    if description.get("format") != FORMAT:
        raise ModelStoreError(
            f"{folder} has model format {description.get('format')!r}; this program reads {FORMAT}"
        )
    seen, expected = hashlib.sha256(data).hexdigest(), description.get("sha256")
    if seen != expected:
        raise ModelStoreError(
            f"{folder / WEIGHTS_FILE} is damaged: SHA-256 is {seen}, config.json says {expected}"
        )
    try:
        config = ModelConfig.from_dict(description["model"])
        digest = bytes.fromhex(description["digest"])
        # Stored in half, computed in more.
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in load(data).items()
        }
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ModelStoreError(f"the model in {folder} is not valid: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_complex() or not tensor.isfinite().all():
            raise ModelStoreError(f"the model in {folder} has values in {name} that are not finite numbers")
    if digest != bitstream_digest(config, tensors):
        raise ModelStoreError(f"{folder}: the digest in config.json does not belong to the weights")
    return StoredModel(config, tensors, digest, seen)


def bitstream_digest(config: ModelConfig, tensors: dict[str, Tensor]) -> bytes:
    """Identity of everything that decides what the bytes of a bitstream mean, 8 bytes.

    That is the entropy model, its tables, the inverse gains and the sizes; a synthesis transform polished
    afterwards decodes the same bitstreams.
    """
    sizes = (config.latent_channels, config.hyper_channels, config.entropy_channels)
    hasher = hashlib.sha256(json.dumps([BITSTREAM, *sizes, config.context_blocks]).encode())
    for name in sorted(tensors):
        if name.startswith(("entropy.", "tables.")) or name == "gains.log_inverse":
            hasher.update(name.encode())
            hasher.update(tensors[name].contiguous().numpy().tobytes())
    return hasher.digest()[:8]


def load_codec(
    name_or_path: str | Path = DEFAULT_MODEL,
    *,
    store: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Codec:
    """Load a model, verify it and put it on a device.

    Args:
        name_or_path: a model's name in the store, or the path of its folder.
        store: the model store (default: `find_store`).
        device: ``cpu``, ``cuda``, ``cuda:1`` ... or ``auto``: CUDA where there is one.
        precision: of the transforms: ``float32``, ``bfloat16`` or ``auto``: bfloat16 where it is fast.
        max_pixels: largest picture to encode or decode, width * height.
    """
    from ugicm.codec.codec import Codec

    model = read_model(model_path(name_or_path, store))
    return Codec(model, device=device, precision=precision, max_pixels=max_pixels)

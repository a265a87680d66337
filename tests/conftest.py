"""Fixtures for all tests: photos that scikit-image ships and a tiny model made on the spot."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ugicm.codec.codec import Codec, Image, Latent
from ugicm.codec.config import ModelConfig
from ugicm.codec.store import load_codec
from ugicm_train.export import model_tensors, write_model
from ugicm_train.model import TrainableCodec
from ugicm_train.start import start_from_dct

# Settings of whoever runs the tests do not count, neither here nor in processes that tests start.
for _name in [name for name in os.environ if name.startswith("UGICM_")]:
    del os.environ[_name]

# A shell starts what it runs in the background with SIGINT ignored, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# On a busy machine anything can take longer than hypothesis finds natural.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

TINY = ModelConfig(
    name="tiny",
    channels=24,
    latent_channels=32,
    hyper_channels=8,
    entropy_channels=16,
    encoder_blocks=1,
    decoder_blocks=2,
    context_blocks=1,
    levels=3,
)


def no_thread(*_: object) -> None:
    """In place of a function that starts one."""
    raise RuntimeError("can't start new thread")


def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """From now on, how many pictures go through a codec's analysis, and how many through its synthesis."""
    coded: list[int] = []
    decoded: list[int] = []
    transform, synthesise = Codec._transform, Codec._synthesise_group

    def transform_counted(codec: Codec, pixels: torch.Tensor, *more: Any) -> torch.Tensor:
        coded.append(len(pixels))
        return transform(codec, pixels, *more)

    def synthesise_counted(codec: Codec, latents: Sequence[Latent], *more: Any) -> list[Image]:
        decoded.append(len(latents))
        return synthesise(codec, latents, *more)

    monkeypatch.setattr(Codec, "_transform", transform_counted)
    monkeypatch.setattr(Codec, "_synthesise_group", synthesise_counted)
    return coded, decoded


def tiny_trainable(seed: int = 0) -> TrainableCodec:
    """An untrained model that codes photos recognisably and whose every part matters."""
    torch.manual_seed(seed)
    model = TrainableCodec(TINY)
    start_from_dct(model)
    with torch.no_grad():
        for head in model.entropy.heads:
            head.weight.mul_(8)
            # Wide enough that escapes stay rare.
            head.bias.view(4, 2, -1)[:, 1] = 2.5
        for change, module, size in (
            (model.analysis_low, model.analysis, 0.03),
            (model.analysis_high, model.analysis, 0.03),
            (model.synthesis_low, model.synthesis, 0.03),
            (model.synthesis_high, model.synthesis, 0.03),
            (model.preference, model.synthesis, 0.1),
            (model.preference_low, model.synthesis, 0.1),
            (model.preference_high, model.synthesis, 0.1),
        ):
            for difference, weight in zip(change.parameters(), module.parameters(), strict=True):
                difference.copy_(size * weight.std() * torch.randn_like(weight))
    return model


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    model = tiny_trainable(seed)
    write_model(folder, model.config, model_tensors(model), {"steps": 0})
    return folder


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with one model, ``tiny``."""
    store = tmp_path_factory.mktemp("model_store")
    write_tiny_model(store / "tiny")
    return store


@pytest.fixture(scope="session")
def tiny_codec(tiny_store: Path) -> Codec:
    """The tiny model in float32 on the CPU."""
    return load_codec("tiny", store=tiny_store, device="cpu", precision="float32")


@pytest.fixture(scope="session")
def photo() -> NDArray[np.uint8]:
    """A real photo, (300, 451, 3)."""
    from skimage import data

    return np.asarray(data.chelsea())

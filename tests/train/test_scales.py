"""Scales move rows and columns of weights, in training too, and end in the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import TINY, tiny_trainable, write_tiny_model
from ugicm.codec.store import read_model
from ugicm_train.export import load_average, model_tensors, write_model
from ugicm_train.losses import rate_distortion_loss
from ugicm_train.model import DIFFERENCE_PACE, PREFERENCE, SCALED, TrainableCodec, make_zero
from ugicm_train.restore import restore
from ugicm_train.scales import Scales
from ugicm_train.train import TrainOptions, load_checkpoint, train

OPTIONS = TrainOptions(
    steps=12, batch=4, crop=64, learn="scales", other_lr=0.004, warmup_steps=1, ema=0.5, device="cpu"
)


def test_scales_are_of_rows_and_columns() -> None:
    model = tiny_trainable()
    before = {name: value.clone() for name, value in model.weights_of("preference").items()}
    model.learn_scales(["preference"])
    for name, value in model.weights_of("preference").items():
        torch.testing.assert_close(value, before[name])
    scales = model.scales["preference"]
    assert isinstance(scales, Scales)
    with torch.no_grad():
        scales.rows["up/weight"][1] = 0.5 / DIFFERENCE_PACE
        scales.columns["up/weight"][2] = -0.25 / DIFFERENCE_PACE
        scales.rows["blocks/0/spatial/weight"][0] = -1.0 / DIFFERENCE_PACE
        scales.rows["fold/bias"][:] = 1.0 / DIFFERENCE_PACE
    after = model.weights_of("preference")
    times = torch.ones_like(before["up.weight"])
    times[1] += 0.5
    times[:, 2] -= 0.25
    torch.testing.assert_close(after["up.weight"], times * before["up.weight"])
    assert not after["blocks.0.spatial.weight"][0].any()
    torch.testing.assert_close(after["blocks.0.spatial.weight"][1:], before["blocks.0.spatial.weight"][1:])
    torch.testing.assert_close(after["fold.bias"], 2 * before["fold.bias"])
    torch.testing.assert_close(model.weights_of("synthesis")["up.weight"], model.synthesis.up.weight)


def test_settled_scales_are_weights() -> None:
    model = tiny_trainable()
    model.learn_scales(SCALED)
    torch.manual_seed(0)
    x, level = torch.rand(1, 3, 64, 64), torch.tensor([1.0])
    with torch.no_grad():
        plain = model(x, level, noise=False)
        for scale in model.scales.parameters():
            scale.copy_(0.02 * torch.randn_like(scale))
        scaled = model(x, level, noise=False)
        model.settle_scales()
        settled = model(x, level, noise=False)
    assert not list(model.scales.parameters())
    for name in ("human", "machine", "bpp"):
        assert not torch.allclose(getattr(plain, name), getattr(scaled, name), rtol=1e-4)
        torch.testing.assert_close(getattr(settled, name), getattr(scaled, name))


def loss(model: TrainableCodec, photo: NDArray[np.uint8]) -> float:
    x = torch.from_numpy(photo[:128, :192].copy()).permute(2, 0, 1)[None] / 255
    total = 0.0
    for value in range(TINY.levels):
        level = torch.tensor([float(value)])
        with torch.no_grad():
            terms = rate_distortion_loss(TINY, model(x, level, noise=False), x, level)
        total += float(terms.loss)
    return total


def test_a_run_learns_scales(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    data, run = tmp_path / "photo.png", tmp_path / "run"
    PIL.Image.fromarray(photo).save(data)
    stored = read_model(write_tiny_model(tmp_path / "model"))
    train(TINY, OPTIONS, [data], run, start=str(tmp_path / "model"))
    train(TINY, OPTIONS, [data], run, resume="checkpoint.pt")
    before, state = restore(stored.config, stored.tensors), load_checkpoint(run)
    after = load_average(state)
    assert loss(after, photo) < loss(before, photo)
    for part in SCALED:
        weights = before.weights_of(part)
        before.learn_scales([part])
        scales = before.scales[part]
        found = {name: state["average"][f"scales.{part}.{name}"] for name in scales.state_dict()}
        # A bias of zero stays there.
        assert all(value.any() for name, value in found.items() if name.endswith("weight")), part
        scales.load_state_dict(found)
        for name, value in scales(weights).items():
            torch.testing.assert_close(after.weights_of(part)[name], value)
    with pytest.raises(ValueError, match="--learn scales, got --learn weights"):
        train(TINY, dataclasses.replace(OPTIONS, learn="weights"), [data], run, resume="checkpoint.pt")


def test_scales_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --start"):
        train(TINY, OPTIONS, [tmp_path], tmp_path / "run")
    model = tiny_trainable()
    for part in PREFERENCE:
        make_zero(getattr(model, part))
    write_model(tmp_path / "plain", model.config, model_tensors(model), {})
    with pytest.raises(ValueError, match="no machine view yet"):
        train(None, OPTIONS, [tmp_path], tmp_path / "run", start=str(tmp_path / "plain"))
    write_tiny_model(tmp_path / "model")
    wider = dataclasses.replace(TINY, channels=2 * TINY.channels)
    with pytest.raises(ValueError, match="what a larger --config adds begins with zeros"):
        train(wider, OPTIONS, [tmp_path], tmp_path / "run", start=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="learn must be one of weights, scales, got 'biases'"):
        dataclasses.replace(OPTIONS, learn="biases")

"""Counted tables of the hyper latent: shorter bitstreams, the same pictures, a model that restores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import TINY, tiny_trainable, write_tiny_model
from ugicm.codec.codec import Codec
from ugicm.codec.coder import TOTAL
from ugicm.codec.soften import rms
from ugicm.codec.store import load_codec, read_model
from ugicm_train.calibrate import LARGEST, RADIUS, count, group, largest, usual_error
from ugicm_train.cli import main
from ugicm_train.data import CropSampler
from ugicm_train.export import narrow_table, read_training
from ugicm_train.restore import restore


def test_calibrated_model_needs_fewer_bytes(
    tmp_path: Path, photo: NDArray[np.uint8], capsys: pytest.CaptureFixture[str]
) -> None:
    PIL.Image.fromarray(photo).save(tmp_path / "photo.png")
    plain, counted = write_tiny_model(tmp_path / "plain"), tmp_path / "counted"
    command = ["calibrate", str(plain), "--out", str(counted), "--data", str(tmp_path / "photo.png")]
    assert main([*command, "--crops", "12", "--size", "192", "--tables", "9"]) == 0
    assert "bits of a hyper symbol" in capsys.readouterr().out
    # At most as many as asked for; what is counted differs by the processor's precision.
    tensors = read_model(counted).tensors
    made = len(tensors["tables.z.lengths"])
    assert tensors["largest"].shape == (TINY.levels,)
    assert 1 < made <= 9
    assert read_training(counted)["calibrated"] == {"crops": 12, "size": 192, "tables": made, "seed": 0}
    codecs = [load_codec(folder, device="cpu", precision="float32") for folder in (plain, counted)]
    coded = [codec.encode([photo] * 3, [1, 50, 100]) for codec in codecs]
    assert sum(map(len, coded[1])) < sum(map(len, coded[0]))
    for before, after in zip(
        *(codec.decode(data) for codec, data in zip(codecs, coded, strict=True)), strict=True
    ):
        assert np.array_equal(before, after)
    assert codecs[0].digest != codecs[1].digest
    restore(TINY, read_model(counted).tensors)


def test_hyper_symbols_are_counted_by_context(tiny_codec: Codec, photo: NDArray[np.uint8]) -> None:
    """A quarter of the positions is coded first, without neighbours."""
    sampler = CropSampler([torch.from_numpy(photo.copy()).permute(2, 0, 1)], size=256, seed=0)
    found = count(tiny_codec, sampler, 2).sum((2, 3))
    assert (found[:, 0] * 4 == found.sum(1)).all()
    assert (found[:, 1:8].sum(1) * 4 == found.sum(1)).all()


def test_the_largest_latent_to_expect_is_measured(tiny_codec: Codec, photo: NDArray[np.uint8]) -> None:
    """On three kinds of crops, each equal to its mirror image, of which the first is the usual one."""
    half = photo[:64, :32]
    usual = np.concatenate([half, half[:, ::-1]], 1)
    busy = np.where(np.indices((64, 64)).sum(0)[..., None] // 8 % 2, 255, usual).astype(np.uint8)
    busy[:, 32:] = busy[:, 31::-1]
    plain = np.full_like(usual, 128)
    model = tiny_trainable()
    photos = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in (*[usual] * 6, busy, plain)]
    found = largest(model, CropSampler(photos, size=64, seed=0))
    assert found.shape == (TINY.levels,)
    for level, quality in enumerate((1.0, 50.5, 100.0)):
        sizes = []
        for picture in (plain, usual, busy):
            pixels = torch.from_numpy(picture.copy())[None]
            y = tiny_codec._transform(pixels, tiny_codec._tilt(tiny_codec._header(picture, quality)))
            sizes.append(float(rms(y).max()))
        assert 1.1 * sizes[0] < sizes[1] < sizes[2] / 1.1
        assert float(found[level]) == pytest.approx(LARGEST * sizes[1], rel=0.01)


def test_the_usual_error_is_that_of_the_median_crop(
    photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_trainable()
    sampler = CropSampler([torch.from_numpy(photo.copy()).permute(2, 0, 1)], size=64, seed=0)
    crops = sampler.batch(64)
    wild = torch.cat([crops[:60], torch.full_like(crops[:4], 1e4)])
    monkeypatch.setattr(sampler, "batch", lambda count: crops)
    usual = usual_error(model, sampler)
    monkeypatch.setattr(sampler, "batch", lambda count: wild)
    torch.testing.assert_close(usual_error(model, sampler), usual, rtol=0.2, atol=0)
    # Few at a time, and as if they came together.
    sizes = []
    monkeypatch.setattr(sampler, "batch", lambda count: crops)
    model.register_forward_hook(lambda module, given, output: sizes.append(len(given[0])))
    usual_error(model, sampler)
    assert max(sizes) == 8
    with torch.no_grad():
        parts = [model(part, torch.zeros(8), machine_count=0).human for part in crops.split(8)]
    error = (torch.cat(parts) - crops).square().mean((1, 2, 3)).median().sqrt()
    torch.testing.assert_close(error, usual[0], rtol=0.01, atol=0)


def test_grain_is_set_kept_and_taken_away(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    photos = tmp_path / "photo.png"
    PIL.Image.fromarray(photo).save(photos)
    folder = write_tiny_model(tmp_path / "model")
    command = ["calibrate", str(folder), "--data", str(photos), "--crops", "1", "--size", "64"]
    assert main([*command, "--grain", "0.5"]) == 0
    stored = read_model(folder)
    sampler = CropSampler([torch.from_numpy(photo.copy()).permute(2, 0, 1)], size=64, seed=0)
    error = usual_error(restore(TINY, stored.tensors), sampler)
    torch.testing.assert_close(stored.tensors["grain"], 0.5 * error)
    assert read_training(folder)["grain"] == 0.5
    assert main(command) == 0
    torch.testing.assert_close(read_model(folder).tensors["grain"], stored.tensors["grain"])
    assert main([*command, "--grain", "0"]) == 0
    assert "grain" not in read_model(folder).tensors


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tables", "256"), ("--crops", "0"), ("--size", "200"), ("--seed", "-1"), ("--grain", "-0.1")],
)
def test_options_are_checked(
    tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(write_tiny_model(tmp_path / "m")), "--data", "x", option, value]) == 1
    assert f"{option[2:]} must be" in capsys.readouterr().err


def test_alike_distributions_share_a_table() -> None:
    narrow, wide = (np.exp(-np.abs(np.arange(-3, 4)) * slope) for slope in (3.0, 0.5))
    rows = np.stack([narrow, wide, narrow * 1.0, wide + 1e-3])
    rows /= rows.sum(1, keepdims=True)
    choice, centres = group(rows, np.ones(4), 2)
    assert choice[0] == choice[2] != choice[1] == choice[3]
    assert centres[choice[1]] == pytest.approx(rows[[1, 3]].mean(0))


def test_tables_are_as_narrow_as_their_distribution() -> None:
    flat = np.full(2 * RADIUS + 2, 1.0)
    peak = np.full(2 * RADIUS + 2, 1e-12)
    peak[RADIUS - 1 : RADIUS + 2] = 1.0
    for weights, entries in ((flat, 2 * RADIUS + 2), (peak, 4)):
        table = narrow_table((weights / weights.sum())[:-1])
        assert len(table) == entries
        assert table.min() >= 1
        assert table.sum() == TOTAL

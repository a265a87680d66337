"""Polishing improves what existing bitstreams decode to and changes none of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import TINY, tiny_trainable, write_tiny_model
from ugicm.codec.codec import Codec
from ugicm.codec.entropy import SCALE_COUNT
from ugicm.codec.entropy_twin import as_coded, round_all
from ugicm.codec.store import StoredModel, load_codec, read_model
from ugicm_train.cli import main
from ugicm_train.export import export, model_tensors, read_training, write_model
from ugicm_train.files import locked
from ugicm_train.losses import Judge
from ugicm_train.model import PREFERENCE, make_zero
from ugicm_train.polish import VIEWS, PolishedCodec, Polisher, add_arguments, polish, run
from ugicm_train.restore import restore
from ugicm_train.train import LEARN, DivergedError, TrainOptions, train

OPTIONS = TrainOptions(
    steps=24, batch=2, crop=128, matrix_lr=0.002, other_lr=0.002, warmup_steps=1, ema=0.5, device="cpu"
)


@pytest.fixture
def data(tmp_path: Path, photo: NDArray[np.uint8]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    PIL.Image.fromarray(photo).save(folder / "photo.png")
    return folder


def squared_error(codec: Codec, bitstream: bytes, photo: NDArray[np.uint8], strength: float) -> float:
    return float(np.square(codec.decode([bitstream], strength)[0].astype(float) - photo).mean())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("learn", LEARN)
def test_bitstreams_stay_the_same_and_decode_better(
    tmp_path: Path, data: Path, photo: NDArray[np.uint8], view: str, learn: str
) -> None:
    before, after = write_tiny_model(tmp_path / "before"), tmp_path / "after"
    options = dataclasses.replace(OPTIONS, learn=learn)
    polish(before, after, options, [data], tmp_path / "run", view=view)
    old, new = (load_codec(path, device="cpu", precision="float32") for path in (before, after))
    for quality in (1.0, 50.0, 100.0):
        bitstream = old.encode([photo], quality)[0]
        assert new.encode([photo], quality)[0] == bitstream
        errors = {s: [squared_error(codec, bitstream, photo, s) for codec in (old, new)] for s in (0.0, 1.0)}
        assert errors[1.0][1] < errors[1.0][0]
        if view == "both":
            assert errors[0.0][1] < errors[0.0][0]
        else:
            np.testing.assert_array_equal(*(codec.decode([bitstream])[0] for codec in (old, new)))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.csv", "ugicm-train.lock"}
    tensors = [read_model(path).tensors for path in (before, after)]
    changed = [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])]
    assert changed
    assert {name.partition(".")[0] for name in changed} == set(VIEWS[view])


def test_grain_is_set_by_the_views_that_were_learned(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        "ugicm_train.polish.set_grain", lambda tensors, model, *_: seen.append(model_tensors(model))
    )
    before, after = write_tiny_model(tmp_path / "before"), tmp_path / "after"
    polish(before, after, dataclasses.replace(OPTIONS, steps=2), [data], tmp_path / "run", view="both")
    old, new = (read_model(path).tensors for path in (before, after))
    for part in VIEWS["both"]:
        name = next(name for name in new if name.startswith(f"{part}.") and (new[name] != old[name]).any())
        torch.testing.assert_close(seen[0][name].half(), new[name].half())


def test_forgotten_machine_view_is_the_human_view() -> None:
    model = tiny_trainable()
    y, level = torch.rand(1, TINY.latent_channels, 4, 4), torch.tensor([1.5])
    with torch.no_grad():
        human = model.human_view(y, level)
        assert not torch.allclose(human, model.machine_view(y, level, 1.0))
        for part in PREFERENCE:
            make_zero(getattr(model, part))
        for strength in (0.0, 0.3, 1.0):
            torch.testing.assert_close(model.machine_view(y, level, strength), human)


def test_restored_model_sees_the_latents_of_the_decoder(tiny_store: Path, photo: NDArray[np.uint8]) -> None:
    stored = read_model(tiny_store / "tiny")
    crop = photo[:128, :192]
    codec = load_codec(tiny_store / "tiny", device="cpu")
    # On paths, errors are others.
    codec._entropy.trellis = codec._entropy.trellis._replace(first=SCALE_COUNT)
    exact = codec.unpack(codec.encode([crop], 50.0)[0]).y_hat
    assert exact is not None
    model = restore(stored.config, stored.tensors).eval()
    x = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        level = torch.tensor([49 / 99 * (stored.config.levels - 1)])
        y = model.latent_of(x, level) * model.gains(level)[0]
        y_hat = model.entropy(model.hyper_analysis(y).round(), y, round_all).y_hat[0]
    # Means differ by a few of their units of 1/64; a symbol near the edge of its bin may flip.
    error = (y_hat.permute(1, 2, 0) - exact).abs()
    assert float(error.median()) < 3 / 64
    assert float((error > 0.5).float().mean()) < 0.02


def with_reach(folder: Path, reach: list[float]) -> StoredModel:
    """The tiny model, of which there is so much of the machine view at each level, in `folder`."""
    model = tiny_trainable()
    tensors = model_tensors(model) | {"reach": torch.tensor(reach)}
    write_model(folder, model.config, tensors, {"reach": reach})
    return read_model(folder)


def test_polishes_what_the_decoder_shows(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    stored = with_reach(tmp_path, [1.0, 0.5, 0.25])
    model = PolishedCodec(stored.config, stored.tensors["reach"])
    model.load_state_dict(restore(stored.config, stored.tensors).state_dict())
    codec = load_codec(tmp_path, device="cpu", precision="float32")
    latents, levels, shown = [], [], []
    for quality in (1.0, 25.75, 50.5, 100.0):
        bitstream = codec.encode([photo[:128, :192]], quality)[0]
        y_hat = codec.unpack(bitstream).y_hat
        assert y_hat is not None
        levels.append((quality - 1) / 99 * (stored.config.levels - 1))
        latents.append(y_hat.permute(2, 0, 1) * model.gains(torch.tensor([levels[-1]]))[1][0])
        shown.append(codec.decode([bitstream], 0.5)[0])
    with torch.no_grad():
        y, level = torch.stack(latents), torch.tensor(levels)
        alone = [model.machine_view(y[i : i + 1], level[i : i + 1], 0.5)[0] for i in range(4)]
        views = {"alone": alone, "together": [*model.machine_view(y, level, 0.5, rates=4)]}
    for pictures in views.values():
        for picture, expected in zip(pictures, shown, strict=True):
            pixels = (picture.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
            np.testing.assert_allclose(pixels, expected, atol=1)


def test_polishes_what_symbols_say(photo: NDArray[np.uint8]) -> None:
    """Means are those of a rounded hyper latent, latents and bits about those of decoding; none is moved."""
    model = PolishedCodec(TINY)
    model.load_state_dict(tiny_trainable().state_dict())
    given: list[Any] = []
    shown: list[torch.Tensor] = []
    model.entropy.register_forward_pre_hook(lambda network, inputs: given.extend(inputs))
    model.synthesis.register_forward_pre_hook(lambda network, inputs: shown.extend(inputs))
    x = torch.from_numpy(photo[:64, :128].copy()).permute(2, 0, 1)[None] / 255
    level = torch.tensor([1.0])
    torch.manual_seed(0)
    bpp = model(x, level).bpp
    z, y, quantise = given
    assert quantise is as_coded
    assert torch.equal(z, z.round())
    torch.manual_seed(0)
    with torch.no_grad():
        y_hat = model.entropy(z, y, as_coded).y_hat
        torch.testing.assert_close(shown[0], y_hat * model.gains(level)[1])
        torch.testing.assert_close(bpp, model(x, level, noise=False).bpp, rtol=0.05, atol=0)
    assert not any(value.requires_grad for value in (z, y, shown[0]))


@pytest.mark.parametrize("restart", [False, True])
def test_reach_outlives_all_but_the_view_it_belongs_to(tmp_path: Path, data: Path, restart: bool) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    with_reach(before, [1.0, 0.5, 0.0])
    options = dataclasses.replace(OPTIONS, steps=2)
    polish(before, after, options, [data], tmp_path / "run", restart=restart)
    assert ("reach" in read_model(after).tensors) is not restart
    assert ("reach" in read_training(after)) is not restart


def test_polishes_the_checkpoint_of_a_run(
    tmp_path: Path, data: Path, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, plain, polished = (tmp_path / name for name in ("trained", "plain", "polished"))
    train(TINY, dataclasses.replace(OPTIONS, steps=2), [data], trained)
    export(trained, plain)
    monkeypatch.setattr("ugicm_train.teachers.parse_teacher", lambda *_: MeanColour())
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    common = ["--teacher", "mean colour", "--data", str(data), "--steps", "2", "--crop", "128"]
    with pytest.raises(ValueError, match="--out"):
        run(parser.parse_args([str(trained), *common]))
    run(parser.parse_args([str(trained), *common, "--out", str(polished)]))
    old, new = (load_codec(path, device="cpu", precision="float32") for path in (plain, polished))
    assert old.encode([photo], 50.0) == new.encode([photo], 50.0)
    record = json.loads((polished / "config.json").read_text())["training"]
    assert [entry["teacher"] for entry in record["polish"]] == ["mean colour"]
    assert record["polish"][0]["steps"] == 2


class MeanColour:
    @staticmethod
    def distance(machine: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        return (machine - original).mean((2, 3)).square().sum(1)

    def draw(self) -> Judge:
        return self.distance


def test_an_interrupted_polish_is_not_overwritten(tmp_path: Path, data: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    work = tmp_path / "run"
    work.mkdir()
    (work / "checkpoint.pt").touch()
    with pytest.raises(FileExistsError, match="--resume"):
        polish(source, source, OPTIONS, [data], work)


def test_folders_that_a_polish_must_not_use(tmp_path: Path, data: Path) -> None:
    source, other = write_tiny_model(tmp_path / "model"), tmp_path / "other"
    other.mkdir()
    (other / "checkpoint.pt").touch()
    with pytest.raises(FileExistsError, match="other holds a run, which a model would write over"):
        polish(source, other, OPTIONS, [data], tmp_path / "run")
    with pytest.raises(ValueError, match="is where the model will be: give another --run"):
        polish(source, source, OPTIONS, [data], source)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="another run writes to"):
        polish(source, source, OPTIONS, [data], tmp_path / "run")


class Stopping(MeanColour):
    """A teacher that asks the run to stop."""

    def draw(self) -> Judge:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().draw()


class NoNumber(MeanColour):
    @staticmethod
    def distance(machine: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        return MeanColour.distance(machine, original) * math.nan


def test_a_polish_that_diverges_writes_nothing(tmp_path: Path, data: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    before = read_model(source).weights_sha256
    options = dataclasses.replace(OPTIONS, steps=4, batch=1, crop=64, decay=0.0)
    for change, teacher, message in (
        ({"matrix_lr": 3.0}, MeanColour(), "a machine view of .* dB; start again"),
        ({}, NoNumber(), "no usable gradient in 4 steps; start again"),
    ):
        with pytest.raises(DivergedError, match=message):
            polish(
                source, source, dataclasses.replace(options, **change), [data], tmp_path / "run",
                teacher=teacher, grain=0.1,
            )  # fmt: skip
        assert read_model(source).weights_sha256 == before
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.csv", "ugicm-train.lock"}


@pytest.mark.parametrize("learn", LEARN)
def test_a_resumed_polish_is_the_same(
    tmp_path: Path, data: Path, learn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = write_tiny_model(tmp_path / "model"), write_tiny_model(tmp_path / "other", seed=1)
    out, work = tmp_path / "out", tmp_path / "run"
    options = dataclasses.replace(OPTIONS, learn=learn, steps=2)
    again = learn == "weights"  # scales of a forgotten view would have nothing to learn
    asked = {"view": "both", "restart": again}
    status = polish(source, out, options, [data], work, teacher=Stopping(), **asked)
    assert status == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped at step 1: go on with --resume\n"
    assert not out.exists()
    for model, change, message in (
        (source, {"view": "machine"}, "with view both, got view machine"),
        (
            source,
            {"restart": not again},
            "with restart True, got restart False" if again else "scales of nothing stay nothing",
        ),
        (other, {}, "with source .*, got source "),
    ):
        with pytest.raises(ValueError, match=message):
            polish(model, out, options, [data], work, resume=True, **(asked | change))
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    torch.save(state | {"record": {}}, work / "checkpoint.pt")
    with pytest.raises(ValueError, match="does not say its restart, source, view"):
        polish(source, out, options, [data], work, resume=True, **asked)
    torch.save(state, work / "checkpoint.pt")
    assert polish(source, out, options, [data], work, resume=True, teacher_name="another", **asked) == 0
    (record,) = read_training(out)["polish"]
    assert [one["teacher"] for one in record["teachers"]] == [None, "another"]
    assert (record["steps"], record["view"], record["restarted"]) == (3, "both", again)


def test_scales_of_no_machine_view_are_refused(tmp_path: Path, data: Path) -> None:
    model = tiny_trainable()
    for part in PREFERENCE:
        make_zero(getattr(model, part))
    source, out, work = tmp_path / "model", tmp_path / "out", tmp_path / "run"
    write_model(source, model.config, model_tensors(model), {})
    options = dataclasses.replace(OPTIONS, learn="scales", steps=1, batch=1, crop=64)
    with pytest.raises(ValueError, match="--learn scales: there is no machine view yet"):
        polish(source, out, options, [data], work)
    assert not out.exists()
    assert not work.exists()
    # Weights learn from nothing.
    assert polish(source, out, dataclasses.replace(options, learn="weights"), [data], work) == 0


def test_what_is_stored_is_the_moving_average(tmp_path: Path) -> None:
    polisher = Polisher(tiny_trainable(), OPTIONS, tmp_path, view="machine")
    for parameter in polisher.average.preference.parameters():
        parameter.fill_(0.25)
    learned = polisher.learned("machine")
    assert {name.partition(".")[0] for name in learned} == set(PREFERENCE)
    assert all((value == 0.25).all() for name, value in learned.items() if name.startswith("preference."))


def test_a_model_in_the_current_folder_is_polished(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_tiny_model(tmp_path / "model"))
    monkeypatch.setattr("ugicm_train.teachers.parse_teacher", lambda *_: MeanColour())
    command = ["polish", ".", "--out", ".", "--teacher", "mean colour", "--data", str(data)]
    assert main([*command, "--steps", "1", "--batch", "1", "--crop", "64"]) == 0
    assert (tmp_path / "model.polish" / "log.csv").exists()


@pytest.mark.parametrize("grain", [math.nan, math.inf, -1.0])
def test_grain_is_a_share(tmp_path: Path, data: Path, grain: float) -> None:
    source = write_tiny_model(tmp_path / "model")
    with pytest.raises(ValueError, match=f"grain must be finite and at least 0, got {grain}"):
        polish(source, source, OPTIONS, [data], tmp_path / "run", grain=grain)


def test_grain_follows_the_error(tmp_path: Path, data: Path, photo: NDArray[np.uint8]) -> None:
    before, after = write_tiny_model(tmp_path / "before"), tmp_path / "after"
    options = dataclasses.replace(OPTIONS, steps=1)
    polish(before, after, options, [data], tmp_path / "run", grain=0.5)
    table = read_model(after).tensors["grain"]
    codec = load_codec(after, device="cpu", precision="float32")
    # Crops of the size that it was measured on: errors are larger at borders.
    tops, lefts = (range(0, side - 127, 128) for side in photo.shape[:2])
    crops = [photo[y : y + 128, x : x + 128] for y in tops for x in lefts]
    errors = [squared_error(codec, codec.encode([crop], 1.0)[0], crop, 0.0) for crop in crops]
    assert float(table[0]) * 255 == pytest.approx(0.5 * np.mean(errors) ** 0.5, rel=0.2)
    # A model can be polished again, and lose its grain, and what `calibrate` said of it.
    stored = read_model(after)
    write_model(after, stored.config, stored.tensors, read_training(after) | {"grain": 0.7})
    polish(after, after, options, [data], tmp_path / "run")
    assert "grain" not in read_model(after).tensors
    assert "grain" not in read_training(after)

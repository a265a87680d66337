"""The mean of models: what it is made of, and what has none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import tiny_trainable, write_tiny_model
from ugicm.codec.entropy_twin import float_weights
from ugicm.codec.store import load_codec, read_model
from ugicm_train.cli import main
from ugicm_train.export import model_tensors, write_model
from ugicm_train.model import TrainableCodec


def nudged(seed: int) -> TrainableCodec:
    """As if trained further from the same weights."""
    model = tiny_trainable(1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    return model


def test_weights_are_the_means(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    models = [nudged(seed) for seed in (5, 6)]
    for name, model in zip("ab", models, strict=True):
        write_model(tmp_path / name, model.config, model_tensors(model), {"steps": 3})
    assert main(["average", str(tmp_path / "c"), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    first, second, mean = (read_model(tmp_path / name) for name in "abc")
    for name, value in mean.tensors.items():
        if not name.startswith(("entropy.", "tables.")):
            middle = (first.tensors[name] + second.tensors[name]) / 2
            torch.testing.assert_close(value, middle, atol=1e-3, rtol=1e-3)
    floats = [float_weights(model.tensors) for model in (first, second, mean)]
    for name, value in floats[2].items():  # of integers, rounded anew
        torch.testing.assert_close(value, (floats[0][name] + floats[1][name]) / 2, atol=1e-3, rtol=1e-2)
    codec = load_codec(tmp_path / "c", device="cpu", precision="float32")
    assert codec.name == "c"
    assert codec.decode(codec.encode([photo[:64, :64]]))[0].shape == (64, 64, 3)
    record = json.loads((tmp_path / "c" / "config.json").read_text())["training"]
    assert record == {"mean": [{"weights": m.weights_sha256, "steps": 3} for m in (first, second)]}


def test_a_common_past_is_told_once(tmp_path: Path) -> None:
    past = {"steps": 3, "start": {"weights": "first", "steps": 9}}
    for name, seed in (("a", 5), ("b", 6)):
        model = nudged(seed)
        write_model(tmp_path / name, model.config, model_tensors(model), {"start": {"weights": "x"} | past})
    assert main(["average", str(tmp_path / "c"), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert main(["average", str(tmp_path / "d"), str(tmp_path / "c"), str(tmp_path / "b")]) == 0
    first, second, third = (read_model(tmp_path / name).weights_sha256 for name in "abc")
    record = json.loads((tmp_path / "d" / "config.json").read_text())["training"]
    whole = {"weights": "x"} | past
    assert record == {
        "mean": [
            {
                "weights": third,
                "mean": [
                    {"weights": first, "start": whole},
                    {"weights": second, "start": {"weights": "x"}},
                ],
            },
            # Not told in these words before, but for what it started from.
            {"weights": second, "start": {"weights": "x"}},
        ]
    }


def test_the_mean_of_a_model_with_itself_is_that_model(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "a"))
    assert main(["average", str(tmp_path / "b"), model, model]) == 0
    before, after = read_model(tmp_path / "a"), read_model(tmp_path / "b")
    for name, value in before.tensors.items():
        if not name.startswith("tables.z"):  # fitted anew
            assert torch.equal(after.tensors[name], value), name


def test_models_of_different_shapes_have_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_tiny_model(tmp_path / "a")
    config = dataclasses.replace(tiny_trainable(1).config, lambda_max=1.0)
    other = TrainableCodec(config)
    write_model(tmp_path / "b", config, model_tensors(other), {})
    assert main(["average", str(tmp_path / "c"), str(first), str(tmp_path / "b")]) == 1
    assert "different shapes or rates" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_part_of_a_machine_view_has_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_tiny_model(tmp_path / "a"))
    assert main(["mix", model, model, model, "--reach", "1", "1", "0.5"]) == 0
    assert main(["average", str(tmp_path / "c"), model]) == 1
    assert "shows only a part of its machine view" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["checkpoint.pt", "log.csv"])
def test_a_run_is_to_be_exported_first(tmp_path: Path, left: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, work = str(write_tiny_model(tmp_path / "model")), tmp_path / "run"
    work.mkdir()
    (work / "config.json").write_text("{}")
    (work / left).touch()
    out, data = str(tmp_path / "out"), ["--data", str(tmp_path)]
    for command in (
        ["average", out, model, str(work)],
        ["calibrate", str(work), *data],
        ["mix", out, model, str(work)],
        ["run", "--start", str(work), *data, "--out", out, "--steps", "1"],
    ):
        assert main(command) == 1
        assert f"{work} is a run, not a model: ugicm-train export {work}" in capsys.readouterr().err

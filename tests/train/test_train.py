"""Training on a handful of crops: it learns, resumes, stops on request and survives a kill."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY, tiny_trainable, write_tiny_model
from ugicm.codec.conditioning import lambda_of
from ugicm.codec.config import ModelConfig
from ugicm.codec.entropy import MEAN_UNIT
from ugicm.codec.entropy_twin import (
    INDEX_OFFSET,
    LOGISTIC_SCALE,
    OCTAVES_PER_UNIT,
    TRELLIS_FIRST,
    TRELLIS_STEP,
    Paths,
    as_coded,
    with_noise,
)
from ugicm.codec.errors import ModelStoreError
from ugicm.codec.fixed_point import INDEX_BITS
from ugicm.codec.store import load_codec, read_model
from ugicm.codec.viterbi import SHORTEST, nearest
from ugicm_train.cli import main
from ugicm_train.data import DataError
from ugicm_train.export import export, model_tensors, write_model
from ugicm_train.files import locked
from ugicm_train.losses import Judge, LossTerms, level_of, rate_distortion_loss
from ugicm_train.model import PREFERENCE, CodecOutput, FactorizedPrior
from ugicm_train.optimizer import Optimizer
from ugicm_train.parallel import Processes
from ugicm_train.train import (
    RESUMED,
    DivergedError,
    Trainer,
    TrainOptions,
    _psnr,
    learning_rate_factor,
    load_checkpoint,
    train,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skimage import data

    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(data.chelsea()).save(folder / "cat.png")
    Image.fromarray(data.coffee()).save(folder / "coffee.png")
    return folder


OPTIONS = TrainOptions(steps=60, batch=4, crop=64, warmup_steps=5, seed=1, device="cpu")


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "log.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_training_learns_resumes_and_exports(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(TINY, OPTIONS, [photos], run)
    first = load_checkpoint(run)
    assert first["step"] == 60
    train(TINY, OPTIONS, [photos], run, resume="checkpoint.pt")
    second = load_checkpoint(run)
    assert second["step"] == 120
    assert second["minutes"] > first["minutes"]
    log = rows(run)
    assert [row["step"] for row in log] == [50, 100]
    assert log[1]["loss"] < 0.95 * log[0]["loss"]

    export(run, tmp_path / "model", name="learned")
    codec = load_codec(tmp_path / "model", device="cpu")
    assert codec.name == "learned"
    picture = np.asarray(Image.open(photos / "cat.png"))
    data = codec.encode([picture], 60)[0]
    decoded = codec.decode([data])[0]
    assert 10 * np.log10(255**2 / np.mean((decoded.astype(float) - picture) ** 2)) > 22


def test_all_that_a_checkpoint_holds_is_resumed(photos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=3, batch=1)
    train(TINY, options, [photos], tmp_path / "run")
    saved = load_checkpoint(tmp_path / "run", needs=RESUMED)
    trainer = Trainer(tiny_trainable(5), options, tmp_path / "other")
    trainer.load(saved)
    now = trainer.state()
    assert (now["step"], now["minutes"]) == (3, saved["minutes"])
    for part in ("model", "average"):
        assert all(torch.equal(now[part][name], value) for name, value in saved[part].items()), part
    assert now["adam"]["state"].keys() == saved["adam"]["state"].keys() != set()
    for key, state in saved["adam"]["state"].items():
        assert all(torch.equal(now["adam"]["state"][key][name], value) for name, value in state.items())


def test_a_run_resumes_just_before_a_row_of_the_log(photos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=1, batch=1)
    train(TINY, options, [photos], tmp_path)
    state = load_checkpoint(tmp_path)
    torch.save(state | {"step": 49}, tmp_path / "checkpoint.pt")
    train(TINY, dataclasses.replace(options, steps=2), [photos], tmp_path, resume="checkpoint.pt")
    assert load_checkpoint(tmp_path)["step"] == 51
    assert [row["step"] for row in rows(tmp_path)] == [50]


def test_a_checkpoint_of_another_device_resumes(photos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=1)
    train(TINY, options, [photos], tmp_path)
    state = load_checkpoint(tmp_path)
    for group in state["adam"]["param_groups"]:
        group |= {"lr": 0.5, "fused": False, "capturable": True}
    trainer = Trainer(tiny_trainable(), options, tmp_path)
    trainer.load(state)
    (group,) = trainer.optimizer.adam.param_groups
    assert (group["fused"], group["capturable"]) == (True, False)
    trainer.train_step(torch.rand(4, 3, 64, 64), 1.0, None)
    assert trainer.step == 2


def test_a_second_run_in_the_same_folder_needs_resume(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(FileExistsError, match="--resume"):
        train(TINY, OPTIONS, [photos], tmp_path)


def test_one_run_in_a_folder_at_a_time(photos: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="another run writes to"):
        train(TINY, OPTIONS, [photos], tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_model_does_not_write_over_a_run(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = dataclasses.replace(OPTIONS, steps=1, batch=1)
    train(TINY, options, [photos], run)
    with pytest.raises(FileExistsError, match="holds a run, which a model would write over"):
        export(run, run)
    train(None, dataclasses.replace(options, steps=2), [photos], run, resume="checkpoint.pt")
    assert load_checkpoint(run)["step"] == 3


def test_a_run_does_not_write_over_a_model(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "model")
    command = ["run", "--data", str(photos), "--out", str(model), "--steps", "1", "--device", "cpu"]
    for more in ([], ["--start", str(model)], ["--resume"]):
        assert main([*command, *more]) == 1
        assert f"{model} holds a model, which a run would write over" in capsys.readouterr().err
    read_model(model)


def test_nothing_is_written_before_photos_are_read(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("of another")
    with pytest.raises(DataError, match="neither a folder nor a file"):
        train(TINY, OPTIONS, [photos / "none"], tmp_path)
    assert (tmp_path / "config.json").read_text() == "of another"
    train(TINY, dataclasses.replace(OPTIONS, steps=1, batch=1), [photos], tmp_path)
    assert ModelConfig.from_json(tmp_path / "config.json") == TINY


def test_a_run_that_left_no_checkpoint_is_noticed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--data", str(photos), "--out", str(tmp_path), "--steps", "1", "--device", "cpu"]
    assert main([*command, "--resume"]) == 1
    assert f"no checkpoint.pt in {tmp_path} to go on from: begin without --resume" in capsys.readouterr().err
    log = "step,loss\n50,1.0\n"
    (tmp_path / "log.csv").write_text(log)
    assert main(command) == 1
    assert "holds the log of a run without checkpoint.pt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    assert (tmp_path / "log.csv").read_text() == log


def test_a_run_that_left_nothing_begins_anew(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n")
    train(TINY, dataclasses.replace(OPTIONS, steps=1, batch=1), [photos], tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_a_run_that_diverges_between_rows_writes_nothing(photos: Path, tmp_path: Path) -> None:
    class NoNumber:
        def draw(self) -> Judge:
            return lambda machine, original: (machine - original).mean((1, 2, 3)) * math.nan

    options = dataclasses.replace(OPTIONS, steps=2, batch=1, decay=0.0)
    with pytest.raises(DivergedError, match="step 2: no usable gradient in 2 steps"):
        train(TINY, options, [photos], tmp_path, teacher=NoNumber())
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_step_that_is_no_number_says_nothing(photos: Path, tmp_path: Path) -> None:
    """It moves nothing, and ends nothing."""
    draws = 0

    class NoNumberOnce:
        def draw(self) -> Judge:
            nonlocal draws
            draws += 1
            factor = math.nan if draws == 7 else 1.0
            return lambda machine, original: (machine - original).square().mean((1, 2, 3)) * factor

    options = dataclasses.replace(OPTIONS, steps=50, batch=1, batch_levels=1, decay=0.0)
    assert train(TINY, options, [photos], tmp_path, teacher=NoNumberOnce()) == 0
    (row,) = rows(tmp_path)
    assert row["skipped"] >= 1
    assert math.isfinite(row["loss"])
    assert 0 < row["bpp"] < 10


def test_a_run_without_a_row_is_judged_once(photos: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_trainable(), dataclasses.replace(OPTIONS, steps=2), tmp_path)
    judged = []
    trainer._check = lambda row, count: judged.append((row["bpp"], count))  # type: ignore[method-assign]
    told = {"loss": 0.8, "bpp": 0.5, "mse_human": 1e-3, "mse_machine": 1e-3, "teacher": 0.0}

    def step(x: torch.Tensor, factor: float, teacher: object) -> dict[str, torch.Tensor]:
        trainer.step += 1
        return {name: torch.tensor(value) for name, value in {**told, "skipped": 0.0, "lost": 0.0}.items()}

    trainer.train_step = step  # type: ignore[method-assign, assignment]
    assert trainer.run(trainer.read([photos])) == 0
    assert judged == [(0.5, 2)]


@pytest.mark.parametrize("late", [1, 5])
def test_the_last_steps_of_a_run_are_judged_with_those_before(
    photos: Path, tmp_path: Path, late: int
) -> None:
    options = dataclasses.replace(OPTIONS, steps=50 + late, batch=16, decay=0.0)
    trainer = Trainer(tiny_trainable(), options, tmp_path)

    def step(x: torch.Tensor, factor: float, teacher: object) -> dict[str, torch.Tensor]:
        trainer.step += 1
        wild = trainer.step > 50
        told = {"loss": 0.8, "bpp": 3.0 if wild else 0.5, "mse_human": 1e-3, "teacher": 0.0, "skipped": wild}
        told["lost"] = 0.0
        # One picture of the batch in a single step, or all of them in several.
        told["mse_machine"] = 1e-3 + wild * (1 / 16 if late == 1 else 1.0)
        return {name: torch.tensor(value) for name, value in told.items()}

    trainer.train_step = step  # type: ignore[method-assign, assignment]
    if late == 1:
        assert trainer.run(trainer.read([photos])) == 0
    else:
        with pytest.raises(DivergedError, match=r"step 55: a machine view of .* dB, and has had 30\.0"):
            trainer.run(trainer.read([photos]))
    assert (tmp_path / "checkpoint.pt").exists() is (late == 1)
    assert [row["step"] for row in rows(tmp_path)] == [50]


def test_one_picture_that_explodes_is_not_all_that_is_told() -> None:
    x, level = torch.full((4, 3, 64, 64), 0.5), torch.full((4,), 1.0)
    view = x + torch.tensor([0.0, 0.0, 0.0, 1000.0]).view(4, 1, 1, 1)
    terms = rate_distortion_loss(TINY, CodecOutput(view, view, torch.full((4,), 0.1)), x, level)
    assert float(terms.mse_human) == float(terms.mse_machine) == 0.25


def test_signals_are_as_before_after_a_run(photos: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    trainer = Trainer(tiny_trainable(), dataclasses.replace(OPTIONS, steps=1, batch=1), tmp_path)
    inside = []
    trainer.model.register_forward_hook(lambda *_: inside.extend(map(signal.getsignal, numbers)))
    trainer.run(trainer.read([photos]))
    assert not set(inside) & set(before)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_is_interrupted_while_it_reads(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ugicm_train.data._decode", lambda path: signal.raise_signal(signal.SIGINT))
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({"model": TINY.to_dict()}))
    command = ["run", "--config", str(config), "--data", str(photos), "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "1", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "ugicm-train: interrupted\n"


def test_a_teacher_needs_a_machine_view(photos: Path, tmp_path: Path) -> None:
    class Idle:
        def draw(self) -> Judge:
            raise AssertionError

    options = dataclasses.replace(OPTIONS, machine_share=0.0)
    with pytest.raises(ValueError, match="--machine-share 0 decodes none"):
        train(TINY, options, [photos], tmp_path, teacher=Idle())


def test_the_command_stops_cleanly_and_survives_kill(photos: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": TINY.to_dict()}))
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "ugicm_train", "run", "--config", str(config), "--data", str(photos),
        "--out", str(run), "--steps", "1000000", "--batch", "2", "--crop", "64",
        "--checkpoint-minutes", "0.001", "--threads", "1", "--device", "cpu",
    ]  # fmt: skip

    def start(*extra: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, *extra], stderr=subprocess.PIPE)

    def wait_for_steps(process: subprocess.Popen[bytes], more_than: int) -> int:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "checkpoint.pt").exists():
                step = int(load_checkpoint(run)["step"])
                if step > more_than:
                    return step
            time.sleep(0.1)
        pytest.fail(f"no checkpoint after step {more_than}: {process.communicate()[1]!r}")

    process = start()
    step = wait_for_steps(process, 0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    saved = int(load_checkpoint(run)["step"])
    assert saved >= step
    process = start("--resume")
    wait_for_steps(process, saved)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM
    stopped = int(load_checkpoint(run)["step"])
    assert stopped > saved
    assert said == f"stopped at step {stopped}: go on with --resume\n"


def test_a_resumed_run_is_of_its_checkpoint(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", tmp_path / "config.json"
    config.write_text(json.dumps({"model": TINY.to_dict()}))
    command = ["run", "--data", str(photos), "--out", str(run), "--steps", "1", "--batch", "1"]
    command += ["--crop", "64", "--device", "cpu"]
    assert main([*command, "--config", str(config)]) == 0
    # Equal or none: both are the checkpoint's.
    assert main([*command, "--resume", "--config", str(config)]) == 0
    assert main([*command, "--resume"]) == 0
    assert load_checkpoint(run)["step"] == 3
    config.write_text(json.dumps({"model": dataclasses.replace(TINY, decoder_blocks=1).to_dict()}))
    for options, message in (
        (["--config", str(config)], "another --config: decoder_blocks 2, got 1"),
        (["--start", "ugicm-s"], "leave out --start"),
    ):
        assert main([*command, "--resume", *options]) == 1
        assert message in capsys.readouterr().err
    assert load_checkpoint(run)["step"] == 3


def test_damaged_checkpoints_are_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, other = tmp_path / "checkpoint.pt", tmp_path / "other.pt"
    torch.save([1, 2], other)
    numbers = other.read_bytes()
    torch.save({"average": tiny_trainable().state_dict(), "config": TINY.to_dict()}, other)
    average = other.read_bytes()
    resume = ["run", "--data", str(photos), "--out", str(tmp_path), "--steps", "1", "--device", "cpu"]
    commands = (
        ["export", str(tmp_path), str(tmp_path / "model")],
        ["integer-cost", str(tmp_path), "--data", str(photos)],
        [*resume, "--resume"],
    )
    half = average[: len(average) // 2]
    for content in (b"", b"no checkpoint", bytes(3000), b"\x80\x02}q", half, numbers):
        checkpoint.write_bytes(content)
        for command in commands:
            assert main(command) == 1
            said = capsys.readouterr().err
            assert said == f"ugicm-train: {checkpoint} is no checkpoint, or a damaged one\n"
    checkpoint.write_bytes(average)
    for command, lacks in ((commands[0], "step, minutes"), (commands[2], "step, minutes, model, adam")):
        assert main(command) == 1
        assert capsys.readouterr().err.endswith(f"{checkpoint} is no whole checkpoint: it lacks {lacks}\n")


def test_checkpoints_that_fit_no_config_are_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, model = tmp_path / "checkpoint.pt", tmp_path / "model"
    options = ["--data", str(photos), "--steps", "1", "--batch", "1", "--crop", "64", "--device", "cpu"]
    whole, config = tiny_trainable().state_dict(), TINY.to_dict()
    adam = {"adam": {"state": {}}, "step": 1, "minutes": 0.0}
    part = {name: value for name, value in whole.items() if name != "gains.log_gain"}
    for weights, shape, message in (
        (part, config, "does not fit its config: 1 tensors, first gains.log_gain"),
        (whole, config | {"channels": 32}, "does not fit its config: "),
        (whole, config | {"width": 3}, "describes no model: unknown keys in the model config: width"),
        (whole, {"channels": 32}, "describes no model: "),
    ):
        torch.save({"average": weights, "model": weights, "config": shape} | adam, checkpoint)
        for command in (
            ["export", str(tmp_path), str(model)],
            ["run", "--resume", "--out", str(tmp_path), *options],
            ["polish", str(tmp_path), "--out", str(model), *options, "--teacher", "efficientnet-lite0"],
        ):
            assert main(command) == 1
            assert f"{checkpoint} {message}" in capsys.readouterr().err
    assert not model.exists()


@pytest.mark.parametrize("part", ["analysis.unfold.weight", "gains.log_gain", "prior.location"])
def test_what_is_no_number_is_not_exported(
    tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tiny_trainable().state_dict()
    state[part][0] = math.nan
    torch.save(
        {"average": state, "config": TINY.to_dict(), "step": 1, "minutes": 0.0}, tmp_path / "checkpoint.pt"
    )
    assert main(["export", str(tmp_path), str(tmp_path / "model")]) == 1
    assert f"checkpoint.pt: {part} has values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_what_is_too_large_for_a_stored_model_is_not_written(tmp_path: Path) -> None:
    tensors = model_tensors(tiny_trainable())
    tensors["analysis.unfold.weight"][0] = 1e5
    with pytest.raises(ValueError, match=r"unfold\.weight has values that are not finite, or too large"):
        write_model(tmp_path / "model", TINY, tensors, {})


def test_a_full_disk_leaves_no_part_of_a_checkpoint(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".checkpoint.pt.tmp").symlink_to("/dev/full")
    command = ["run", "--data", str(photos), "--out", str(tmp_path), "--steps", "1", "--batch", "1"]
    assert main([*command, "--crop", "64", "--device", "cpu", "--decay", "0"]) == 1
    assert f"cannot write {tmp_path / 'checkpoint.pt'}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "log.csv",
        "ugicm-train.lock",
    ]


def test_a_state_that_is_lost_does_not_replace_the_last_checkpoint(photos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=2, batch=1, decay=0)
    train(TINY, options, [photos], tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    wild = dataclasses.replace(options, steps=1, matrix_lr=1e39, warmup_steps=0)
    with pytest.raises(
        DivergedError, match=r"at step 3: .* of the model has values that are not finite; .*1e\+39"
    ):
        train(TINY, wild, [photos], tmp_path, resume="checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_run_whose_steps_are_no_numbers_is_lost(photos: Path, tmp_path: Path) -> None:
    """Such steps are left out of the means, which look fine then."""
    options = dataclasses.replace(OPTIONS, steps=50, batch=1, batch_levels=1, decay=0)
    train(TINY, options, [photos], tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    draws = 0

    class OneIsGood:
        def draw(self) -> Judge:
            nonlocal draws
            draws += 1
            factor = 1.0 if draws == 1 else math.nan
            return lambda machine, original: (machine - original).square().mean((1, 2, 3)) * factor

    more = dataclasses.replace(options, steps=4)
    with pytest.raises(DivergedError, match="at step 54: 3 of 4 steps are no numbers"):
        train(TINY, more, [photos], tmp_path, resume="checkpoint.pt", teacher=OneIsGood())
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_lost_state_is_not_saved_between_rows(photos: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        tiny_trainable(), dataclasses.replace(OPTIONS, steps=60, checkpoint_minutes=0), tmp_path
    )
    told = {"loss": 0.8, "bpp": 0.5, "mse_human": 1e-3, "mse_machine": 1e-3, "teacher": 0.0}

    def step(x: torch.Tensor, factor: float, teacher: object) -> dict[str, torch.Tensor]:
        trainer.step += 1
        lost = float(trainer.step > 52)
        return {name: torch.tensor(value) for name, value in {**told, "skipped": lost, "lost": lost}.items()}

    trainer.train_step = step  # type: ignore[method-assign, assignment]
    with pytest.raises(DivergedError, match="at step 55: 3 of 5 steps are no numbers"):
        trainer.run(trainer.read([photos]))
    assert load_checkpoint(tmp_path)["step"] == 54


def test_a_run_says_where_it_comes_from(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dataclasses.replace(OPTIONS, steps=1)

    class Same:
        def draw(self) -> Judge:
            return lambda machine, original: (machine - original).square().mean((1, 2, 3))

    train(TINY, options, [photos], tmp_path, teacher=Same(), teacher_name="the same")
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["teacher"], said["data"], said["start"]) == ("the same", [str(photos)], None)
    capsys.readouterr()
    train(TINY, options, [photos], tmp_path, resume="checkpoint.pt")
    assert "no --teacher from here on; before, it was the same" in capsys.readouterr().err
    train(TINY, options, [photos], tmp_path, resume="checkpoint.pt", teacher=Same(), teacher_name="another")
    teachers = load_checkpoint(tmp_path)["record"]["teachers"]
    assert [teacher["teacher"] for teacher in teachers] == ["the same", "another"]


def test_optimisers_share_out_all_parameters() -> None:
    model = tiny_trainable()
    optimizer = Optimizer(model, tiny_trainable(), Processes(), clip=1.0)
    dense = [matrix for matrices, _ in optimizer.muon._groups for matrix in matrices]
    rest = [p for group in optimizer.adam.param_groups for p in group["params"]]
    assert {id(p) for p in (*dense, *rest)} == {id(p) for p in model.parameters()}
    assert len(dense) + len(rest) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in dense)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_transforms_and_muon(photos: Path, tmp_path: Path, precision: str) -> None:
    trainer = Trainer(tiny_trainable(), dataclasses.replace(OPTIONS, steps=1, precision=precision), tmp_path)
    seen: set[torch.dtype] = set()
    trainer.model.analysis.unfold.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    trainer.run(trainer.read([photos]))
    assert seen == {trainer.optimizer.muon.dtype} == {getattr(torch, precision)}


def test_an_unknown_precision_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--data", str(photos), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert main([*command, "--precision", "float16"]) == 1
    assert "precision must be auto, float32 or bfloat16, got 'float16'" in capsys.readouterr().err


def test_without_a_machine_view_its_difference_stays(photos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=2, machine_share=0.0)
    train(TINY, options, [photos], tmp_path)
    model = load_checkpoint(tmp_path)["model"]
    assert all(not value.any() for name, value in model.items() if name.partition(".")[0] in PREFERENCE)
    # With one, from the same checkpoint: the optimisers' states still fit.
    train(TINY, dataclasses.replace(OPTIONS, steps=2), [photos], tmp_path, resume="checkpoint.pt")
    assert load_checkpoint(tmp_path)["model"]["preference.up.weight"].any()


def test_learning_rate_warms_up_and_decays() -> None:
    options = TrainOptions(steps=100, warmup_steps=10, decay=0.5)
    factors = [learning_rate_factor(step, step / 100, options) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:51] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)
    assert learning_rate_factor(0, 0.0, dataclasses.replace(options, warmup_steps=0)) == 1


def test_learning_rates_warm_up_again_after_a_resume(photos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=2, batch=1, warmup_steps=10, decay=0.0)
    trainer = Trainer(tiny_trainable(), options, tmp_path)
    trainer.load(trainer.state() | {"step": 100})
    factors = []
    trainer.train_step = lambda x, factor, teacher: (  # type: ignore[method-assign]
        factors.append(factor) or Trainer.train_step(trainer, x, factor, teacher)
    )
    trainer.run(trainer.read([photos]))
    assert factors == [0.1, 0.2]


def test_levels_of_all_processes_are_spread_evenly(photos: Path, tmp_path: Path) -> None:
    shares = []
    for rank in range(3):
        trainer = Trainer(tiny_trainable(), dataclasses.replace(OPTIONS, level_power=1.0), tmp_path)
        trainer.processes.rank, trainer.processes.count = rank, 3
        trainer.read([photos])
        shares += [level / (TINY.levels - 1) for level in trainer.next_levels(2)]
    shares.sort()
    assert np.diff([*shares, shares[0] + 1]) == pytest.approx(1 / 6)


def test_the_state_before_the_decay_is_kept(photos: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=6, batch=1, decay=0.5)
    train(TINY, options, [photos], tmp_path)
    assert load_checkpoint(tmp_path, "before-decay.pt")["step"] == 3
    # What decays from its beginning begins with what has decayed already.
    options = dataclasses.replace(options, steps=2, decay=1.0)
    train(TINY, options, [photos], tmp_path, resume="checkpoint.pt")
    assert load_checkpoint(tmp_path, "before-decay.pt")["step"] == 3
    options = dataclasses.replace(options, decay=0.5)
    train(TINY, options, [photos], tmp_path, resume="checkpoint.pt")
    assert load_checkpoint(tmp_path, "before-decay.pt")["step"] == 9
    train(TINY, dataclasses.replace(options, decay=1.0), [photos], tmp_path / "new")
    assert load_checkpoint(tmp_path / "new", "before-decay.pt")["step"] == 0


def test_the_moving_average_forgets_the_start(tmp_path: Path) -> None:
    trainer = Trainer(tiny_trainable(), dataclasses.replace(OPTIONS, ema=0.999), tmp_path)
    start = trainer.model.analysis.unfold.weight.detach().clone()
    trainer.train_step(torch.rand(2, 3, 64, 64), 1.0, None)
    moved, followed = (
        model.analysis.unfold.weight.detach() - start for model in (trainer.model, trainer.average)
    )
    torch.testing.assert_close(followed, 0.98 * moved, atol=1e-6, rtol=1e-3)


def test_a_gradient_that_is_out_of_line_is_skipped_until_it_lasts() -> None:
    model, average = tiny_trainable(), tiny_trainable().requires_grad_(False)
    optimizer = Optimizer(model, average, Processes(), clip=2.0)
    count = sum(parameter.numel() for parameter in model.parameters())

    def step(norm: float) -> float:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, norm / count**0.5)
        before = model.gains.log_gain.detach().clone()
        skipped = float(optimizer.step(torch.tensor(1e-3), torch.tensor(1e-3), torch.tensor(0.9)))
        assert torch.equal(before, model.gains.log_gain) is (skipped == 1)
        return skipped

    assert [step(norm) for norm in (1.0, 1.0, 11.0, 1.0, 9.0)] == [0, 0, 1, 0, 0]
    # What lasts is taken for usual.
    lasting = [step(100.0) for _ in range(100)]
    assert lasting[:4] == [1] * 4
    assert sum(lasting) < 50
    assert not any(lasting[50:])


def test_long_gradients_are_shortened() -> None:
    moments = []
    for norm in (1.0, 4.0, 8.0):
        model = tiny_trainable()
        optimizer = Optimizer(model, tiny_trainable().requires_grad_(False), Processes(), clip=4.0)
        count = sum(parameter.numel() for parameter in model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, norm / count**0.5)
        optimizer.step(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.9))
        seen = optimizer.adam.state[model.gains.log_gain]["exp_avg"]
        moments.append(float(seen.mean()) * count**0.5 / (1 - 0.9))
    assert moments == pytest.approx([1.0, 4.0, 4.0], rel=1e-4)


def test_parts_of_a_batch_count_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(OPTIONS, batch_levels=4, machine_share=0.4)
    trainer = Trainer(tiny_trainable(), options, tmp_path)
    weight = trainer.model.analysis.unfold.weight
    sizes, gradients = [], []

    def loss(
        config: ModelConfig, output: CodecOutput, x: torch.Tensor, *_: object, **__: object
    ) -> LossTerms:
        sizes.append((len(x), len(output.machine)))
        value = len(x) * weight.sum()
        return LossTerms(value, *(value.detach().new_tensor(float(len(x))) for _ in range(4)))

    def step(**_: object) -> torch.Tensor:
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
        return torch.tensor(0.0)

    monkeypatch.setattr("ugicm_train.train.rate_distortion_loss", loss)
    monkeypatch.setattr(trainer.optimizer, "step", step)
    mean = (4 + 4 + 4 + 1) / 7
    for _ in range(2):
        terms = trainer.train_step(torch.rand(7, 3, 64, 64), 1.0, None)
        # As many have a machine view as asked for, or more.
        assert sizes == [(2, 1), (2, 1), (2, 1), (1, 1)]
        sizes.clear()
        torch.testing.assert_close(gradients.pop(), torch.full_like(weight, mean))
        assert float(terms["bpp"]) == pytest.approx(mean)


def test_what_a_step_is_asked_for(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, matrix_lr=0.5, other_lr=0.25, ema=0.9, batch_levels=3)
    trainer = Trainer(tiny_trainable(), options, tmp_path)
    asked: list[dict[str, float]] = []
    trainer.graph_step = lambda x, levels, **given: asked.append(given)  # type: ignore[assignment]
    torch.manual_seed(0)
    for _ in range(1000):
        assert trainer.train_step(torch.rand(1), 0.1, None) == {}
    assert {(step["matrix_lr"], step["other_lr"], step["judge"]) for step in asked} == {(0.05, 0.025, None)}
    kept = [step["kept"] for step in asked]
    assert kept[0] == 1 / 50
    assert kept == sorted(kept)
    assert kept[-1] == 0.9
    # Mostly the machine's end, else all of the way.
    between = [step["strength"] for step in asked if step["strength"] != 1]
    assert len(between) == pytest.approx(150, abs=40)
    assert min(between) < 0.1
    assert max(between) > 0.9
    assert np.mean(between) == pytest.approx(0.5, abs=0.1)


def test_a_resumed_run_draws_anew(photos: Path, tmp_path: Path) -> None:
    drawn = []
    for step in (0, 60, 0):
        trainer = Trainer(tiny_trainable(), OPTIONS, tmp_path)
        trainer.step = step
        crops = trainer.read([photos]).batch(2)
        drawn.append((crops.sum().item(), trainer.next_levels(1), torch.rand(()).item()))
    assert drawn[0] == drawn[2]
    assert all(first != second for first, second in zip(drawn[0], drawn[1], strict=True))


def far_from_green(machine: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """A judge that dislikes green."""
    return (machine[:, 1] - original[:, 1]).abs().mean((1, 2)) + machine[:, 1].mean((1, 2))


def test_judge_moves_the_machine_view_alone() -> None:
    model = tiny_trainable()
    x = 0.5 + 0.1 * torch.rand(2, 3, 64, 64)
    level = torch.tensor([1.5, 1.5])
    output = model(x, level)
    plain = rate_distortion_loss(TINY, output, x, level)
    judged = rate_distortion_loss(TINY, output, x, level, judge=far_from_green)
    assert judged.loss > plain.loss
    assert judged.teacher > 0
    assert judged.mse_human == plain.mse_human
    half = rate_distortion_loss(TINY, output, x, level, judge=far_from_green, strength=0.5)
    assert plain.loss < half.loss < judged.loss
    gradient = torch.autograd.grad(
        judged.loss - plain.loss, [output.human, output.machine], allow_unused=True
    )
    assert gradient[0] is None or not gradient[0].any()
    assert gradient[1] is not None
    assert gradient[1].any()


@pytest.mark.parametrize("rates", [None, 2])
def test_the_machine_view_teaches_the_encoder_but_not_the_human_view(rates: int | None) -> None:
    model = tiny_trainable()
    x, level = torch.rand(2, 3, 64, 64), torch.tensor([0.4, 1.6] if rates else [1.6, 1.6])
    model(x, level, strength=0.5, rates=rates).machine.square().sum().backward()
    learns = {
        name.partition(".")[0]
        for name, weight in model.named_parameters()
        if weight.grad is not None and weight.grad.any()
    }
    assert {"analysis", "gains", *PREFERENCE[:: 1 if rates else 2]} <= learns
    assert not {name for name in learns if name.startswith("synthesis")}


def test_rates_are_of_noisy_latents_and_pictures_of_rounded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_trainable()
    x, level = torch.rand(1, 3, 64, 64), torch.tensor([1.0])

    def coded(z_noise: float, y_noise: float, *, noise: bool = True) -> CodecOutput:
        monkeypatch.setattr("ugicm_train.model.add_noise", lambda z: z + z_noise)
        monkeypatch.setattr("ugicm.codec.entropy_twin.add_noise", lambda y: y + y_noise)
        torch.manual_seed(0)
        with torch.no_grad():
            return model(x, level, noise=noise)

    monkeypatch.setattr(Paths, "alone", lambda paths, unit: unit < math.inf)
    plain = coded(0.0, 0.0)
    for noises in ((50.0, 0.0), (0.0, 50.0)):
        noisy = coded(*noises)
        assert noisy.bpp > plain.bpp + 0.03
        assert torch.equal(noisy.human, plain.human)
        assert torch.equal(noisy.machine, plain.machine)
        assert torch.equal(coded(*noises, noise=False).bpp, coded(0.0, 0.0, noise=False).bpp)
    # On paths, pictures are of the nearest ones, and rates of noise that is smaller.
    monkeypatch.setattr(Paths, "alone", lambda paths, unit: unit > math.inf)
    on_paths = coded(0.0, 0.0)
    assert torch.equal(coded(0.0, 50.0).bpp, on_paths.bpp)
    assert not torch.equal(on_paths.human, plain.human)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(model(x, level).human, on_paths.human)


def test_training_sees_paths_and_rates_noise_as_large_as_their_error() -> None:
    random = np.random.default_rng(0)
    for first, last in ((TRELLIS_FIRST, 14), (18, 40)):
        units = (random.integers(first, last, (256, 256)) - INDEX_OFFSET) / 2**INDEX_BITS
        x = random.logistic(0, LOGISTIC_SCALE * 2 ** (OCTAVES_PER_UNIT * units))
        step = TRELLIS_STEP / MEAN_UNIT
        points = nearest((x / step).astype(np.float32)) * step
        y, unit = torch.from_numpy(x).float(), torch.from_numpy(units).float()
        torch.manual_seed(0)
        seen, rated = as_coded(y.requires_grad_(), unit)
        assert float((rated - y).detach().square().mean()) == pytest.approx(
            ((points - x) ** 2).mean(), rel=0.03
        )
        # Paths of rows by scale, in whole steps and hardly further than those of rows as they come.
        steps = seen.detach().double() / step
        assert float((steps - steps.round()).abs().max()) < 1e-3
        assert float((seen - y).detach().square().mean()) == pytest.approx(
            ((points - x) ** 2).mean(), rel=0.02
        )
        (seen.sum() + 2 * rated.sum()).backward()
        assert torch.equal(y.grad, torch.full_like(y, 3))
        y = y.detach()
        below = torch.full_like(y, (TRELLIS_FIRST - INDEX_OFFSET - 0.51) / 2**INDEX_BITS)
        assert torch.equal(as_coded(y, below)[0], y.round())


def test_on_a_gpu_pictures_are_of_that_noise() -> None:
    unit = torch.tensor([-2.0, 1.0]).expand(1000, 2)
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    seen, rated = with_noise(x, unit)
    assert torch.equal(seen[:, 0], x[:, 0] + (x[:, 0].round() - x[:, 0]))
    assert torch.equal(seen[:, 1], rated[:, 1])
    assert float((rated[:, 1] - x[:, 1]).abs().max()) <= Paths().width / 2 < 0.5
    assert float((rated[:, 0] - x[:, 0]).abs().max()) > 0.49


def test_rows_of_a_path_are_cut_from_the_widest() -> None:
    units = torch.full((3 * SHORTEST + 5,), 1.0)
    units[-10:] = 0.5
    units[0] = -2.0  # alone
    x = torch.linspace(-3, 3, len(units))
    points = Paths().nearest(x, units)
    step = TRELLIS_STEP / MEAN_UNIT
    on_paths = ((points / step).round() * step - points).abs() < 1e-6
    # The four narrowest of those on paths are what is left of whole rows.
    alone = points == x.round()
    assert bool(alone[[0, *range(-10, -6)]].all())
    assert bool(on_paths[1:-10].all())
    assert bool(on_paths[-6:].all())


def test_judge_counts_in_proportion_to_the_rest_where_the_rate_can_change() -> None:
    x, level = torch.full((2, 3, 64, 64), 0.5), torch.tensor([1.0, 1.0])
    errors = torch.tensor([0.01, 0.05]).view(2, 1, 1, 1)

    def loss(bpp: torch.Tensor, judge: Judge | None) -> torch.Tensor:
        return rate_distortion_loss(
            TINY, CodecOutput(x + errors, x + errors, bpp), x, level, judge=judge
        ).loss

    def apart(machine: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        return machine.new_full((len(machine),), 0.3)

    bpp = torch.tensor([0.1, 0.4], requires_grad=True)
    torch.testing.assert_close(loss(bpp, apart) / loss(bpp, None), torch.tensor(1.3))


def test_a_percent_counts_the_same_at_any_rate_where_bits_cannot_move() -> None:
    x, level = torch.full((4, 3, 64, 64), 0.5), torch.tensor([1.0, 2.0, 1.0, 2.0])
    machine = torch.full_like(x, 0.6)

    def pull(distances: list[float]) -> torch.Tensor:
        """Gradient of the loss in each sample's distance, times the distances."""
        found = torch.tensor(distances, requires_grad=True)
        output = CodecOutput(x[:0], machine, torch.full((4,), 0.2))
        loss = rate_distortion_loss(TINY, output, x, level, judge=lambda *_: found).loss
        return torch.autograd.grad(loss, found)[0] * found.detach()

    quiet, loud, unequal = pull([0.1] * 4), pull([1.0, 0.01] * 2), pull([0.3, 0.1, 0.1, 0.1])
    torch.testing.assert_close(quiet, loud)
    torch.testing.assert_close(unequal[[1, 3]], quiet[[1, 3]])
    torch.testing.assert_close(unequal[0], 3 * unequal[2])
    assert not pull([0.0] * 4).any()  # and is a number
    assert float(unequal.sum()) == pytest.approx(float(quiet.sum()))


def test_the_loss_is_that_of_its_formula() -> None:
    """Of the first sample both views, of the second people's alone; each rate pulls by its own balance."""
    x = torch.full((2, 3, 64, 64), 0.5)
    human, machine = torch.tensor([0.01, 0.03]), torch.tensor([0.02])
    output = CodecOutput(
        x + human.view(2, 1, 1, 1), x[:1] + machine.view(1, 1, 1, 1), torch.tensor([0.2, 0.3])
    )
    for level in (0.0, 1.0, 1.7):
        terms = rate_distortion_loss(TINY, output, x, torch.full((2,), level))
        trade = TINY.lambda_min * (TINY.lambda_max / TINY.lambda_min) ** (level / (TINY.levels - 1))
        errors = (0.01**2 + 0.5 * 0.02**2) / 1.5, 0.03**2
        costs = [bpp + trade * 255**2 * error for bpp, error in zip((0.2, 0.3), errors, strict=True)]
        balance = (trade / (TINY.lambda_min * TINY.lambda_max) ** 0.5) ** -0.45
        assert balance * max(costs) < 4  # none is an outlier
        expected = np.mean([(balance * cost) ** 0.5 for cost in costs])
        assert float(terms.loss) == pytest.approx(expected, rel=1e-4)
        assert float(terms.mse_human) == pytest.approx((0.01**2 + 0.03**2) / 2, rel=1e-3)
        assert float(terms.mse_machine) == pytest.approx(0.02**2, rel=1e-3)


def test_busy_samples_count_by_the_square_root_of_their_loss() -> None:
    x, level = torch.full((2, 3, 64, 64), 0.5), torch.tensor([1.0, 1.0])
    human = (x + torch.tensor([0.01, 0.05]).view(2, 1, 1, 1)).requires_grad_()
    bpp = torch.tensor([0.1, 0.1], requires_grad=True)
    loss = rate_distortion_loss(TINY, CodecOutput(human, x[:0], bpp), x, level).loss
    by_rate, by_error = torch.autograd.grad(loss, [bpp, human])
    costs = 0.1 + lambda_of(TINY, level) * 255**2 * torch.tensor([0.01, 0.05]) ** 2
    torch.testing.assert_close(by_rate[0] / by_rate[1], (costs[1] / costs[0]).sqrt())
    # Rate and error of one sample trade as ever.
    per_error = by_error.sum((1, 2, 3)) / by_rate / (2 * torch.tensor([0.01, 0.05]))
    torch.testing.assert_close(per_error, lambda_of(TINY, level) * 255**2)


def test_a_sample_that_explodes_pulls_no_more_than_others() -> None:
    x, level = torch.full((4, 3, 64, 64), 0.5), torch.full((4,), 1.0)
    errors, bpp = torch.tensor([0.01, 0.1, 10.0, 1000.0]), torch.full((4,), 0.1)
    human = (x + errors.view(4, 1, 1, 1)).requires_grad_()
    loss = rate_distortion_loss(TINY, CodecOutput(human, x[:0], bpp), x, level).loss
    (gradient,) = torch.autograd.grad(loss, human)
    pulls = gradient.sum((1, 2, 3))
    assert (pulls > 0).all()
    assert pulls[3] < pulls[2] < pulls[1]
    # It is told as worse all the same.
    view = human.detach()
    told = [
        float(rate_distortion_loss(TINY, CodecOutput(view[i:j], x[:0], bpp[i:j]), x[i:j], level[i:j]).loss)
        for i, j in ((0, 1), (1, 2), (2, 3), (3, 4))
    ]
    assert told == sorted(told)
    judged = [
        float(
            rate_distortion_loss(
                TINY,
                CodecOutput(view[3:], view[3:], bpp[3:]),
                x[3:],
                level[3:],
                judge=lambda picture, _: picture.new_ones(len(picture)),
                teacher_weight=weight,
            ).loss
        )
        for weight in (0.0, 0.5, 2.0)
    ]
    assert judged == sorted(judged)


def test_a_run_that_diverges_is_stopped(tmp_path: Path) -> None:
    fine = {"bpp": 0.7, "loss": 0.8, "psnr_human": 30.0, "psnr_machine": 29.0, "skipped": 0}

    def check(step: int, **change: float) -> None:
        trainer.step = step
        trainer._check(fine | change, 50)

    trainer = Trainer(tiny_trainable(), OPTIONS, tmp_path)
    check(50)
    check(100, bpp=2.0, psnr_machine=17.0, skipped=49)
    for change, message in (
        ({"bpp": 4.7}, r"step 150: 4\.7 bits per pixel, and has had 0\.7; .*--matrix-lr .*--other-lr"),
        ({"bpp": math.nan}, r"nan bits per pixel, and has had 0\.7"),
        ({"loss": math.nan}, "a loss of nan; start again"),
        ({"psnr_machine": 13.0}, r"a machine view of 13\.0 dB, and has had 29\.0"),
        ({"psnr_human": math.nan}, r"a human view of nan dB, and has had 30\.0"),
        ({"skipped": 50}, "no usable gradient in 50 steps"),
    ):
        with pytest.raises(DivergedError, match=message):
            check(150, **change)
    trainer = Trainer(tiny_trainable(), OPTIONS, tmp_path)
    for change, message in (
        ({"bpp": math.inf}, "step 50: inf bits per pixel; start again"),
        ({"psnr_machine": 2.0}, r"a machine view of 2\.0 dB; start again"),
    ):
        with pytest.raises(DivergedError, match=message):
            check(50, **change)
    check(50, psnr_machine=math.inf)  # not decoded
    check(100, psnr_machine=math.inf)


def test_what_is_no_number_has_no_psnr() -> None:
    assert _psnr(0.01) == pytest.approx(20)
    assert _psnr(0.0) == math.inf  # a view that is not decoded
    assert math.isnan(_psnr(math.nan))


def test_a_batch_has_one_level() -> None:
    with pytest.raises(ValueError, match="one level"):
        tiny_trainable()(torch.rand(2, 3, 64, 64), torch.tensor([0.0, 1.0]))


def test_machine_view_of_a_part_of_the_batch() -> None:
    model = tiny_trainable()
    x, level = torch.rand(4, 3, 64, 64), torch.zeros(4)
    output = model(x, level, machine_count=1)
    assert len(output.machine) == 1
    assert torch.isfinite(rate_distortion_loss(TINY, output, x, level).loss)
    none = model(x, level, machine_count=0)
    assert torch.isfinite(rate_distortion_loss(TINY, none, x, level).loss)


@pytest.mark.parametrize("power", [0.8, 1.0, 1.2])
def test_levels_cover_the_ladder(power: float) -> None:
    levels = torch.tensor([level_of(TINY, share, power) for share in np.linspace(0, 1, 2000)])
    assert 0 <= levels.min() < 0.1
    assert float(levels.mean()) == pytest.approx((TINY.levels - 1) / (1 + power), rel=0.05)
    assert TINY.levels - 1.1 < levels.max() <= TINY.levels - 1
    ends = lambda_of(TINY, torch.tensor([0.0, TINY.levels - 1.0]))
    assert ends.tolist() == pytest.approx([TINY.lambda_min, TINY.lambda_max])


def test_estimated_rate_is_the_real_rate(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The float twin estimates what the integer model and coder spend, within 1 %."""
    twin = tiny_trainable().eval()
    with torch.no_grad():
        for head in twin.entropy.heads:
            head.weight.div_(8)  # an untrained model has outliers
    torch.save({"config": TINY.to_dict(), "average": twin.state_dict()}, tmp_path / "checkpoint.pt")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    # Of these 576x384 are rated.
    Image.open(photos / "coffee.png").crop((0, 0, 590, 400)).save(pictures / "coffee.png")
    assert main(["integer-cost", str(tmp_path), "--data", str(pictures), "--qualities", "5", "20"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["5", "20"]
    for _, float_bpp, real_bpp, percent, float_db, real_db in rows:
        assert float(real_bpp) == pytest.approx(float(float_bpp), rel=0.01)
        assert float(percent.removesuffix(" %")) == pytest.approx(0, abs=1)
        assert float(real_db) == pytest.approx(float(float_db), abs=0.1)

    Image.new("RGB", (64, 64)).save(pictures / "flat.png")
    assert main(["integer-cost", str(tmp_path), "--data", str(pictures), "--qualities", "5"]) == 1
    assert f"a picture in {pictures} is stored lossless" in capsys.readouterr().err


def test_what_cannot_be_rated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (200, 63)).save(tmp_path / "flat.png")
    for options, message in (
        ([], f"{tmp_path / 'flat.png'} has a side of less than 64 pixels"),
        (["--qualities", "10", "500"], "a quality must be in 1..100, got 500"),
    ):
        assert main(["integer-cost", str(tmp_path), "--data", str(tmp_path), *options]) == 1
        said = capsys.readouterr()
        assert message in said.err
        assert not said.out


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="exactly one of minutes and steps"):
        TrainOptions()
    with pytest.raises(ValueError, match="minutes must be above 0, got 0"):
        TrainOptions(minutes=0.0)
    for name in ("warmup_steps", "matrix_lr", "other_lr", "teacher_weight", "seed", "checkpoint_minutes"):
        for value in (-1, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got {value}"):
                dataclasses.replace(OPTIONS, **{name: value})
        dataclasses.replace(OPTIONS, **{name: 0})
    for name, value in (("seed", 1 << 64), ("threads", 10**11)):
        with pytest.raises(ValueError, match=rf"{name} must be at most \d+, got {value}"):
            dataclasses.replace(OPTIONS, **{name: value})
    for name, value in (("clip", -1.0), ("clip", math.nan), ("threads", -3)):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got {value}"):
            dataclasses.replace(OPTIONS, **{name: value})
    with pytest.raises(ValueError, match="multiple of 64"):
        TrainOptions(steps=1, crop=100)
    with pytest.raises(ValueError, match="machine_share"):
        TrainOptions(steps=1, machine_share=2)
    with pytest.raises(ValueError, match="batch_levels"):
        TrainOptions(steps=1, batch_levels=0)
    with pytest.raises(ValueError, match="batch must be above 0"):
        TrainOptions(steps=1, batch=0)
    with pytest.raises(ValueError, match="crop must be above 0"):
        TrainOptions(steps=1, crop=0)
    with pytest.raises(ValueError, match="level_power must be finite"):
        dataclasses.replace(OPTIONS, level_power=math.inf)
    with pytest.raises(ValueError, match="level_power must be above 0"):
        TrainOptions(steps=1, level_power=-0.8)
    with pytest.raises(ValueError, match=r"ema must be in 0\.\.1, got 1\.5"):
        TrainOptions(steps=1, ema=1.5)


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "--data", str(tmp_path / "no"), "--out", str(tmp_path / "o"), "--steps", "1"])
    assert code == 1
    assert "neither a folder nor a file" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "m")]) == 1
    assert "train first" in capsys.readouterr().err
    run = ["run", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--steps", "1"]
    assert main([*run, "--device", "cpu"]) == 1
    assert capsys.readouterr().err == f"ugicm-train: no photo in {tmp_path}\n"
    assert main([*run, "--seed", "-1"]) == 1
    assert "seed must be" in capsys.readouterr().err
    for size in ("-1", "nan", "inf"):
        assert main(["pack", str(tmp_path), "--out", str(tmp_path / "shards"), "--max-mb", size]) == 1
        assert "max-mb must be finite and above 0" in capsys.readouterr().err
    assert main([*run, "--device", "toaster"]) == 1
    assert "device 'toaster' cannot be used here" in capsys.readouterr().err
    other, half = tmp_path / "other.json", tmp_path / "half.json"
    other.write_text("{}")
    half.write_text(json.dumps({"model": TINY.to_dict() | {"channels": 12.5}}))
    for path, message in (
        (tmp_path, "neither a config.json nor one of"),
        (other, "describes no model"),
        (half, "describes no model: channels must be of type int, got 12.5"),
    ):
        with pytest.raises(SystemExit):
            main([*run, "--config", str(path)])
        assert message in capsys.readouterr().err


def test_a_model_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path)
    before = read_model(tmp_path)
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        whole(path, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_model(tmp_path, TINY, model_tensors(tiny_trainable(seed=1)), {})
    assert read_model(tmp_path).weights_sha256 == before.weights_sha256
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_signal_does_not_part_weights_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path)
    before, replace = read_model(tmp_path), Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path, TINY, model_tensors(tiny_trainable(seed=1)), {})
    assert read_model(tmp_path).weights_sha256 != before.weights_sha256
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_model_that_was_parted_is_put_together_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "model")
    replace, killed = Path.replace, tmp_path / "killed"

    def copied(path: Path, target: Path) -> Path:
        """What a kill after the first rename leaves."""
        new = replace(path, target)
        if not killed.exists():
            shutil.copytree(tmp_path / "model", killed)
        return new

    monkeypatch.setattr(Path, "replace", copied)
    write_tiny_model(tmp_path / "model", seed=1)
    with pytest.raises(ModelStoreError, match="damaged"):
        read_model(killed)
    replace(killed / ".config.json.tmp", killed / "config.json")
    assert read_model(killed).weights_sha256 == read_model(tmp_path / "model").weights_sha256


def test_what_is_far_out_has_its_exact_price() -> None:
    prior = FactorizedPrior(2)
    z = torch.tensor([-40.0, -20.0, -3.0, 0.0, 0.7, 3.0, 14.0, 20.0, 40.0])
    values = z.repeat(2, 1)[None, :, None]
    seen = prior.mass(values)
    # By the cumulative distribution, of which float64 has enough digits below.
    weight, location = prior.logits.softmax(-1).double(), prior.location.double()
    edges = -values.abs().double()[..., None] - location[None, :, None, None]
    cumulative = torch.sigmoid(edges + 0.5) - torch.sigmoid(edges - 0.5)
    torch.testing.assert_close(
        seen.double(), (weight[None, :, None, None] * cumulative).sum(-1), rtol=2e-6, atol=0
    )
    torch.testing.assert_close(prior.bits(values), prior.bits(-values))


def test_a_teacher_gets_the_precision_of_the_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def parse(*spec: str) -> None:
        asked.append(spec)
        raise ValueError

    monkeypatch.setattr("ugicm_train.teachers.parse_teacher", parse)
    common = ["--data", str(photos), "--steps", "1", "--teacher", "t", "--precision", "float32"]
    for command in (["run", *common, "--out", "run"], ["polish", "ugicm-s", *common]):
        assert main(command) == 1
    assert asked == [("t", "float32")] * 2


def test_training_needs_only_four_packages() -> None:
    """torch, numpy, Pillow and safetensors: the training machine may have nothing else."""
    code = (
        "import sys\n"
        "blocked = {'compressai', 'fastapi', 'rich', 'constriction', 'open_clip', 'typer',"
        " 'google_crc32c', 'pydantic', 'scipy', 'torchvision'}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in blocked:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import ugicm_train.train, ugicm_train.cli, ugicm_train.data\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ugicm_train.evaluation.rate_distortion", None)
    assert main(["rd", "model", "--data", "photos"]) == 1
    assert capsys.readouterr().err.endswith("is the extra installed? pip install 'ugicm[train]'\n")


def test_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in dataclasses.fields(TrainOptions):
        assert " ".join(option.metadata["help"].split()) in shown, option.name


def test_gradients_reach_every_parameter() -> None:
    model = tiny_trainable()
    x, level = torch.rand(2, 3, 64, 64), torch.tensor([1.6, 1.6])
    rate_distortion_loss(TINY, model(x, level), x, level).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing

"""Several processes, one model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import tiny_trainable, write_tiny_model
from tests.live import free_port
from ugicm.codec.store import read_model
from ugicm_train.model import PREFERENCE
from ugicm_train.parallel import Processes
from ugicm_train.train import Trainer, TrainOptions, load_checkpoint

PROGRAM = """
import sys, torch
from pathlib import Path
from ugicm.codec.config import ModelConfig
from ugicm_train.model import TrainableCodec
from ugicm_train.train import Trainer, TrainOptions

out, data, model = map(Path, sys.argv[1:])
options = TrainOptions(steps=6, batch=2, crop=64, warmup_steps=1, device="cpu", threads=1, machine_share=0.5)
torch.manual_seed(0)
trainer = Trainer(TrainableCodec(ModelConfig.from_json(model / "config.json")), options, out)
sampler = trainer.read([data])
first = sampler.batch(1)
trainer.run(sampler)
torch.save({"model": trainer.model.state_dict(), "crop": first}, out / f"rank{trainer.processes.rank}.pt")
"""


POLISH = """
import sys
from pathlib import Path
from ugicm_train.polish import polish
from ugicm_train.train import TrainOptions

out, data, model = map(Path, sys.argv[1:])
options = TrainOptions(steps=3, batch=2, crop=64, warmup_steps=1, device="cpu", threads=1)
polish(model, out / "polished", options, [data], out / "run", grain=0.1)
"""


STOP = """
import os, signal, sys
from pathlib import Path
from ugicm.codec.config import ModelConfig
from ugicm_train.train import Trainer, TrainOptions, train

out, data, model = map(Path, sys.argv[1:])
step = Trainer.train_step

def interrupted(self, *arguments):
    if self.step == 2 and self.processes.first:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, *arguments)

Trainer.train_step = interrupted
options = TrainOptions(steps=100, batch=2, crop=64, device="cpu", threads=1)
sys.exit(train(ModelConfig.from_json(model / "config.json"), options, [data], out / "run"))
"""


def run_twice(program: str, *arguments: Path, status: int = 0) -> None:
    """The program in two processes that work together, and end with the same status."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [status, status]


def test_matrices_are_dealt_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    matrices = [torch.nn.Parameter(torch.zeros(side, 2 * side)) for side in (8, 16, 8, 4, 16, 8, 8)]
    assert [len(part) for part in processes.assign(matrices)] == [7]
    monkeypatch.setattr(processes, "count", 2)
    assigned = processes.assign(matrices)
    assert sorted(id(m) for part in assigned for m in part) == sorted(map(id, matrices))
    work = [sum(m.numel() * min(m.shape) for m in part) for part in assigned]
    assert abs(work[0] - work[1]) <= 2 * 4**3
    assert [len(part) for part in processes.assign(matrices[:1])] == [1]


def test_gradients_are_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    monkeypatch.setattr(processes, "count", 4)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: values.add_(3.0))  # of the others
    moved, still = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    other = torch.nn.Parameter(torch.zeros(5))
    moved.grad, other.grad = torch.full((2, 3), 1.0), torch.full((5,), 5.0)
    processes.average_gradients([moved, still, other])
    assert torch.equal(moved.grad, torch.full((2, 3), 1.0))
    assert torch.equal(other.grad, torch.full((5,), 2.0))
    assert still.grad is None


def test_polishing_writes_one_model(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    data = tmp_path / "photo.png"
    PIL.Image.fromarray(photo).save(data)
    model = write_tiny_model(tmp_path / "model")
    run_twice(POLISH, tmp_path, data, model)
    before, after = read_model(model), read_model(tmp_path / "polished")
    assert after.digest == before.digest
    changed = {name for name, value in before.tensors.items() if not torch.equal(value, after.tensors[name])}
    assert changed
    assert all(name.partition(".")[0] in PREFERENCE for name in changed)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_no_process_waits_for_another_to_make_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_trainable(), TrainOptions(steps=1, device="cpu"), tmp_path / "run")
    monkeypatch.setattr(Processes, "first", False)
    with trainer.alone():
        assert list((tmp_path / "run").iterdir()) == []


def test_processes_see_other_crops_and_make_the_same_steps(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    data = tmp_path / "photo.png"
    PIL.Image.fromarray(photo).save(data)
    model = write_tiny_model(tmp_path / "model")
    run_twice(PROGRAM, tmp_path, data, model)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert not torch.equal(states[0]["crop"], states[1]["crop"])
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint["step"] == 6
    assert all(torch.equal(value, states[0]["model"][name]) for name, value in checkpoint["model"].items())


def test_processes_stop_together(
    tmp_path: Path, photo: NDArray[np.uint8], capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "photo.png"
    PIL.Image.fromarray(photo).save(data)
    run_twice(STOP, tmp_path, data, write_tiny_model(tmp_path / "model"), status=128 + signal.SIGINT)
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    assert capfd.readouterr().err.count("stopped at step 3: go on with --resume") == 1

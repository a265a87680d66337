"""Which stage of the codec does what: its time and its arithmetic."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ugicm.codec import coder, dense, entropy, trellis
from ugicm.codec.codec import Codec

Observe = Callable[[str, Callable[[], Any]], Any]
"""(stage, work) -> the result of the work."""

TRANSFORMS = ("analysis", "hyper analysis", "synthesis")
STAGES = (*TRANSFORMS[:2], "entropy model", "path search", "coder", TRANSFORMS[2])


class _Watched:
    """A transform whose calls go through `observe`."""

    def __init__(self, transform: Any, stage: str, observe: Observe) -> None:
        self._transform, self._stage, self._observe = transform, stage, observe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transform, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._observe(self._stage, lambda: self._transform(*arguments))


@contextmanager
def observed(codec: Codec, observe: Observe) -> Iterator[None]:
    """Pass the work of every stage through `observe`; decoding, the coder works within the entropy model."""
    undo: list[Callable[[], None]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            undo.append(partial(setattr, owner, name, vars(owner)[name]))
        else:
            undo.append(partial(delattr, owner, name))
        setattr(owner, name, value)

    def watch(owner: Any, name: str, stage: str) -> None:
        function = getattr(owner, name)

        def through(*arguments: Any, **options: Any) -> Any:
            return observe(stage, lambda: function(*arguments, **options))

        replace(owner, name, through)

    analysis_for, synthesis_for = codec._analysis_for, codec._synthesis_for
    replace(codec, "_analysis_for", lambda *key: _Watched(analysis_for(*key), "analysis", observe))
    replace(codec, "_hyper_analysis", _Watched(codec._hyper_analysis, "hyper analysis", observe))
    replace(codec, "_synthesis_for", lambda *key: _Watched(synthesis_for(*key), "synthesis", observe))
    watch(codec._entropy, "quantise", "entropy model")
    watch(entropy, "nearest", "path search")
    watch(codec._cpu_entropy, "pack", "coder")
    watch(codec._cpu_entropy, "unpack", "entropy model")
    watch(trellis.TrellisTables, "read", "coder")
    watch(coder.SymbolDecoder, "read", "coder")
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


class StageClock:
    """Seconds of each stage, without those of a stage within it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._inner = [0.0]

    def observe(self, stage: str, work: Callable[[], Any]) -> Any:
        self._inner.append(0.0)
        start = time.perf_counter()
        result = work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        passed = time.perf_counter() - start
        self.seconds[stage] += passed - self._inner.pop()
        self._inner[-1] += passed
        return result


def macs_per_pixel(codec: Codec) -> dict[str, float]:
    """Multiply-accumulates per pixel of each stage that has any, counted while it codes a small picture."""
    counts: dict[str, float] = defaultdict(float)

    def observe(stage: str, work: Callable[[], Any]) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = work()
        counts[f"{direction} {stage}" if stage == "entropy model" else stage] += counter.get_total_flops() / 2
        return result

    # Noise, so that it is not kept lossless.
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    fused, dense.FUSED = dense.FUSED, frozenset()  # the counter knows torch's public operations only
    try:
        with observed(codec, observe):
            direction = "encoder's"
            data = codec.encode([picture])
            direction = "decoder's"
            codec.decode(data)
    finally:
        dense.FUSED = fused
    return {stage: count / 128**2 for stage, count in counts.items() if count}

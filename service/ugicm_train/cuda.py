"""A training step for one GPU: all rates in one pass, and nothing that waits for the device.

It is captured once (once with each judge of the machine view) as a CUDA graph and replayed: launched from
Python, its 2,700 kernels would take longer than they run. What most of them belong to, the blocks, is
compiled, which fuses the layers between products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ugicm.codec.entropy_twin import EntropyBlock, EntropyNetwork
from ugicm.codec.networks import Block
from ugicm_train.losses import Judge, LossTerms, logged, rate_distortion_loss
from ugicm_train.model import TrainableCodec
from ugicm_train.optimizer import Optimizer

WARM_UP_STEPS = 3
"""Before the capture: libraries choose their kernels, the compiler compiles."""

RECOMPILE_LIMIT = 32
"""Variants of a function (sizes, precisions, what needs gradients) that are compiled."""


def compile_blocks(model: nn.Module) -> None:
    """Have the parts of which most of a step consists compiled; equal ones share what is compiled."""
    from torch._dynamo import config  # slow to import, and needed here only

    # A step with a machine view has some nine kinds of blocks; beyond torch's 8, they would not be compiled.
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    compiled: dict[object, Callable[..., Tensor]] = {}
    for module in model.modules():
        if isinstance(module, (Block, EntropyBlock, EntropyNetwork)):
            function = module.function
            if function not in compiled:
                compiled[function] = torch.compile(function, dynamic=False)
            module.function = compiled[function]


class GraphStep:
    """One update of a model; a CUDA graph where the model is on such a device."""

    def __init__(
        self,
        model: TrainableCodec,
        optimizer: Optimizer,
        *,
        shape: tuple[int, ...],
        rates: int,
        machine_rates: int = 0,
        teacher_weight: float = 1.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """A step that is captured when called.

        Args:
            model: what is trained.
            optimizer: of this model.
            shape: of a batch.
            rates: equal parts of a batch, each of one rate.
            machine_rates: how many of these, from the first, have a machine view as well.
            teacher_weight: of the judge's distance.
            dtype: precision of the transforms.
        """
        self.model, self.optimizer, self.rates, self.dtype = model, optimizer, rates, dtype
        self.machine_count, self.teacher_weight = shape[0] // rates * machine_rates, teacher_weight
        device = next(model.parameters()).device
        self.x = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
        # Level of each rate, strength, learning rates of Muon and Adam, share of the average that is kept.
        self.inputs = torch.zeros(rates + 4, device=device)
        self.sums = {name: torch.zeros((), device=device) for name in (*LossTerms._fields, "skipped", "lost")}
        self.graphs: dict[Judge | None, torch.cuda.CUDAGraph] = {}

    def _update(self, judge: Judge | None) -> None:
        levels, (strength, *optimizing) = self.inputs[: self.rates], self.inputs[self.rates :]
        level = levels.repeat_interleave(len(self.x) // self.rates)
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(
            self.x.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        ):
            output = self.model(
                self.x, level, machine_count=self.machine_count, strength=strength, rates=self.rates
            )
        terms = rate_distortion_loss(
            self.model.config,
            output,
            self.x,
            level,
            judge=judge,
            teacher_weight=self.teacher_weight,
            strength=strength,
        )
        terms.loss.backward()
        for name, value in logged(terms._asdict(), self.optimizer.step(*optimizing)).items():
            self.sums[name].add_(value)

    def __call__(
        self,
        x: Tensor,
        levels: Sequence[float],
        *,
        strength: float = 1.0,
        judge: Judge | None = None,
        matrix_lr: float,
        other_lr: float,
        kept: float,
    ) -> None:
        """Queue one update; `sums` adds up what it finds."""
        self.x.copy_(x)
        inputs = torch.tensor([*levels, strength, matrix_lr, other_lr, kept])
        if not self.x.is_cuda:
            self.inputs.copy_(inputs)
            self._update(judge)
            return
        self.inputs.copy_(inputs.pin_memory(), non_blocking=True)
        if judge not in self.graphs:
            self.graphs[judge] = self._capture(judge)
        self.graphs[judge].replay()

    def _capture(self, judge: Judge | None) -> torch.cuda.CUDAGraph:
        asked, found = self.inputs.clone(), {name: total.clone() for name, total in self.sums.items()}
        # The rehearsals change nothing but the optimisers' averages.
        self.inputs[-3:] = torch.tensor([0.0, 0.0, 1.0], device=self.x.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._update(judge)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # They take turns, and so may share their memory.
        with torch.cuda.graph(graph, pool=next((other.pool() for other in self.graphs.values()), None)):
            self._update(judge)
        self.inputs.copy_(asked)
        for name, total in found.items():
            self.sums[name].copy_(total)
        return graph

    def take_sums(self) -> dict[str, float]:
        """What has been added up since the last time; waits for the device."""
        values = torch.stack(list(self.sums.values())).tolist()
        for total in self.sums.values():
            total.zero_()
        return dict(zip(self.sums, values, strict=True))

"""Distance of two pictures in the features of a frozen network.

Per tapped block (shallow, middle, deep): 1 - cosine of the two feature vectors at each position, averaged
over positions. The same for the embedding of the whole region. The distance is the mean of these terms; each
lies in 0..2, so every depth counts alike. UG-ICM (Yin et al., AAAI 2025) compares the embedding alone; tasks
need all depths (CoTAM, ICLR 2026).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugicm.codec.device import pick_precision
from ugicm_train.losses import Judge, Teacher
from ugicm_train.regions import cut, draw_regions


class TeacherError(ValueError):
    """A teacher cannot be made; the message says what to install or which file to give."""


def require(module: str, package: str) -> Any:
    """Import `module`, or say which `package` to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TeacherError(
            f"this teacher needs the package {package!r} ({error}): pip install {package}"
        ) from error


def positions(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def feature_distance(seen: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine of the vectors at each position, (B, positions, C) each -> mean over positions, (B,)."""
    return 1 - F.cosine_similarity(seen.float(), wanted.float(), dim=-1).mean(1)


class FeatureTeacher:
    """Compares a random region of two pictures by the features of a frozen network.

    `network` maps (B, 3, side, side), normalised by `mean` and `std`, to a list of (B, positions, C): the
    tapped blocks, then the embedding as a single position. There is a judge for each of the `sides`, in
    pixels, so that what is learned does not hang on one scale.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.sides = tuple(sides)
        self.network = network.eval().requires_grad_(False)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.precision = "auto"
        """Of the network: auto (what is fast where the pictures are), float32 or bfloat16."""
        self._dtype: torch.dtype | None = None
        """None before it is first asked."""
        self.judges = tuple(partial(self.distance, side=side) for side in self.sides)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Features of (B, 3, side, side) in [0, 1]."""
        device = pictures.device
        if self._dtype is None or self._mean.device != device:
            # Converted once: autocast would convert frozen weights again at every call.
            self._dtype = pick_precision(self.precision, device)
            self._mean, self._std = self._mean.to(device), self._std.to(device)
            self.network.to(device, self._dtype)
        x = ((pictures - self._mean) / self._std).to(self._dtype)
        return self.network(x.contiguous(memory_format=torch.channels_last))

    def draw(self) -> Judge:
        """The judge at one of the sides."""
        return self.judges[int(torch.randint(len(self.judges), ()))]

    def distance(self, machine: Tensor, original: Tensor, *, side: int) -> Tensor:
        """Distance of (B, 3, H, W) pictures in [0, 1], (B,) in 0..2; differentiable in `machine` only."""
        boxes = draw_regions(original)
        with torch.no_grad():
            wanted = self.features(cut(original, boxes, side))
        seen = self.features(cut(machine, boxes, side))
        terms = [feature_distance(a, b) for a, b in zip(seen, wanted, strict=True)]
        return torch.stack(terms).mean(0)


class TeacherMix:
    """Several teachers, one drawn at a time: in the mean the weighted sum of all, at the cost of one.

    Weights say how often a teacher is drawn, so that they count where distances are made alike, too.
    """

    def __init__(self, parts: Sequence[tuple[Teacher, float]]) -> None:
        """Of `parts`: teachers with their weights.

        Raises:
            TeacherError: all weights are 0.
        """
        self.parts = tuple(parts)
        self._weights = torch.tensor([weight for _, weight in self.parts])
        self._sum = float(self._weights.sum())
        if self._sum <= 0:
            raise TeacherError("the weights of all teachers are 0: give one of them a larger one")
        self._times = cache(_times)

    def draw(self) -> Judge:
        """A judge of one of the teachers, times the sum of all weights."""
        teacher, _ = self.parts[int(torch.multinomial(self._weights, 1))]
        return self._times(self._sum, teacher.draw())


def _times(factor: float, judge: Judge) -> Judge:
    def judged(machine: Tensor, original: Tensor) -> Tensor:
        return factor * judge(machine, original)

    return judged

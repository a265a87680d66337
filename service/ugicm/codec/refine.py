"""Refinement: optimise the latent of one picture at the encoder, for fewer bits and less error.

A decoder notices nothing. Stochastic Gumbel annealing (Yang, Bamler and Mandt, "Improving inference for
neural image compression", NeurIPS 2020): each symbol is drawn between its two neighbouring integers, softly
and with gradients, from a distribution that hardens from step to step. Symbols on paths of the trellis
(`ugicm.codec.trellis`) get noise instead, as large as their error will be. The hyper latent stays as it is:
moving it too gained nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ugicm.codec.conditioning import Gains, lambda_of
from ugicm.codec.config import ModelConfig
from ugicm.codec.device import making_modules, without_autocast
from ugicm.codec.entropy_twin import EntropyNetwork, Paths, float_weights
from ugicm.codec.errors import CodecError
from ugicm.codec.networks import Synthesis
from ugicm.codec.trellis import TrellisTables

MAX_STEPS = 10_000
LEARNING_RATE = 0.03
"""Of Adam, in quantisation steps; falls linearly to zero."""
BETAS = (0.7, 0.95)
ERROR_WEIGHT = 1.5
"""Of the squared error, times what it has in training: from one quality to the next, pictures pay 1.2 to 2.4
times as many bits for it."""
WARMEST, COLDEST = 0.5, 0.15
"""Temperatures. The coldest is reached before the end: `COOLED` of the way."""
COOLED = 0.85


def check_steps(steps: int) -> None:
    """``CodecError`` for what is no number of steps in 0..`MAX_STEPS`."""
    if not isinstance(steps, int | np.integer) or not 0 <= steps <= MAX_STEPS:
        raise CodecError(f"refine must be in 0..{MAX_STEPS} steps, got {steps}")


class Frame(NamedTuple):
    """A tile to refine within what is decoded around it."""

    y: Tensor
    """Latent after gains, the tile and its margin, (h, w, M) float32."""
    rows: slice
    columns: slice
    """Where the tile lies in it."""
    pixels: Tensor
    """The original there, uint8 (H, W, 3); at most 16 h x 16 w, as padding of the picture does not count."""


class Refiner:
    """Minimises bits + `ERROR_WEIGHT` lambda 255^2 squared error of the human view over a tile's symbols."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        gains: Gains,
        trellis: TrellisTables,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``gains`` frozen, on ``device``; ``dtype``: precision of the networks."""
        self._paths = Paths(trellis.first, trellis.step)
        self._config, self._gains = config, gains
        self._device, self._dtype = device, dtype
        with making_modules():
            network = EntropyNetwork(config)
        network.load_state_dict(float_weights(tensors), assign=True)
        self._entropy = network.requires_grad_(False).to(device, dtype)

    @without_autocast
    def __call__(
        self, synthesis: Synthesis, frame: Frame, z_hat: Tensor, level: Tensor, steps: int
    ) -> Tensor:
        """The tile's latent after gains, moved so that rounding it is cheaper; the same on every call.

        Args:
            synthesis: that of the human view at this level, frozen, in the networks' precision.
            frame: the tile and its surroundings.
            z_hat: rounded hyper latent of the tile, (h/4, w/4, N).
            level: (1,) in 0 .. levels - 1.
            steps: of optimisation, at least 1.

        Returns:
            (h, w, M) float32, the tile without its margin.
        """
        # Latents made for inference cannot take part in gradients, their copies can.
        with torch.inference_mode(False), torch.enable_grad():
            around, z, level = (x.clone() for x in (_channels_first(frame.y), _channels_first(z_hat), level))
            inverse, z = self._gains(level)[1], z.to(self._dtype)
            original = _channels_first(frame.pixels.to(self._device)).float() / 255
            height, width = original.shape[2:]
            weight = ERROR_WEIGHT * float(lambda_of(self._config, level)) * 255**2 / 3
            y = around[..., frame.rows, frame.columns].clone().requires_grad_()
            adam = torch.optim.Adam([y], betas=BETAS)
            generator = torch.Generator(self._device).manual_seed(0)
            for step in range(steps):
                progress = step / steps
                for group in adam.param_groups:
                    group["lr"] = LEARNING_RATE * (1 - progress)
                temperature = WARMEST * (COLDEST / WARMEST) ** min(1.0, progress / COOLED)

                def drawn(x: Tensor, unit: Tensor, temperature: float = temperature) -> tuple[Tensor, Tensor]:
                    uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                    seen = self._paths.seen(x, unit, draw(x, temperature, uniform), uniform - 0.5)
                    return seen, seen

                y_hat, bits = self._entropy(z, y, drawn)
                seen = around.clone()
                seen[..., frame.rows, frame.columns] = y_hat
                latent = (seen * inverse).to(self._dtype, memory_format=torch.channels_last)
                picture = synthesis(latent)
                error = (picture[..., :height, :width] - original).square().sum()
                adam.zero_grad()
                (bits.sum() + weight * error).backward()
                adam.step()
            return y.detach()[0].permute(1, 2, 0).contiguous()


def draw(x: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Softly one of the two integers around x, the nearer the likelier; differentiable, shaped like x.

    ``uniform``: random numbers in [0, 1), which decide.

    Of two, Gumbel's trick is a logistic one (equation 8 of the paper, its logits -atanh(distance) / T).
    """
    below = x.floor()
    share = (x - below).clamp(1e-4, 1 - 1e-4)
    logit = (torch.atanh(share) - torch.atanh(1 - share)) / temperature
    uniform = uniform.clamp(1e-7, 1 - 1e-7)
    return below + torch.sigmoid((logit + torch.logit(uniform)) / temperature)


def _channels_first(x: Tensor) -> Tensor:
    """(h, w, C) -> (1, C, h, w)."""
    return x.permute(2, 0, 1)[None]

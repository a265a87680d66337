"""The trainable codec: production transforms plus the differentiable twin of the exact entropy model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ugicm.codec.conditioning import Gains
from ugicm.codec.config import ModelConfig
from ugicm.codec.entropy_twin import LIKELIHOOD_MIN, EntropyNetwork, add_noise, round_straight
from ugicm.codec.networks import Analysis, HyperAnalysis, Synthesis


class FactorizedPrior(nn.Module):
    """Logistic mixture per channel of the hyper latent; becomes integer tables on export."""

    def __init__(self, channels: int, components: int = 3) -> None:
        super().__init__()
        self.location = nn.Parameter(torch.linspace(-2, 2, components).repeat(channels, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, components))
        self.logits = nn.Parameter(torch.zeros(channels, components))

    def mass(self, z: Tensor) -> Tensor:
        """Probability of the unit bin around z, (B, N, h, w) -> the same shape."""
        z = z.float()[..., None]
        location = self.location[None, :, None, None]
        scale = self.log_scale.exp()[None, :, None, None]
        weight = self.logits.softmax(-1)[None, :, None, None]
        upper = torch.sigmoid((z + 0.5 - location) / scale)
        lower = torch.sigmoid((z - 0.5 - location) / scale)
        return (weight * (upper - lower)).sum(-1)

    def bits(self, z: Tensor) -> Tensor:
        return -torch.log2(self.mass(z).clamp_min(LIKELIHOOD_MIN))


class CodecOutput(NamedTuple):
    human: Tensor
    """Picture at strength 0, (B, 3, H, W), about [0, 1]."""
    machine: Tensor
    """Picture at the other strength of the first samples, (machine_count, 3, H, W)."""
    bpp: Tensor
    """Estimated bits per pixel, (B,)."""


class TrainableCodec(nn.Module):
    """One encode, two decodes of the same latent."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.analysis = Analysis(config)
        self.gains = Gains(config.levels, config.latent_channels, config.lambda_max / config.lambda_min)
        self.hyper_analysis = HyperAnalysis(config)
        self.prior = FactorizedPrior(config.hyper_channels)
        self.entropy = EntropyNetwork(config)
        self.synthesis = Synthesis(config)
        self.preference = Synthesis(config)
        """What the machine's synthesis transform adds to each weight of the human's."""
        self.forget_machine()

    @torch.no_grad()
    def forget_machine(self) -> None:
        """Make the machine view the human view."""
        for change in self.preference.parameters():
            change.zero_()

    def machine_view(self, latent: Tensor, strength: float) -> Tensor:
        """Decode at `strength`; gradients reach the latent and the difference, not the human's transform."""
        difference = dict(self.preference.named_parameters())
        blended = {
            name: weight.detach() + strength * difference[name]
            for name, weight in self.synthesis.named_parameters()
        }
        return torch.func.functional_call(self.synthesis, blended, (latent,))

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        *,
        machine_count: int | None = None,
        strength: float = 1.0,
        noise: bool = True,
    ) -> CodecOutput:
        """``x`` (B, 3, H, W) in [0, 1], H and W multiples of 64; ``level`` (B,) in [0, levels-1].

        The machine view, at `strength`, is decoded for the first `machine_count` samples (all, if None).
        """
        batch, _, height, width = x.shape
        count = batch if machine_count is None else machine_count
        gain, inverse = self.gains(level)
        y = self.analysis(x).float() * gain
        z = self.hyper_analysis(y).float()
        z_bits = self.prior.bits(add_noise(z) if noise else z.round()).sum((1, 2, 3))
        y_hat, y_bits = self.entropy(round_straight(z), y, noise=noise)
        latent = (y_hat * inverse).contiguous(memory_format=torch.channels_last)
        human = self.synthesis(latent)
        machine = self.machine_view(latent[:count], strength) if count else human[:0]
        return CodecOutput(human, machine, (z_bits + y_bits) / (height * width))

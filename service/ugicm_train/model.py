"""The trainable codec: production transforms plus the differentiable twin of the exact entropy model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ugicm.codec.conditioning import Gains, tilt_of
from ugicm.codec.config import LATENT_STRIDE, ModelConfig
from ugicm.codec.entropy_twin import (
    LIKELIHOOD_MIN,
    EntropyNetwork,
    add_noise,
    as_coded,
    logistic_mass,
    round_all,
    round_straight,
)
from ugicm.codec.networks import (
    Analysis,
    HyperAnalysis,
    Synthesis,
    Weights,
    between_rates,
    moved_weights,
    weights_of,
)
from ugicm_train.scales import Scales


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
        inverse = torch.exp(-self.log_scale)[None, :, None, None]
        weight = self.logits.softmax(-1)[None, :, None, None]
        return (weight * logistic_mass(z, location, inverse)).sum(-1)

    def bits(self, z: Tensor) -> Tensor:
        return -torch.log2(self.mass(z).clamp_min(LIKELIHOOD_MIN))


PREFERENCE = ("preference", "preference_low", "preference_high")
"""Parts that make up the machine view."""
DIFFERENCES = ("analysis_low", "analysis_high", "synthesis_low", "synthesis_high", *PREFERENCE)
"""Parts of the model that others are moved by (`ugicm.codec.networks.moved_weights`)."""
SCALED = ("analysis", "hyper_analysis", "entropy", "synthesis", *DIFFERENCES)
"""Parts that may learn `Scales` in place of weights: all but gains and prior, which are small."""
DIFFERENCE_PACE = 8.0
"""How many times as fast scales of `DIFFERENCES` learn: these weights are small, and so are parts of them."""


@torch.no_grad()
def make_zero(change: nn.Module) -> None:
    """Forget what a difference of weights has learned."""
    for parameter in change.parameters():
        parameter.zero_()


def has_machine_view(model: TrainableCodec) -> bool:
    """Whether the machine's synthesis transform differs from the human's at all."""
    return any(weight.any() for part in PREFERENCE for weight in getattr(model, part).parameters())


def scaled_parts(state: Mapping[str, Tensor]) -> set[str]:
    """Parts that learn `Scales`, of the state of a `TrainableCodec`."""
    return {name.split(".")[1] for name in state if name.startswith("scales.")}


class CodecOutput(NamedTuple):
    human: Tensor
    """Picture at strength 0, (B, 3, H, W), about [0, 1]."""
    machine: Tensor
    """Picture at the other strength of the first samples, (machine_count, 3, H, W)."""
    bpp: Tensor
    """Estimated bits per pixel, (B,)."""


def stacked_weights(
    middle: Weights, low: Weights, high: Weights, level: Tensor, levels: int
) -> dict[str, Tensor]:
    """`moved_weights` at each of the levels (R,), stacked: every weight gets a first dimension R.

    In one product for all of them, and without asking the device for a value.
    """
    tilt = tilt_of(level, levels)
    shares = torch.stack([torch.ones_like(tilt), (-tilt).relu(), tilt.relu()], 1)
    flat = torch.stack(
        [torch.cat([source[name].flatten() for name in middle]) for source in (middle, low, high)]
    )
    with torch.autocast(flat.device.type, enabled=False):
        mixed = shares @ flat
    parts = mixed.split([value.numel() for value in middle.values()], 1)
    return {
        name: part.reshape(len(level), *value.shape)
        for (name, value), part in zip(middle.items(), parts, strict=True)
    }


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
        self.analysis_low, self.analysis_high = Analysis(config), Analysis(config)
        self.synthesis_low, self.synthesis_high = Synthesis(config), Synthesis(config)
        """What the lowest and the highest rate's transforms add to each weight of the middle rate's."""
        self.preference = Synthesis(config)
        """What the machine's synthesis transform adds to each weight of the human's, at the middle rate."""
        self.preference_low, self.preference_high = Synthesis(config), Synthesis(config)
        """What the lowest and the highest rate add to that."""
        for name in DIFFERENCES:
            make_zero(getattr(self, name))
        self.scales = nn.ModuleDict()
        """What learns in place of parts' weights, by these parts' names."""

    def learn_scales(self, parts: Iterable[str]) -> None:
        """From now on, weights of these parts (of `SCALED`) learn nothing but `Scales`."""
        for name in parts:
            part = getattr(self, name).requires_grad_(False)
            self.scales[name] = Scales(part, DIFFERENCE_PACE if name in DIFFERENCES else 1.0)

    @torch.no_grad()
    def settle_scales(self) -> None:
        """Put what scales have learned into the weights."""
        for name in self.scales:
            getattr(self, name).load_state_dict(self.weights_of(name))
        self.scales.clear()

    def weights_of(self, part: str) -> Weights:
        """Weights of a part, by name, scaled."""
        weights = weights_of(getattr(self, part))
        if part not in self.scales:
            return weights
        scaled: Weights = self.scales[part](weights)
        return scaled

    def _call(self, part: str, *inputs: Any) -> Any:
        """What a part makes of `inputs` with its `weights_of`."""
        return torch.func.functional_call(getattr(self, part), dict(self.weights_of(part)), inputs)

    def _between_rates(self, part: str, level: Tensor, rates: int | None) -> dict[str, Tensor]:
        """Weights of a part at the level of a batch, or, stacked, at those of its `rates` equal parts.

        Raises:
            ValueError: no parts, but the levels differ.
        """
        middle, low, high = (self.weights_of(name) for name in (part, f"{part}_low", f"{part}_high"))
        if rates is not None:
            return stacked_weights(middle, low, high, level[:: len(level) // rates], self.config.levels)
        if len(level.unique()) != 1:
            raise ValueError(f"a batch is coded at one level, got {level.tolist()}")
        tilt = tilt_of(float(level[0]), self.config.levels)
        return moved_weights(middle, *between_rates(low, high, tilt))

    def latent_of(self, x: Tensor, level: Tensor, rates: int | None = None) -> Tensor:
        """y before gains, (B, M, H/16, W/16)."""
        weights = self._between_rates("analysis", level, rates)
        latent: Tensor = torch.func.functional_call(self.analysis, weights, (x,))
        return latent

    def human_view(self, latent: Tensor, level: Tensor, rates: int | None = None) -> Tensor:
        """Decode (B, M, H/16, W/16) for people."""
        weights = self._between_rates("synthesis", level, rates)
        view: Tensor = torch.func.functional_call(self.synthesis, weights, (latent,))
        return view

    def machine_view(
        self,
        latent: Tensor,
        level: Tensor,
        strength: float | Tensor,
        *,
        count: int | None = None,
        rates: int | None = None,
    ) -> Tensor:
        """Decode the first `count` samples (all, if None) at `strength`; gradients reach the latent and the
        difference, not the human's transform.

        Raises:
            ValueError: `count` is not that of whole parts, where the batch has `rates` of them.
        """
        count = len(latent) if count is None else count
        if not count:
            return latent.new_empty(0, 3, *(LATENT_STRIDE * side for side in latent.shape[2:]))
        if rates is not None:
            whole, rest = divmod(count * rates, len(latent))
            if rest:
                raise ValueError(f"{count} of {len(latent)} samples are no whole parts of {rates}")
            rates = whole
        latent, level = latent[:count], level[:count]
        with torch.no_grad():
            human = self._between_rates("synthesis", level, rates)
        added = self._between_rates("preference", level, rates)
        weights = {name: value + strength * added[name] for name, value in human.items()}
        view: Tensor = torch.func.functional_call(self.synthesis, weights, (latent,))
        return view

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        *,
        machine_count: int | None = None,
        strength: float | Tensor = 1.0,
        noise: bool = True,
        rates: int | None = None,
    ) -> CodecOutput:
        """``x`` (B, 3, H, W) in [0, 1], H and W multiples of 64; ``level`` (B,) in [0, levels-1], all
        the same, or the same in each of `rates` equal parts of the batch.

        The machine view, at `strength`, is decoded for the first `machine_count` samples (all, if None).
        """
        height, width = x.shape[2:]
        gain, inverse = self.gains(level)
        y = self.latent_of(x, level, rates).float() * gain
        z = self._call("hyper_analysis", y).float()
        z_bits = self.prior.bits(add_noise(z) if noise else z.round()).sum((1, 2, 3))
        y_hat, y_bits = self._call("entropy", round_straight(z), y, as_coded if noise else round_all)
        latent = (y_hat * inverse).contiguous(memory_format=torch.channels_last)
        human = self.human_view(latent, level, rates)
        machine = self.machine_view(latent, level, strength, count=machine_count, rates=rates)
        return CodecOutput(human, machine, (z_bits + y_bits) / (height * width))

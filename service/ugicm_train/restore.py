"""From a stored model back to a trainable one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ugicm.codec.coder import TOTAL
from ugicm.codec.conditioning import Gains, at_level
from ugicm.codec.config import ModelConfig
from ugicm.codec.entropy_twin import float_weights
from ugicm.codec.networks import between_rates, moved_weights, weights_of
from ugicm.codec.store import WEIGHTS_FILE, StoredModel, read_model
from ugicm_train.export import read_training
from ugicm_train.model import FactorizedPrior, TrainableCodec
from ugicm_train.train import CHECKPOINT, LOG

PRIOR_STEPS = 400
RATE_FIELDS = ("name", "lambda_min", "lambda_max")
SIZE_FIELDS = ("channels", "encoder_blocks", "decoder_blocks", "context_blocks")
"""What may differ between a stored model and the one that starts from it; of these, what may only grow."""


def restore(config: ModelConfig, tensors: dict[str, Tensor]) -> TrainableCodec:
    """The trainable twin of a stored model, close enough to give the latents that a decoder sees.

    But for symbols on paths (`ugicm.codec.trellis`), which the twin rounds alone or gives noise. The hyper
    prior, stored as tables only, is fitted to them.

    Raises:
        ValueError: the tensors are not those of this config.
    """
    model = TrainableCodec(config)
    not_trained = ("entropy.", "tables.", "grain", "reach", "largest")
    state = {name: value for name, value in tensors.items() if not name.startswith(not_trained)}
    state |= {f"entropy.{name}": value for name, value in float_weights(tensors).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("prior.") for name in missing):
        raise ValueError(f"the model does not fit its config: missing {missing}, unexpected {unexpected}")
    fit_prior(model.prior, *hyper_tables(tensors))
    return model


def read_stored(folder: Path) -> StoredModel:
    """As `read_model`, but says of a run's folder what to do with it.

    Raises:
        ValueError: a run, or no whole model.
    """
    if not (folder / WEIGHTS_FILE).exists() and any((folder / name).exists() for name in (CHECKPOINT, LOG)):
        raise ValueError(f"{folder} is a run, not a model: ugicm-train export {folder} MODEL makes one of it")
    return read_model(folder)


def read_trainable(folder: Path) -> tuple[TrainableCodec, dict[str, Any]]:
    """A stored model as `restore` makes it, and the hash of its weights with what it says about its training.

    Raises:
        ValueError: it shows only a part of its machine view.
    """
    stored = read_stored(folder)
    if (reach := stored.tensors.get("reach")) is not None and not bool((reach == 1).all()):
        # What is decoded there would be trained, and exported, as if nothing were held back.
        shares = " ".join(f"{value:.4g}" for value in reach.tolist())
        raise ValueError(
            f"{folder} shows only a part of its machine view at each level (reach {shares}), and this takes "
            f"all of it: use a copy, made with `ugicm-train mix COPY {folder} {folder} --reach"
            f"{' 1' * len(reach)}`"
        )
    record = {"weights": stored.weights_sha256} | read_training(folder)
    return restore(stored.config, stored.tensors), record


def hyper_tables(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Frequencies and lengths of every hyper channel's table at the middle rate, no neighbours known."""
    choice, lengths = tensors["tables.z.choice"], tensors["tables.z.lengths"]
    chosen = choice[len(choice) // 2, 0].tolist()
    tables = tensors["tables.z.frequencies"].split(lengths.tolist())
    return torch.cat([tables[index] for index in chosen]), lengths[chosen]


def fit_prior(prior: FactorizedPrior, frequencies: Tensor, lengths: Tensor) -> float:
    """Fit the mixtures to integer tables by cross entropy; returns the mean excess in bits a symbol."""
    radius = int(lengths.max()) // 2 - 1
    target = torch.zeros(len(lengths), 2 * radius + 1)
    for row, table in zip(target, frequencies.split(lengths.tolist()), strict=True):
        own = len(table) // 2 - 1
        row[radius - own : radius + own + 1] = table[:-1] / TOTAL
    target /= target.sum(1, keepdim=True)
    values = torch.arange(-radius, radius + 1).float()
    mean = (target * values).sum(1)
    spread = ((target * values**2).sum(1) - mean**2).sqrt().clamp_min(0.1)
    count = prior.location.shape[1]
    with torch.no_grad():
        prior.location.copy_(mean[:, None] + spread[:, None] * torch.linspace(-0.5, 0.5, count))
        prior.log_scale.copy_((spread / 2).log()[:, None].expand(-1, count))
    adam = torch.optim.Adam(prior.parameters(), lr=0.05)
    entropy = -torch.special.xlogy(target, target).sum(1).mean() / np.log(2)
    with torch.enable_grad():
        for step in range(PRIOR_STEPS):
            adam.param_groups[0]["lr"] = 0.05 * (1 - step / PRIOR_STEPS)
            bits = prior.bits(values.expand(len(lengths), -1)[None, :, None])[0, :, 0]
            loss = (target * bits).sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    prior.zero_grad()
    return float(loss.detach() - entropy)


@torch.no_grad()
def move_levels(gains: Gains, old: ModelConfig, new: ModelConfig) -> None:
    """Re-sample the gain vectors for another range of lambda; what lies outside is extrapolated."""
    last = old.levels - 1
    span = np.log(old.lambda_max / old.lambda_min)
    wanted = np.linspace(np.log(new.lambda_min), np.log(new.lambda_max), new.levels)
    position = torch.from_numpy((wanted - np.log(old.lambda_min)) / span * last).float()
    for table in (gains.log_gain, gains.log_inverse):
        table.copy_(at_level(table, position))


@torch.no_grad()
def move_rates(
    middle: nn.Module, low: nn.Module, high: nn.Module, old: ModelConfig, new: ModelConfig
) -> None:
    """Give the middle and the ends of another range of lambda the weights that these rates had.

    `low` and `high` are what the ends add to `middle`.
    """
    ends = (math.log(new.lambda_min), math.log(new.lambda_max))
    span = math.log(old.lambda_max / old.lambda_min)
    tilts = [2 * (at - math.log(old.lambda_min)) / span - 1 for at in (*ends, sum(ends) / 2)]
    weights, below, above = (weights_of(module) for module in (middle, low, high))
    moved = [moved_weights(weights, *between_rates(below, above, tilt)) for tilt in tilts]
    for name in weights:
        least, most, centre = (values[name] for values in moved)
        low.get_parameter(name).copy_(least - centre)
        high.get_parameter(name).copy_(most - centre)
        middle.get_parameter(name).copy_(centre)


def _parts(name: str, weight: Tensor) -> tuple[Tensor, ...]:
    """What of a weight grows by itself: gates have values and gates one after the other."""
    return weight.unflatten(0, (2, -1)).unbind() if ".gate." in name else (weight,)


@torch.no_grad()
def grow(stored: TrainableCodec, config: ModelConfig) -> TrainableCodec:
    """A larger model that computes about what a smaller one does.

    Old channels do not listen to new ones yet, new ones hear all; new blocks are near the identity. Both are
    as in a new model, and what rates and preferences add there is zero.
    """
    model = TrainableCodec(config)
    state = model.state_dict()
    for name, weight in stored.state_dict().items():
        for old, new in zip(_parts(name, weight), _parts(name, state[name]), strict=True):
            new[: len(old)] = 0
            new[tuple(map(slice, old.shape))] = old
    return model


def start_from(stored: TrainableCodec, config: ModelConfig) -> TrainableCodec:
    """A model of `config` with the weights of a restored one; the range of lambda may differ, sizes may grow.

    Raises:
        ValueError: another difference between the two shapes.
    """
    own, wanted = stored.config.to_dict(), config.to_dict()
    different = [
        name
        for name in wanted
        if name not in RATE_FIELDS
        and own[name] != wanted[name]
        and not (name in SIZE_FIELDS and own[name] < wanted[name])
    ]
    if different:
        values = ", ".join(f"{name} {own[name]} (wanted {wanted[name]})" for name in different)
        raise ValueError(f"cannot start from {stored.config.name}: it has {values}")
    model = grow(stored, config)
    move_levels(model.gains, stored.config, config)
    for middle, low, high in (
        (model.analysis, model.analysis_low, model.analysis_high),
        (model.synthesis, model.synthesis_low, model.synthesis_high),
        (model.preference, model.preference_low, model.preference_high),
    ):
        move_rates(middle, low, high, stored.config, config)
    return model

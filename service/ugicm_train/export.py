"""From a training checkpoint to a model folder: round the entropy model to integers, build its tables."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from ugicm.codec.coder import TOTAL
from ugicm.codec.config import ModelConfig
from ugicm.codec.entropy import MEAN_UNIT, SCALE_COUNT, Z_LIMIT
from ugicm.codec.entropy_twin import (
    INDEX_OFFSET,
    LOGISTIC_SCALE,
    OCTAVES_PER_UNIT,
    TRELLIS_FIRST,
    TRELLIS_STEP,
    Paths,
)
from ugicm.codec.fixed_point import (
    BITS_MAX,
    BITS_MIN,
    INDEX_BITS,
    SUM_LIMIT,
    largest_sums,
    rounding_half,
    sum_bits,
)
from ugicm.codec.store import CONFIG_FILE, FORMAT, WEIGHTS_FILE, bitstream_digest
from ugicm_train.files import written_whole
from ugicm_train.model import PREFERENCE, FactorizedPrior, TrainableCodec, scaled_parts
from ugicm_train.signals import uninterrupted
from ugicm_train.train import CHECKPOINT, load_checkpoint

TAIL_SIGMAS = 8.0
"""Tables of the latent reach this far; what lies beyond is coded as an escape."""
PRIOR_TAIL = 1e-6
"""Tables of the hyper latent reach until this much probability is left outside."""
WEIGHT_MAX = 32767
TRANSFORMS = (
    "analysis", "analysis_low", "analysis_high", "hyper_analysis",
    "synthesis", "synthesis_low", "synthesis_high", *PREFERENCE, "gains",
)  # fmt: skip
"""Parts of a model that are stored as they are."""
HALF_PRECISION = frozenset(TRANSFORMS) - {"gains"}
"""What is stored in float16; the rest decides what bitstreams mean."""


def to_frequencies(probabilities: NDArray[np.float64]) -> NDArray[np.int32]:
    """Probabilities (n,) -> integers (n,) of at least 1 that sum to `coder.TOTAL`."""
    spare = TOTAL - len(probabilities)
    scaled = np.maximum(probabilities, 0) / probabilities.sum() * spare
    frequencies = np.floor(scaled).astype(np.int64) + 1
    frequencies[np.argmax(probabilities)] += TOTAL - frequencies.sum()
    return frequencies.astype(np.int32)


def bin_masses(sigma: float, spacing: float, shift: float, width: float) -> NDArray[np.float64]:
    """Probability under a zero-mean logistic distribution of bins of `width` around n `spacing` + `shift`.

    For n from -R to R, with R as `TAIL_SIGMAS` says, and of all bins beyond: (2 R + 2,).
    """
    radius = int(np.ceil(TAIL_SIGMAS * sigma / spacing)) + 1
    distances = (torch.arange(-radius - 1, radius + 2, dtype=torch.float64) * spacing + shift).abs()
    scale = sigma * LOGISTIC_SCALE
    # Sigmoid of the distance below zero is accurate in the tail.
    upper = torch.sigmoid((width / 2 - distances) / scale)
    mass = upper - torch.sigmoid((-width / 2 - distances) / scale)
    beyond = (upper[0] + upper[-1]) * width / spacing
    return torch.cat([mass[1:-1], beyond[None]]).numpy()


def latent_tables(first: int = TRELLIS_FIRST) -> dict[str, Tensor]:
    """All tables of y: of `SCALE_COUNT` logistic distributions, and, from ``first`` on, of symbols on paths.

    Around a point of a path, the cell is about as wide in every direction as the mean squared error says.
    """
    sigmas = [2.0 ** ((i - INDEX_OFFSET) * OCTAVES_PER_UNIT / 2**INDEX_BITS) for i in range(SCALE_COUNT)]
    step = TRELLIS_STEP / MEAN_UNIT
    wide = [
        [bin_masses(sigma, 4 * step, bits * step, Paths().width) for bits in range(4)]
        for sigma in sigmas[first:]
    ]
    made = {
        "y": [bin_masses(sigma, 1.0, 0.0, 1.0) for sigma in sigmas],
        "rest": [mass for by_bits in wide for mass in by_bits],
    }
    zeros = [to_frequencies(np.array([fours.sum(), others.sum()]))[0] for fours, _, others, _ in wide]
    tensors = {
        "tables.step": torch.tensor(TRELLIS_STEP, dtype=torch.int32),
        "tables.branches": torch.tensor(zeros, dtype=torch.int32),
    }
    for kind, masses in made.items():
        tables = [to_frequencies(mass) for mass in masses]
        tensors[f"tables.{kind}.frequencies"] = torch.from_numpy(
            np.concatenate([np.zeros(0, np.int32), *tables])
        )
        tensors[f"tables.{kind}.lengths"] = torch.tensor([len(table) for table in tables], dtype=torch.int32)
    return tensors


def narrow_table(mass: NDArray[np.float64]) -> NDArray[np.int32]:
    """Frequencies of a hyper symbol, ``mass`` over -radius .. radius, as narrow as `PRIOR_TAIL` allows."""
    middle = len(mass) // 2
    for radius in range(1, middle + 1):
        inside = mass[middle - radius : middle + radius + 1]
        if 1 - inside.sum() < PRIOR_TAIL:
            break
    return to_frequencies(np.append(inside, max(1 - inside.sum(), 0.0)))


@torch.no_grad()
def prior_tables(prior: FactorizedPrior) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Frequencies and lengths of every hyper channel."""
    channels = prior.location.shape[0]
    values = torch.arange(-Z_LIMIT, Z_LIMIT + 1, dtype=torch.float64)
    mass = prior.double().mass(values.repeat(channels, 1)[None, :, None])[0, :, 0].numpy()
    prior.float()
    tables = [narrow_table(row) for row in mass]
    return np.concatenate(tables), np.array([len(t) for t in tables], np.int32)


def integer_entropy(network: torch.nn.Module) -> dict[str, Tensor]:
    """Round the trained entropy network: each row to the finest grid on which its sums stay exact.

    For every layer: ``weight`` int16, ``bias`` int32 and ``bits`` uint8 (`ugicm.codec.fixed_point`).

    Raises:
        ValueError: a row does not fit the coarsest grid; the model did not train properly.
    """
    out: dict[str, Tensor] = {}
    state = network.state_dict()
    for name in [name.removesuffix(".weight") for name in state if name.endswith(".weight")]:
        weight, bias = (state[f"{name}.{kind}"].detach().double().cpu() for kind in ("weight", "bias"))
        found = torch.zeros(len(weight), dtype=torch.bool)
        layer = (torch.empty_like(weight), torch.empty_like(bias), torch.empty(len(weight)))
        for places in range(BITS_MIN, BITS_MAX + 1):
            bits = torch.full((len(weight),), places)
            finer = (
                (weight * 2.0**places).round(),
                (bias * torch.exp2(sum_bits(name, bits).double()) + rounding_half(name, bits)).round(),
                bits,
            )
            fits = largest_sums(name, *finer) < SUM_LIMIT
            fits &= finer[0].flatten(1).abs().amax(1) <= WEIGHT_MAX
            for kept, candidate in zip(layer, finer, strict=True):
                kept[fits] = candidate[fits].to(kept)
            found |= fits
        if not found.all():
            raise ValueError(
                f"layer {name} has weights of up to {float(weight.abs().max()):.3g} and biases of up to "
                f"{float(bias.abs().max()):.3g}, too large for exact sums"
            )
        weight, bias, bits = layer
        for _ in range(BITS_MAX - BITS_MIN):
            # Places that no number of the row needs, so that equal layers have equal integers.
            spare = ((weight % 2).flatten(1).any(1) | (bias % 2).bool()).logical_not() & (bits > BITS_MIN)
            weight[spare] /= 2
            bias[spare] /= 2
            bits[spare] -= 1
        for kind, value, dtype in zip(
            ("weight", "bias", "bits"), layer, (torch.int16, torch.int32, torch.uint8), strict=True
        ):
            out[f"entropy.{name}.{kind}"] = value.to(dtype)
    return out


def model_tensors(model: TrainableCodec) -> dict[str, Tensor]:
    """Everything that ``weights.safetensors`` holds."""
    tensors = integer_entropy(model.entropy)
    tensors |= latent_tables()
    frequencies, lengths = prior_tables(model.prior)
    tensors["tables.z.frequencies"] = torch.from_numpy(frequencies)
    tensors["tables.z.lengths"] = torch.from_numpy(lengths)
    # One table for each channel, until `ugicm_train.calibrate` counts.
    tensors["tables.z.choice"] = torch.arange(model.config.hyper_channels, dtype=torch.uint8).view(1, 1, -1)
    for prefix in TRANSFORMS:
        for name, value in getattr(model, prefix).state_dict().items():
            tensors[f"{prefix}.{name}"] = value.detach().float().cpu().contiguous()
    return tensors


def check_is_no_run(folder: Path) -> None:
    """``FileExistsError`` where a folder holds a run, whose ``config.json`` a model would write over."""
    if (folder / CHECKPOINT).exists():
        raise FileExistsError(f"{folder} holds a run, which a model would write over: give another folder")


def named(config: ModelConfig, folder: Path, source: Path) -> ModelConfig:
    """With the name of the folder, if that is not where the model comes from."""
    here = folder.resolve()
    return config if here == source.resolve() else dataclasses.replace(config, name=here.name)


def write_model(
    folder: Path, config: ModelConfig, tensors: dict[str, Tensor], training: dict[str, Any]
) -> None:
    """Write ``config.json`` and ``weights.safetensors``; `training` is kept as a record.

    The transforms are rounded to float16, an eighth of the error of bfloat16, in which most machines compute
    them.

    What is there stays whole, or is replaced as a whole, unless the process is killed between two renames;
    ``.config.json.tmp`` is then the ``config.json`` that belongs to the weights.

    Raises:
        ValueError: a tensor has values that are not finite, perhaps in float16 alone.
        FileExistsError: the folder holds a run.
    """
    check_is_no_run(folder)
    stored = {
        name: tensor.half() if name.partition(".")[0] in HALF_PRECISION else tensor
        for name, tensor in tensors.items()
    }
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite, or too large: nothing is written")
    data = save(stored)
    description = {
        "format": FORMAT,
        "model": config.to_dict(),
        "digest": bitstream_digest(config, tensors).hex(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "training": without_repeats(training, set()),
    }
    text = json.dumps(description, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    # Both are written before one replaces what may be there.
    with (
        uninterrupted(),
        written_whole(folder / CONFIG_FILE) as config_file,
        written_whole(folder / WEIGHTS_FILE) as weights,
    ):
        config_file.write_text(text, encoding="utf-8")
        weights.write_bytes(data)


def without_repeats(record: Any, seen: set[str]) -> Any:
    """The record; what came before a model, named by its ``weights``, is told the first time only.

    A mean of models that came from one another would repeat their past as often as it has branches.
    """
    if isinstance(record, list):
        return [without_repeats(item, seen) for item in record]
    if not isinstance(record, dict):
        return record
    if "weights" in record:
        text = json.dumps(record, sort_keys=True)
        if text in seen:
            return {name: record[name] for name in ("share", "weights") if name in record}
        seen.add(text)
    return {name: without_repeats(value, seen) for name, value in record.items()}


def read_training(folder: Path) -> dict[str, Any]:
    """The record that `write_model` kept; empty where there is none."""
    description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    record: dict[str, Any] = description.get("training", {})
    return record


def run_record(state: dict[str, Any]) -> dict[str, Any]:
    """What a model says about the run that it is the checkpoint of."""
    return {"steps": state["step"], "minutes": round(state["minutes"], 1)} | state.get("record", {})


def load_average(state: dict[str, Any]) -> TrainableCodec:
    """The moving average of a checkpoint, as a float32 model for evaluation."""
    model = TrainableCodec(ModelConfig.from_dict(state["config"]))
    model.learn_scales(scaled_parts(state["average"]))
    model.load_state_dict(state["average"])
    model.settle_scales()
    return model.eval().requires_grad_(False)


def export(run: Path, folder: Path, *, checkpoint: str = CHECKPOINT, name: str | None = None) -> None:
    """Write the model folder of a run's checkpoint (its moving average)."""
    state = load_checkpoint(run, checkpoint)
    model = load_average(state)
    config = dataclasses.replace(model.config, name=name or folder.resolve().name)
    write_model(folder, config, model_tensors(model), run_record(state))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train export``."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("folder", type=Path, help="model folder, such as model_store/ugicm-s")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="checkpoint file of the run")
    parser.add_argument("--name", help="model name (default: the folder's)")


def run(arguments: argparse.Namespace) -> int:
    """Export."""
    export(arguments.run, arguments.folder, checkpoint=arguments.checkpoint, name=arguments.name)
    return 0

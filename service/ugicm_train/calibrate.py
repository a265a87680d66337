"""``ugicm-train calibrate``: what a trained model needs to know of photos' latents.

Count the hyper latents and make their tables anew.

Training knows one distribution for each hyper channel. What is coded by `ugicm.codec.hyper_prior` may use
another table at every level of quality and for every context, so they are counted: histograms by level,
context and channel, each pulled towards its channel's, grouped into a few tables by k-means under code
length. Bitstreams get shorter, most at low rates, and those of before no longer decode.

Measure how large latents are, so that the encoder knows what is no photo's (`ugicm.codec.soften`); and, with
``--grain``, how large errors are, to set the machine view's grain (`ugicm.codec.grain`).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ugicm.codec.codec import Codec
from ugicm.codec.config import HYPER_STRIDE, QUALITY_MAX, QUALITY_MIN
from ugicm.codec.hyper_prior import CONTEXTS, by_phase
from ugicm.codec.soften import rms
from ugicm.codec.store import model_path
from ugicm_train.data import CropSampler, medians, read_photos
from ugicm_train.export import named, narrow_table, read_training, write_model
from ugicm_train.model import TrainableCodec
from ugicm_train.restore import read_stored, restore

RADIUS = 64
"""Symbols beyond are escapes in every table."""
PULL = 20.0
"""As many symbols, distributed like the channel's at that level, are added to every histogram."""
FLOOR = 1e-3
"""Symbols that no photo of that channel and level has are taken to be this many."""
ROUNDS = 30
BATCH = 8
ERROR_SIZE = 256
"""Errors are measured on crops of this side in pixels, as in training, or of `size` where that is smaller."""
LARGEST = 1.7
"""What the encoder takes for a photo's, in multiples of the median crop's largest. Kodak reaches 1.73."""

Counts = NDArray[np.float64]


def largest(model: TrainableCodec, sampler: CropSampler) -> Tensor:
    """Largest `rms` of a latent position to expect at each level, (levels,)."""

    def largest_of(crops: Tensor, level: Tensor) -> Tensor:
        return rms(model.latent_of(crops, level).permute(0, 2, 3, 1)).amax((1, 2))

    return LARGEST * medians(largest_of, sampler, levels=model.config.levels)


def usual_error(model: TrainableCodec, sampler: CropSampler) -> Tensor:
    """Root mean squared error of the human view at each level, (levels,), where pixels lie in [0, 1].

    That of the median crop: one that is unlike any photo can come out as anything at all.
    """

    def error(crops: Tensor, level: Tensor) -> Tensor:
        human = model(crops, level, machine_count=0).human
        return (human - crops).square().mean((1, 2, 3))

    # On a GPU, the same noise on paths of the trellis on every call.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return medians(error, sampler, levels=model.config.levels).sqrt().cpu()


def set_grain(tensors: dict[str, Tensor], model: TrainableCodec, sampler: CropSampler, grain: float) -> None:
    """Store what deviation the grain of `model` has: that share of its `usual_error`, none for 0."""
    tensors.pop("grain", None)
    if grain:
        tensors["grain"] = grain * usual_error(model, sampler)


def check_grain(grain: float) -> None:
    """``ValueError`` for no share that an error can have."""
    if not 0 <= grain < math.inf:
        raise ValueError(f"grain must be finite and at least 0, got {grain}")


def count(codec: Codec, sampler: CropSampler, crops: int) -> Counts:
    """Histograms (levels, CONTEXTS, N, 2 RADIUS + 2) of the hyper latents of random crops, escapes last."""
    levels, channels = codec.config.levels, codec.config.hyper_channels
    counts = np.zeros((levels, CONTEXTS, channels, 2 * RADIUS + 2))
    row = np.arange(channels)[:, None]
    for done in range(0, crops, BATCH):
        batch = (sampler.batch(min(BATCH, crops - done)) * 255).round().byte()
        images = list(batch.permute(0, 2, 3, 1).contiguous().numpy())
        for level, quality in enumerate(np.linspace(QUALITY_MIN, QUALITY_MAX, levels)):
            for latent in codec.analyse(images, float(quality)):
                for tile in latent.tiles:
                    beyond = np.abs(tile.z) > RADIUS
                    values = np.where(beyond, 2 * RADIUS + 1, tile.z + RADIUS)
                    for mask, context in by_phase(tile.z):
                        np.add.at(counts[level], (context, row, values[:, mask]), 1)
    return counts


def distributions(counts: Counts) -> Counts:
    """Probabilities shaped like the histograms."""
    channel = counts.sum(1, keepdims=True) + FLOOR
    channel /= channel.sum(-1, keepdims=True)
    return (counts + PULL * channel) / (counts.sum(-1, keepdims=True) + PULL)


def group(probabilities: Counts, weights: Counts, tables: int) -> tuple[NDArray[np.intp], Counts]:
    """Few distributions in place of many: k-means under code length.

    Args:
        probabilities: (n, S) distributions.
        weights: (n,) how often each is used.
        tables: how many to make at most.

    Returns:
        The table of each, (n,), and the tables' distributions, (tables, S).
    """
    # Begin with runs of equal length, ordered by width and then by mean.
    values = np.arange(probabilities.shape[1])
    mean = probabilities @ values
    deviation = np.sqrt(np.maximum(probabilities @ values**2 - mean**2, 0))
    order = np.lexsort((mean, np.round(2 * np.log2(deviation + 0.05))))
    choice = np.empty(len(order), np.intp)
    choice[order] = np.arange(len(order)) * tables // len(order)
    weights = weights + 1e-3
    for _ in range(ROUNDS):
        used = np.unique(choice)
        centres = np.stack(
            [
                np.average(probabilities[choice == table], axis=0, weights=weights[choice == table])
                for table in used
            ]
        )
        choice = (probabilities @ -np.log2(centres).T).argmin(1)
    used, choice = np.unique(choice, return_inverse=True)
    return choice, centres[used]


def calibrate(
    source: Path,
    folder: Path,
    data: list[Path],
    *,
    crops: int,
    size: int,
    tables: int,
    seed: int,
    grain: float | None = None,
) -> None:
    """Write the model in `source` with tables counted on `crops` of `size` pixels a side to `folder`.

    ``grain``: share of the error that comes back in the machine view; None leaves it as it is.
    """
    stored = read_stored(source)
    photos = [photo for _, photo in read_photos(data, min_side=size)]
    counts = count(Codec(stored), CropSampler(photos, size=size, seed=seed), crops)
    shape = counts.shape[:-1]
    choice, centres = group(
        distributions(counts).reshape(-1, counts.shape[-1]), counts.sum(-1).reshape(-1), tables
    )
    made = [narrow_table(centre[:-1]) for centre in centres]
    model = restore(stored.config, stored.tensors)
    tensors = stored.tensors | {
        "largest": largest(model, CropSampler(photos, size=size, seed=seed)),
        "tables.z.frequencies": torch.from_numpy(np.concatenate(made)),
        "tables.z.lengths": torch.tensor([len(table) for table in made], dtype=torch.int32),
        "tables.z.choice": torch.from_numpy(choice.reshape(shape).astype(np.uint8)),
    }
    record: dict[str, object] = {
        "calibrated": {"crops": crops, "size": size, "tables": len(made), "seed": seed}
    }
    if grain is not None:
        sampler = CropSampler(photos, size=min(size, ERROR_SIZE), seed=seed)
        set_grain(tensors, model, sampler, grain)
        record["grain"] = grain
    alone = counts.sum((0, 1)) + FLOOR
    bits = [
        -(counts * np.log2(table)).sum() / counts.sum()
        for table in (alone / alone.sum(-1, keepdims=True), centres[choice].reshape(counts.shape))
    ]
    print(f"bits of a hyper symbol: {bits[1]:.4f}, with one table for each channel {bits[0]:.4f}")
    write_model(folder, named(stored.config, folder, source), tensors, read_training(source) | record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train calibrate``."""
    parser.add_argument("model", help="model (name or folder)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of photos or shards")
    parser.add_argument("--out", type=Path, help="model folder to write (default: the model's)")
    parser.add_argument("--crops", type=int, default=256, help="how many crops to count")
    parser.add_argument("--size", type=int, default=512, help="their side in pixels")
    parser.add_argument("--tables", type=int, default=64, help="tables to make, at most 255")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--grain",
        type=float,
        help="noise in the machine view, as a share of the codec's error (default: what there is)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Count and write."""
    if not 1 <= arguments.tables <= 255:
        raise ValueError(f"tables must be in 1..255, got {arguments.tables}")
    if arguments.size < HYPER_STRIDE or arguments.size % HYPER_STRIDE:
        raise ValueError(f"size must be a multiple of {HYPER_STRIDE} pixels, got {arguments.size}")
    for name, least in (("crops", 1), ("seed", 0)):
        if (value := getattr(arguments, name)) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if arguments.grain is not None:
        check_grain(arguments.grain)
    source = model_path(arguments.model)
    calibrate(
        source,
        arguments.out or source,
        arguments.data,
        crops=arguments.crops,
        size=arguments.size,
        tables=arguments.tables,
        seed=arguments.seed,
        grain=arguments.grain,
    )
    return 0

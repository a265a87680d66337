"""``ugicm-train average``: the mean of the weights of models that one has become by further training.

Such models lie in one valley, and their mean can be better than each (Wortsman et al., "Model soups", ICML
2022). Like a run's export it has tables and grain of its own only after `calibrate`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from ugicm.codec.store import model_path
from ugicm_train.export import model_tensors, write_model
from ugicm_train.model import TrainableCodec
from ugicm_train.restore import read_trainable


def average(folder: Path, sources: Sequence[Path], *, name: str | None = None) -> None:
    """Write the mean of the models in `sources` to `folder`.

    Raises:
        ValueError: models of different shapes or rates, or one that shows only a part of its machine view.
    """
    models, records = zip(*map(read_trainable, sources), strict=True)
    config = dataclasses.replace(models[0].config, name=name or folder.resolve().name)
    for source, model in zip(sources, models, strict=True):
        if dataclasses.replace(model.config, name=config.name) != config:
            raise ValueError(f"{source} and {sources[0]} have different shapes or rates")
    states = [model.state_dict() for model in models]
    mean = TrainableCodec(config)
    mean.load_state_dict(
        {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    )
    write_model(folder, config, model_tensors(mean), {"mean": list(records)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train average``."""
    parser.add_argument("folder", type=Path, help="model folder to write")
    parser.add_argument("models", nargs="+", help="models (names or folders), trained from one another")
    parser.add_argument("--name", help="model name (default: the folder's)")


def run(arguments: argparse.Namespace) -> int:
    """Average and write."""
    average(arguments.folder, [model_path(name) for name in arguments.models], name=arguments.name)
    return 0

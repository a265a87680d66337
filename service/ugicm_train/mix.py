"""``ugicm-train mix``: a machine view made of those of several models, in shares.

The differences that make up the machine view (`networks.moved`) outlive further training of the human
view, so they can be carried over, averaged and made milder. Encoder, entropy model and human view are those
of the base; its bitstreams do not change.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ugicm.codec.store import model_path
from ugicm_train.export import named, read_training, write_model
from ugicm_train.model import PREFERENCE
from ugicm_train.restore import read_stored

GRAIN, REACH = "grain", "reach"
MACHINE_RECORD = ("polish", "grain", "mixed", "reach")
"""What a model's training record says about its machine view."""


class View(NamedTuple):
    """Part of a mixture."""

    model: Path
    share: float


def _is_preference(name: str) -> bool:
    return name.partition(".")[0] in PREFERENCE


def parse_view(text: str) -> View:
    """``MODEL*SHARE``, or ``MODEL`` for the whole."""
    model, _, share = text.rpartition("*")
    try:
        view = View(model_path(model or share), float(share) if model else 1.0)
        if not math.isfinite(view.share):
            raise ValueError(f"a share must be finite, got {view.share}")
        return view
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def mix(folder: Path, base: Path, views: Sequence[View], reach: Sequence[float] | None = None) -> None:
    """Write `base` with the sum of the machine views, each times its share, to `folder`.

    ``reach``: how much of the machine view there is at each level, 0..1, in place of what the views have.

    Raises:
        ValueError: two models of different shapes, rates or reach, or a reach that is none.
    """
    stored = read_stored(base)
    mixed: dict[str, Tensor] = {}
    tables = []
    records = []
    for view in views:
        model = read_stored(view.model)
        # What a view and its grain are at a level belongs to that level's rate.
        if dataclasses.replace(model.config, name=stored.config.name) != stored.config:
            raise ValueError(f"{view.model} and {base} have different shapes or rates")
        tables.append(model.tensors.get(REACH, torch.ones(stored.config.levels)))
        for name, tensor in model.tensors.items():
            if _is_preference(name) or name == GRAIN:
                mixed[name] = mixed.get(name, torch.zeros_like(tensor)) + view.share * tensor
        training = read_training(view.model)
        machine = {name: training[name] for name in MACHINE_RECORD if name in training}
        records.append({"share": view.share, "weights": model.weights_sha256} | machine)
    if reach is not None:
        table = torch.tensor(reach, dtype=torch.float32)
        if len(table) != stored.config.levels or not ((table >= 0) & (table <= 1)).all():
            raise ValueError(f"reach needs {stored.config.levels} numbers in 0..1, got {list(reach)}")
    else:
        table = tables[0]
        if any(not torch.equal(other, table) for other in tables):
            raise ValueError("the views have different reach; give --reach")
    mixed[REACH] = table
    kept = {
        name: value
        for name, value in stored.tensors.items()
        if not _is_preference(name) and name not in (GRAIN, REACH)
    }
    training = {name: value for name, value in read_training(base).items() if name not in MACHINE_RECORD}
    record = {"mixed": records, "reach": [round(value, 4) for value in table.tolist()]}
    config = named(stored.config, folder, base)
    write_model(folder, config, kept | mixed, training | record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train mix``."""
    parser.add_argument("folder", type=Path, help="model folder to write")
    parser.add_argument("base", help="model whose encoder and human view are kept (name or folder)")
    parser.add_argument(
        "--reach",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="how much of the machine view there is at each level of quality, 0..1 (default: as the views)",
    )
    parser.add_argument("views", nargs="+", type=parse_view, metavar="MODEL*SHARE", help="machine views")


def run(arguments: argparse.Namespace) -> int:
    """Mix and write."""
    mix(arguments.folder, model_path(arguments.base), arguments.views, arguments.reach)
    return 0

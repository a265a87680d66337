"""``ugicm-train polish``: better views of bitstreams that exist already.

The second stage of UG-ICM (Yin et al., AAAI 2025): encoder, gains, hyper transform and entropy model are
frozen. No bitstream changes by a byte, so what was encoded before is decoded better afterwards. What learns:

    machine     what the machine's synthesis transform adds to the human's: the human view stays as it is, to
                the last bit
    both        the human's synthesis transform, too, as in the paper

and of that, the weights or `ugicm_train.scales`.

At the end the machine view's grain is set (`ugicm.codec.grain`).
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ugicm.codec.conditioning import at_level
from ugicm.codec.config import ModelConfig
from ugicm.codec.entropy_twin import as_coded, round_all
from ugicm.codec.store import model_path
from ugicm.memory import keep_freed_memory
from ugicm_train.calibrate import check_grain, set_grain
from ugicm_train.export import (
    check_is_no_run,
    load_average,
    model_tensors,
    named,
    read_training,
    run_record,
    write_model,
)
from ugicm_train.losses import Teacher
from ugicm_train.model import PREFERENCE, CodecOutput, TrainableCodec, has_machine_view, make_zero
from ugicm_train.restore import read_stored, restore
from ugicm_train.train import (
    CHECKPOINT,
    LEARN,
    RESUMED,
    STABLE_CHECKPOINT,
    Trainer,
    TrainOptions,
    load_checkpoint,
)

VIEWS = {"machine": PREFERENCE, "both": ("synthesis", "synthesis_low", "synthesis_high", *PREFERENCE)}
"""Parts of the model that polishing changes, by the view that learns."""

GRAIN = 0.1
"""Default share of the error that comes back as grain."""
LEVEL_POWER = 1.2
"""Low rates are drawn more often: there machines lose most."""


class PolishedCodec(TrainableCodec):
    """Encodes without gradients, and shows what of the machine view a decoder shows."""

    human_learns = False

    def __init__(self, config: ModelConfig, reach: Tensor | None = None) -> None:
        """``reach``: how much of the machine view there is at each level, (levels,); None for all."""
        super().__init__(config)
        self.reach: Tensor
        # No part of checkpoints: it does not learn.
        self.register_buffer("reach", torch.ones(config.levels) if reach is None else reach, persistent=False)

    def _between_rates(self, part: str, level: Tensor, rates: int | None) -> dict[str, Tensor]:
        weights = super()._between_rates(part, level, rates)
        if part != "preference":
            return weights
        reach = at_level(self.reach, level[:: len(level) // (rates or 1)])
        return {name: value * reach.view(-1, *[1] * (value.ndim - 1)) for name, value in weights.items()}

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
        """As `TrainableCodec`, but the hyper latent is rounded and its bits do not count."""
        with torch.no_grad():
            gain, inverse = self.gains(level)
            y = self.latent_of(x, level, rates).float() * gain
            z = self.hyper_analysis(y).float().round()
            y_hat, bits = self.entropy(z, y, as_coded if noise else round_all)
            latent = (y_hat * inverse).contiguous(memory_format=torch.channels_last)
        # No samples where nothing learns from them.
        human = self.human_view(latent, level, rates) if self.human_learns else x[:0]
        machine = self.machine_view(latent, level, strength, count=machine_count, rates=rates)
        return CodecOutput(human, machine, bits / (x.shape[2] * x.shape[3]))


class Polisher(Trainer):
    """A `Trainer` that starts from a trained model and moves nothing but (parts of) its synthesis."""

    def __init__(
        self,
        model: TrainableCodec,
        options: TrainOptions,
        out: Path,
        *,
        view: str,
        reach: Tensor | None = None,
    ) -> None:
        polished = PolishedCodec(model.config, reach).requires_grad_(False)
        polished.load_state_dict(model.state_dict())
        polished.human_learns = view == "both"
        if options.learn == "scales":
            polished.learn_scales(VIEWS[view])
        else:
            for name in VIEWS[view]:
                getattr(polished, name).requires_grad_(True)
        super().__init__(polished, options, out)

    def load(self, state: dict[str, Any]) -> None:
        """As `Trainer`, but only what the same polish has left (`record`).

        Raises:
            ValueError: it was another, which would become a third.
        """
        record = state.get("record", {})
        if missing := self.record.keys() - record.keys():
            names = ", ".join(sorted(missing))
            raise ValueError(
                f"the checkpoint does not say its {names} (an earlier version wrote it): begin anew"
            )
        for name, value in self.record.items():
            if (was := record[name]) != value:
                raise ValueError(f"the checkpoint is of a polish with {name} {was}, got {name} {value}")
        super().load(state)

    def learned(self, view: str) -> dict[str, Tensor]:
        """Parameters of the parts that learned, as the moving average has them."""
        return {
            f"{part}.{name}": value
            for part in VIEWS[view]
            for name, value in self.average.weights_of(part).items()
        }


def polish(
    source: Path | str,
    folder: Path,
    options: TrainOptions,
    data: list[Path],
    run: Path,
    *,
    view: str = "machine",
    restart: bool = False,
    teacher: Teacher | None = None,
    teacher_name: str | None = None,
    grain: float = 0.0,
    resume: bool = False,
) -> int:
    """Polish the synthesis transform of a model and write the model folder.

    Args:
        source: a model (name or folder), or the folder of a training run.
        folder: model folder to write; may be `source`.
        options: budget and learning rates.
        data: folders of photos or shards.
        run: folder for the checkpoint and the log of this polish.
        view: which view learns, ``machine`` or ``both`` (see the module's text).
        restart: forget the machine view that the model has learned, and its reach, and begin with the human
            view.
        teacher: judge of the machine view; None leaves the squared error alone.
        teacher_name: recorded in ``config.json``.
        grain: deviation of the machine view's grain, as a share of the human view's error; 0 for none.
        resume: go on from the checkpoint in `run`.

    Returns:
        Exit status of `Trainer.run`; nothing is written where that was stopped.

    Raises:
        ValueError: no such grain, scales of no machine view, the checkpoint is of a polish with other options
            or of another model, another polish writes to `run`, or the polish has diverged; nothing is
            written then.
        FileExistsError: `folder` or `run` holds a run.
    """
    check_grain(grain)
    path = Path(source) if (Path(source) / CHECKPOINT).exists() else model_path(source)
    config, tensors, training, model = _read(path)
    # Of a run, too, which has no hash of its own.
    identity = hashlib.sha256(save(tensors)).hexdigest()[:16]
    if restart:
        for part in PREFERENCE:
            make_zero(getattr(model, part))
        for known in (tensors, training):
            known.pop("reach", None)
    if options.learn == "scales" and not has_machine_view(model):
        raise ValueError(
            "--learn scales: there is no machine view yet, and scales of nothing stay nothing; learn "
            "weights, or leave out --restart"
        )
    if run.resolve() == folder.resolve():
        raise ValueError(f"{run} is where the model will be: give another --run")
    check_is_no_run(folder)
    if not resume and (run / CHECKPOINT).exists():
        raise FileExistsError(f"{run} holds an unfinished polish: use --resume, or another --run")
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    polisher = Polisher(model, options, run, view=view, reach=tensors.get("reach"))
    polisher.record = {"view": view, "restart": restart, "source": identity}
    with polisher.alone():
        if resume:
            polisher.load(load_checkpoint(run, needs=RESUMED))
        said = {"teacher": teacher_name, "weight": options.teacher_weight}
        teachers = [one for one in polisher.record.get("teachers", []) if one != said] + [said]
        polisher.record["teachers"] = teachers
        sampler = polisher.read(data)
        status = polisher.run(sampler, teacher)
        if status or not polisher.processes.first:
            return status  # where stopped, the checkpoint waits for --resume
        learned = polisher.learned(view)
        tensors |= {name: value.float().cpu().contiguous() for name, value in learned.items()}
        model.load_state_dict(learned, strict=False)
        set_grain(tensors, model.to(polisher.device), sampler, grain)
        record = {
            "view": view,
            "learned": options.learn,
            "restarted": restart,
            "teacher": teacher_name,
            "teacher_weight": options.teacher_weight,
            **({"teachers": teachers} if len(teachers) > 1 else {}),
            "grain": grain,
            "steps": polisher.step,
            "minutes": round(polisher.minutes, 1),
        }
        training.pop("grain", None)  # what calibrating had set
        config = named(config, folder, path)
        write_model(folder, config, tensors, training | {"polish": [*training.get("polish", []), record]})
        for name in (CHECKPOINT, STABLE_CHECKPOINT):
            (run / name).unlink(missing_ok=True)
    return 0


def _read(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any], TrainableCodec]:
    """Config, stored tensors, training record and trainable model of a model or a run."""
    if (path / CHECKPOINT).exists():
        state = load_checkpoint(path)
        model = load_average(state)
        return model.config, model_tensors(model), run_record(state), model
    stored = read_stored(path)
    return stored.config, stored.tensors, read_training(path), restore(stored.config, stored.tensors)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train polish``."""
    parser.add_argument("source", help="model (name or folder) or run folder")
    parser.add_argument("--teacher", required=True, help="such as open_clip:ViT-B-32/openai")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of photos or shards")
    parser.add_argument("--out", type=Path, help="model folder to write (default: the source, if a model)")
    parser.add_argument("--run", type=Path, help="checkpoint and log (default: beside the output)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted polish")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="wall-clock budget")
    budget.add_argument("--steps", type=int, help="so many steps instead")
    parser.add_argument("--view", choices=tuple(VIEWS), default="machine", help="which view learns")
    parser.add_argument(
        "--learn", choices=LEARN, default="weights", help="the weights, or how much of each row and column"
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin with the human view as the machine view"
    )
    parser.add_argument("--teacher-weight", type=float, default=0.3, help="against the squared error")
    parser.add_argument(
        "--grain",
        type=float,
        default=GRAIN,
        help="noise in the machine view, as a share of the codec's error",
    )
    parser.add_argument("--batch", type=int, default=8, help="crops of a step")
    parser.add_argument("--crop", type=int, default=256, help="pixels a side, a multiple of 64")
    parser.add_argument(
        "--min-scale", type=float, default=1.0, help="shrink photos to between this and 1 of their size"
    )
    parser.add_argument("--matrix-lr", type=float, default=0.001, help="dense weights (both views)")
    parser.add_argument("--other-lr", type=float, default=0.003, help="biases and filters, or all scales")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int)


def run(arguments: argparse.Namespace) -> int:
    """Polish and write the model folder."""
    from ugicm_train.teachers import parse_teacher

    is_run = (Path(arguments.source) / CHECKPOINT).exists()
    if is_run and arguments.out is None:
        raise ValueError(f"{arguments.source} is a run, not a model: give --out")
    folder = arguments.out or model_path(arguments.source)
    options = TrainOptions(
        minutes=arguments.minutes,
        steps=arguments.steps,
        batch=arguments.batch,
        crop=arguments.crop,
        min_scale=arguments.min_scale,
        matrix_lr=arguments.matrix_lr,
        other_lr=arguments.other_lr,
        warmup_steps=20,
        decay=0.5,
        ema=0.99,
        learn=arguments.learn,
        level_power=LEVEL_POWER,
        teacher_weight=arguments.teacher_weight,
        seed=arguments.seed,
        device=arguments.device,
        precision=arguments.precision,
        threads=arguments.threads,
    )
    whole = folder.resolve()  # "." has no name
    return polish(
        arguments.source,
        folder,
        options,
        arguments.data,
        arguments.run or whole.with_name(f"{whole.name}.polish"),
        view=arguments.view,
        restart=arguments.restart,
        teacher=parse_teacher(arguments.teacher, arguments.precision),
        teacher_name=arguments.teacher,
        grain=arguments.grain,
        resume=arguments.resume,
    )

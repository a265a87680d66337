"""The training loop: one command for CPU and CUDA, resumable, safe against being killed.

Needs only torch, numpy, Pillow and safetensors; shows a live progress bar where `rich` is installed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ugicm.codec.config import PRESETS, ModelConfig
from ugicm.codec.device import pick_device, pick_precision
from ugicm.codec.store import WEIGHTS_FILE, model_path
from ugicm.memory import keep_freed_memory
from ugicm_train.cuda import GraphStep, compile_blocks
from ugicm_train.data import CropSampler, read_photos
from ugicm_train.files import locked, written_whole
from ugicm_train.losses import Teacher, level_of, logged, rate_distortion_loss
from ugicm_train.model import PREFERENCE, SCALED, TrainableCodec, has_machine_view, scaled_parts
from ugicm_train.optimizer import Optimizer
from ugicm_train.parallel import Processes
from ugicm_train.progress import Progress
from ugicm_train.signals import caught
from ugicm_train.start import start_from_dct

CHECKPOINT, CONFIG, LOG = "checkpoint.pt", "config.json", "log.csv"
STABLE_CHECKPOINT = "before-decay.pt"
"""The state just before the learning rate decays: the best place to go on from."""
EXPORTED = ("average", "config", "step", "minutes")
RESUMED = (*EXPORTED, "model", "adam")
"""Parts of a checkpoint that are needed for a model, and to go on."""
LEARN = ("weights", "scales")
"""What of a model learns: its weights, or `ugicm_train.scales` of those that it has."""
DIVERGED = 5.0
"""A run whose rate has grown this many times over its least is stopped: no budget brings it back."""
COLLAPSED_DB, NOTHING_DB = 15.0, 3.0
"""So is one that has a view so far below its best PSNR, or below a PSNR at which half of the pictures show
nothing."""
STEPS_PER_ROW = 50
"""Of the log."""
DRAWN_BEFORE = 1000
"""Drawn crops that a GPU, which needs some a step, chooses from; each takes milliseconds to draw."""
FULL_STRENGTH_SHARE = 0.85
"""Share of the steps whose machine view is decoded at strength 1."""
LOG_FIELDS = (
    "step", "minutes", "loss", "bpp", "psnr_human", "psnr_machine", "teacher", "skipped", "lr_factor",
    "crops_per_s",
)  # fmt: skip


def _option(default: Any, text: str) -> Any:
    """A field of `TrainOptions`; `text` is what the command line says of it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainOptions:
    """One run. Learning rates are peak values; times are wall-clock."""

    minutes: float | None = _option(None, "train this long from now")
    steps: int | None = _option(None, "train so many steps from now instead")
    batch: int = _option(16, "crops of a step, in each process where there are several")
    crop: int = _option(256, "side of a crop in pixels, a multiple of 64")
    synthetic_share: float = _option(
        0.04, "part of the crops that is drawn, not photographed: text, stripes, flat colour"
    )
    min_scale: float = _option(
        1.0, "shrink photos to between this and 1 of their size before a crop is taken"
    )
    batch_levels: int = _option(4, "rates in a batch of each process, each with an equal part of it")
    level_power: float = _option(
        0.8,
        "levels are drawn as last * u^POWER, u uniform: below 1, more often high ones, which starve",
    )
    machine_share: float = _option(1.0, "part of the batch, at least, that also decodes the machine view")
    learn: str = _option("weights", "weights, or scales: how much there is of each row and column of them")
    matrix_lr: float = _option(0.005, "Muon's peak learning rate, for the dense weights")
    other_lr: float = _option(1e-3, "AdamW's, for all the rest")
    warmup_steps: int = _option(200, "steps over which learning rates rise")
    decay: float = _option(0.3, "last part of the run, 0 to 1, over which they fall to zero")
    ema: float = _option(0.999, "what the moving average keeps of itself each step")
    clip: float = _option(2.0, "longest gradient; longer ones are shortened to it")
    teacher_weight: float = _option(1.0, "of the teacher's distance, against squared error and rate")
    seed: int = _option(0, "of crops, rates and noise")
    threads: int | None = _option(None, "threads of each process (default: as torch chooses)")
    checkpoint_minutes: float = _option(5.0, "write checkpoint.pt this often")
    device: str = _option("auto", "cpu, cuda, cuda:1 ..., or auto: CUDA where there is one")
    precision: str = _option(
        "auto", "of the transforms in the forward pass and of Muon's products: auto, float32, bfloat16"
    )
    compile: bool = _option(True, "on a single GPU, have the blocks compiled")

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give exactly one of minutes and steps")
        above_0 = ("minutes", "steps", "batch", "crop", "batch_levels", "level_power", "clip", "threads")
        for name in above_0:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("synthetic_share", "machine_share", "decay", "ema"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        most = {"seed": 1 << 32, "threads": 1024}
        for name, limit in most.items():
            if (getattr(self, name) or 0) > limit:
                raise ValueError(f"{name} must be at most {limit}, got {getattr(self, name)}")
        from_0 = ("warmup_steps", "matrix_lr", "other_lr", "teacher_weight", "seed", "checkpoint_minutes")
        for name in from_0:
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if math.isinf(self.level_power):
            raise ValueError("level_power must be finite: at infinity every crop has the lowest rate")
        if self.learn not in LEARN:
            raise ValueError(f"learn must be one of {', '.join(LEARN)}, got {self.learn!r}")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must be in (0, 1], got {self.min_scale}")
        if self.crop % 64:
            raise ValueError(f"crop must be a multiple of 64 pixels, got {self.crop}")


class DivergedError(ValueError):
    """Training has run away; the message says what to change."""


def learning_rate_factor(step: int, done: float, options: TrainOptions) -> float:
    """Linear warm-up, then constant, then linear decay to zero; `done` is the run's finished part."""
    warm = min(1.0, (step + 1) / max(1, options.warmup_steps))
    cool = min(1.0, (1.0 - done) / options.decay) if options.decay > 0 else 1.0
    return warm * max(cool, 0.0)


def load_checkpoint(run: Path, name: str = CHECKPOINT, *, needs: Sequence[str] = EXPORTED) -> dict[str, Any]:
    """The training state of a run folder (tensors and plain values only).

    Raises:
        ValueError: the file is damaged, lacks a part that the caller `needs`, does not fit its config, or has
            values that are not finite.
    """
    path = run / name
    if not path.exists():
        raise FileNotFoundError(f"no {name} in {run}: train first, or check the path")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # of many kinds, and torch's texts are about other things
        raise ValueError(f"{path} is no checkpoint, or a damaged one") from error
    if missing := [part for part in needs if part not in state]:
        raise ValueError(f"{path} is no whole checkpoint: it lacks {', '.join(missing)}")
    try:
        different = _different_tensors(state)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no model: {error}") from error
    if different:
        raise ValueError(f"{path} does not fit its config: {len(different)} tensors, first {different[0]}")
    for name, value in state["average"].items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite: take a checkpoint of before")
    return state


def _different_tensors(state: dict[str, Any]) -> list[str]:
    """Those that are missing, of another shape or too many, of a checkpoint's models and its config."""
    different = set()
    for part in ("average", "model"):
        if part in state:
            with torch.device("meta"):  # shapes alone
                model = TrainableCodec(ModelConfig.from_dict(state["config"]))
            model.learn_scales(scaled_parts(state[part]))
            wanted = {(name, value.shape) for name, value in model.state_dict().items()}
            different |= wanted ^ {(name, value.shape) for name, value in state[part].items()}
    return sorted({name for name, _ in different})


class Trainer:
    """State of one run: model, its moving average, optimisers and counters."""

    def __init__(self, model: TrainableCodec, options: TrainOptions, out: Path) -> None:
        """Train `model`, as it is, in folder `out`; parameters that need no gradient stay as they are."""
        self.model, self.config, self.options, self.out = model, model.config, options, out
        self.processes = Processes()
        name = options.device
        if name == "auto":
            name = f"cuda:{self.processes.local_rank}" if torch.cuda.is_available() else "cpu"
        self.device = pick_device(name)
        self.dtype = pick_precision(options.precision, self.device)
        self.model.to(self.device)
        if not options.machine_share:
            for part in PREFERENCE:
                getattr(self.model, part).requires_grad_(False)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = Optimizer(
            self.model, self.average, self.processes, clip=options.clip, dtype=self.dtype
        )
        one_gpu = self.device.type == "cuda" and self.processes.count == 1
        self.graph_step = self._graph_step() if one_gpu else None
        self.level_random = torch.Generator()
        self.step, self.minutes = 0, 0.0
        self.record: dict[str, Any] = {}
        """Where the weights come from besides this run's data: the model it started from, teachers."""
        self.asked_to_stop = 0
        """The signal that did, 0 for none."""
        self.least_bpp = math.inf
        """Of the rows of the log."""
        self.best_psnr = {"human": -math.inf, "machine": -math.inf}
        """Likewise."""
        self.warm_from = 0
        """Step from which the warm-up counts: the learning rate also warms up after a resume."""

    def _graph_step(self) -> GraphStep:
        """One GPU: everything of a step happens on the device."""
        options = self.options
        if options.batch % options.batch_levels:
            raise ValueError(
                f"batch must be a multiple of batch_levels on CUDA, got {options.batch} and "
                f"{options.batch_levels}"
            )
        if options.compile:
            compile_blocks(self.model)
        return GraphStep(
            self.model,
            self.optimizer,
            shape=(options.batch, 3, options.crop, options.crop),
            rates=options.batch_levels,
            machine_rates=math.ceil(options.machine_share * options.batch_levels),
            teacher_weight=options.teacher_weight,
            dtype=self.dtype,
        )

    def alone(self) -> AbstractContextManager[None]:
        """The run's folder for this run alone (`locked`); the first process holds it for the others."""
        self.out.mkdir(parents=True, exist_ok=True)  # by each of them: all open the log
        return locked(self.out) if self.processes.first else nullcontext()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            # Muon's momentum is as good as new after some twenty steps.
            "adam": self.optimizer.adam.state_dict(),
            "step": self.step,
            "minutes": self.minutes,
            "record": self.record,
            "config": self.config.to_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`; learning rates come from the options, not from the checkpoint.

        Raises:
            ValueError: something else learned there than the options say.
        """
        learned = "scales" if scaled_parts(state["model"]) else "weights"
        if learned != self.options.learn:
            raise ValueError(
                f"the checkpoint is of a run with --learn {learned}, got --learn {self.options.learn}"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        # How the optimiser works, and where, is a matter of this run's device, not of the checkpoint's.
        adam = self.optimizer.adam
        adam.load_state_dict(state["adam"] | {"param_groups": adam.state_dict()["param_groups"]})
        self.step, self.minutes = state["step"], state["minutes"]
        self.record = state.get("record", {})
        self.warm_from = self.step

    def read(self, data: Sequence[Path]) -> CropSampler:
        """Crops of the photos in `data`, which stay on the device; other crops in each process."""
        size = self.options.crop
        seed = self.options.seed + self.step + 1_000_003 * self.processes.rank
        torch.manual_seed(seed)
        # The same in all processes.
        self.level_random.manual_seed(self.options.seed + self.step)
        photos = [photo.to(self.device) for _, photo in read_photos(data, min_side=size)]
        return CropSampler(
            photos,
            size=size,
            seed=seed,
            synthetic_share=self.options.synthetic_share,
            min_scale=self.options.min_scale,
            drawn_before=DRAWN_BEFORE if self.device.type == "cuda" else 0,
        )

    def next_levels(self, count: int) -> list[float]:
        """Rates of the parts of this process's next batch; those of all processes are spread evenly."""
        first = float(torch.rand((), generator=self.level_random))
        total = count * self.processes.count
        shares = [(first + (self.processes.rank * count + part) / total) % 1 for part in range(count)]
        return [level_of(self.config, share, self.options.level_power) for share in shares]

    def _average_kept(self) -> float:
        """How much of the moving average stays at this step."""
        return min(self.options.ema, (self.step + 1) / (self.step + 50))

    def train_step(self, x: Tensor, factor: float, teacher: Teacher | None) -> dict[str, Tensor]:
        """One update; a batch whose gradients are not finite or far out of line is skipped.

        What is returned is empty where the step adds it up by itself (`graph_step`).
        """
        options = self.options
        # Mostly the machine's end, else anywhere between: the slider must work along its whole way.
        strength = 1.0 if float(torch.rand(())) < FULL_STRENGTH_SHARE else float(torch.rand(()))
        optimizing = {
            "matrix_lr": options.matrix_lr * factor,
            "other_lr": options.other_lr * factor,
            "kept": self._average_kept(),
        }
        if self.graph_step is not None:
            levels = self.next_levels(options.batch_levels)
            judge = teacher.draw() if teacher else None
            self.graph_step(x, levels, strength=strength, judge=judge, **optimizing)
            self.step += 1
            return {}
        self.model.zero_grad()
        parts = x.chunk(min(options.batch_levels, len(x)))
        sums: dict[str, Tensor] = {}
        for part, value in zip(parts, self.next_levels(len(parts)), strict=True):
            level = part.new_full((len(part),), value)
            count = math.ceil(options.machine_share * len(part))
            with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
                output = self.model(part, level, machine_count=count, strength=strength)
            terms = rate_distortion_loss(
                self.config,
                output,
                part,
                level,
                judge=teacher.draw() if teacher else None,
                teacher_weight=options.teacher_weight,
                strength=strength,
            )
            share = len(part) / len(x)
            (share * terms.loss).backward()
            for name, term in terms._asdict().items():
                sums[name] = sums.get(name, 0.0) + share * term.detach()
        skipped = self.optimizer.step(
            **{name: torch.tensor(value, device=x.device) for name, value in optimizing.items()}
        )
        self.step += 1
        return logged(sums, skipped)

    def _row(self, sums: dict[str, Any], count: int, factor: float, seconds: float) -> dict[str, Any]:
        """Of the log: means of the last `count` steps, which took so long."""
        kept = count - round(float(sums["lost"]))
        means = {name: float(value) / kept if kept else math.nan for name, value in sums.items()}
        return {
            "step": self.step,
            "minutes": round(self.minutes, 2),
            "loss": round(means["loss"], 5),
            "bpp": round(means["bpp"], 4),
            "psnr_human": round(_psnr(means["mse_human"]), 3),
            "psnr_machine": round(_psnr(means["mse_machine"]), 3),
            "teacher": round(means["teacher"], 5),
            "skipped": round(float(sums["skipped"])),
            "lr_factor": round(factor, 4),
            "crops_per_s": round(count * self.options.batch * self.processes.count / seconds, 1),
        }

    def _check_lost(self, sums: dict[str, Any], count: int) -> None:
        """Stop a run whose last `count` steps tell nothing; those that remain in their means may look fine.

        Raises:
            DivergedError: more than half of them are no numbers, and more than one.
        """
        lost = round(float(sums["lost"]))
        if count > 1 and 2 * lost > count:
            self._diverged(f"{lost} of {count} steps are no numbers")

    def _check(self, row: dict[str, Any], count: int) -> None:
        """Stop a run that is lost, by a row of `count` steps; its last checkpoint stays.

        Raises:
            DivergedError: the rate has exploded or a view collapsed, the loss is no number, or every step was
                skipped.
        """
        bpp, loss = row["bpp"], row["loss"]
        if row["skipped"] == count:
            if count == 1:  # one alone may be out of line
                return
            self._diverged(f"no usable gradient in {count} steps")
        if not (math.isfinite(bpp) and bpp <= DIVERGED * self.least_bpp):
            self._diverged(f"{bpp} bits per pixel", self.least_bpp)
        if not math.isfinite(loss):
            self._diverged(f"a loss of {loss}")
        for view, best in self.best_psnr.items():
            # Infinite where it is not decoded.
            psnr = row[f"psnr_{view}"]
            if not psnr >= max(NOTHING_DB, best - COLLAPSED_DB):
                self._diverged(f"a {view} view of {psnr} dB", best)
            if math.isfinite(psnr):
                self.best_psnr[view] = max(best, psnr)
        self.least_bpp = min(self.least_bpp, bpp)

    def _save(self, path: Path) -> None:
        """Write the state; one that no run could go on from must not take the place of the last.

        Raises:
            DivergedError: it has values that are not finite.
        """
        state = self.state()
        for part in ("model", "average"):
            for name, value in state[part].items():
                if not value.isfinite().all():
                    self._diverged(f"{name} of the {part} has values that are not finite")
        with written_whole(path) as beside:
            try:
                torch.save(state, beside)
            except RuntimeError as error:  # torch's own way of saying that a disk is full
                raise OSError(f"cannot write {path}: {error}") from error

    def _diverged(self, sign: str, before: float = math.inf) -> NoReturn:
        had = f", and has had {before}" if math.isfinite(before) else ""
        rates = f"--matrix-lr than {self.options.matrix_lr} and --other-lr than {self.options.other_lr}"
        raise DivergedError(
            f"the run has diverged at step {self.step}: {sign}{had}; start again with a lower {rates}, or "
            "--resume from a checkpoint of before"
        )

    def run(self, sampler: CropSampler, teacher: Teacher | None = None) -> int:
        """Train until the budget of the options is used up, or until SIGINT or SIGTERM.

        Returns:
            Exit status, the same in all processes: 0, or that of the signal.

        Raises:
            DivergedError: the run is lost; nothing more is written.
        """

        def stop(number: int, _: object) -> None:
            self.asked_to_stop = number

        with caught(stop):
            return self._run(sampler, teacher)

    def _run(self, sampler: CropSampler, teacher: Teacher | None) -> int:
        options = self.options
        start, minutes_before, first = time.monotonic(), self.minutes, self.step
        saved_at, logged_at, count, factor = start, start, 0, 0.0
        sums: dict[str, Any] = {}
        row_sums: dict[str, Any] = {}
        row_count = 0

        def check_unlogged() -> None:
            """By the steps after the last row, before they are saved."""
            nonlocal sums
            if not count:
                return
            if self.graph_step is not None:
                sums = _added(sums, self.graph_step.take_sums())
            # With those of the last row: a single picture that explodes tells nothing of few steps.
            both, steps = _added(sums, row_sums), count + row_count
            self._check(self._row(both, steps, factor, time.monotonic() - start), steps)
            self._check_lost(sums, count)

        writes = self.processes.first
        stable_saved = False
        with (
            Progress(shown=writes) as progress,
            (self.out / LOG).open("a", newline="", encoding="utf-8") as log_file,
        ):
            log = csv.DictWriter(log_file, LOG_FIELDS)
            if log_file.tell() == 0 and writes:
                log.writeheader()
            while True:
                elapsed = (time.monotonic() - start) / 60
                if options.minutes is not None:
                    done = elapsed / options.minutes
                else:
                    done = (self.step - first) / (options.steps or 1)
                done = self.processes.agree(1.0 if self.asked_to_stop else done)
                if done >= 1:
                    break
                if not stable_saved and writes and done >= 1 - options.decay:
                    stable = self.out / STABLE_CHECKPOINT
                    # A run that decays from its beginning has no better state than one that is there.
                    if self.step > first or not stable.exists():
                        if row_count:
                            check_unlogged()
                        self._save(stable)
                    stable_saved = True
                factor = learning_rate_factor(self.step - self.warm_from, done, options)
                terms = self.train_step(sampler.batch(options.batch), factor, teacher)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value
                count += 1
                self.minutes = minutes_before + (time.monotonic() - start) / 60
                now = time.monotonic()
                if not writes:
                    continue
                if self.step % STEPS_PER_ROW == 0:
                    if self.graph_step is not None:
                        sums = _added(sums, self.graph_step.take_sums())
                    row = self._row(sums, count, factor, now - logged_at)
                    log.writerow(row)
                    log_file.flush()
                    self._check(row, count)
                    self._check_lost(sums, count)
                    # Nothing is known yet where the first step of a resumed run is logged.
                    remaining_s = elapsed * 60 * (1 / done - 1) if done else math.inf
                    progress.update(row, done=done, remaining_s=remaining_s)
                    row_sums, row_count = sums, count
                    logged_at, sums, count = now, {}, 0
                if now - saved_at > options.checkpoint_minutes * 60:
                    if row_count:  # else the steps may be too few
                        check_unlogged()
                    self._save(self.out / CHECKPOINT)
                    saved_at = now
        if writes:
            check_unlogged()
            self._save(self.out / CHECKPOINT)
        stopped_by = int(self.processes.agree(self.asked_to_stop))
        if not stopped_by:
            return 0
        progress.say(f"stopped at step {self.step}: go on with --resume")
        return 128 + stopped_by


def _added(sums: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sums.get(name, 0.0) + others.get(name, 0.0) for name in {**sums, **others}}


def _psnr(mse: float) -> float:
    return -10 * math.log10(mse) if mse else math.inf


def train(
    config: ModelConfig | None,
    options: TrainOptions,
    data: list[Path],
    out: Path,
    *,
    resume: str | None = None,
    start: str | None = None,
    teacher: Teacher | None = None,
    teacher_name: str | None = None,
) -> int:
    """Train in folder `out`; returns the exit status of `Trainer.run`.

    `config` is that of the checkpoint or of `start`, else ``ugicm-s``, if None. `resume` names the checkpoint
    file in `out` to continue from; `start` is a stored model (name or folder) whose weights a new run begins
    with; `teacher_name` is kept in the model's record.

    Raises:
        ValueError: the options contradict each other, or the checkpoint; another run writes to `out`.
        OSError: `out` holds something that the run would write over, or no checkpoint to resume.
    """
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    if teacher is not None and not options.machine_share:
        raise ValueError(
            "a teacher judges the machine view, and --machine-share 0 decodes none: give a share above 0, "
            "or no --teacher"
        )
    if options.learn == "scales" and start is None and resume is None:
        raise ValueError("--learn scales moves weights that are trained already: give --start")
    if (out / WEIGHTS_FILE).exists():
        raise FileExistsError(f"{out} holds a model, which a run would write over: give another --out")
    if resume is None:
        if (out / CHECKPOINT).exists():
            raise FileExistsError(f"{out} holds a run already: use --resume, or another --out")
        if _has_rows(out / LOG):
            raise FileExistsError(
                f"{out} holds the log of a run without {CHECKPOINT}: one that still runs, or that was ended "
                f"before it wrote any; give another --out, or remove {LOG}"
            )
    elif not (out / resume).exists():
        raise FileNotFoundError(f"no {resume} in {out} to go on from: begin without --resume, or check --out")
    if resume and start is not None:
        raise ValueError("--resume goes on with the weights of the checkpoint: leave out --start")
    state = load_checkpoint(out, resume, needs=RESUMED) if resume else None
    if state is not None:
        stored = ModelConfig.from_dict(state["config"])
        if config is not None and config != stored:
            own, given = stored.to_dict(), config.to_dict()
            values = [f"{name} {own[name]}, got {given[name]}" for name in own if own[name] != given[name]]
            raise ValueError(f"the checkpoint is of another --config: {'; '.join(values)}")
        config = stored
    torch.manual_seed(options.seed)
    record: dict[str, Any] = {}
    if start is not None:
        # Needs the entropy coder's package, which training from nothing does not.
        from ugicm_train.restore import read_trainable, start_from

        trained, record["start"] = read_trainable(model_path(start))
        model = start_from(trained, config or trained.config)
    else:
        model = TrainableCodec(config or PRESETS["ugicm-s"])
        start_from_dct(model)
    if options.learn == "scales":
        if start is not None:
            _check_scales(model, trained.config, machine=bool(options.machine_share))
        model.learn_scales(SCALED)
    trainer = Trainer(model, options, out)
    trainer.record = record | {"learned": options.learn}
    if state is not None:
        trainer.load(state)
    before: list[dict[str, Any]] = trainer.record.get("teachers", [])
    if teacher is not None:
        said = {"teacher": teacher_name, "weight": options.teacher_weight}
        trainer.record["teachers"] = [*before, said]
    elif before and options.machine_share and trainer.processes.first:
        sys.stderr.write(f"no --teacher from here on; before, it was {before[-1]['teacher']}\n")
    with trainer.alone():
        sampler = trainer.read(data)
        if trainer.processes.first:
            described = {
                "model": model.config.to_dict(),
                "options": dataclasses.asdict(options),
                "start": start,
                "data": [str(source) for source in data],
                "teacher": teacher_name,
            }
            with written_whole(out / CONFIG) as beside:
                beside.write_text(json.dumps(described, indent=2), encoding="utf-8")
        return trainer.run(sampler, teacher)


def _check_scales(model: TrainableCodec, trained: ModelConfig, *, machine: bool) -> None:
    """``ValueError`` where scales of the model's weights would be scales of zeros."""
    if machine and not has_machine_view(model):
        raise ValueError(
            "--learn scales: the model has no machine view yet, and scales of nothing stay nothing; learn "
            "weights, or give --machine-share 0"
        )
    if dataclasses.replace(model.config, name=trained.name) != trained:
        raise ValueError("--learn scales: what a larger --config adds begins with zeros; learn weights")


def _has_rows(log: Path) -> bool:
    """Whether a run wrote more there than the header."""
    return log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > 1


def _config(name: str) -> ModelConfig:
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{name!r} is neither a config.json nor one of {', '.join(PRESETS)}")
    try:
        return ModelConfig.from_json(path)
    except (KeyError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name} describes no model: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train run``: where and from what, then the fields of `TrainOptions`."""
    parser.add_argument(
        "--config",
        type=_config,
        help="preset name or config.json (default: that of the checkpoint or of --start, else ugicm-s)",
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of photos or shards")
    parser.add_argument("--out", type=Path, required=True, help="run folder (checkpoints, log)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=CHECKPOINT,
        metavar="CHECKPOINT",
        help="continue from a checkpoint of the run folder (default: checkpoint.pt)",
    )
    parser.add_argument("--start", metavar="MODEL", help="begin with the weights of a stored model")
    kinds = {"minutes": float, "steps": int, "threads": int}  # those without a default
    for option in dataclasses.fields(TrainOptions):
        flag, kind = f"--{option.name.replace('_', '-')}", kinds.get(option.name) or type(option.default)
        text = option.metadata["help"]
        if kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=option.default, help=text)
        else:
            parser.add_argument(flag, type=kind, default=option.default, help=text)
    parser.add_argument(
        "--teacher", help="judge of the machine view, such as open_clip:ViT-B-32/openai (default: none)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train in the run folder."""
    names = [option.name for option in dataclasses.fields(TrainOptions)]
    options = TrainOptions(**{name: getattr(arguments, name) for name in names})
    teacher = None
    if arguments.teacher:
        from ugicm_train.teachers import parse_teacher

        teacher = parse_teacher(arguments.teacher, arguments.precision)
    return train(
        arguments.config,
        options,
        arguments.data,
        arguments.out,
        resume=arguments.resume,
        start=arguments.start,
        teacher=teacher,
        teacher_name=arguments.teacher,
    )

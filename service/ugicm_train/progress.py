"""A live line about the run: a bar where `rich` is installed and a terminal listens, plain lines else."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Context manager; `update` takes a row of the training log."""

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        self._bar: Any = None
        self._task: Any = None
        self._printed = 0.0

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn
                from rich.progress import Progress as RichProgress
            except ImportError:
                return self
            self._bar = RichProgress(
                TextColumn("step {task.fields[step]}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=1.0, step=0, text="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays; for after the block."""
        if self._shown:
            print(line, file=sys.stderr, flush=True)

    def update(self, row: dict[str, Any], *, done: float, remaining_s: float) -> None:
        psnr_db = min(row["psnr_human"], row["psnr_machine"])  # a view that is not decoded has none
        text = (
            f"loss {row['loss']:.4f}  bpp {row['bpp']:.3f}  PSNR {psnr_db:.2f} dB  "
            f"{row['crops_per_s']:.0f} crops/s  ETA {remaining_s / 60:.0f} min"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, step=row["step"], text=text)
        elif time.monotonic() - self._printed > 60:
            print(f"step {row['step']}  {100 * done:.0f}%  {text}", file=sys.stderr, flush=True)
            self._printed = time.monotonic()

"""One measurement in several processes (``--jobs``): each has a core and a part of the pictures.

Every process is the same command with ``--part``. What it finds lies in files of its own beside the
output, from where the first one takes it; an interrupted one goes on there.
"""

from __future__ import annotations

import argparse
import glob
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
"""Read by torch when it is imported."""


@dataclass(frozen=True)
class Part:
    """One of `count` parts, numbered from 0."""

    index: int
    count: int

    def of(self, items: Iterable[Path]) -> list[Path]:
        """This part's share, spread over all of them."""
        return sorted(items)[self.index :: self.count]

    def file(self, whole: Path) -> Path:
        """Where this part's results are, for those of the whole."""
        return whole.with_name(f"{whole.stem}.part-{self.index}-of-{self.count}{whole.suffix}")


def part_files(whole: Path) -> list[Path]:
    """What parts left beside the results of the whole, also of an interrupted run with other ``--jobs``."""
    return sorted(whole.parent.glob(f"{glob.escape(whole.stem)}.part-*-of-*{whole.suffix}"))


def _part(text: str) -> Part:
    index, _, count = text.partition("/")
    return Part(int(index), int(count))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--jobs``, and the ``--part`` that it gives each process."""
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes, each with one core and a part of the pictures; times are then of busy cores",
    )
    parser.add_argument("--part", type=_part, help=argparse.SUPPRESS)
    parser.set_defaults(argv=())


def measure_parts(command: Sequence[str], jobs: int) -> list[Part]:
    """Run `command`, arguments of ``ugicm-train``, for each part at once, and wait; none if `jobs` is 1.

    The process itself uses one thread from here on, as theirs do.

    Raises:
        ValueError: one of them failed; it has said why.
    """
    if jobs <= 1:
        return []
    parts = [Part(index, jobs) for index in range(jobs)]
    import torch

    torch.set_num_threads(1)
    # So that it stops its parts when it is stopped: they would go on beside those of the next one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    running: list[subprocess.Popen[bytes]] = []
    try:
        for part in parts:
            # After the subcommand: at the end it could stand behind a `--`.
            arguments = [*command[:1], "--part", f"{part.index}/{part.count}", *command[1:]]
            running.append(
                subprocess.Popen(  # noqa: S603  this very program
                    [sys.executable, "-m", "ugicm_train", *arguments],
                    env=os.environ | {THREADS: "1"},
                )
            )
        failed = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
            process.wait()
    if any(failed):
        raise ValueError(
            f"{sum(map(bool, failed))} of {jobs} parts failed; the same command goes on from there"
        )
    return parts

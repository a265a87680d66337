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
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ugicm_train.files import locked

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


def kept_alone(folder: Path, part: Part | None) -> AbstractContextManager[None]:
    """`locked`, but for a part, which writes to files of its own."""
    return nullcontext() if part else locked(folder)


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


def measure_parts(command: Sequence[str], jobs: int, pictures: Callable[[], int]) -> None:
    """Run `command`, arguments of ``ugicm-train``, for each part at once, and wait; none if `jobs` is 1.

    The process itself uses one thread from here on, as theirs do.

    Args:
        command: of the process itself.
        jobs: parts, at least 1.
        pictures: how many there are: no more parts than these; asked only if `jobs` is above 1.

    Raises:
        ValueError: `jobs` is below 1, or a part failed; it has said why.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs == 1:
        return
    import torch

    torch.set_num_threads(1)
    count = min(jobs, pictures())
    if count <= 1:
        return
    parts = [Part(index, count) for index in range(count)]
    # So that it stops its parts when it is stopped: they would go on beside those of the next one.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    running: list[subprocess.Popen[bytes]] = []
    # Nothing is ever written: when this process is gone, however it ended, the parts read the pipe's end.
    reading, writing = os.pipe()
    try:
        for part in parts:
            # After the subcommand: at the end it could stand behind a `--`.
            arguments = [*command[:1], "--part", f"{part.index}/{part.count}", *command[1:]]
            running.append(
                subprocess.Popen(  # noqa: S603  this very program
                    [sys.executable, "-m", "ugicm_train", *arguments],
                    stdin=reading,
                    env=os.environ | {THREADS: "1"},
                )
            )
        failed = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)
        os.close(reading)
        os.close(writing)
    if any(failed):
        raise ValueError(
            f"{sum(map(bool, failed))} of {count} parts failed; the same command goes on from there"
        )


def end_with_parent() -> None:
    """In a part: end the process when the one that started it (`measure_parts`) is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()

"""How far a measurement is."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A bar where a terminal listens, lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()

    def start(self, what: str, total: int) -> None:
        """Of so many steps; it takes the place of what was before."""
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._task = self._bar.add_task(what, total=total)

    def advance(self, line: str = "") -> None:
        """A step is done; `line` says so where there is no bar."""
        if self._bar is not None:
            self._bar.advance(self._task)
        elif line:
            self.say(line)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

"""SIGINT and SIGTERM that wait until what must not be interrupted is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def caught(stop: Callable[[int, object], None]) -> Iterator[None]:
    """Within the block both call `stop` with their number; not in threads, which get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What comes within the block takes effect after it."""
    waiting: list[int] = []
    try:
        with caught(lambda number, _: waiting.append(number)):
            yield
    finally:
        for number in waiting:
            signal.raise_signal(number)

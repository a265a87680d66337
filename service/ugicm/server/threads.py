"""Work in threads that an event loop waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


async def run_in(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    """Result of `work` in a thread of the pool.

    A pool keeps cancelled work until its turn comes; what is kept of it here has let go of what it holds.
    """
    waiting = [work]
    del work
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: waiting.pop()())
    finally:
        waiting.clear()


async def run_while_awaited(pool: ThreadPoolExecutor, work: Callable[[Callable[[], bool]], Result]) -> Result:
    """As `run_in`; what `work` is given says whether nobody waits any more."""
    gone = threading.Event()
    try:
        return await run_in(pool, lambda: work(gone.is_set))
    finally:
        gone.set()

"""Keep freed memory in the process: returning it to the system and faulting it in again is slow.

The heap is then never trimmed, and would go on growing around what is kept in it for long.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

MAP_BYTES = 128 << 10
"""From this size on, what is kept for long lies in a `memory_map`; by default a process may have 65,530."""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP_BYTES = 1 << 30
_GROW_BYTES = 1 << 26
_MMAP_BYTES = 1 << 25
"""The largest threshold that glibc accepts."""


def keep_freed_memory() -> None:
    """Let glibc's malloc reuse blocks of up to 32 MiB instead of unmapping them.

    Tensors of a few MiB otherwise cost a system call and page faults each. Does nothing outside glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
    mallopt(_M_TOP_PAD, _GROW_BYTES)


def memory_map(size: int) -> mmap.mmap:
    """Room of `size` bytes outside the heap, returned to the system with its last reference."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

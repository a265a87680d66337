"""Keep freed memory in the process: returning it to the system and faulting it in again is slow."""

from __future__ import annotations

import ctypes
import sys

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

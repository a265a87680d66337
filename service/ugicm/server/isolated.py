"""Image files, read in processes of their own with limits of processor time and memory.

Pillow and the libraries below it believe what a file says: a small one can keep them busy for minutes, take
gigabytes or crash them. Here that ends one process, and the next file gets a new one; the service goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import AvifImagePlugin

from ugicm.codec.errors import CodecError, check_pixels
from ugicm.pixels import Pixels
from ugicm.server import images
from ugicm.server.images import MalformedImageError, UnsupportedImageError

SECONDS, SECONDS_PER_PIXEL = 5, 1e-6
"""Of a processor that reading may take; a megapixel takes hundredths."""
MEMORY, MEMORY_PER_PIXEL = 768 << 20, 64
"""Bytes that reading may take besides twice the file, the interpreter included."""
POLL_S = 0.05
"""Between two looks at whether anybody still waits for a file."""

_REQUEST = struct.Struct("<QQ")
"""Bytes of the file that follows; most pixels, or 0 for the size alone."""
_CODE = "import sys; sys.path[:] = {path!r}; from ugicm.server.isolated import main; main()"
_KINDS: dict[str, type[CodecError]] = {
    kind.__name__: kind for kind in (CodecError, MalformedImageError, UnsupportedImageError)
}


OF_THE_SERVICE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that its processes do not take, as it finishes what it has begun; they end with it."""
FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
"""How a file can end the process that reads it; any other way is not the file's fault."""


class ReaderLostError(RuntimeError):
    """No process to read an image could be started, or somebody ended it: no fault of the image."""


class _Answer(NamedTuple):
    """What another process found in a file."""

    size: tuple[int, int] | None
    """Width and height by the header; None if there is none that can be read."""
    pixels: Pixels | None
    """uint8 RGB (H, W, 3); None if only the size was asked for, it was too large, or something failed."""
    error: tuple[str, str] | None
    """Why there are no pixels: the name of one of `_KINDS`, and its text. No exception, whose traceback would
    keep the picture."""


def size_of_image(data: bytes, *, stop: Callable[[], bool] = lambda: False) -> tuple[int, int]:
    """Width and height by the image's header; what it raises is as for `read_image`."""
    answer = _ask(data, 0, stop)
    if answer.size is None:
        raise _problem(answer)
    return answer.size


def read_image(data: bytes, *, max_pixels: int, stop: Callable[[], bool] = lambda: False) -> Pixels:
    """As `images.read_image`.

    Args:
        data: the file.
        max_pixels: most that are read.
        stop: asked again and again; once true, the work ends.

    Raises:
        UnsupportedImageError: none of the formats in `images.FORMATS`.
        MalformedImageError: damaged, truncated, or reading it takes too much time or memory.
        LimitExceededError: more than `max_pixels`; noticed in the header, before anything is decoded.
        CodecError: `stop` said true.
        ReaderLostError: there is no other process, or it was ended.
    """
    answer = _ask(data, max_pixels, stop)
    if answer.pixels is None:
        if answer.error is None and answer.size is not None:
            check_pixels(*answer.size, max_pixels)
        raise _problem(answer)
    return answer.pixels


def _problem(answer: _Answer) -> CodecError:
    kind, text = answer.error or (MalformedImageError.__name__, "the image has no pixels")
    return _KINDS[kind](text)


class _Reader:
    """Another process that reads one file after the other; it ends when its standard input does."""

    def __init__(self) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_SERVICE)  # which the process inherits
        try:
            self.process = subprocess.Popen(  # noqa: S603  this program, and no word of a caller's
                [sys.executable, "-c", _CODE.format(path=[str(path) for path in sys.path])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # It would make room for all processors' threads.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def ask(self, data: bytes, max_pixels: int, stop: Callable[[], bool]) -> _Answer:
        """What is in a file; ``OSError`` or ``EOFError`` if the process has ended."""
        source, sink = self.process.stdout, self.process.stdin
        assert isinstance(source, io.BufferedReader)
        assert sink is not None
        os.set_blocking(sink.fileno(), False)
        unsent = [memoryview(_REQUEST.pack(len(data), min(max_pixels, 1 << 62))), memoryview(data)]
        watched = select.poll()
        watched.register(source, select.POLLIN)
        watched.register(sink, select.POLLOUT)
        while source.fileno() not in (ready := dict(watched.poll(1000 * POLL_S))):
            if stop():
                raise CodecError("the work was stopped")
            if ready:
                unsent[0] = unsent[0][os.write(sink.fileno(), unsent[0]) :]
                while unsent and not unsent[0]:
                    del unsent[0]
                if not unsent:
                    watched.unregister(sink)
        if unsent or not (line := source.readline()):
            raise EOFError
        said: dict[str, Any] = json.loads(line)
        pixels = None
        if shape := said["shape"]:
            pixels = np.empty(shape, np.uint8)
            if source.readinto(pixels.reshape(-1).data) != pixels.size:
                raise EOFError
        return _Answer(said["size"] and tuple(said["size"]), pixels, said["error"])

    def end(self) -> int:
        """Its exit status, after it has been ended if it goes on."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not taken is not wanted any more
                pipe and pipe.close()
        return self.process.wait()


_idle: list[_Reader] = []
_lock = threading.Lock()


@atexit.register
def _end_all() -> None:
    """They would end by themselves, a moment later."""
    with _lock:
        while _idle:
            _idle.pop().end()


def _take() -> _Reader:
    with _lock:
        while _idle:
            if (reader := _idle.pop()).process.poll() is None:
                return reader
            reader.end()
    try:
        return _Reader()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ReaderLostError(f"no process to read the image can be started ({why}); try again") from error


def _ask(data: bytes, max_pixels: int, stop: Callable[[], bool]) -> _Answer:
    reader = _take()
    try:
        answer = reader.ask(data, max_pixels, stop)
    except (OSError, EOFError):
        with contextlib.suppress(subprocess.TimeoutExpired):
            reader.process.wait(1)  # closing its pipes is the last it does
        raise _failure(reader.end()) from None
    except BaseException:
        reader.end()
        raise
    with _lock:
        _idle.append(reader)
    return answer


def _failure(status: int) -> Exception:
    if status >= 0:  # it could not start, and has said why
        return RuntimeError(f"the process that reads images ended with status {status}")
    ended = signal.Signals(-status)
    if ended is signal.SIGXCPU:
        return MalformedImageError("the image is damaged, or reading it takes too long")
    if ended in FAULTS:
        return MalformedImageError(f"the image is damaged: its decoder ended ({ended.name})")
    why = ", perhaps for want of memory" if ended is signal.SIGKILL else ""
    return ReaderLostError(f"the process that read the image was ended ({ended.name}){why}; try again")


def _limit(length: int, pixels: int) -> None:
    """Time and memory from here on, for a file of so many bytes with so many pixels."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    for kind, most in (
        (resource.RLIMIT_CPU, used.ru_utime + used.ru_stime + SECONDS + SECONDS_PER_PIXEL * pixels),
        (resource.RLIMIT_DATA, MEMORY + 2 * length + MEMORY_PER_PIXEL * pixels),
    ):
        highest = resource.getrlimit(kind)[1]  # set from outside
        outside = math.inf if highest == resource.RLIM_INFINITY else highest
        resource.setrlimit(kind, (math.ceil(min(most, outside, 1 << 62)), highest))


def _answer(data: bytes, max_pixels: int) -> _Answer:
    size = None
    try:
        image = images.open_image(data)
        size = image.size
        if math.prod(size) > max_pixels:
            return _Answer(size, None, None)
        _limit(len(data), math.prod(size))
        return _Answer(size, images.load_pixels(image), None)
    except MemoryError:
        text = "the image is damaged, or reading it takes too much memory"
        return _Answer(size, None, (MalformedImageError.__name__, text))
    except CodecError as error:
        return _Answer(size, None, (type(error).__name__, str(error)))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """What the other process does: files from standard input, what is in them to standard output."""
    with contextlib.suppress(RuntimeError):  # no more threads; then it ends after the file
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(OSError):  # where memory is short, rather this process than the service
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    source = sys.stdin.buffer
    # First, as it takes the place of standard error where there is none; then that is not free for the other.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sink = os.fdopen(os.dup(1), "wb")
    for stream in (1, 2):  # what libraries print, such as libtiff
        os.dup2(nowhere, stream)
    while head := source.read(_REQUEST.size):
        length, max_pixels = _REQUEST.unpack(head)
        _limit(length, 0)
        size, pixels, error = _answer(source.read(length), max_pixels)
        shape = None if pixels is None else pixels.shape
        sink.write(json.dumps({"size": size, "error": error, "shape": shape}).encode() + b"\n")
        if pixels is not None:
            sink.write(np.ascontiguousarray(pixels).data)
        sink.flush()
        del pixels

"""Whatever a file does to the process that reads it, the service goes on."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.live import wait_until
from ugicm.codec.errors import CodecError, LimitExceededError
from ugicm.server import images, isolated
from ugicm.server.images import FORMATS, MalformedImageError, UnsupportedImageError
from ugicm.server.isolated import ReaderLostError, read_image, size_of_image

RAMP = np.linspace(0, 255, 20 * 30 * 3).astype(np.uint8).reshape(20, 30, 3)
START = "; from ugicm.server.isolated import main; main()"
"""Of what the other process runs, after its path is set."""


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[isolated._Reader]]:
    """Those that wait for files: none at first."""
    waiting: list[isolated._Reader] = []
    monkeypatch.setattr(isolated, "_idle", waiting)
    yield waiting
    for reader in waiting:
        reader.end()


def file(format: str = "PNG", image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or Image.fromarray(RAMP)).save(out, format, **options)
    return out.getvalue()


def running(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """From now on, processes run this in place of loading pixels."""
    lines = f"def load(image):\n  {code}\nimages.load, isolated.SECONDS = load, 1\nisolated.main()"
    changed = f"; import os, time; from ugicm.server import images, isolated\n{lines}"
    assert isolated._CODE.endswith(START)
    monkeypatch.setattr(isolated, "_CODE", isolated._CODE.replace(START, changed))


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_read_is_the_same_as_in_this_process(format: str) -> None:
    data = file(format)
    pixels = read_image(data, max_pixels=600)
    assert np.array_equal(pixels, images.read_image(data, max_pixels=600))
    assert pixels.flags.writeable
    assert size_of_image(data) == (30, 20)
    with pytest.raises(LimitExceededError, match="30x20 image: 600 is over the limit of 599"):
        read_image(data, max_pixels=599)


def test_errors_are_the_same_as_in_this_process() -> None:
    for data in (b"", b"hello", file()[:60], file("JPEG")[:-80], file("AVIF")[:100]):
        with pytest.raises(CodecError) as here:
            images.read_image(data, max_pixels=600)
        with pytest.raises(type(here.value)) as there:
            read_image(data, max_pixels=600)
        assert str(there.value) == str(here.value)
    with pytest.raises(UnsupportedImageError):
        size_of_image(b"hello")
    assert size_of_image(file("JPEG")[:-80]) == (30, 20)


def test_one_process_reads_file_after_file(idle: list[isolated._Reader]) -> None:
    read_image(file(), max_pixels=600)
    (reader,) = idle
    with pytest.raises(UnsupportedImageError):
        read_image(b"hello", max_pixels=600)
    read_image(file(image=Image.new("RGB", (1000, 1000))), max_pixels=10**6)
    assert idle == [reader]


def test_a_process_that_ended_while_it_waited(idle: list[isolated._Reader]) -> None:
    size_of_image(file())
    idle[0].process.kill()
    wait_until(lambda: idle[0].process.poll() is not None)
    assert read_image(file(), max_pixels=600).shape == RAMP.shape


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("while True: pass", "reading it takes too long"),
        ("x = bytearray(1 << 30)", "reading it takes too much memory"),
        ("os.kill(os.getpid(), 11)", "its decoder ended .SIGSEGV"),
        ("raise ValueError('why')", "damaged or truncated .why"),
    ],
)
def test_files_that_take_too_much(code: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running(monkeypatch, code)
    with pytest.raises(MalformedImageError, match=message):
        read_image(file(), max_pixels=600)
    monkeypatch.undo()
    assert read_image(file(), max_pixels=600).shape == RAMP.shape


def test_a_process_that_the_system_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is not the file's fault."""
    running(monkeypatch, "os.kill(os.getpid(), 9)")
    with pytest.raises(ReaderLostError, match="was ended"):
        read_image(file(), max_pixels=600)


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_CODE", "import sys; sys.exit(3)")
    with pytest.raises(RuntimeError, match="ended with status 3"):
        read_image(file(), max_pixels=600)

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(isolated.subprocess, "Popen", fail)
    with pytest.raises(ReaderLostError, match="too many open files"):
        size_of_image(file())


def test_signals_to_all_processes_of_a_service_do_not_harm_files(
    idle: list[isolated._Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as systemd's, when it stops a service."""
    running(monkeypatch, "[os.kill(os.getpid(), number) for number in (1, 2, 15)]; image.seek(0)")
    assert read_image(file(), max_pixels=600).shape == RAMP.shape


@pytest.mark.parametrize("number", isolated.OF_THE_SERVICE)
def test_nor_do_they_before_a_process_has_begun(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    made = isolated._Reader.__init__

    def signalled(reader: isolated._Reader) -> None:
        made(reader)
        reader.process.send_signal(number)

    monkeypatch.setattr(isolated._Reader, "__init__", signalled)
    assert read_image(file(), max_pixels=600).shape == RAMP.shape


@pytest.mark.parametrize("stream", [1, 2])
def test_what_libraries_print_is_not_taken_for_an_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stream: int
) -> None:
    running(monkeypatch, f"os.write({stream}, b'warning'); image.seek(0)")
    assert np.array_equal(read_image(file(), max_pixels=600), RAMP)
    assert capfd.readouterr() == ("", "")


def test_half_an_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the rest of the picture would be what was in that memory before."""
    data, head = file(), json.dumps({"size": [30, 20], "error": None, "shape": RAMP.shape}) + "\n"
    code = f"sys.stdin.buffer.read(16 + {len(data)}); os.write(1, {head.encode()} + bytes(99))"
    code = f"import os, sys; {code}; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(isolated, "_CODE", code.replace("{", "{{").replace("}", "}}"))
    with pytest.raises(ReaderLostError, match="was ended"):
        read_image(data, max_pixels=600)


def test_a_file_that_crashes_its_reader_leaves_no_dump(idle: list[isolated._Reader]) -> None:
    """Of other people's pictures, on the disk of the service."""
    size_of_image(file())
    limits = Path(f"/proc/{idle[0].process.pid}/limits").read_text()
    assert re.search(r"Max core file size +0 +0 ", limits)


def test_where_memory_is_short_the_service_stays(idle: list[isolated._Reader]) -> None:
    size_of_image(file())
    assert Path(f"/proc/{idle[0].process.pid}/oom_score_adj").read_text() == "1000\n"


def test_a_picture_that_failed_is_not_kept(idle: list[isolated._Reader]) -> None:
    def data_kb() -> int:
        status = Path(f"/proc/{idle[0].process.pid}/status").read_text()
        return int(re.findall(r"VmData:\s+(\d+)", status)[0])

    size_of_image(file())
    before = data_kb()
    large = file(image=Image.new("RGB", (4000, 4000)))
    with pytest.raises(MalformedImageError, match="truncated"):
        read_image(large[:-5000], max_pixels=1 << 24)
    assert data_kb() < before + (8 << 10)  # KiB; the picture has 47 MiB


def test_a_file_that_nobody_waits_for_any_more(
    idle: list[isolated._Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    running(monkeypatch, "time.sleep(600)")
    begun = time.monotonic()
    with pytest.raises(CodecError, match="stopped"):
        read_image(file(), max_pixels=600, stop=lambda: time.monotonic() > begun + 0.3)
    assert idle == []


def test_a_process_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_CODE", "import time; time.sleep(600)")
    begun = time.monotonic()
    with pytest.raises(CodecError, match="stopped"):
        read_image(bytes(1 << 22), max_pixels=1, stop=lambda: time.monotonic() > begun + 0.3)


def test_time_and_memory_are_those_of_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    running(monkeypatch, "end = time.process_time() + 0.4\n  while time.process_time() < end: pass")
    for _ in range(6):
        assert read_image(file(), max_pixels=600).shape == RAMP.shape


def test_limits_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    start = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (4, 4)); "
    monkeypatch.setattr(isolated, "_CODE", start + isolated._CODE)
    assert read_image(file(), max_pixels=10**30).shape == RAMP.shape


def test_signals_are_for_the_service_alone() -> None:
    """Ctrl-C on a terminal reaches all processes of its group; requests that have begun are finished."""
    code = (
        f"import sys, time; sys.path[:] = {sys.path!r}\n"
        "from ugicm.server import isolated\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "import signal; signal.signal(signal.SIGINT, lambda *_: None)\n"
        "isolated.size_of_image(data); print('ready', flush=True); time.sleep(1)\n"
        "print(isolated._idle[0].process.poll(), isolated.size_of_image(data))"
    )
    command = [sys.executable, "-c", code, "/dev/stdin"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False, process_group=0
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(file())
    process.stdin.close()
    assert process.stdout.readline() == b"ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.read() == b"None (30, 20)\n"
    assert process.wait() == 0


def test_processes_end_with_the_service() -> None:
    code = (
        f"import os, sys; sys.path[:] = {sys.path!r}\n"
        "from ugicm.server import isolated\n"
        "try: isolated.size_of_image(b'')\n"
        "except ValueError: pass\n"
        "print(isolated._idle[0].process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


def test_many_threads() -> None:
    data = [file(image=Image.new("RGB", (n, 10 * n))) for n in range(1, 9)]
    found: dict[int, list[tuple[int, ...]]] = {}

    def work(number: int) -> None:
        found[number] = [read_image(each, max_pixels=10**4).shape for each in data]

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [[(10 * n, n, 3) for n in range(1, 9)]] * 4


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def profiles(count: int) -> bytes:
    """A tiny PNG with as many colour profiles of 16 MiB of zeros."""
    data = file(image=Image.new("RGB", (16, 16)))
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 24)))
    return data[:33] + count * profile + data[33:]


def scans(count: int) -> bytes:
    """A JPEG of four megapixels with as many empty scans."""
    data = file("JPEG", Image.new("RGB", (2048, 2048)), progressive=True)
    end = data.rindex(b"\xff\xd9")
    return data[:end] + count * b"\xff\xda\x00\x08\x01\x01\x00\x01\x05\x10" + data[end:]


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data


def full_box(kind: bytes, version: int, data: bytes) -> bytes:
    return box(kind, struct.pack(">I", version << 24) + data)


def items(count: int) -> bytes:
    """The header of an AVIF with as many items, which libavif compares each with all before."""
    numbers = range(1, count + 1)
    entries = b"".join(full_box(b"infe", 3, struct.pack(">IH4sx", n, 0, b"av01")) for n in numbers)
    parts = [
        full_box(b"hdlr", 0, bytes(4) + b"pict" + bytes(13)),
        full_box(b"pitm", 0, b"\0\1"),
        full_box(b"iinf", 1, struct.pack(">I", count) + entries),
    ]
    head = box(b"ftyp", b"avif" + bytes(4) + b"avifmif1miaf")
    return head + full_box(b"meta", 0, b"".join(parts))


@pytest.mark.parametrize(("make", "count"), [(profiles, 1000), (scans, 40_000), (items, 100_000)])
def test_files_that_would_take_minutes(
    make: Callable[[int], bytes], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(count)
    assert len(data) < 20 << 20
    changed = "; from ugicm.server import isolated; isolated.SECONDS = 1; isolated.main()"
    monkeypatch.setattr(isolated, "_CODE", isolated._CODE.replace(START, changed))
    with pytest.raises(MalformedImageError, match="takes too long"):
        read_image(data, max_pixels=1 << 23)


def test_images_are_read_without_standard_error(image_file: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_file())
    code = (
        f"import os, sys, time; sys.path[:] = {sys.path!r}; os.close(2)\n"
        "from ugicm.server.isolated import size_of_image\n"
        "end = time.monotonic() + 20\n"
        "print(size_of_image(open(sys.argv[1], 'rb').read(), stop=lambda: time.monotonic() > end))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, check=False)
    assert done.stdout == b"(48, 32)\n"

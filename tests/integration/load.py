"""Closed-loop load on the real service, beside the bare codec library in the same run.

    python tests/integration/load.py PHOTO... --clients 16 --seconds 120

Each client encodes a photo, then decodes it by id for a person or a machine, without a pause. Prints a JSON
object: requests by status, latencies, megapixels per second of both, and the server's memory over time.
Settings of the server come from UGICM_* variables.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import httpx2
import numpy as np
from PIL import Image

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"
SERVE = "import sys; from ugicm.cli import main; sys.argv[1:] = ['serve', '--port', '8765']; main()"


class Sample(NamedTuple):
    """One request."""

    operation: str
    status: int
    seconds: float
    pixels: int


def clients(photos: list[bytes], count: int, seconds: float) -> list[Sample]:
    """What `count` closed-loop clients see in `seconds`."""
    samples: list[Sample] = []
    sizes = [np.prod(Image.open(photo).size) for photo in map(_file, photos)]
    stop_at = time.monotonic() + seconds

    def client(number: int) -> None:
        with httpx2.Client(base_url=URL, timeout=120) as http:
            turn = number
            while time.monotonic() < stop_at:
                turn += 1
                pixels = int(sizes[turn % len(photos)])
                quality = 20 + turn * 7 % 60  # new bitstreams, so that no picture is at hand already
                started = time.monotonic()
                answer = http.post(
                    f"/encode?quality={quality}.{number:03}", content=photos[turn % len(photos)]
                )
                samples.append(Sample("encode", answer.status_code, time.monotonic() - started, pixels))
                if answer.status_code != 200:
                    time.sleep(float(answer.headers.get("retry-after", 1)))
                    continue
                preference = ("human", "machine")[turn % 2]
                started = time.monotonic()
                answer = http.post(f"/decode?preference={preference}", json={"id": answer.json()["id"]})
                samples.append(Sample("decode", answer.status_code, time.monotonic() - started, pixels))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return samples


def library(photos: list[bytes], seconds: float) -> float:
    """Megapixels per second of image files through the bare codec: read, encode, decode, write."""
    from ugicm.codec.store import load_codec
    from ugicm.server.images import read_image, write_image
    from ugicm.server.settings import Settings

    settings = Settings()
    codec = load_codec(
        settings.model, store=settings.model_store, device=settings.device, precision=settings.precision
    )
    pixels = turn = 0
    started = 0.0
    while not started or time.monotonic() < started + seconds:
        image = read_image(photos[turn % len(photos)], max_pixels=settings.max_pixels)
        bitstream = codec.encode([image], 20 + turn * 7 % 60)[0]
        write_image(codec.decode([bitstream], float(turn % 2))[0], "png")
        if turn == 4:  # warm
            started, pixels = time.monotonic(), 0
        pixels += 2 * image.shape[0] * image.shape[1]
        turn += 1
    return pixels / 1e6 / (time.monotonic() - started)


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Closed-loop load on the real service.")
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    photos = [path.read_bytes() for path in arguments.photos]

    bare_before = library(photos, arguments.seconds / 8)
    server = subprocess.Popen([sys.executable, "-c", SERVE], stderr=subprocess.DEVNULL)
    memory: list[float] = []
    try:
        while not _ready():
            time.sleep(0.1)
        clients(photos, arguments.clients, arguments.seconds / 12)  # warm
        done = threading.Event()

        def watch() -> None:
            while not done.wait(arguments.seconds / 60):
                memory.append(resident_mb(server.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.monotonic()
        samples = clients(photos, arguments.clients, arguments.seconds)
        elapsed = time.monotonic() - started
        done.set()
        watcher.join()
        with urllib.request.urlopen(f"{URL}/metrics") as answer:
            metrics = answer.read().decode().splitlines()
    finally:
        server.terminate()
        server.wait()
    bare_after = library(photos, arguments.seconds / 8)

    served = sum(sample.pixels for sample in samples if sample.status == 200) / 1e6 / elapsed
    bare = (bare_before + bare_after) / 2
    half = len(memory) // 2
    report = {
        "clients": arguments.clients,
        "seconds": round(elapsed, 1),
        "statuses": dict(Counter(f"{sample.operation} {sample.status}" for sample in samples)),
        "latency_ms": {
            operation: _quantiles([s.seconds for s in samples if (s.operation, s.status) == (operation, 200)])
            for operation in ("encode", "decode")
        },
        "service_mp_per_s": round(served, 3),
        "library_mp_per_s": [round(bare_before, 3), round(bare_after, 3)],
        "ratio": round(served / bare, 3),
        "memory_mb": [round(memory[0]), round(memory[half]), round(memory[-1])],
        "memory_growth_second_half": round(max(memory[half:]) / max(memory[:half]) - 1, 4),
        "batches": [
            line for line in metrics if line.startswith("ugicm_batch_images") and "bucket" not in line
        ],
    }
    print(json.dumps(report, indent=1))


def _quantiles(seconds: list[float]) -> dict[str, int]:
    if len(seconds) < 2:
        return {}
    points = statistics.quantiles(seconds, n=100)
    return {name: round(1e3 * points[index]) for name, index in (("p50", 49), ("p95", 94), ("p99", 98))}


def _file(data: bytes) -> object:
    import io

    return io.BytesIO(data)


def _ready() -> bool:
    try:
        with urllib.request.urlopen(f"{URL}/readyz", timeout=5):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()

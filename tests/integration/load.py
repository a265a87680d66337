"""Closed-loop load on the real service, beside the bare codec library in the same run.

    python tests/integration/load.py PHOTO... --clients 16 --seconds 120

Each client encodes a photo at a quality of its own, then decodes it by id for a person or a machine, without
a pause: hardly two bitstreams are alike, so no picture is at hand already. Prints a JSON object: requests by
status, latencies, megapixels per second of both, look-ups of pictures, and the server's memory over time
beside the bytes in its caches. Settings of the server come from UGICM_* variables.
"""

from __future__ import annotations

import argparse
import io
import json
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

from ugicm.codec.bitstream import QUALITY_STEPS

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"
SERVE = "import sys; from ugicm.cli import main; sys.argv[1:] = ['serve', '--port', '8765']; main()"


class Sample(NamedTuple):
    """One request."""

    operation: str
    status: int
    seconds: float
    pixels: int


def clients(photos: list[bytes], count: int, seconds: float, *, seed: int) -> list[Sample]:
    """What `count` closed-loop clients see in `seconds`; another seed asks for other bitstreams."""
    samples: list[Sample] = []
    sizes = [np.prod(Image.open(io.BytesIO(photo)).size) for photo in photos]
    stop_at = time.monotonic() + seconds

    def client(number: int) -> None:
        random = np.random.default_rng((seed, number))
        with httpx2.Client(base_url=URL, timeout=120) as http:
            turn = number
            while time.monotonic() < stop_at:
                turn += 1
                pixels = int(sizes[turn % len(photos)])
                quality = float(random.integers(20 * QUALITY_STEPS, 80 * QUALITY_STEPS)) / QUALITY_STEPS
                started = time.monotonic()
                answer = http.post(f"/encode?quality={quality}", content=photos[turn % len(photos)])
                samples.append(Sample("encode", answer.status_code, time.monotonic() - started, pixels))
                if answer.status_code != 200:
                    time.sleep(float(answer.headers.get("retry-after", 1)))
                    continue
                preference = ("human", "machine")[turn % 2]
                started = time.monotonic()
                answer = http.post(f"/decode?preference={preference}", json={"id": answer.json()["id"]})
                samples.append(Sample("decode", answer.status_code, time.monotonic() - started, pixels))

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(count)]
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


def metrics() -> dict[str, float]:
    """The server's, by name and labels."""
    with urllib.request.urlopen(f"{URL}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def memory_mb() -> dict[str, float]:
    """Resident memory of the server, and what its two caches hold of it."""
    now = metrics()
    return {
        "resident": now["process_resident_memory_bytes"] / 1e6,
        "bitstreams": now['ugicm_cache_bytes{tier="bitstream"}'] / 1e6,
        "pictures": now['ugicm_cache_bytes{tier="picture"}'] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Closed-loop load on the real service.")
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--warm-up", type=float, default=30, help="seconds of load before the measured ones")
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    photos = [path.read_bytes() for path in arguments.photos]

    bare_before = library(photos, arguments.seconds / 8)
    server = subprocess.Popen([sys.executable, "-c", SERVE], stderr=subprocess.DEVNULL)
    memory: list[dict[str, float]] = []
    try:
        while not _ready():
            time.sleep(0.1)
        clients(photos, arguments.clients, arguments.warm_up, seed=0)
        before = metrics()
        memory.append(memory_mb())
        done = threading.Event()

        def watch() -> None:
            while not done.wait(arguments.seconds / 60):
                memory.append(memory_mb())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        started = time.monotonic()
        samples = clients(photos, arguments.clients, arguments.seconds, seed=1)
        elapsed = time.monotonic() - started
        done.set()
        watcher.join()
        after = metrics()
    finally:
        server.terminate()
        server.wait()
    bare_after = library(photos, arguments.seconds / 8)

    def counted(name: str) -> int:
        return round(after.get(name, 0) - before.get(name, 0))

    served = sum(sample.pixels for sample in samples if sample.status == 200) / 1e6 / elapsed
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
        "ratio": round(2 * served / (bare_before + bare_after), 3),
        "pictures": {
            result: counted(f'ugicm_cache_requests_total{{result="{result}",tier="picture"}}')
            for result in ("miss", "hit", "shared")
        },
        "pictures_per_batch": round(
            counted("ugicm_batch_images_sum") / counted("ugicm_batch_images_count"), 2
        ),
        "memory_mb": {
            when: {name: round(value) for name, value in memory[index].items()}
            for when, index in (("start", 0), ("middle", half), ("end", -1))
        },
        "memory_growth_second_half": round(
            max(point["resident"] for point in memory[half:])
            / max(point["resident"] for point in memory[: half + 1])
            - 1,
            4,
        ),
    }
    print(json.dumps(report, indent=1))


def _quantiles(seconds: list[float]) -> dict[str, int]:
    if len(seconds) < 2:
        return {}
    points = statistics.quantiles(seconds, n=100)
    return {name: round(1e3 * points[index]) for name, index in (("p50", 49), ("p95", 94), ("p99", 98))}


def _ready() -> bool:
    try:
        with urllib.request.urlopen(f"{URL}/readyz", timeout=5):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()

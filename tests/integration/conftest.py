"""The real service in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live import free_port

COMMAND = (sys.executable, "-c", "from ugicm.cli import main; main()", "serve")


@pytest.fixture(name="free_port")
def _free_port() -> int:
    return free_port()


class Service:
    """``ugicm serve`` with the tiny model."""

    def __init__(self, port: int, store: Path, log: Path, **settings: Any) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        values = {"port": port, "model": "tiny", "model_store": store, "device": "cpu", **settings}
        environment = os.environ | {f"UGICM_{name.upper()}": str(value) for name, value in values.items()}
        with log.open("wb") as file:
            self.process = subprocess.Popen(COMMAND, env=environment, stdout=file, stderr=file)

    def ready(self) -> int:
        """Status of /readyz; 0 while nobody listens."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=10) as answer:
                status: int = answer.status
                return status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while self.ready() != 200:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture
def start(tmp_path: Path, tiny_store: Path, free_port: int) -> Iterator[Callable[..., Service]]:
    """``start(**settings)`` returns at once; what still runs at the end is killed."""
    services = []

    def start(**settings: Any) -> Service:
        services.append(Service(free_port, tiny_store, tmp_path / "log", **settings))
        return services[-1]

    yield start
    for service in services:
        if service.process.poll() is None:
            service.process.kill()
        service.process.wait()

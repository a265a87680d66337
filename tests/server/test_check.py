"""``ugicm check`` and ``ugicm health``."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from tests import live
from ugicm.codec.codec import Codec
from ugicm.server import isolated
from ugicm.server.check import check, health
from ugicm.server.settings import Settings


@pytest.fixture
def tiny_settings(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    return Settings(model="tiny", model_store=tiny_store, device="cpu", precision="float32")


def test_all_is_well(tiny_settings: Settings) -> None:
    findings = list(check(tiny_settings))
    assert [finding.name for finding in findings] == ["settings", "model", "cache", "round trip"]
    assert all(finding.ok for finding in findings), findings
    assert "tiny" in findings[1].detail


def test_a_misspelt_variable_is_named(tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UGICM_MAX_PIXEL", "5")
    # Of Kubernetes, where a Service is called ugicm.
    monkeypatch.setenv("UGICM_SERVICE_HOST", "10.96.0.7")
    monkeypatch.setenv("UGICM_PORT_8000_TCP_PROTO", "tcp")
    monkeypatch.setenv("UGICM_CACHE_SERVICE_HOST", "10.96.0.8")
    monkeypatch.setenv("UGICM_CACHE_SERVICE_PORT_REDIS", "6379")
    monkeypatch.setenv("UGICM_CACHE_PORT", "tcp://10.96.0.8:6379")
    monkeypatch.setenv("UGICM_CACHE_PORT_6379_TCP", "tcp://10.96.0.8:6379")
    monkeypatch.setenv("ugicm_max_pixels", "1000000")
    monkeypatch.setenv("ugicm_max_pixl", "1")
    assert next(check(tiny_settings)) == (
        "settings",
        False,
        "no setting reads UGICM_MAX_PIXEL, ugicm_max_pixl",
    )


def test_a_missing_model_ends_the_checks(tiny_settings: Settings) -> None:
    findings = list(check(tiny_settings.model_copy(update={"model": "none-such"})))
    assert [(finding.name, finding.ok) for finding in findings] == [("settings", True), ("model", False)]
    assert "none-such" in findings[1].detail


def test_a_damaged_model_is_found(tiny_store: Path, tiny_settings: Settings, tmp_path: Path) -> None:
    damaged = tmp_path / "tiny"
    damaged.mkdir()
    for source in (tiny_store / "tiny").iterdir():
        (damaged / source.name).write_bytes(source.read_bytes())
    weights = damaged / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    findings = list(check(tiny_settings.model_copy(update={"model_store": tmp_path})))
    assert "damaged" in findings[-1].detail


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "file:///proc/nowhere", "ftp://x"])
def test_a_cache_that_cannot_be_reached(tiny_settings: Settings, url: str) -> None:
    findings = {f.name: f for f in check(tiny_settings.model_copy(update={"cache_url": url}))}
    assert not findings["cache"].ok
    assert "UGICM_CACHE_URL" in findings["cache"].detail
    assert findings["round trip"].ok


def test_a_cache_that_keeps_nothing(tiny_settings: Settings) -> None:
    findings = {f.name: f for f in check(tiny_settings.model_copy(update={"cache_bytes": 100}))}
    assert findings["cache"] == (
        "cache",
        False,
        "memory: 32 bytes are too many for it; raise UGICM_CACHE_BYTES",
    )


def test_a_round_trip_that_loses_the_picture(
    tiny_settings: Settings, tiny_codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def black(codec: Codec, latents: list[Any], strength: list[float]) -> list[Any]:
        return [np.zeros((128, 128, 3), np.uint8)]

    monkeypatch.setattr(Codec, "synthesise", black)
    finding = list(check(tiny_settings))[-1]
    assert (finding.name, finding.ok) == ("round trip", False)

    def failing(codec: Codec, latents: list[Any], strength: list[float]) -> list[Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Codec, "synthesise", failing)
    assert list(check(tiny_settings))[-1] == ("round trip", False, "RuntimeError: out of memory")


@pytest.fixture
def served(make_app: Any) -> Iterator[tuple[FastAPI, int]]:
    """A live application and its port."""
    app = make_app()
    with live.served(app) as port:
        yield app, port


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_health_follows_readiness(
    served: tuple[FastAPI, int], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, port = served
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert health(host, port).ok
    app.state.lifecycle.draining = True
    finding = health(host, port)
    assert not finding.ok
    assert "draining" in finding.detail


def test_health_of_a_service_on_all_interfaces_of_ipv6() -> None:
    finding = health("::", 1, timeout_s=1)
    assert "[::1]:1" in finding.detail


def test_health_of_what_does_not_speak_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        finding = health("127.0.0.1", listener.getsockname()[1])
        thread.join()
    assert not finding.ok
    assert "SSH" in finding.detail


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "no host"])
def test_health_of_nobody(host: str) -> None:
    finding = health(host, 1, timeout_s=1)
    assert not finding.ok
    assert host in finding.detail


def test_health_imports_nothing_heavy() -> None:
    code = (
        "import sys, ugicm.server.check as c; c.health(port=1, timeout_s=1);"
        "heavy = {'torch', 'fastapi', 'pydantic', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_check_tries_the_process_that_reads_images(codec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ugicm.server.app.load_model", lambda settings: codec)
    monkeypatch.setattr(isolated, "_idle", [])
    assert [finding.ok for finding in check(Settings())][-1]
    monkeypatch.setattr(isolated, "_idle", [])
    monkeypatch.setattr(isolated, "_CODE", "import sys; sys.exit(3)")
    last = list(check(Settings()))[-1]
    assert not last.ok
    assert "status 3" in last.detail

"""The real ``ugicm serve``: under load while it is told to stop, and how it fails to start."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx2
import pytest
from PIL import Image


@pytest.fixture
def photos(photo: Any) -> list[bytes]:
    """A few crops of a photo, PNG."""
    files = []
    for side in (64, 96, 130, 200):
        out = io.BytesIO()
        Image.fromarray(photo[:side, : side + 10]).save(out, "PNG")
        files.append(out.getvalue())
    return files


def test_a_stop_under_load_loses_nothing(start: Any, photos: list[bytes]) -> None:
    service = start(drain_delay_s=2, log_format="json")
    service.wait_until_ready()
    in_rotation = threading.Event()
    in_rotation.set()
    statuses: list[int] = []
    failures: list[Exception] = []

    def client(number: int) -> None:
        """Encodes and decodes while the load balancer sends requests here."""
        with httpx2.Client(base_url=service.url, timeout=60) as http:
            turn = number
            while in_rotation.is_set():
                turn += 1
                try:
                    encoded = http.post("/encode", content=photos[turn % len(photos)])
                    statuses.append(encoded.status_code)
                    by_id = {"id": encoded.json()["id"]}
                    strength = (turn % 11) / 10
                    decoded = http.post("/decode", params={"strength": strength}, json=by_id)
                    statuses.append(decoded.status_code)
                except Exception as error:
                    failures.append(error)
                    return

    clients = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(8)]
    for thread in clients:
        thread.start()
    while len(statuses) < 40:
        time.sleep(0.02)
    before = len(statuses)
    service.process.send_signal(signal.SIGTERM)
    while service.ready() == 200:
        time.sleep(0.02)
    assert service.ready() == 503
    in_rotation.clear()
    for thread in clients:
        thread.join()
    assert service.process.wait(60) == 0
    assert failures == []
    assert set(statuses) == {200}
    assert len(statuses) > before
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    assert not [line for line in lines if line["level"] == "error"]


def test_requests_in_flight_finish_after_the_socket_closed(start: Any, photo: Any) -> None:
    service = start(drain_delay_s=0)
    service.wait_until_ready()
    out = io.BytesIO()
    Image.fromarray(photo).resize((1600, 1200)).save(out, "PNG")
    answers: list[int] = []

    def send() -> None:
        answers.append(httpx2.post(f"{service.url}/encode", content=out.getvalue(), timeout=60).status_code)

    threads = [threading.Thread(target=send, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    while "ugicm_queue_pixels 0.0" in httpx2.get(f"{service.url}/metrics").text:
        time.sleep(0.01)
    service.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert answers == [200] * 3
    assert service.process.wait(60) == 0


def test_connections_without_a_request(start: Any, free_port: int) -> None:
    service = start(transfer_timeout_s=2, keep_alive_s=10)
    service.wait_until_ready()

    def connect(data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", free_port), timeout=30)
        connection.sendall(data)
        return connection

    def rest(connection: socket.socket) -> bytes:
        """What arrives until the connection ends; it is ended by the service."""
        received = b""
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    received += data
            except ConnectionResetError:
                pass
        return received

    head = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
    silent, half, again = connect(b""), connect(head), connect(head + b"\r\n" + head)
    kept = connect(head + b"\r\n")
    assert rest(silent) == rest(half) == b""
    time.sleep(3.5)  # longer than uvicorn would keep it without being told
    kept.sendall(head + b"\r\n")
    assert rest(kept).count(b" 200 OK") == 2
    assert rest(again).count(b" 200 OK") == 1
    endless = connect(head + b"x: ")
    with endless, pytest.raises(ConnectionError):
        endless.sendall(b"x" * (64 << 20))
    assert b" 200 OK" in rest(connect(head + b"x: " + b"x" * 60_000 + b"\r\n\r\n"))


@pytest.mark.parametrize("length", ["Content-Length: %d", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("apart", [False, True])
def test_offers_of_another_protocol_are_ignored(
    start: Any, free_port: int, photos: list[bytes], length: str, apart: bool
) -> None:
    """Java's HTTP client offers HTTP/2 with every request, and curl with ``--http2``."""
    service = start()
    service.wait_until_ready()
    (photo, *_) = photos
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB"
    head = f"POST /encode HTTP/1.1\r\nHost: x\r\n{length.replace('%d', str(len(photo)))}\r\n{offer}\r\n\r\n"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(photo), photo) if "chunked" in length else photo
    with socket.create_connection(("127.0.0.1", free_port), timeout=60) as connection:
        for _ in range(2):
            if apart:
                for part in (head[:40].encode(), head[40:].encode(), body[:100], body[100:]):
                    connection.sendall(part)
                    time.sleep(0.05)
            else:
                connection.sendall(head.encode() + body)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, len(json.loads(answer.read())["id"])) == (200, 64)


@pytest.mark.parametrize(
    "head",
    [
        "GET /livez HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" * 1500,
    ],
    ids=["version 1.0", "last request", "many at once"],
)
def test_offers_that_end_or_repeat(start: Any, free_port: int, head: str) -> None:
    service = start(keep_alive_s=1)
    service.wait_until_ready()
    with socket.create_connection(("127.0.0.1", free_port), timeout=60) as connection:
        connection.sendall(head.encode())
        received = b""
        while data := connection.recv(1 << 16):
            received += data
    assert received.count(b"HTTP/1.1 200 OK") == head.count("GET")


def test_requests_that_never_end_are_told_so(start: Any, photo: Any) -> None:
    service = start(drain_delay_s=0, shutdown_timeout_s=0)
    service.wait_until_ready()
    out = io.BytesIO()
    Image.fromarray(photo).resize((3000, 2000)).save(out, "PNG")
    answers: list[httpx2.Response] = []

    def send() -> None:
        url = f"{service.url}/encode?target_bpp=0.5"
        answers.append(httpx2.post(url, content=out.getvalue(), timeout=60))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    while "ugicm_queue_pixels 0.0" in httpx2.get(f"{service.url}/metrics").text:
        time.sleep(0.01)
    service.process.send_signal(signal.SIGTERM)
    thread.join()
    assert (answers[0].status_code, answers[0].json()["code"]) == (503, "stopping")
    assert service.process.wait(60) == 0


def test_a_stop_while_it_starts() -> None:
    """As the first process of a container, which has no other handler for SIGTERM."""
    code = (
        "import os, signal\n"
        "from ugicm import cli\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "cli._settings = lambda **options: os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.serve()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_interrupt_does_not_wait(start: Any, times: int) -> None:
    """Twice: a program that started the service may pass on what the terminal has sent already."""
    service = start(drain_delay_s=1000)
    service.wait_until_ready()
    for _ in range(times):
        service.process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert service.process.wait(60) in (0, -signal.SIGINT, 130)
    assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "none-such"}, "no model 'none-such'"),
        ({"cache_url": "ftp://cache"}, "UGICM_CACHE_URL"),
        ({"max_pixels": "many"}, "UGICM_MAX_PIXELS"),
        (
            {"precision": "float16"},
            "UGICM_PRECISION: Input should be 'auto', 'float32' or 'bfloat16', got 'float16'",
        ),
    ],
)
def test_it_does_not_start_and_says_why(start: Any, settings: dict[str, Any], message: str) -> None:
    service = start(**settings)
    assert service.process.wait(60) != 0
    text = service.log.read_text()
    assert message in text
    assert "Traceback" not in text


def test_a_taken_port(start: Any, free_port: int) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", free_port))
        holder.listen()
        service = start()
        assert service.process.wait(60) != 0
    assert os.strerror(98) in service.log.read_text() or "in use" in service.log.read_text()


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ([(signal.SIGTERM, 0)], 0),
        ([(signal.SIGINT, 0)], 128 + signal.SIGINT),
        ([(signal.SIGTERM, 0), (signal.SIGTERM, 0.3)], 128 + signal.SIGTERM),
    ],
)
def test_a_cache_that_hangs_does_not_hold_the_exit(
    start: Any, tmp_path: Any, ends: list[tuple[signal.Signals, float]], status: int
) -> None:
    service = start(cache_url=f"file://{tmp_path}/cache", cache_timeout_s=0.2)
    service.wait_until_ready()
    id = "ab" * 32
    (tmp_path / "cache" / "ab").mkdir(parents=True)
    os.mkfifo(tmp_path / "cache" / "ab" / id)  # opening it waits for somebody who writes
    assert httpx2.get(f"{service.url}/bitstreams/{id}").status_code == 503
    for signal_, pause_s in ends:
        time.sleep(pause_s)
        service.process.send_signal(signal_)
    assert service.process.wait(30) == status
    assert "the file system of the cache keeps a thread" in service.log.read_text()


def test_files_survive_a_kill(start: Any, photos: list[bytes], tmp_path: Any) -> None:
    settings = {"cache_url": f"file://{tmp_path}/cache"}
    service = start(**settings)
    service.wait_until_ready()
    id = httpx2.post(f"{service.url}/encode", content=photos[0]).json()["id"]
    service.process.kill()
    service.process.wait()
    service = start(**settings)
    service.wait_until_ready()
    assert httpx2.get(f"{service.url}/bitstreams/{id}/image").status_code == 200

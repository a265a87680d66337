"""A headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """The only page of a browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._sent = 0
        (target,) = (t for t in self.command("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session: dict[str, str] = {"sessionId": attached["sessionId"]}

    _session: dict[str, str] = {}  # noqa: RUF012 - of the browser itself

    def command(self, method: str, **parameters: Any) -> Any:
        """The result of a method of the protocol."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters, **self._session}
        self._socket.send(json.dumps(message))
        while (answer := json.loads(self._socket.recv(timeout=60))).get("id") != self._sent:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script: str) -> Any:
        """Value of an expression, awaited."""
        result = self.command(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for at most half a minute."""
        deadline = time.monotonic() + 30
        while not self.run(condition):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"))
            time.sleep(0.02)

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def choose(self, selector: str, *paths: Path) -> None:
        """Put files into a box for files, as its user does."""
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        node = self.command("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.command("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser that keeps its things in `folder`."""
    assert PROGRAM
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0")
    process = subprocess.Popen(
        [PROGRAM, *options, f"--user-data-dir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        said = folder / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not said.exists() or len(lines := said.read_text().split()) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(30)

"""Log lines and spans of the running process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

LOG_THREE_LINES = """
import logging, structlog
from ugicm.server import logs
from ugicm.server.settings import Settings
logs.configure(Settings(log_format={format!r}, log_level="info"))
log = structlog.get_logger("ours")
with structlog.contextvars.bound_contextvars(request_id="r1"):
    log.info("hello", answer=42)
    log.debug("too quiet")
    try:
        huge = list(range(100000))
        raise ValueError("boom")
    except ValueError:
        log.exception("failed")
logging.getLogger("uvicorn.error").warning("from the %s", "library")
"""


def log_lines(format: str) -> list[str]:
    code = LOG_THREE_LINES.format(format=format)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("format", ["json", "auto"])
def test_one_json_object_per_line(format: str) -> None:
    hello, failed, library = map(json.loads, log_lines(format))
    assert hello["event"] == "hello"
    assert (hello["answer"], hello["request_id"], hello["level"]) == (42, "r1", "info")
    assert "ValueError: boom" in failed["exception"]
    assert (library["event"], library["logger"]) == ("from the library", "uvicorn.error")


def test_console_lines_show_no_locals() -> None:
    text = "\n".join(log_lines("console"))
    assert "ValueError: boom" in text
    assert "99999" not in text


def test_console_lines_speak_to_no_terminal() -> None:
    code = (
        "import structlog; from ugicm.server import logs; from ugicm.server.settings import Settings\n"
        "logs.configure(Settings(log_format='console'))\n"
        "structlog.get_logger('x').info('request', path='/x\\x1b[2J\\x07', method='GET')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"\x1b[2J" not in done.stderr
    assert b"\x07" not in done.stderr
    assert rb"\x1b[2J" in done.stderr


def test_requests_make_spans_but_health_checks_do_not(make_client: Any) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for tracing in (False, True):
        client = make_client(tracing=tracing)
        client.get("/info", headers={"traceparent": parent})
        client.get("/readyz")
        spans = [span for span in exporter.get_finished_spans() if span.kind is trace.SpanKind.SERVER]
        assert [span.name for span in spans] == ["GET /info"] * tracing
    assert f"{spans[0].context.trace_id:032x}" == parent.split("-")[1]


def test_tracing_that_is_not_installed(make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ValueError, match="UGICM_TRACING needs the extra otel"):
        make_client(tracing=True)

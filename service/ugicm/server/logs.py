"""Log lines: JSON for machines, colours for a terminal; the standard library's loggers included."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, Processor

from ugicm.server.settings import Settings


class _SaidAlready(logging.Filter):
    """Drops what uvicorn says of answers that `ugicm.server.middleware` broke off, with a line of its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.getMessage() != "ASGI callable returned without completing response."


_LINES = ("exception", "stack")
"""What has lines of its own."""


def _printable(_: object, __: str, event: EventDict) -> EventDict:
    """Values of clients, such as paths, must not speak to the operator's terminal."""
    return {
        name: value if not isinstance(value, str) or value.isprintable() or name in _LINES else repr(value)
        for name, value in event.items()
    }


def configure(settings: Settings) -> None:
    """Set up structlog and the root logger of this process, once, before serving."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        # A rich traceback would print the locals: pictures, for seconds.
        else [_printable, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    logging.getLogger("uvicorn.error").addFilter(_SaidAlready())
    root.setLevel(settings.log_level.upper())

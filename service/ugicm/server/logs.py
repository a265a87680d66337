"""Log lines: JSON for machines, colours for a terminal; the standard library's loggers included."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor

from ugicm.server.settings import Settings


class _SaidAlready(logging.Filter):
    """Drops what uvicorn says of answers that `ugicm.server.middleware` broke off, with a line of its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.getMessage() != "ASGI callable returned without completing response."


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
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
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

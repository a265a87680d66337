"""What Kubernetes sets in every pod beside a Service called ``ugicm``: variables that look like ours.

Standard library only, as `ugicm health` needs it.
"""

from __future__ import annotations

import re
from typing import TypeVar

Value = TypeVar("Value")

VARIABLES = re.compile("UGICM_(PORT|SERVICE)_.*")
"""Besides ``UGICM_PORT``."""
DEFAULT_PORT = 8000


def port_or_default(value: Value) -> Value | int:
    """`DEFAULT_PORT` where ``UGICM_PORT`` is a link, such as ``tcp://10.0.0.7:8000``; else `value`."""
    return DEFAULT_PORT if re.match("(tcp|udp|sctp)://", str(value)) else value

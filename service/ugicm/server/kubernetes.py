"""What Kubernetes sets in pods where a Service is called ``ugicm`` or ``ugicm-…``, which looks like ours.

Standard library only, as `ugicm health` needs it.
"""

from __future__ import annotations

import re
from typing import TypeVar

Value = TypeVar("Value")

VARIABLES = re.compile(r"UGICM_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
"""``UGICM_PORT``, which is a setting as well, among them."""
DEFAULT_PORT = 8000


def port_or_default(value: Value) -> Value | int:
    """`DEFAULT_PORT` where ``UGICM_PORT`` is a link, such as ``tcp://10.0.0.7:8000``; else `value`."""
    return DEFAULT_PORT if re.match("(tcp|udp|sctp)://", str(value)) else value

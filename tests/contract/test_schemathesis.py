"""Requests generated from the OpenAPI document, valid and not: no 5xx, no undocumented answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.live import served
from ugicm.codec.codec import Codec
from ugicm.server.app import create_app
from ugicm.server.settings import Settings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

schema = schemathesis.openapi.from_dict(create_app(Settings()).openapi())


@pytest.fixture(scope="module")
def url(tiny_codec: Codec) -> Iterator[str]:
    """A live server with the tiny model."""
    with served(create_app(Settings(max_pixels=100_000), tiny_codec)) as port:
        yield f"http://127.0.0.1:{port}"


@schema.parametrize()
@settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
def test_generated_requests(case: Case, url: str) -> None:
    case.call_and_validate(base_url=url, checks=CHECKS)

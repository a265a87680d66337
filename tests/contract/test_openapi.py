"""The OpenAPI document: a snapshot, so that no change of the contract passes unnoticed, and its rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ugicm.server.app import create_app
from ugicm.server.settings import Settings

SNAPSHOT = Path(__file__).with_name("openapi.json")
"""To accept a change on purpose: delete the file and run the test, which then writes it and fails once."""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def test_snapshot(document: dict[str, Any]) -> None:
    current = json.loads(json.dumps(document))
    current["info"]["version"] = "any"
    if not SNAPSHOT.exists():
        SNAPSHOT.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"{SNAPSHOT.name} was missing and has been written; look at it and run again")
    assert current == json.loads(SNAPSHOT.read_text())


def test_every_operation_is_named_tagged_and_described(document: dict[str, Any]) -> None:
    names = []
    for where, operation in operations(document):
        assert re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", operation["operationId"]), where
        assert len(operation["tags"]) == 1, where
        assert operation["summary"], where
        names.append(operation["operationId"])
    assert len(names) == len(set(names))


def test_every_failure_is_a_problem(document: dict[str, Any]) -> None:
    for where, operation in operations(document):
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and operation["operationId"] != "getReady":
                (content,) = answer["content"].items()
                assert content == (
                    "application/problem+json",
                    {"schema": {"$ref": "#/components/schemas/Problem"}},
                ), f"{where} {status}"


def test_every_operation_but_health_checks_can_be_refused_or_fail(document: dict[str, Any]) -> None:
    for where, operation in operations(document):
        if operation["operationId"] not in ("getLive", "getReady"):
            for status, code in (("500", "internal"), ("503", "overloaded")):
                assert f"`{code}`" in operation["responses"][status]["description"], where


def test_every_field_has_an_example_or_a_type_of_its_own(document: dict[str, Any]) -> None:
    for name in ("BitstreamInfo", "EncodeResult", "BitstreamRef", "ModelInfo", "Limits"):
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert "examples" in schema or "$ref" in schema, f"{name}.{field}"


def test_binary_bodies_and_answers_are_declared_as_such(document: dict[str, Any]) -> None:
    binary = {"type": "string", "format": "binary"}
    text = json.dumps(document)
    assert "contentMediaType" not in text
    for where, operation in operations(document):
        bodies = [operation.get("requestBody", {}), operation["responses"].get("200", {})]
        for content in (body.get("content", {}) for body in bodies):
            for media_type, entry in content.items():
                if media_type not in ("application/json", "multipart/form-data"):
                    assert entry["schema"] == binary, f"{where} {media_type}"


def test_every_reference_resolves(document: dict[str, Any]) -> None:
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))
    assert set(references) <= set(document["components"]["schemas"])
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])

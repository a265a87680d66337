"""The documentation names everything that a client or an operator can meet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ugicm.server.app import create_app
from ugicm.server.metrics import Metrics
from ugicm.server.problems import Code
from ugicm.server.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
API, OPERATIONS = ((DOCS / name).read_text() for name in ("api.md", "operations.md"))


@pytest.mark.parametrize("kind", Code)
def test_every_problem_is_listed_under_its_status(kind: Code) -> None:
    rows = [row for row in API.splitlines() if re.match(rf"\| [\d, ]*\b{kind.status}\b", row)]
    assert any(f"`{kind.code}`" in row for row in rows)


def test_every_path_and_parameter_is_listed() -> None:
    for path, operations in create_app(Settings()).openapi()["paths"].items():
        assert f"{path}`" in API, path
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "query":
                    assert f"| `{parameter['name']}` |" in API


def test_every_metric_is_listed() -> None:
    for metric in Metrics().registry.collect():
        if metric.name.startswith("ugicm_"):
            name = metric.name.removeprefix("ugicm_")
            assert f"`{name}`" in OPERATIONS or f"`{name}_total`" in OPERATIONS, name


def test_every_variable_it_names_exists() -> None:
    known = {f"UGICM_{name.upper()}" for name in Settings.model_fields}
    for path in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        named = set(re.findall(r"\bUGICM_[A-Z_]*[A-Z]\b", path.read_text()))
        assert named <= known, path.name

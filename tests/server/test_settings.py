"""Settings: environment, units, lists; and that the documentation names every one."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from ugicm.server.settings import Settings, setting

DOCS = Path(__file__).parents[2] / "docs"


def test_environment_with_units_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UGICM_MAX_BYTES", "1.5MiB")
    monkeypatch.setenv("UGICM_PICTURE_CACHE_BYTES", "64MiB")
    monkeypatch.setenv("UGICM_API_KEYS", " key-number-1 ,, key-number-2,")
    monkeypatch.setenv("UGICM_BATCH_PIXELS", "")
    settings = Settings()
    assert settings.max_bytes == 1_572_864
    assert settings.picture_cache_bytes == 64 << 20
    assert [key.get_secret_value() for key in settings.api_keys] == ["key-number-1", "key-number-2"]
    assert settings.batch_pixels is None
    assert "key-number" not in repr(settings)


def test_a_kubernetes_service_of_our_name_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets such variables in every pod beside a Service called ``ugicm``."""
    monkeypatch.setenv("UGICM_PORT", "tcp://10.96.0.7:80")
    assert Settings().port == 8000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70000),
        ("port", "http://10.96.0.7:80"),
        ("request_timeout_s", "inf"),
        ("max_pixels", 16_383),
        ("max_bytes", 0),
        ("precision", "float16"),
        ("api_keys", "7-chars"),
        ("url_keys", "7-chars"),
        ("api_keys", " , "),
        ("url_keys", ","),
        ("api_keys", "schlüssel-geheim"),
        ("api_keys", "key with spaces"),
        ("cors_origins", "app.example.com"),
        ("cors_origins", "https://app.example.com/"),
        ("unknown", 1),
    ],
)
def test_values_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Settings(**{name: value})


def test_keys_of_eight_characters_are_long_enough() -> None:
    assert len(Settings(api_keys="8-chars-", url_keys="8-chars-").api_keys) == 1


def test_errors_show_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be logged by what starts the application, such as Ray."""
    monkeypatch.setenv("UGICM_URL_KEYS", "url-secret-0123456789")
    with pytest.raises(ValidationError) as raised:
        Settings(api_keys=["good-key-123456", "sh0rt"])
    assert "8 characters" in str(raised.value)
    assert not any(text in str(raised.value) for text in ("url-secret", "good-key", "sh0rt", "6789"))


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described_and_documented(name: str) -> None:
    assert Settings.model_fields[name].description
    (row,) = re.findall(
        rf"^\| `{setting(name)}` \| (.*?) \|", (DOCS / "configuration.md").read_text(), re.MULTILINE
    )
    default = getattr(Settings(), name)
    if quoted := re.fullmatch(r"`(.*)`", row):
        assert getattr(Settings(**{name: quoted[1]}), name) == default
    else:  # in words
        assert default in (None, ()) or Settings.model_fields[name].default_factory


def test_make_serve_leaves_the_address_to_the_settings() -> None:
    environment = {**os.environ, "HOST": "elsewhere", "PORT": "1", "UGICM_PORT": "9000"}
    command = ["make", "--dry-run", "--directory", str(DOCS.parent), "serve"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert any(line.endswith("ugicm serve") for line in done.stdout.splitlines()), done.stdout


def test_messages_name_settings_that_exist() -> None:
    with pytest.raises(KeyError):
        setting("no_such_field")

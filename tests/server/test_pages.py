"""The viewer and the API documentation work without a network."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ugicm.server.routes.pages import STATIC


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_a_page_and_all_it_asks_for_come_from_here(client: Any, page: str) -> None:
    response = client.get(page)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "<script>" not in response.text
    references = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    assert references
    for reference in references:
        if not reference.startswith("data:"):
            assert "//" not in reference
            assert client.get("/" + reference).status_code == 200, reference


def test_the_own_scripts_name_no_other_host() -> None:
    own = [path for path in STATIC.iterdir() if path.suffix in (".js", ".css", ".html")]
    assert len(own) >= 4
    for path in own:
        assert not re.search(r"https?://|url\(", path.read_text()), path


def test_vendored_files_carry_their_licence() -> None:
    folder = STATIC / "swagger-ui"
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert (folder / "swagger-ui-bundle.js.LICENSE.txt").is_file()


def test_static_files_do_not_leak_others(client: Any) -> None:
    # As the client sends them: it would resolve "..".
    for path in ("/static/%2e%2e/app.py", "/static/swagger-ui/%2e%2e/%2e%2e/app.py", "/static/none.js"):
        response = client.get(path)
        assert (response.status_code, response.json()["code"]) == (404, "not-found")


@pytest.mark.parametrize("path", ["/", "/docs", "/static/viewer.js"])
@pytest.mark.parametrize("wanted", ["bytes=0-9", "bytes=99999999-", "bytes=abc", "items=0-1"])
def test_pages_come_whole(client: Any, path: str, wanted: str) -> None:
    response = client.get(path, headers={"Range": wanted})
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["accept-ranges"] == "none"
    assert response.content == client.get(path).content

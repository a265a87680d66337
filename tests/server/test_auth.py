"""API keys and signed links."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from pydantic import SecretStr

from ugicm.server.auth import sign

KEYS = "first-key-0001, second-key-0002"
URL_KEYS = "old-secret-01,new-secret-02"
KEY = {"X-API-Key": "second-key-0002"}


@pytest.fixture
def client(make_client: Any) -> Any:
    return make_client(api_keys=KEYS, url_keys=URL_KEYS)


@pytest.fixture
def links(client: Any, image_file: Any) -> dict[str, str]:
    answer: dict[str, str] = client.post("/encode", content=image_file(), headers=KEY).json()["links"]
    return answer


def test_a_key_is_needed(client: Any, image_file: Any) -> None:
    for method, path in (
        ("POST", "/encode"),
        ("POST", "/encode/batch"),
        ("POST", "/decode"),
        ("GET", "/info"),
        ("GET", f"/bitstreams/{'0' * 64}"),
        ("GET", f"/bitstreams/{'0' * 64}/info"),
        ("GET", f"/bitstreams/{'0' * 64}/image"),
        ("DELETE", f"/bitstreams/{'0' * 64}"),
    ):
        response = client.request(method, path, content=image_file())
        assert (response.status_code, response.json()["code"]) == (401, "missing-api-key")
        assert response.headers["www-authenticate"] == "Bearer"
        response = client.request(method, path, headers={"X-API-Key": "wrong-key-0000"})
        assert (response.status_code, response.json()["code"]) == (403, "bad-api-key")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "first-key-0001"},
        KEY,
        {"Authorization": "Bearer first-key-0001"},
        {"Authorization": "bearer  second-key-0002"},
    ],
)
def test_every_key_is_accepted_in_both_headers(client: Any, headers: dict[str, str]) -> None:
    assert client.get("/info", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": KEYS},
        {"X-API-Key": "first-key-0001x"},
        {"X-API-Key": "f\u00fcrst-key-0001".encode().decode("latin-1")},
        {"Authorization": "Basic first-key-0001"},
        {"Authorization": "Bearer "},
    ],
)
def test_nothing_else_is_accepted(client: Any, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    assert client.get("/info", headers=encoded).status_code in (401, 403)


def test_how_long_a_comparison_takes_says_nothing(make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def compare(one: bytes, other: bytes) -> bool:
        nonlocal compared
        compared += 1
        return one == other

    monkeypatch.setattr("ugicm.server.auth.secrets.compare_digest", compare)
    client = make_client(api_keys=KEYS, url_keys=URL_KEYS)
    for key, status in (("first-key-0001", 200), ("second-key-0002", 200), ("wrong-key-0000", 403)):
        compared = 0
        assert client.get("/info", headers={"X-API-Key": key}).status_code == status
        assert compared == 2
    for secret in URL_KEYS.split(","):
        compared = 0
        link = sign(f"/bitstreams/{'0' * 64}", {}, SecretStr(secret), int(time.time()) + 60)
        assert client.get(link).status_code == 404
        assert compared == 2


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/health", "/v2/health/live", "/metrics", "/", "/docs"]
)
def test_health_metrics_and_pages_need_no_key(client: Any, path: str) -> None:
    assert client.get(path).status_code == 200


def test_links_of_an_encode_work_without_a_key(client: Any, links: dict[str, str]) -> None:
    for link in links.values():
        assert client.get(link).status_code == 200
        assert client.head(link).status_code == 200
    assert client.delete(links["bitstream"]).status_code == 401


def test_shared_caches_keep_nothing_that_needs_a_key_or_has_expired(
    client: Any, make_client: Any, links: dict[str, str], image_file: Any
) -> None:
    free = make_client()
    assert client.get("/info", headers=KEY).headers["cache-control"] == "no-store"
    described = links["bitstream"].partition("?")[0] + "/info"
    assert client.get(described, headers=KEY).headers["cache-control"].startswith("private, max-age=")
    for name, age_s in (("bitstream", 31536000), ("human", 3600)):
        path = links[name].partition("?")[0]
        keyed = client.get(path, headers=KEY).headers["cache-control"]
        assert keyed.startswith(f"private, max-age={age_s}")
        soon = sign(path, {}, SecretStr("new-secret-02"), int(time.time()) + 60)
        scope, max_age = client.get(soon).headers["cache-control"].split(", ")[:2]
        assert scope == "public"
        assert int(max_age.removeprefix("max-age=")) <= 60
        free_path = free.post("/encode", content=image_file()).json()["links"][name]
        assert free.get(free_path).headers["cache-control"].startswith(f"public, max-age={age_s}")


def test_a_key_is_enough_whatever_the_link_says(client: Any, links: dict[str, str]) -> None:
    for link in (links["machine"], links["machine"].replace("exp=", "exp=x"), links["machine"] + "0"):
        response = client.get(link, headers=KEY)
        assert (response.status_code, response.headers["cache-control"]) == (200, "private, max-age=3600")
    # A key of something else on the way to the service does not spoil a link.
    response = client.get(links["machine"], headers={"Authorization": "Bearer of-a-proxy"})
    assert (response.status_code, response.headers["cache-control"][:7]) == (200, "public,")


def test_a_changed_link_is_refused(client: Any, links: dict[str, str]) -> None:
    for changed in (
        links["human"].replace("human", "machine"),
        links["human"] + "&format=jpeg",
        links["bitstream"].replace("?", "/info?"),
        links["bitstream"].replace("exp=", "exp=9"),
        links["bitstream"].replace("sig=", "sig=0"),
    ):
        response = client.get(changed)
        assert (response.status_code, response.json()["code"]) == (403, "bad-signature")


def test_older_secrets_and_expiry(client: Any, links: dict[str, str]) -> None:
    path = links["bitstream"].partition("?")[0]
    later, earlier = int(time.time()) + 60, int(time.time()) - 1
    old, unknown = SecretStr("new-secret-02"), SecretStr("never-set-0003")
    assert client.get(sign(path, {}, old, later)).status_code == 200
    assert client.get(sign(path, {}, old, earlier)).json()["code"] == "bad-signature"
    assert client.get(sign(path, {}, unknown, later)).json()["code"] == "bad-signature"


def test_the_first_secret_signs_for_as_long_as_is_set(make_client: Any, image_file: Any) -> None:
    client = make_client(api_keys=KEYS, url_keys=URL_KEYS, url_ttl_s=100)
    before = int(time.time())
    link = client.post("/encode", content=image_file(), headers=KEY).json()["links"]["human"]
    expiry = int(re.findall(r"exp=(\d+)", link)[0])
    assert before + 100 <= expiry <= int(time.time()) + 100
    path = link.partition("?")[0]
    assert link == sign(path, {"preference": "human"}, SecretStr("old-secret-01"), expiry)


def test_a_signature_without_secrets_is_worth_nothing(make_client: Any) -> None:
    client = make_client(api_keys=KEYS)
    path = f"/bitstreams/{'0' * 64}"
    assert client.get(sign(path, {}, SecretStr(""), 1 << 40)).json()["code"] == "bad-signature"


def test_without_keys_everything_is_open(make_client: Any, image_file: Any) -> None:
    client = make_client()
    result = client.post("/encode", content=image_file()).json()
    assert "sig" not in result["links"]["bitstream"]
    assert client.delete(result["links"]["bitstream"]).status_code == 204


def test_the_document_says_whether_a_key_is_needed(client: Any, make_client: Any) -> None:
    keyed, free = client.get("/openapi.json").json(), make_client().get("/openapi.json").json()
    assert keyed["paths"]["/encode"]["post"]["security"] == [{"apiKey": []}, {"bearer": []}]
    link = {"link": []}
    assert link in keyed["paths"]["/bitstreams/{id}/image"]["get"]["security"]
    assert link not in keyed["paths"]["/bitstreams/{id}"]["delete"]["security"]
    unsigned = make_client(api_keys=KEYS).get("/openapi.json").json()
    assert link not in unsigned["paths"]["/bitstreams/{id}/image"]["get"]["security"]
    assert "security" not in keyed["paths"]["/readyz"]["get"]
    assert "security" not in free["paths"]["/encode"]["post"]
    assert "securitySchemes" not in free["components"]

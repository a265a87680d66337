"""The application over HTTP: what each route answers, and every kind of problem."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from ugicm.codec.bitstream import MEDIA_TYPE as BITSTREAM_MEDIA_TYPE
from ugicm.codec.bitstream import VERSION, Header, serialise
from ugicm.codec.errors import LimitExceededError
from ugicm.server.cache import MemoryCache, bitstream_id
from ugicm.server.deps import PARAMETERS
from ugicm.server.isolated import ReaderLostError
from ugicm.server.problems import as_service_error

UNKNOWN = "0" * 64


def assert_problem(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["type"] == f"urn:ugicm:problem:{code}"
    assert body["title"]
    assert body["detail"]
    assert body["instance"] == response.request.url.path
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def encode(client: TestClient, image: bytes, **params: Any) -> dict[str, Any]:
    response = client.post("/encode", content=image, params=params)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_importing_the_factory_starts_nothing() -> None:
    code = (
        "import threading, ugicm.server.app as a; from ugicm.server.settings import Settings;"
        "a.create_app(Settings(model='no-such-model')); assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_encode_then_both_views_by_id(client: TestClient, image_file: Any, pixels: Any) -> None:
    image = image_file()
    response = client.post("/encode", content=image, headers={"Content-Type": "image/png"})
    result = response.json()
    assert response.status_code == 200
    assert (result["width"], result["height"], result["quality"]) == (48, 32, 50.0)
    assert result["bpp"] == pytest.approx(8 * result["size"] / (48 * 32))
    assert (result["cached"], result["stored"]) == (False, True)
    assert response.headers["location"] == f"/bitstreams/{result['id']}"
    assert response.headers["etag"] == f'"{result["id"]}"'

    human = client.post("/decode", json={"id": result["id"]})
    machine = client.post("/decode", params={"preference": "machine"}, json={"id": result["id"]})
    assert human.headers["content-type"] == "image/png"
    assert human.headers["bitstream-id"] == result["id"]
    np.testing.assert_array_equal(pixels(human.content), pixels(image))
    np.testing.assert_array_equal(pixels(machine.content), 255 - pixels(image))
    linked = client.get(result["links"]["machine"])
    assert linked.content == machine.content


def test_encode_again_is_idempotent(client: TestClient, image_file: Any) -> None:
    first, second = encode(client, image_file()), encode(client, image_file())
    assert first["id"] == second["id"]
    assert (first["cached"], second["cached"]) == (False, True)
    response = client.post("/encode", content=image_file())
    assert response.headers["cache-status"] == "ugicm; hit"


def test_encode_without_storing(client: TestClient, image_file: Any) -> None:
    response = client.post("/encode", params={"store": False}, content=image_file())
    assert response.json()["stored"] is False
    assert "location" not in response.headers
    assert_problem(client.get(f"/bitstreams/{response.json()['id']}"), 404, "unknown-bitstream")


def test_the_three_bodies_of_decode_agree(client: TestClient, image_file: Any) -> None:
    result = encode(client, image_file())
    bitstream = client.get(result["links"]["bitstream"]).content
    raw = client.post("/decode", content=bitstream, headers={"Content-Type": "application/vnd.ugicm"})
    form = client.post("/decode", files={"bitstream": ("a.ugic", bitstream)})
    reference = client.post("/decode", json={"id": result["id"]})
    assert raw.content == form.content == reference.content
    assert raw.headers["bitstream-id"] == result["id"]
    assert reference.headers["content-location"].startswith(f"/bitstreams/{result['id']}/image?")


def test_multipart_encode_equals_raw_encode(client: TestClient, image_file: Any) -> None:
    form = client.post("/encode", files={"image": ("photo.png", image_file(), "image/png")})
    assert form.json()["id"] == encode(client, image_file())["id"]


def test_a_form_may_end_between_two_slices(
    client: TestClient, image_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ugicm.server.deps.FORM_SLICE_BYTES", 7)
    assert client.post("/encode", files={"image": ("a.png", image_file())}).status_code == 200


def test_accept_makes_encode_answer_with_the_bitstream(client: TestClient, image_file: Any) -> None:
    response = client.post("/encode", content=image_file(), headers={"Accept": "application/vnd.ugicm"})
    assert response.headers["content-type"] == "application/vnd.ugicm"
    kept = client.get(f"/bitstreams/{response.headers['bitstream-id']}")
    assert response.content == kept.content


def test_what_no_browser_shows_is_a_file_to_save(client: TestClient, image_file: Any) -> None:
    """Swagger UI would save it as text, its bytes re-encoded."""
    id = encode(client, image_file())["id"]
    name = f'attachment; filename="{id[:8]}'
    asked = {"content": image_file(), "headers": {"Accept": "application/vnd.ugicm"}}
    assert client.post("/encode", **asked).headers["content-disposition"] == f'{name}.ugic"'
    assert client.get(f"/bitstreams/{id}").headers["content-disposition"] == f'{name}.ugic"'
    for format, disposition in (("npy", name), ("png", name.replace("attachment", "inline"))):
        response = client.get(f"/bitstreams/{id}/image", params={"format": format})
        assert response.headers["content-disposition"] == f'{disposition}-human.{format}"'


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "application/json"),
        ("application/vnd.ugicm;q=0, application/json", "application/json"),
        ("application/json, application/vnd.ugicm;q=0.5", "application/json"),
        ("application/vnd.ugicm, application/json;q=0.5", "application/vnd.ugicm"),
        ("Application/Vnd.Ugicm, */*", "application/vnd.ugicm"),
        ("application/vnd.ugicm-other", "application/json"),
    ],
)
def test_encode_answers_with_what_is_liked_best(
    client: TestClient, image_file: Any, accept: str, media_type: str
) -> None:
    response = client.post("/encode", content=image_file(), headers={"Accept": accept})
    assert response.headers["content-type"] == media_type


def test_a_header_may_have_several_lines(client: TestClient, image_file: Any) -> None:
    path = encode(client, image_file())["links"]["bitstream"]
    image = client.get(f"{path}/image", headers=[("Accept", "text/html"), ("Accept", "image/webp")])
    assert image.headers["content-type"] == "image/webp"
    known = [("If-None-Match", '"other"'), ("If-None-Match", client.get(path).headers["etag"])]
    assert client.get(path, headers=known).status_code == 304


def test_strength_overrides_preference(client: TestClient, image_file: Any, pixels: Any) -> None:
    id = encode(client, image_file())["id"]
    params = {"preference": "machine", "strength": 0.0}
    response = client.post("/decode", params=params, json={"id": id})
    np.testing.assert_array_equal(pixels(response.content), pixels(image_file()))
    between = client.post("/decode", params={"strength": 0.5}, json={"id": id})
    assert abs(pixels(between.content).astype(int) - 127).max() <= 1


def test_strengths_are_rounded_so_that_pictures_can_be_kept(client: TestClient, image_file: Any) -> None:
    id = encode(client, image_file())["id"]
    first, second = (
        client.post("/decode", params={"strength": strength, "format": "webp"}, json={"id": id})
        for strength in (0.504, 0.496)
    )
    assert second.headers["cache-status"] == "ugicm; hit"
    location = first.headers["content-location"]
    assert location == f"/bitstreams/{id}/image?strength=0.5&format=webp"
    assert first.content == second.content == client.get(location).content


def test_answers_to_posts_are_not_for_caches(client: TestClient, image_file: Any) -> None:
    encoded = client.post("/encode", content=image_file())
    assert (encoded.headers["cache-control"], encoded.headers["vary"]) == ("no-store", "Accept")
    assert client.post("/decode", json={"id": encoded.json()["id"]}).headers["cache-control"] == "no-store"
    name = f'attachment; filename="{encoded.json()["id"][:8]}.ugic"'
    assert client.get(encoded.headers["location"]).headers["content-disposition"] == name


def test_quality_reaches_the_codec(client: TestClient, image_file: Any) -> None:
    assert encode(client, image_file(), quality=7.5)["quality"] == 7.5


@pytest.mark.parametrize("params", [{"max_bytes": 100_000}, {"target_bpp": 24}])
def test_a_size_decides_the_quality(client: TestClient, image_file: Any, params: dict[str, Any]) -> None:
    assert encode(client, image_file(), **params)["quality"] == 1.0


def test_bits_per_pixel_are_of_the_picture(client: TestClient, image_file: Any) -> None:
    for bpp in (0.1, 0.2):
        response = client.post("/encode", params={"target_bpp": bpp}, content=image_file())
        body = assert_problem(response, 422, "invalid-parameter")
        assert f"over the budget of {int(bpp * 48 * 32 / 8)}" in body["detail"]


def test_a_size_out_of_reach(client: TestClient, image_file: Any) -> None:
    response = client.post("/encode", params={"max_bytes": 3}, content=image_file())
    assert "over the budget of 3" in assert_problem(response, 422, "invalid-parameter")["detail"]


@pytest.mark.parametrize(
    ("format", "media_type"),
    [
        ("png", "image/png"),
        ("webp", "image/webp"),
        ("jpeg", "image/jpeg"),
        ("npy", "application/x-npy"),
    ],
)
def test_formats(client: TestClient, image_file: Any, format: str, media_type: str) -> None:
    id = encode(client, image_file())["id"]
    explicit = client.get(f"/bitstreams/{id}/image", params={"format": format})
    assert explicit.headers["content-type"] == media_type
    assert "vary" not in explicit.headers
    shown = "attachment" if format == "npy" else "inline"  # no browser shows it
    assert explicit.headers["content-disposition"] == f'{shown}; filename="{id[:8]}-human.{format}"'
    negotiated = client.get(f"/bitstreams/{id}/image", headers={"Accept": media_type})
    assert negotiated.content == explicit.content
    assert negotiated.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "image/png"),
        ("image/webp;q=0.9, image/*;q=0.5", "image/webp"),
        ("image/png;q=0, */*", "image/webp"),
        ("text/html, image/jpeg", "image/jpeg"),
        ("image/*;q=x, image/jpeg;q=0.1", "image/jpeg"),
    ],
)
def test_accept_weights(client: TestClient, image_file: Any, accept: str, media_type: str) -> None:
    id = encode(client, image_file())["id"]
    response = client.get(f"/bitstreams/{id}/image", headers={"Accept": accept})
    assert response.headers["content-type"] == media_type


def test_bitstream_info_is_the_header(client: TestClient, image_file: Any) -> None:
    result = encode(client, image_file(), quality=20)
    info = client.get(f"/bitstreams/{result['id']}/info").json()
    assert info == {key: result[key] for key in info}
    assert (info["model"], info["tiles"]) == ("00112233aabbccdd", 1)


def test_delete_forgets_bitstream_and_pictures(client: TestClient, image_file: Any) -> None:
    path = encode(client, image_file())["links"]["bitstream"]
    assert client.get(f"{path}/image").status_code == 200
    response = client.delete(path)
    assert (response.status_code, response.content) == (204, b"")
    assert_problem(client.get(f"{path}/image"), 404, "unknown-bitstream")
    assert_problem(client.delete(path), 404, "unknown-bitstream")
    encode(client, image_file())
    assert client.get(f"{path}/image").headers["cache-status"] == "ugicm; fwd=miss"


def test_delete_leaves_the_pictures_of_others(client: TestClient, image_file: Any) -> None:
    kept, gone = (encode(client, image_file(seed=seed))["links"]["bitstream"] for seed in (1, 2))
    assert client.get(f"{kept}/image").status_code == 200
    client.delete(gone)
    assert client.get(f"{kept}/image").headers["cache-status"] == "ugicm; hit"


def test_info(client: TestClient) -> None:
    info = client.get("/info").json()
    assert info["model"] == {
        "name": "fake",
        "digest": "00112233aabbccdd",
        "device": "cpu",
        "precision": "float32",
    }
    assert info["limits"]["max_pixels"] == 1_000_000
    assert info["preferences"] == ["human", "machine"]


@pytest.mark.parametrize("path", ["/livez", "/v2/health/live"])
def test_live(client: TestClient, path: str) -> None:
    assert client.get(path).json() == {"status": "live"}


@pytest.mark.parametrize("path", ["/readyz", "/health", "/v2/health/ready"])
def test_ready(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.json()) == (200, {"status": "ready", "cache": "up"})


def test_both_transforms_have_run_before_it_is_ready(make_client: Any, codec: Any) -> None:
    make_client()
    assert codec.calls == [("analyse", 1), ("synthesise", 1), ("synthesise", 1)]


def test_not_ready_while_draining(client: TestClient) -> None:
    client.app.state.lifecycle.draining = True  # type: ignore[attr-defined]
    response = client.get("/readyz")
    assert (response.status_code, response.json()["status"]) == (503, "draining")
    assert client.get("/livez").headers["connection"] == "close"


def test_not_ready_while_the_device_fails(client: TestClient, codec: Any, image_file: Any) -> None:
    codec.fail = RuntimeError("device lost")
    assert_problem(client.post("/encode", content=image_file()), 500, "internal")
    assert client.get("/readyz").json()["status"] == "unhealthy"
    codec.fail = None
    assert client.get("/readyz").status_code == 200
    codec.calls.clear()
    assert client.get("/readyz").status_code == 200
    assert not codec.calls  # it works again


# Problems


@pytest.mark.parametrize(
    ("path", "name"), [("/encode", "image"), ("/encode/batch", "images"), ("/decode", "bitstream")]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT, errno.EROFS, errno.EMFILE])
def test_no_room_for_the_files_of_a_form(
    client: TestClient,
    image_file: Any,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    name: str,
    number: int,
) -> None:
    def full(file: object, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    files = {name: ("photo.png", image_file())}
    with monkeypatch.context() as patch:
        patch.setattr(tempfile.SpooledTemporaryFile, "write", full)
        answer = client.post(path, files=files)
    body = assert_problem(answer, 503, "overloaded")
    assert (body["setting"], body["retry_after_s"], answer.headers["retry-after"]) == ("TMPDIR", 1, "1")
    assert os.strerror(number).lower() in body["detail"]
    assert client.post(path, files=files).status_code != 503


@pytest.mark.parametrize(
    ("path", "name"), [("/encode", "image"), ("/encode/batch", "images"), ("/decode", "bitstream")]
)
@pytest.mark.parametrize("end", [b"", b"\r\n", b"\r\n--edge", b"\r\n--edge-"])
def test_a_form_that_breaks_off(
    client: TestClient, image_file: Any, path: str, name: str, end: bytes
) -> None:
    """Its last file would be missing, as if it had not been sent."""
    head = f'\r\n--edge\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
    part = head.encode() + image_file()
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    count = 2 if name == "images" else 1
    answer = client.post(path, content=count * part + end, headers=headers)
    assert "ends before its closing boundary" in assert_problem(answer, 400, "malformed-body")["detail"]


def test_files_of_a_form_that_cannot_be_kept(
    client: TestClient, image_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: object, data: bytes) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", broken)
    assert_problem(client.post("/encode", files={"image": ("photo.png", image_file())}), 500, "internal")


@pytest.mark.parametrize("step", ["size_of_image", "read_image"])
def test_no_process_that_reads_the_image(
    client: TestClient, image_file: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def lost(data: bytes, **options: object) -> None:
        raise ReaderLostError("the process was ended; try again")

    monkeypatch.setattr(f"ugicm.server.engine.{step}", lost)
    body = assert_problem(client.post("/encode", content=image_file()), 503, "overloaded")
    assert (body["detail"], body["retry_after_s"]) == ("the process was ended; try again", 1)
    (line,) = client.post("/encode/batch", files={"images": ("a.png", image_file())}).text.splitlines()
    assert json.loads(line)["problem"]["code"] == "overloaded"


def test_unknown_path_and_method(client: TestClient) -> None:
    for path in ("/nothing", "/encode/", "/info/", "/static"):  # nor does it redirect to where something is
        assert_problem(client.get(path), 404, "not-found")
    response = client.put("/encode")
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


def test_all_methods_of_a_path_are_allowed(client: TestClient) -> None:
    response = client.put(f"/bitstreams/{64 * 'a'}")
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "GET, HEAD, DELETE"
    assert client.post("/static/viewer.js").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/livez", "/v2/health/live", "/readyz", "/health", "/metrics", "/info"])
def test_status_is_never_kept(client: TestClient, path: str) -> None:
    assert client.get(path).headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/livez", "/v2/health/live", "/readyz", "/health", "/metrics", "/info"]
)
def test_head_of_what_can_be_got(client: TestClient, path: str) -> None:
    head, got = client.head(path), client.get(path)
    assert head.status_code == got.status_code == 200
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    "params",
    [{"quality": 0}, {"quality": "x"}, {"quality": "nan"}, {"target_bpp": 0}, {"max_bytes": 0}],
)
def test_invalid_parameter(client: TestClient, image_file: Any, params: dict[str, Any]) -> None:
    response = client.post("/encode", params=params, content=image_file())
    body = assert_problem(response, 422, "invalid-parameter")
    assert body["errors"][0]["loc"] == f"/query/{next(iter(params))}"


def test_two_size_targets_contradict(client: TestClient, image_file: Any) -> None:
    params = {"target_bpp": 1, "max_bytes": 1}
    assert_problem(client.post("/encode", params=params, content=image_file()), 422, "invalid-parameter")


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "malformed-body"),
        (b"plain text", 415, "unsupported-media-type"),
        (b"%PDF-1.4", 415, "unsupported-media-type"),
    ],
)
def test_not_an_image(client: TestClient, content: bytes, status: int, code: str) -> None:
    assert_problem(client.post("/encode", content=content), status, code)


def test_truncated_image(client: TestClient, image_file: Any) -> None:
    assert_problem(client.post("/encode", content=image_file()[:90]), 400, "malformed-image")


def test_unsupported_content_type_lists_what_is(client: TestClient) -> None:
    for path, accepted in (("/encode", "image/*"), ("/decode", "application/vnd.ugicm")):
        response = client.post(path, content=b"x", headers={"Content-Type": "text/plain"})
        assert_problem(response, 415, "unsupported-media-type")
        assert accepted in response.headers["accept"]


@pytest.mark.parametrize("path", ["/encode", "/decode", "/encode/batch"])
@pytest.mark.parametrize("coding", ["gzip", "BR", "identity, deflate"])
def test_a_compressed_body(client: TestClient, image_file: Any, path: str, coding: str) -> None:
    response = client.post(path, content=image_file(), headers={"Content-Encoding": coding})
    assert_problem(response, 415, "unsupported-media-type")
    assert f"Content-Encoding '{coding.lower()}'" in response.json()["detail"]
    assert response.headers["accept-encoding"] == "identity"


def test_a_body_that_says_it_is_not_compressed(client: TestClient, image_file: Any) -> None:
    response = client.post("/encode", content=image_file(), headers={"Content-Encoding": "identity"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "files",
    [
        {"photo": ("a.png", b"x")},
        {"image": (None, "text")},
        {"image": (None, b"\xff" * (2 << 20))},  # more than a text may have
    ],
)
@pytest.mark.parametrize("path", ["/encode", "/encode/batch"])
def test_form_without_the_part(client: TestClient, files: Any, path: str) -> None:
    response = client.post(path, files=files)
    assert_problem(response, 422, "invalid-parameter")
    assert "file name" in response.json()["detail"]


@pytest.mark.parametrize("path", ["/encode", "/encode/batch", "/decode"])
def test_parameters_in_a_form(client: TestClient, image_file: Any, path: str) -> None:
    response = client.post(path, files={"image": image_file()}, data={"quality": "10"})
    assert response.status_code == 422
    assert "quality is a field of the form; parameters belong in the query" in response.json()["detail"]


def test_all_parameters_are_looked_for_in_forms(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/encode", "/encode/batch", "/decode"):
        named = {each["name"] for each in paths[path]["post"]["parameters"] if each["in"] == "query"}
        assert named
        assert named <= PARAMETERS


def test_an_empty_file_in_a_form(client: TestClient) -> None:
    response = client.post("/encode", files={"image": ("photo.png", b"")})
    assert (response.status_code, response.json()["code"]) == (400, "malformed-body")
    assert "the file part 'image' is empty" in response.json()["detail"]


def test_broken_form(client: TestClient) -> None:
    response = client.post(
        "/encode", content=b"junk", headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert_problem(response, 400, "malformed-body")


@pytest.mark.parametrize(
    "charset", ["undefined", "utf-7", "unicode_escape", "punycode", "idna", "no-such", '""']
)
def test_form_in_an_odd_charset(client: TestClient, charset: str) -> None:
    """Some of Python's codecs take minutes for a megabyte."""
    text = b"a" * 100_000 + b"-" + b"a" * 100_000
    form = b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\n' + text + b"\r\n--b--\r\n"
    kind = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    for path in ("/encode", "/encode/batch", "/decode"):
        body = assert_problem(client.post(path, content=form, headers=kind), 400, "malformed-body")
        assert "the charset of a form must be utf-8" in body["detail"]


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", "us-ascii", "ISO-8859-1"])
def test_form_in_a_usual_charset(client: TestClient, image_file: Any, charset: str) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    kind = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    form = head + image_file() + b"\r\n--b--\r\n"
    assert client.post("/encode", content=form, headers=kind).status_code == 200


def test_too_many_pixels(client: TestClient, codec: Any, image_file: Any) -> None:
    codec.calls.clear()
    response = client.post("/encode", content=image_file(1001, 1000))
    body = assert_problem(response, 413, "too-many-pixels")
    assert (body["limit"], body["actual"], body["setting"]) == (
        1_000_000,
        1_001_000,
        "UGICM_MAX_PIXELS",
    )
    assert codec.calls == []


def test_too_many_bytes_declared_and_chunked(make_client: Any) -> None:
    client = make_client(max_bytes=1000)
    body = assert_problem(client.post("/encode", content=b"x" * 1001), 413, "too-many-bytes")
    assert (body["limit"], body["actual"], body["setting"]) == (1000, 1001, "UGICM_MAX_BYTES")
    chunks = (b"x" * 400 for _ in range(1000))
    assert_problem(client.post("/encode", content=chunks), 413, "too-many-bytes")
    form = {"image": ("a", b"x" * 1001)}
    assert_problem(client.post("/encode", files=form), 413, "too-many-bytes")


def test_malformed_bitstream(client: TestClient, image_file: Any) -> None:
    bitstream = bytearray(client.get(encode(client, image_file())["links"]["bitstream"]).content)
    assert_problem(client.post("/decode", content=bytes(bitstream[:40])), 400, "malformed-bitstream")
    bitstream[40] ^= 1
    assert_problem(client.post("/decode", content=bytes(bitstream)), 400, "malformed-bitstream")
    assert_problem(client.post("/decode", content=b"foreign"), 400, "malformed-bitstream")


def test_bitstream_of_another_model(client: TestClient) -> None:
    foreign = serialise(Header(1, 8, 8, 50.0, b"\xff" * 8), [b"segment"])
    body = assert_problem(client.post("/decode", content=foreign), 409, "model-mismatch")
    assert (body["needed"], body["loaded"]) == ("ff" * 8, "00112233aabbccdd")


def test_a_kept_bitstream_of_another_version(make_client: Any) -> None:
    cache = MemoryCache(1000)
    future = serialise(Header(VERSION, 8, 8, 50.0, bytes(8)), [b"x"]).replace(b"\x1a\x01", b"\x1a\x63")
    asyncio.run(cache.put(id := bitstream_id(future), future))
    client = make_client(cache)
    paths = client.get("/openapi.json").json()["paths"]
    for view in ("info", "image"):
        response = client.get(f"/bitstreams/{id}/{view}")
        assert "version 99" in assert_problem(response, 400, "malformed-bitstream")["detail"]
        assert "400" in paths[f"/bitstreams/{{id}}/{view}"]["get"]["responses"]
    assert client.get(f"/bitstreams/{id}").content == future


def test_bitstream_of_a_huge_picture(client: TestClient) -> None:
    huge = serialise(Header(1, 1 << 20, 1 << 20, 50.0, b"\xff" * 8), [b"segment"])
    body = assert_problem(client.post("/decode", content=huge), 413, "too-many-pixels")
    assert body["actual"] == 1 << 40


def test_a_side_too_long_for_the_format(client: TestClient, codec: Any, image_file: Any) -> None:
    id = encode(client, image_file(16_384, 2))["id"]
    codec.calls.clear()
    response = client.get(f"/bitstreams/{id}/image", params={"format": "webp"})
    body = assert_problem(response, 422, "invalid-parameter")
    assert "format=webp holds at most 16383 pixels per side, the picture has 16384x2" in body["detail"]
    assert "setting" not in body
    assert codec.calls == []
    assert client.get(f"/bitstreams/{id}/image").status_code == 200


def test_accept_falls_back_to_a_format_that_holds_the_picture(client: TestClient, image_file: Any) -> None:
    id = encode(client, image_file(16_384, 2))["id"]
    for accept, media_type in (
        ("image/webp, */*;q=0.8", "image/png"),
        ("image/jpeg, image/webp", "image/jpeg"),
    ):
        for response in (
            client.get(f"/bitstreams/{id}/image", headers={"Accept": accept}),
            client.post("/decode", json={"id": id}, headers={"Accept": accept}),
        ):
            assert (response.status_code, response.headers["content-type"]) == (200, media_type)
            assert response.headers["content-disposition"].endswith(f'.{media_type.partition("/")[2]}"')
    response = client.get(f"/bitstreams/{id}/image", headers={"Accept": "image/webp, image/png;q=0"})
    assert "format=webp holds at most" in assert_problem(response, 422, "invalid-parameter")["detail"]


def test_only_settings_are_called_settings() -> None:
    error = LimitExceededError("pixels per side", limit=1, actual=2, setting="scaling it down")
    assert as_service_error(error).members["setting"] is None


def test_json_that_is_none(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    problem = assert_problem(client.post("/decode", content=b"{", headers=headers), 400, "malformed-body")
    assert problem["detail"].startswith("the body is no JSON: ")


@pytest.mark.parametrize("json", [{}, {"id": "x"}, {"id": UNKNOWN, "more": 1}, [], "x"])
def test_malformed_reference(client: TestClient, json: Any) -> None:
    assert_problem(client.post("/decode", json=json), 422, "invalid-parameter")


def test_a_long_reference_is_not_parsed(client: TestClient) -> None:
    response = client.post("/decode", json={"id": UNKNOWN, "more": "x" * 1000})
    assert "bytes" in assert_problem(response, 422, "invalid-parameter")["detail"]


def test_unknown_bitstream(client: TestClient) -> None:
    body = assert_problem(client.post("/decode", json={"id": UNKNOWN}), 404, "unknown-bitstream")
    assert "UGICM_CACHE_BYTES" in body["detail"]
    assert_problem(client.get(f"/bitstreams/{UNKNOWN}"), 404, "unknown-bitstream")
    assert_problem(client.get("/bitstreams/../etc/passwd"), 404, "not-found")
    assert_problem(client.get("/bitstreams/ABC"), 422, "invalid-parameter")


def test_not_acceptable(client: TestClient, image_file: Any) -> None:
    id = encode(client, image_file())["id"]
    response = client.get(f"/bitstreams/{id}/image", headers={"Accept": "text/html"})
    assert_problem(response, 406, "not-acceptable")


def test_any_bytes_are_acceptable(client: TestClient, image_file: Any) -> None:
    """As code says that was generated from the schema."""
    id = encode(client, image_file())["id"]
    response = client.get(f"/bitstreams/{id}/image", headers={"Accept": "application/octet-stream"})
    assert response.headers["content-type"] == "image/png"


def test_unexpected_failure_is_logged_and_shows_no_trace(
    client: TestClient, codec: Any, image_file: Any, log: Any
) -> None:
    codec.fail = RuntimeError("secret detail")
    body = assert_problem(client.post("/encode", content=image_file()), 500, "internal")
    assert "secret" not in str(body)
    failure = next(line for line in log if line["event"] == "request failed")
    assert failure["log_level"] == "error"
    assert failure["exc_info"]


def test_deadline(make_client: Any, codec: Any, image_file: Any) -> None:
    client = make_client(request_timeout_s=0.05)
    codec.gate.clear()
    body = assert_problem(client.post("/encode", content=image_file()), 504, "timeout")
    codec.gate.set()
    assert (body["limit"], body["setting"]) == (0.05, "UGICM_REQUEST_TIMEOUT_S")
    assert body["actual"] >= 0.05


# Conditional requests


def test_bitstream_is_immutable_and_conditional(client: TestClient, image_file: Any) -> None:
    path = encode(client, image_file())["links"]["bitstream"]
    full = client.get(path)
    assert "immutable" in full.headers["cache-control"]
    again = client.get(path, headers={"If-None-Match": f'"other", {full.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    for known in ("*", f"W/{full.headers['etag']}"):
        assert client.get(path, headers={"If-None-Match": known}).status_code == 304
    head = client.head(path, headers={"Range": "bytes=0-7"})  # of GET only
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(full.content))
    assert head.headers["etag"] == full.headers["etag"]


def test_ranges(client: TestClient, image_file: Any) -> None:
    path = encode(client, image_file())["links"]["bitstream"]
    full = client.get(path).content
    size = len(full)
    for asked, first, last in (
        ("bytes=0-7", 0, 7),
        ("bytes=5-", 5, size - 1),
        ("bytes=-4", size - 4, size - 1),
        (f"bytes=3-{size + 9}", 3, size - 1),
        (f"bytes=-{size + 9}", 0, size - 1),
    ):
        response = client.get(path, headers={"Range": asked})
        assert response.status_code == 206
        assert response.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert response.content == full[first : last + 1]
    for ignored in ("bytes=-", "bytes=4-2", "lines=1-2", "bytes=0-1,4-5", "bytes=" + "9" * 30 + "-"):
        response = client.get(path, headers={"Range": ignored})
        assert (response.status_code, response.content) == (200, full)
    for beyond in (f"bytes={size}-", "bytes=-0"):
        response = client.get(path, headers={"Range": beyond})
        assert_problem(response, 416, "range-not-satisfiable")
        assert response.headers["content-range"] == f"bytes */{size}"
    for known, status in (('"other"', 200), (client.head(path).headers["etag"], 206)):
        response = client.get(path, headers={"Range": "bytes=0-7", "If-Range": known})
        assert response.status_code == status


def test_image_etag_follows_the_picture(client: TestClient, image_file: Any) -> None:
    path = encode(client, image_file())["links"]["bitstream"] + "/image"
    human, machine = client.get(path), client.get(path, params={"preference": "machine"})
    assert human.headers["etag"] != machine.headers["etag"]
    assert client.get(path, headers={"If-None-Match": human.headers["etag"]}).status_code == 304
    assert client.get(path, headers={"If-None-Match": machine.headers["etag"]}).status_code == 200
    assert client.head(path).headers["content-length"] == str(len(human.content))


def test_large_bodies_are_hashed_once_and_not_in_the_event_loop(
    client: TestClient, image_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_loop: list[bool] = []

    def noted(content: bytes) -> str:
        in_loop.append(asyncio._get_running_loop() is not None)
        return bitstream_id(content)

    monkeypatch.setattr("ugicm.server.cache._LONG_BYTES", 0)
    monkeypatch.setattr("ugicm.server.cache.bitstream_id", noted)
    path = encode(client, image_file())["links"]["bitstream"]
    assert in_loop == [False]
    pictures = [client.get(f"{path}/image") for _ in range(3)]
    assert client.head(f"{path}/image").headers["etag"] == pictures[0].headers["etag"]
    assert pictures[0].headers["etag"] == f'"{bitstream_id(pictures[0].content)}"'
    assert {(picture.content, picture.headers["etag"]) for picture in pictures} == {
        (pictures[0].content, pictures[0].headers["etag"])
    }
    assert in_loop == [False] * 2
    client.post("/decode", content=client.get(path).content)
    assert in_loop == [False] * 3


# Request context


@pytest.mark.parametrize(("given", "kept"), [("abc-DEF_1", True), ("a b", False), ("x" * 65, False)])
def test_request_id(client: TestClient, given: str, kept: bool) -> None:
    answered = client.get("/livez", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert (answered == given) is kept
    assert answered


def test_server_timing_names_the_stages(client: TestClient, image_file: Any) -> None:
    response = client.post("/encode", content=image_file())
    stages = {part.split(";")[0].strip() for part in response.headers["server-timing"].split(",")}
    assert stages >= {"queue", "image", "analysis", "entropy"}
    decoded = client.post("/decode", json={"id": response.json()["id"]})
    assert "synthesis;dur=" in decoded.headers["server-timing"]
    again = client.post("/decode", json={"id": response.json()["id"]})
    assert again.headers["server-timing"].startswith("cache;dur=")
    assert "synthesis" not in again.headers["server-timing"]
    assert response.headers["x-content-type-options"] == "nosniff"


DECLARED_ELSEWHERE = {"content-length", "content-type", "x-content-type-options"}
"""Besides what the document says of an answer: its ``content``, and what is no business of clients."""


def test_headers_are_those_of_the_document(make_client: Any, image_file: Any) -> None:
    client = make_client(api_keys="a-key-of-some-length")
    client.headers["X-API-Key"] = "a-key-of-some-length"
    paths = client.get("/openapi.json").json()["paths"]
    id = client.post("/encode", content=image_file()).json()["id"]
    path, none = f"/bitstreams/{id}", f"/bitstreams/{'0' * 64}"
    etag = client.get(f"{path}/image").headers["etag"]
    octets = {"Content-Type": "application/octet-stream"}
    requests: list[tuple[str, str, dict[str, Any], int]] = [
        ("post", "/encode", {"content": image_file()}, 200),
        ("post", "/encode", {"content": image_file(), "headers": {"Accept": BITSTREAM_MEDIA_TYPE}}, 200),
        ("post", "/encode", {"content": b"", "headers": octets}, 400),
        ("post", "/encode", {"content": b"", "headers": {"X-API-Key": ""}}, 401),
        ("post", "/encode", {"content": b"", "headers": {"Content-Length": "999999999"}}, 413),
        ("post", "/encode", {"content": b"no image", "headers": octets}, 415),
        ("post", "/encode", {"content": image_file(), "params": {"quality": 0}}, 422),
        ("post", "/encode/batch", {"files": {"images": ("a.png", image_file())}}, 200),
        ("post", "/decode", {"json": {"id": id}}, 200),
        ("post", "/decode", {"json": {"id": "0" * 64}}, 404),
        ("post", "/decode", {"json": {"id": id}, "headers": {"Accept": "text/plain"}}, 406),
        ("get", path, {}, 200),
        ("get", path, {"headers": {"Range": "bytes=0-3"}}, 206),
        ("get", path, {"headers": {"If-None-Match": "*"}}, 304),
        ("get", path, {"headers": {"Range": "bytes=9999999-"}}, 416),
        ("get", none, {}, 404),
        ("get", none, {"headers": {"Content-Length": "999999999"}}, 413),
        ("get", f"{path}/info", {}, 200),
        ("get", f"{path}/image", {}, 200),
        ("get", f"{path}/image", {"headers": {"Range": "bytes=0-3"}}, 206),
        ("get", f"{path}/image", {"headers": {"If-None-Match": etag}}, 304),
        ("get", "/info", {}, 200),
        ("get", "/livez", {}, 200),
        ("get", "/readyz", {}, 200),
        ("delete", path, {}, 204),
    ]
    undeclared: dict[tuple[str, str, int], set[str]] = {}
    for method, where, options, status in requests:
        answer = client.request(method, where, **options)
        assert answer.status_code == status, (where, answer.text)
        template = where.replace(id, "{id}").replace("0" * 64, "{id}")
        said = paths[template][method]["responses"][str(status)]
        kind = answer.headers.get("content-type")
        assert (kind in said["content"]) if answer.content else (kind is None), (where, kind)
        undeclared[method, template, status] = (
            set(answer.headers) - DECLARED_ELSEWHERE - {name.lower() for name in said["headers"]}
        )
    assert {what: names for what, names in undeclared.items() if names} == {}


def test_a_path_of_any_characters_in_a_problem(client: TestClient) -> None:
    assert client.get("/a%20b%22%ff").json()["instance"] == "/a%20b%22%EF%BF%BD"


ORIGIN = "https://app.example.com"


def test_pages_of_other_origins(make_client: Any, image_file: Any) -> None:
    client = make_client(cors_origins="HTTPS://app.Example.com:443", api_keys="a-key-of-some-length")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    preflight = client.options("/encode", headers={"Origin": ORIGIN, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert preflight.headers["access-control-allow-headers"] == "x-api-key"
    assert client.options("/encode", headers={"Origin": "https://other", **asked}).status_code == 400

    refused = client.post("/encode", content=image_file(), headers={"Origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN
    assert "Retry-After" in refused.headers["access-control-expose-headers"]
    assert "Origin" in client.get("/livez").headers["vary"]
    other = client.get("/livez", headers={"Origin": "https://other"})
    assert "access-control-allow-origin" not in other.headers


def test_no_other_origins_unless_they_are_set(client: Any) -> None:
    answer = client.get("/livez", headers={"Origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]

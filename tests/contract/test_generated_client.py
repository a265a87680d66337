"""A client that openapi-python-client generates, without a warning, encodes and decodes for real."""

from __future__ import annotations

import importlib
import inspect
import io
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ugicm.codec.codec import Codec
from ugicm.server.app import create_app
from ugicm.server.settings import Settings

PACKAGE = "generated_ugicm_client"


@pytest.fixture(scope="module")
def app(tiny_codec: Codec) -> Any:
    return create_app(Settings(), tiny_codec)


@pytest.fixture(scope="module")
def generated(app: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The generated package, imported."""
    import json

    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(app.openapi()))
    (folder / "config.yml").write_text("post_hooks: []\n")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning"]
    command += ["--path", "openapi.json", "--config", "config.yml", "--meta", "none"]
    command += ["--output-path", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    yield importlib.import_module(PACKAGE)
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def client(generated: ModuleType, app: Any) -> Iterator[Any]:
    """The generated client, talking to the application without a socket."""
    from fastapi.testclient import TestClient

    with TestClient(app) as transport:
        client = generated.Client(base_url="http://testserver", raise_on_unexpected_status=True)
        yield client.set_httpx_client(transport)


@pytest.fixture(scope="module")
def photo_file(photo: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(photo[:96, :128]).save(out, "PNG")
    return out.getvalue()


def part(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def size_of(data: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(data)).size


def test_encode_and_decode_for_all_bodies(client: Any, photo_file: bytes) -> None:
    file, models = part("types").File, part("models")
    encode, decode = part("api.codec.encode"), part("api.codec.decode")
    get_bitstream = part("api.bitstreams.get_bitstream")

    raw = encode.sync(client=client, body=file(io.BytesIO(photo_file)), quality=60)
    form = models.EncodeForm(image=file(io.BytesIO(photo_file), "photo.png", "image/png"))
    assert isinstance(raw, models.EncodeResult)
    assert encode.sync(client=client, body=form, quality=60).id == raw.id
    assert (raw.width, raw.height) == (128, 96)

    bitstream = get_bitstream.sync(id=raw.id, client=client).payload.read()
    assert len(bitstream) == raw.size
    bodies = [
        file(io.BytesIO(bitstream)),
        models.DecodeForm(bitstream=file(io.BytesIO(bitstream), "photo.ugic")),
        models.BitstreamRef(id=raw.id),
    ]
    machine = models.Preference.MACHINE
    pictures = [decode.sync(client=client, body=body, preference=machine).payload.read() for body in bodies]
    assert pictures[0] == pictures[1] == pictures[2]
    assert size_of(pictures[0]) == (128, 96)
    human = decode.sync(client=client, body=bodies[2], strength=0.0, format_=models.ImageFormat.NPY)
    assert np.load(io.BytesIO(human.payload.read())).shape == (96, 128, 3)


def test_the_other_operations(client: Any, photo_file: bytes) -> None:
    file, models = part("types").File, part("models")
    form = models.BatchForm(images=[file(io.BytesIO(photo_file), f"{i}.png") for i in range(2)])
    lines = part("api.codec.encode_batch").sync(client=client, body=form).payload.read().splitlines()
    assert len(lines) == 2
    id = part("api.codec.encode").sync(client=client, body=file(io.BytesIO(photo_file))).id
    info = part("api.bitstreams.get_bitstream_info").sync(id=id, client=client)
    assert (info.id, info.width) == (id, 128)
    image = part("api.bitstreams.get_image").sync(id=id, client=client)
    assert size_of(image.payload.read()) == (128, 96)
    assert part("api.service.get_info").sync(client=client).model.name == "tiny"
    assert part("api.service.get_ready").sync(client=client).status == "ready"
    assert part("api.bitstreams.delete_bitstream").sync_detailed(id=id, client=client).status_code == 204


def test_files_of_a_form_need_a_name(client: Any, photo_file: bytes) -> None:
    file, models = part("types").File, part("models")
    form = models.EncodeForm(image=file(io.BytesIO(photo_file)))
    assert "file name" in part("api.codec.encode").sync(client=client, body=form).detail
    assert "file name" in inspect.getsource(part("models.encode_form"))


def test_problems_are_typed(client: Any) -> None:
    file, models = part("types").File, part("models")
    encode, decode = part("api.codec.encode"), part("api.codec.decode")
    problem = encode.sync(client=client, body=file(io.BytesIO(b"no image")))
    assert isinstance(problem, models.Problem)
    assert problem.code == "unsupported-media-type"
    missing = decode.sync(client=client, body=models.BitstreamRef(id="0" * 64))
    assert isinstance(missing, models.Problem)
    assert missing.status == 404

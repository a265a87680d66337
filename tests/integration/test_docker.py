"""No container engine here: the files are checked against the code, and their steps executed without one."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml
from PIL import Image

from ugicm.cli import app as cli
from ugicm.server.backends import RedisCache, open_cache
from ugicm.server.settings import PREFIX, Settings, setting

REPOSITORY = Path(__file__).parents[2]
VARIABLES = {setting(name) for name in Settings.model_fields}


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


dockerfile = _load("dockerfile")


def steps(name: str) -> list[str]:
    return [step.text for step in dockerfile.read_steps(dockerfile.DOCKERFILE) if step.name == name]


def final_stage() -> list[Any]:
    all_steps = dockerfile.read_steps(dockerfile.DOCKERFILE)
    start = max(index for index, step in enumerate(all_steps) if step.name == "FROM")
    return list(all_steps[start:])


def compose(*files: str) -> list[dict[str, Any]]:
    return [yaml.safe_load((REPOSITORY / file).read_text()) for file in files]


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return compose("docker-compose.yml")[0]


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return compose("docker/compose.gpu.yml")[0]


def in_bytes(size: str) -> int:
    """``2g`` as Docker reads it."""
    return int(size[:-1]) << {"k": 10, "m": 20, "g": 30}[size[-1]]


def is_command_line(words: list[str]) -> bool:
    commands = typer.main.get_command(cli).commands  # type: ignore[attr-defined]
    return words[0] == "ugicm" and words[1] in commands and len(words) == 2


# Dockerfile


def test_its_commands_exist() -> None:
    (command,) = steps("CMD")
    (health,) = steps("HEALTHCHECK")
    for text in (command, health.partition("CMD ")[2]):
        assert is_command_line(yaml.safe_load(text)), text


def test_its_variables_are_settings_and_its_port_is_the_one_exposed() -> None:
    variables: dict[str, str] = {}
    for text in steps("ENV"):
        variables |= dockerfile.assignments(text)
    ours = {name: value for name, value in variables.items() if name.startswith(PREFIX)}
    assert set(ours) <= VARIABLES
    assert steps("EXPOSE") == [ours[setting("port")]]
    assert ours[setting("host")] == "0.0.0.0"


def test_what_it_copies_exists_and_is_not_ignored() -> None:
    kept = [
        line[1:]
        for line in (REPOSITORY / "docker/Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for text in steps("COPY"):
        if not text.startswith("--from="):
            for source in text.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert source in kept, source


def test_the_final_image_has_no_tools_and_no_rights() -> None:
    stage = final_stage()
    assert "slim" in stage[0].text
    runs = [step.text for step in stage if step.name == "RUN"]
    assert not [run for run in runs if re.search(r"\b(apt|pip|gcc|curl)\b", run)]
    (account,) = [run for run in runs if run.startswith("useradd")]
    (user,) = steps("USER")
    assert user.isdecimal()  # Kubernetes cannot tell whether a name is root's
    assert f" --uid {user} " in account
    build = dockerfile.read_steps(dockerfile.DOCKERFILE)
    assert any(step.name == "ENV" and "PIP_NO_CACHE_DIR=1" in step.text for step in build)
    assert stage.index(("USER", user)) < [step.name for step in stage].index("CMD")


def test_requirements_are_those_of_the_project() -> None:
    import tomllib

    done = subprocess.run(
        [sys.executable, "docker/requirements.py", "pyproject.toml", "otel", "cluster"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    expected = [*project["dependencies"], *extras["otel"], *extras["cluster"]]
    assert done.stdout.splitlines() == expected


# Compose


def test_services_volumes_and_build(base: dict[str, Any]) -> None:
    service = base["services"]["ugicm"]
    assert (REPOSITORY / service["build"]["context"] / service["build"]["dockerfile"]) == (
        REPOSITORY / "docker/Dockerfile"
    )
    arguments = {argument for text in steps("ARG") for argument in dockerfile.assignments(text)}
    assert set(service["build"]["args"]) <= arguments
    for name, description in base["services"].items():
        assert description["deploy"]["resources"]["limits"]["memory"], name
        assert description["read_only"] is True, name
        for volume in description["volumes"]:
            source = volume.split(":")[0]
            assert source in base["volumes"] or source == "./model_store"


def test_environment_and_ports(base: dict[str, Any], gpu: dict[str, Any]) -> None:
    service = base["services"]["ugicm"]
    for environment in (service["environment"], gpu["services"]["ugicm"]["environment"]):
        assert set(environment) <= VARIABLES
    (port,) = service["ports"]
    assert port.rsplit(":", 1)[1] == steps("EXPOSE")[0]
    store = service["environment"][setting("model_store")]
    assert f"./model_store:{store}:ro" in service["volumes"]


def test_the_settings_take_the_values(
    base: dict[str, Any], gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (base, gpu):
        for name, value in file["services"]["ugicm"]["environment"].items():
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)))
    settings = Settings()
    assert settings.device == "cuda"
    assert settings.max_requests == 24
    assert isinstance(open_cache(settings), RedisCache)
    assert (REPOSITORY / "model_store" / settings.model / "config.json").exists()


def test_the_cache_is_one_of_the_services_and_healthy_first(base: dict[str, Any]) -> None:
    service, cache = base["services"]["ugicm"], base["services"]["cache"]
    assert service["environment"][setting("cache_url")] == "redis://cache:6379/0"
    assert service["depends_on"]["cache"]["condition"] == "service_healthy"
    assert cache["healthcheck"]["test"][-1] == "ping"
    assert "--maxmemory-policy allkeys-lru" in cache["command"]


def test_bodies_fit_the_memory(base: dict[str, Any]) -> None:
    service = base["services"]["ugicm"]
    defaults = Settings()
    bodies = int(service["environment"][setting("max_requests")]) * defaults.max_bytes
    (temporary,) = service["tmpfs"]
    assert in_bytes(temporary.removeprefix("/tmp:size=")) >= bodies
    caches = defaults.picture_cache_bytes
    # docs/performance.md: resident after a load, and 35 bytes a pixel of a drawn picture
    model, work = 1.2e9, 35 * defaults.max_pixels
    assert in_bytes(service["deploy"]["resources"]["limits"]["memory"]) >= 2 * bodies + caches + model + work


def test_the_grace_period_is_longer_than_the_shutdown(base: dict[str, Any]) -> None:
    settings = Settings()
    grace_s = int(base["services"]["ugicm"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.drain_delay_s + settings.shutdown_timeout_s


def test_only_the_override_asks_for_a_gpu(base: dict[str, Any], gpu: dict[str, Any]) -> None:
    assert "reservations" not in str(base)
    (device,) = gpu["services"]["ugicm"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert set(gpu["services"]) <= set(base["services"])
    assert set(gpu["services"]["ugicm"]["build"]["args"]) == {"TORCH"}


# Both together, without an engine


@pytest.mark.slow
def test_the_steps_lead_to_a_request_served_by_the_shipped_model(
    tmp_path: Path, photo: Any, free_port: int
) -> None:
    pytest.importorskip("hatchling", reason="building the wheel offline needs hatchling")
    root = tmp_path / "root"
    image = dockerfile.build(root, seed=Path(sysconfig.get_paths()["purelib"]))
    environment = image.run_environment() | {"UGICM_PORT": str(free_port), "UGICM_HOST": "127.0.0.1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(image.command, env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(image.healthcheck, env=environment, capture_output=True).returncode:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        out = io.BytesIO()
        Image.fromarray(photo[:64, :64]).save(out, "PNG")
        url = f"http://127.0.0.1:{free_port}"
        with urllib.request.urlopen(urllib.request.Request(f"{url}/encode", out.getvalue())) as answer:
            encoded = json.load(answer)
        with urllib.request.urlopen(url + encoded["links"]["machine"]) as answer:
            assert Image.open(answer).size == (64, 64)
        with urllib.request.urlopen(f"{url}/info") as answer:
            assert json.load(answer)["model"]["name"] == Settings().model
    finally:
        process.terminate()
        assert process.wait(60) == 0

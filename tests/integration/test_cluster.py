"""The service on a local Ray cluster, as docker/serve.yaml describes it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from ugicm.codec.codec import Codec
from ugicm.server.settings import Settings

# Of Ray's own classes.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

DESCRIPTION = Path(__file__).parents[2] / "docker/serve.yaml"


def description() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(DESCRIPTION.read_text())
    return loaded


def test_its_description_agrees_with_the_code() -> None:
    from ray.serve.schema import ServeDeploySchema

    from ugicm import cluster

    deployed = ServeDeploySchema.model_validate(description())
    (application,) = deployed.applications
    assert application.import_path == f"{cluster.__name__}:{cluster.app.__name__}"
    built = cluster.app(dict(application.args))
    (deployment,) = application.deployments
    assert deployment.name == built._bound_deployment.name
    assert deployed.http_options.port == Settings().port


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("auto", 0), ("cuda", 1), ("cuda:0", 1)])
def test_a_replica_on_cuda_asks_for_a_gpu(device: str, gpus: int) -> None:
    from ray.serve.schema import ServeDeploySchema

    from ugicm.cluster import app

    built = app({"cache_url": "redis://cache", "device": device})
    assert built._bound_deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": gpus}
    (settings,) = built._bound_deployment.init_args
    assert settings.device.startswith("cuda") == bool(gpus)
    # Options in the description would replace these as a whole.
    (application,) = ServeDeploySchema.model_validate(description()).applications
    assert "ray_actor_options" not in application.deployments[0].model_fields_set


def test_a_replica_answers_for_itself_up_to_its_limit() -> None:
    from ugicm.cluster import app

    settings = {"cache_url": "redis://cache", "max_requests": 7, "shutdown_timeout_s": 9}
    deployment = app(settings)._bound_deployment
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (7, 7)
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 9


@pytest.mark.parametrize("url", ["memory:", "MEMORY:"])
def test_what_replicas_cannot_share_is_refused(url: str) -> None:
    from ugicm.cluster import app

    with pytest.raises(ValueError, match=rf"UGICM_CACHE_URL must name a cache .* got '{url}'"):
        app({"cache_url": url})


class Cluster:
    """``serve run`` with two replicas of the tiny model."""

    def __init__(self, folder: Path, store: Path, port: int) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log"
        config = description()
        config["http_options"] = {"host": "127.0.0.1", "port": port}
        (application,) = config["applications"]
        application["args"] |= {
            "cache_url": f"file://{folder}/cache",
            "device": "cpu",
            "precision": "float32",
            "model": "tiny",
            "model_store": str(store),
        }
        (deployment,) = application["deployments"]
        assert deployment["autoscaling_config"]["min_replicas"] == 2
        deployment["ray_actor_options"] = {"num_cpus": 0.1}
        (folder / "serve.yaml").write_text(yaml.safe_dump(config))
        # Paths of sockets must be short.
        self.temporary = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
        environment = os.environ | {
            "RAY_TMPDIR": self.temporary.name,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_DEDUP_LOGS": "0",
            # Three times 5 seconds are too few where the processor is busy.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        }
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("serve")), "run", "serve.yaml"],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/octet-stream") -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
            return content

    def replicas(self) -> set[int]:
        """Process ids of those that are ready, as their log lines say."""
        lines = self.log.read_text(errors="replace").splitlines()
        return {
            int(found[1])
            for line in lines
            if '"ready"' in line and (found := re.search(r"pid=(\d+)\)", line))
        }

    def wait_until(self, condition: Any) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        # Ray stops its processes one after the other, and now and then waits for one for ever.
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.temporary.cleanup()


@pytest.fixture
def cluster(tmp_path: Path, tiny_store: Path, free_port: int) -> Iterator[Cluster]:
    started = Cluster(tmp_path, tiny_store, free_port)
    yield started
    started.stop()


@pytest.mark.cluster
@pytest.mark.slow
def test_replicas_answer_alike_and_one_may_die(
    cluster: Cluster, tiny_codec: Codec, photo: NDArray[np.uint8]
) -> None:
    cluster.wait_until(lambda: len(cluster.replicas()) == 2)
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "png")
    (expected,) = tiny_codec.encode([photo], quality=40)

    result = json.loads(cluster.ask("/encode?quality=40", file.getvalue(), "image/png"))
    assert cluster.ask(result["links"]["bitstream"]) == expected

    def decoded(strength: float) -> NDArray[np.uint8]:
        asked = json.dumps({"id": result["id"]}).encode()
        picture = cluster.ask(f"/decode?strength={strength}", asked, "application/json")
        return np.asarray(Image.open(io.BytesIO(picture)))

    for strength in (0.0, 1.0):
        np.testing.assert_array_equal(decoded(strength), tiny_codec.decode([expected], strength)[0])

    with pytest.raises(urllib.error.HTTPError) as refused:
        cluster.ask("/encode", b"no picture")
    assert refused.value.code == 415
    assert json.load(refused.value)["code"] == "unsupported-media-type"

    before = cluster.replicas()
    os.kill(min(before), signal.SIGKILL)
    for step in range(20):  # not from a cache of pictures
        decoded(0.01 + 0.01 * step)
    cluster.wait_until(lambda: len(cluster.replicas() - before) == 1)
    decoded(0.5)

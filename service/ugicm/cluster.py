"""The service on Ray Serve, for more than one machine or GPU: ``serve deploy docker/serve.yaml``.

A replica is what `ugicm serve` is: one process with the whole application, a model loaded once, batches of
its own. Ray routes requests to the replica with the fewest, starts and stops replicas with the load, replaces
those that fail, and runs its HTTP proxies, so that `Settings.host` and `Settings.port` have no meaning here.
Replicas share the bitstream cache and nothing else.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from ugicm.server import logs
from ugicm.server.app import create_app
from ugicm.server.settings import Settings, setting

TARGET_REQUESTS = 8
"""Requests in a replica, waiting ones included, that are worth another replica when there are more."""


@serve.ingress()
class Service:
    """One replica."""

    def __init__(self, settings: Settings) -> None:
        logs.configure(settings)
        self._app = create_app(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Ray asks regularly, and replaces the replica after a few failures.

        Raises:
            RuntimeError: the device failed at its last work and fails again.
        """
        if not await self._app.state.services.engine.healthy():
            raise RuntimeError("the device fails")


def app(args: dict[str, Any]) -> Application:
    """What ``import_path: ugicm.cluster:app`` names.

    Replicas and their resources are the business of the ``deployments`` in Ray's own configuration; what is
    set here are defaults.

    Args:
        args: settings by the names of their fields, before those of the environment.

    Raises:
        ValueError: a setting is wrong, or the cache is not one that replicas can share.
    """
    settings = Settings(**args)
    if settings.device == "auto":
        # Whoever did not ask Ray for a GPU must not take one: all replicas of a node would take the first.
        settings = settings.model_copy(update={"device": "cpu"})
    if urlsplit(settings.cache_url).scheme == "memory":
        raise ValueError(
            f"on a cluster, {setting('cache_url')} must name a cache that all replicas share (redis://, "
            f"s3://, or file:/// on a file system that they share), got {settings.cache_url!r}: what one "
            "replica encodes another is asked to decode"
        )
    deployed: Any = serve.deployment(Service)  # its annotation is that of the decorator with arguments
    application: Application = deployed.options(
        name="ugicm",
        autoscaling_config=AutoscalingConfig(max_replicas=16, target_ongoing_requests=TARGET_REQUESTS),
        # Up to here, a replica answers for itself: 503 with a Retry-After that it has computed.
        max_ongoing_requests=settings.max_requests,
        max_queued_requests=settings.max_requests,
        backpressure_config=BackpressureConfig(retry_after_s=1),
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s,
        ray_actor_options={"num_cpus": 2, "num_gpus": int(settings.device != "cpu")},
    ).bind(settings)
    return application

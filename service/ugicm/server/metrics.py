"""Prometheus metrics. Every label has a small, fixed set of values."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_PIXELS = (65_536, 262_144, 524_288, 1_048_576, 2_097_152, 4_194_304, 8_388_608, 16_777_216, 67_108_864)
_BPP = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)


class Metrics:
    """One registry per application, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "ugicm_requests", "Requests answered.", ("route", "method", "code"), registry=registry
        )
        self.request_seconds = Histogram(
            "ugicm_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "ugicm_rejected", "Requests answered with a problem.", ("code",), registry=registry
        )
        self.client_disconnects = Counter(
            "ugicm_client_disconnects", "Clients that left before their answer.", registry=registry
        )
        self.queue_seconds = Histogram(
            "ugicm_queue_seconds", "Wait for the device.", buckets=_SECONDS, registry=registry
        )
        self.queue_pixels = Gauge(
            "ugicm_queue_pixels", "Pixels of the pictures in the service.", registry=registry
        )
        self.batch_images = Histogram(
            "ugicm_batch_images",
            "Pictures that went through the network together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_pixels = Histogram(
            "ugicm_batch_pixels", "Pixels of a batch.", buckets=_PIXELS, registry=registry
        )
        self.codec_seconds = Histogram(
            "ugicm_codec_seconds",
            "Work of one stage; of a whole batch for analysis, search and synthesis.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.bitstream_bpp = Histogram(
            "ugicm_bitstream_bpp",
            "Bits per pixel of encoded pictures.",
            buckets=_BPP,
            registry=registry,
        )
        self.cache_requests = Counter(
            "ugicm_cache_requests", "Look-ups.", ("tier", "result"), registry=registry
        )
        self.cache_errors = Counter(
            "ugicm_cache_errors", "Failed operations of the bitstream cache.", registry=registry
        )
        self.cache_up = Gauge("ugicm_cache_up", "1 while the bitstream cache answers.", registry=registry)
        self.cache_bytes = Gauge(
            "ugicm_cache_bytes", "Bytes kept in memory or files.", ("tier",), registry=registry
        )
        self.model_info = Gauge(
            "ugicm_model_info",
            "The loaded model.",
            ("model", "digest", "device", "precision"),
            registry=registry,
        )

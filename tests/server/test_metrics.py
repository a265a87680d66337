"""What /metrics says after some traffic."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families


def samples(client: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_traffic_is_counted_under_bounded_labels(make_client: Any, image_file: Any) -> None:
    client = make_client(warm_up=False)
    encoded = client.post("/encode", content=image_file()).json()
    id = encoded["id"]
    client.post("/decode", json={"id": id})
    client.post("/decode", json={"id": "0" * 64})
    client.get(f"/bitstreams/{id}")
    for path in ("/a", "/b", "/c"):
        client.request("BREW", path)
    seen = samples(client)

    def value(name: str, **labels: str) -> float:
        return seen[name, tuple(sorted(labels.items()))]

    assert value("ugicm_requests_total", route="/encode", method="POST", code="200") == 1
    assert value("ugicm_requests_total", route="/decode", method="POST", code="404") == 1
    assert value("ugicm_requests_total", route="/bitstreams/{id}", method="GET", code="200") == 1
    assert value("ugicm_requests_total", route="unmatched", method="other", code="404") == 3
    assert value("ugicm_rejected_total", code="unknown-bitstream") == 1
    assert value("ugicm_cache_requests_total", tier="bitstream", result="hit") == 2
    assert value("ugicm_cache_requests_total", tier="bitstream", result="miss") == 1
    for stage in (
        "image_decode",
        "analysis",
        "entropy_encode",
        "entropy_decode",
        "synthesis",
        "image_encode",
    ):
        assert value("ugicm_codec_seconds_count", stage=stage) == 1
    assert value("ugicm_queue_seconds_count") == 2
    assert value("ugicm_bitstream_bpp_count") == 1
    assert value("ugicm_bitstream_bpp_sum") == pytest.approx(encoded["bpp"])
    assert value("ugicm_cache_bytes", tier="bitstream") > encoded["size"]
    assert value("ugicm_batch_pixels_sum") == 2 * 128 * 128
    assert value("ugicm_cache_bytes", tier="picture") > 0
    assert (
        value(
            "ugicm_model_info",
            model="fake",
            digest="00112233aabbccdd",
            device="cpu",
            precision="float32",
        )
        == 1
    )


def test_two_applications_in_one_process_count_apart(make_client: Any) -> None:
    first, second = make_client(), make_client()
    first.get("/livez")
    key = ("ugicm_requests_total", (("code", "200"), ("method", "GET"), ("route", "/livez")))
    assert samples(first)[key] == 1
    assert key not in samples(second)

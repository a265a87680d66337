"""What `ugicm bench` reports; never how fast anything was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from ugicm.bench import run
from ugicm.bench.peers import Peer
from ugicm.bench.stages import StageClock, observed
from ugicm.cli import app
from ugicm.codec.codec import Codec


@pytest.fixture
def arguments(
    tiny_store: Path, tmp_path: Path, photo: NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setattr(run, "TIMED_S", 0.0)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return [
        *("bench", str(tmp_path / "photo.png"), "--megapixels", "0.02,0.1", "--batches", "2,1"),
        *("--model", "tiny", "--model-store", str(tiny_store), "--device", "cpu", "--precision", "float32"),
    ]


def bench(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_progress_goes_to_standard_error(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--no-peers", "--json"])
    assert json.loads(result.stdout)
    assert result.stderr.splitlines()[:2] == ["memory", "ugicm, 1 x 0.02 megapixels"]


def test_report_is_one_object(arguments: list[str]) -> None:
    report = json.loads(bench(*arguments, "--json"))
    rows = report["results"]
    own = [row for row in rows if row["codec"] == "ugicm tiny"]
    # Whole hyper positions nearest to the sizes asked for.
    assert {(row["op"], row["megapixels"], row["batch"]) for row in own} == {
        (op, size, batch) for op in ("encode", "decode") for size in (0.025, 0.098) for batch in (1, 2)
    }
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        pixels = row["megapixels"] * row["batch"]
        assert row["ms_per_megapixel"] == pytest.approx(row["median_ms"] / pixels, rel=0.1)
        assert row["bytes"] > 0
        assert row["threads"] > 0
    for row in own:
        stages = row["stages_ms"]
        transform = "analysis" if row["op"] == "encode" else "synthesis"
        assert min(stages[name] for name in (transform, "entropy model", "coder")) > 0
        assert stages["other"] >= -0.2 * row["median_ms"]
        assert 0 < row["share_of_peak"] < 2
    assert report["machine"]["peak_gflops"]["float32"] > 0
    jpeg = [row for row in rows if row["codec"] == "Pillow JPEG"]
    assert {(row["op"], row["megapixels"]) for row in jpeg} == {
        (op, size) for op in ("encode", "decode") for size in (0.025, 0.098)
    }
    for row in jpeg:
        assert row["threads"] == 1
        (ours,) = (
            each["median_ms"]
            for each in own
            if (each["op"], each["megapixels"], each["batch"]) == (row["op"], row["megapixels"], 1)
        )
        assert row["times_ours"] == pytest.approx(row["median_ms"] / ours, abs=0.01)


def test_memory_is_that_of_the_work_alone() -> None:
    size = 64 << 20
    used = run.peak_memory(lambda: np.ones(size, np.uint8))
    assert used is not None
    assert used > 0.9 * size
    idle = run.peak_memory(lambda: None)
    assert idle is not None
    assert idle < size / 8


def test_table_and_drawn_picture(arguments: list[str]) -> None:
    del arguments[1]
    text = bench(*arguments, "--no-peers")
    assert "ugicm tiny" in text
    assert "of peak" in text
    assert "Pillow" not in text


def test_a_picture_that_is_kept_lossless(arguments: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "photo.png")
    report = json.loads(bench(*arguments, "--no-peers", "--json"))
    own = [row for row in report["results"] if row["codec"] == "ugicm tiny"]
    assert {row["op"]: "transform_gflops" in row for row in own} == {"encode": True, "decode": False}
    assert all(list(row["stages_ms"]) == ["other"] for row in own if row["op"] == "decode")
    lines = bench(*arguments, "--no-peers").splitlines()
    assert [line for line in lines if " decode " in line and "of peak" not in line]


def test_sizes_must_be_numbers(arguments: list[str]) -> None:
    for value in ("1,x", "0", "nan", "1,inf"):
        result = CliRunner().invoke(app, [*arguments, "--megapixels", value])
        assert result.exit_code == 2
        assert "sizes and batches" in result.stderr


def test_a_bad_photo_is_named(arguments: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    result = CliRunner().invoke(app, [*arguments, str(broken)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"ugicm: bench: {broken}: not an image")


def test_networks_have_names(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--learned", "mbt2018-mean,jpeg"])
    assert result.exit_code == 2
    assert "no network jpeg; there are bmshj2018-hyperprior" in " ".join(result.stderr.split())


def test_networks_that_are_not_installed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressai", None)
    result = CliRunner().invoke(app, [*arguments, "--learned", "mbt2018-mean"])
    assert result.exit_code == 1
    assert "pip install 'ugicm[bench]'" in result.stderr


def test_times_are_against_ours_for_the_same_picture() -> None:
    def row(codec: str, op: str, megapixels: float, batch: int, median: float) -> dict[str, Any]:
        return {"codec": codec, "op": op, "megapixels": megapixels, "batch": batch, "median_ms": median}

    rows = [
        row("ugicm tiny", "encode", 0.1, 1, 10.0),
        row("ugicm tiny", "encode", 0.1, 8, 77.0),
        row("ugicm tiny", "decode", 0.1, 1, 20.0),
        row("ugicm tiny", "encode", 0.4, 1, 40.0),
        row("peer", "encode", 0.1, 1, 25.0),
        row("peer", "decode", 0.1, 1, 5.0),
        row("peer", "encode", 1.0, 1, 5.0),
    ]
    run._add_ratios(rows)
    assert [each.get("times_ours") for each in rows] == [None] * 4 + [2.5, 0.25, None]


def test_a_peer_that_is_too_slow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run, "measure", lambda work: (work(), run.Timing(9000.0, 9000.0, 9000.0, {}))
    )  # a second for a thousand pixels
    peer = Peer("slow", lambda image: bytes(image.size), lambda data: np.zeros(1, np.uint8), len, 1)
    images = [np.zeros((side, 100, 3), np.uint8) for side in (90, 200, 201, 900)]
    rows = list(run._peer_rows(peer, images))
    assert [(row["op"], row["megapixels"], row["bytes"]) for row in rows] == [
        *(("encode", 0.009, 27_000), ("decode", 0.009, 27_000)),
        *(("encode", 0.02, 60_000), ("decode", 0.02, 60_000)),
        *(("encode", 0.02, 60_300), ("decode", 0.02, 60_300)),
    ]


def test_times_are_of_calls_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, costs = [0.0], iter([100.0, 0.5, 0.1, 0.2, 9.0])

    def work() -> float:
        cost = next(costs)
        now[0] += cost
        return cost

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(run, "TIMED_S", 0.75)
    result, timing = run.measure(work)
    assert result == 100.0
    assert timing[:3] == pytest.approx((200.0, 100.0, 500.0))


def test_a_stage_does_not_count_what_is_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StageClock(torch.device("cpu"))

    def wait(seconds: float) -> None:
        now[0] += seconds

    def outer() -> str:
        wait(1.0)
        for _ in range(2):
            clock.observe("coder", lambda: wait(0.25))
        return "done"

    assert clock.observe("entropy model", outer) == "done"
    clock.observe("synthesis", lambda: wait(2.0))
    assert clock.seconds == {"coder": 0.5, "entropy model": 1.0, "synthesis": 2.0}


@pytest.mark.slow
def test_networks_of_others(arguments: list[str]) -> None:
    pytest.importorskip("compressai")
    text = bench(
        *arguments, "--megapixels", "0.02", "--learned", "bmshj2018-hyperprior,elic2022", "--no-peers"
    )
    assert "CompressAI bmshj2018-hyperprior" in text
    assert "CompressAI elic2022" in text


def test_watching_leaves_no_trace(tiny_codec: Codec, photo: NDArray[Any]) -> None:
    before = dict(vars(tiny_codec))
    stages = []

    def observe(stage: str, work: Any) -> Any:
        stages.append(stage)
        return work()

    with observed(tiny_codec, observe):
        watched = tiny_codec.encode([photo])
        tiny_codec.decode(watched)
    assert stages.count("synthesis") == stages.count("analysis") == 1
    assert vars(tiny_codec) == before
    count = len(stages)
    assert tiny_codec.encode([photo]) == watched
    assert len(stages) == count


def test_sizes_over_the_limit_are_refused_at_once(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(run, "resized")
    for limit in (["--max-pixels", "90000"], []):
        if not limit:
            monkeypatch.setenv("UGICM_MAX_PIXELS", "90000")
        result = CliRunner().invoke(app, [*arguments, *limit])
        assert result.exit_code == 1
        assert "98304 is over the limit of 90000; UGICM_MAX_PIXELS changes it" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # 4 megapixels become whole hyper positions, which are more.
        (["--megapixels", "4", "--max-pixels", "4000000"], "4046848 is over the limit of 4000000"),
        (["--megapixels", "1.1", "--batches", "2"], "nothing to measure: several pictures at a time"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    arguments: list[str], options: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "memory" not in result.stderr.splitlines()

"""The measurement itself, with codecs whose numbers are known, and once with the real codec and peers."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from ugicm.codec.codec import Codec
from ugicm.codec.store import load_codec, read_model
from ugicm_train.cli import main
from ugicm_train.evaluation import coders, metrics, parts, rate_distortion, report
from ugicm_train.evaluation.anchors import Point, points_of, read_anchors
from ugicm_train.evaluation.coders import (
    PEERS,
    Coder,
    installed_peers,
    pillow_coder,
    refined_coder,
    ugicm_coder,
)
from ugicm_train.evaluation.measurement import (
    Measurement,
    RateTarget,
    Row,
    joined,
    measure,
    measure_image,
)
from ugicm_train.evaluation.parts import Part
from ugicm_train.evaluation.rate_distortion import check, compare, mean_curves, read_measurement
from ugicm_train.export import write_model
from ugicm_train.files import locked, written_whole

CSV = (
    "codec,bpp,psnr_db,ms_ssim\nvtm,0.1,28,0.93\nvtm,0.8,36,0.99\nvtm,0.4,33,0.98\nold,0.5,30,\nold,0.9,32,\n"
)


class Shift:
    """Codes by adding 2^(8 - quality) to every pixel; `quality` * 100 bytes; counts its calls."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, image: NDArray[np.uint8], quality: float) -> bytes:
        self.encoded += 1
        header = f"{image.shape[0]} {image.shape[1]} {quality:g};".encode()
        return (header + image.tobytes()[:1]).ljust(int(100 * quality), b"\0")

    def decode(self, data: bytes, strength: float) -> NDArray[np.uint8]:
        height, width, quality = data.split(b";")[0].split()
        value = 100 + 2 ** (8 - int(quality)) * (1 + strength)
        return np.full((int(height), int(width), 3), value, np.uint8)

    def coder(self, name: str = "shift") -> Coder:
        views = {"human": 0.0, "machine": 1.0}
        return Coder(name, "version 1", (5.0, 6.0, 7.0), self.encode, self.decode, views)


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    """Two pictures of grey 100, of different sizes."""
    folder = tmp_path / "greys"
    (folder / "sub").mkdir(parents=True)
    for name, side in (("a.png", 40), ("sub/b.png", 80)):
        PIL.Image.fromarray(np.full((side, side, 3), 100, np.uint8)).save(folder / name)
    return folder


def test_rows_count_all_bytes_and_both_views(greys: Path) -> None:
    shift = Shift()
    image = np.full((40, 40, 3), 100, np.uint8)
    rows = list(measure_image(shift.coder(), "a", image))
    assert shift.encoded == 3  # one bitstream for both views
    assert [(row.quality, row.view) for row in rows[:3]] == [(5, "human"), (5, "machine"), (6, "human")]
    first, machine = rows[0], rows[1]
    assert first.bytes == 500
    assert first.bpp == pytest.approx(8 * 500 / 1600)
    assert first.psnr_db == pytest.approx(20 * np.log10(255 / 8), abs=1e-4)
    assert machine.psnr_db == pytest.approx(20 * np.log10(255 / 16), abs=1e-4)
    assert first.ms_ssim is None  # too small for five scales


def test_curves_are_means_over_pictures(greys: Path) -> None:
    measured = measure([Shift().coder()], greys)
    assert list(measured.images) == ["a.png", "sub/b.png"]
    human, machine = mean_curves(measured.rows)
    assert (human["view"], machine["view"]) == ("human", "machine")
    assert human["points"][0]["bpp"] == pytest.approx((8 * 500 / 1600 + 8 * 500 / 6400) / 2)
    assert [point.psnr_db for point in points_of(human)] == pytest.approx(
        [20 * np.log10(255 / d) for d in (8, 4, 2)], abs=1e-4
    )


def test_points_are_means_not_medians() -> None:
    rows = [
        Row("c", "human", 5.0, name, 1, bpp, psnr, None, None, None, 1.0, 1.0)
        for name, bpp, psnr in (("a", 0.1, 30.0), ("b", 0.2, 31.0), ("c", 0.6, 38.0))
    ]
    (curve,) = mean_curves(rows)
    (point,) = curve["points"]
    assert (point["bpp"], point["psnr_db"]) == (pytest.approx(0.3), pytest.approx(33))


def test_our_views_are_the_two_ends(tiny_codec: Codec, tiny_store: Path) -> None:
    assert coders.ugicm_coder(tiny_codec, tiny_store / "tiny").views == {"human": 0.0, "machine": 1.0}


def test_interrupted_measurement_is_continued(greys: Path) -> None:
    saved: list[Measurement] = []

    def stop(measured: Measurement) -> None:
        saved.append(measured)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([Shift().coder()], greys, save=stop)
    shift = Shift()
    resumed = measure([shift.coder()], greys, known=saved[0])
    assert shift.encoded == 1 + 3  # warm-up, then only the second picture
    fresh = measure([Shift().coder()], greys)
    assert [row[:10] for row in resumed.rows] == [row[:10] for row in fresh.rows]


def test_an_interruption_does_not_cost_what_was_known(greys: Path) -> None:
    known = measure([Shift().coder()], greys)
    PIL.Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(greys / "a.png")
    saved: list[tuple[dict[str, str], set[Any]]] = []

    def save(measured: Measurement) -> None:
        saved.append((dict(measured.images), {row[:10] for row in measured.rows}))

    again = measure([Shift().coder()], greys, known=known, save=save)
    assert saved == 2 * [(again.images, {row[:10] for row in again.rows})]
    # Pictures of other parts are not this one's to tell of.
    measure([Shift().coder()], greys, known=known, save=save, part=Part(1, 2))
    assert saved[-1][0].keys() == {"sub/b.png"}


def test_changed_picture_is_measured_again(greys: Path) -> None:
    known = measure([Shift().coder()], greys)
    PIL.Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(greys / "a.png")
    again = measure([Shift().coder()], greys, known=known)
    assert again.rows[0].psnr_db == pytest.approx(20 * np.log10(255 / 18), abs=1e-4)


def test_sizes_of_a_changed_picture_are_measured_again(greys: Path) -> None:
    asked: list[int] = []

    def to_bpp(image: NDArray[np.uint8], target: float) -> bytes:
        asked.append(int(image[0, 0, 0]))
        return bytes(asked[-1])

    coder = replace(Shift().coder(), encode_to_bpp=to_bpp)
    known = measure([coder], greys)
    assert asked == [100] * 6
    PIL.Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(greys / "a.png")
    again = measure([coder], greys, known=known)
    assert asked[6:] == [90] * 3
    assert [target.bpp for target in again.targets] == [8 * 90 / 1600] * 3 + [8 * 100 / 6400] * 3
    # Nor do those of before come in by another way.
    assert joined([again, known]).targets == again.targets
    changed = joined([Measurement(again.images, [], []), known])
    assert {target.image for target in changed.targets} == {"sub/b.png"}


def test_what_is_transparent_is_measured_as_white(tmp_path: Path) -> None:
    for name, picture in (
        ("hidden", PIL.Image.new("RGBA", (40, 40), (255, 0, 0, 0))),
        ("white", PIL.Image.new("RGB", (40, 40), "white")),
    ):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "a.png")
    hidden, white = (measure([Shift().coder()], tmp_path / name) for name in ("hidden", "white"))
    assert hidden.images == white.images


def test_what_was_not_asked_for_is_kept(greys: Path) -> None:
    known = measure([Shift().coder(), Shift().coder("other")], greys)
    saved: list[Measurement] = []
    shift = Shift()
    fewer = replace(shift.coder(), qualities=(6.0, 8.0))
    again = measure([fewer], greys, known=known, save=saved.append)
    assert shift.encoded == 2 + 1  # one new quality, and its warm-up
    assert {(row.codec, row.quality) for row in again.rows} == {("shift", 6.0), ("shift", 8.0)}
    for measured in saved:
        assert {row.key for row in measured.rows} >= {row.key for row in known.rows}
    assert len(saved[-1].rows) == len(known.rows) + 2 * 2


def test_other_butteraugli_is_kept(greys: Path) -> None:
    measured = measure([Shift().coder()], greys)
    known = measured._replace(rows=[row._replace(butteraugli=1.5) for row in measured.rows])
    more = measure([replace(Shift().coder(), qualities=(6.0, 8.0))], greys, known=known)
    assert {(row.quality, row.butteraugli) for row in more.rows} == {(6.0, 1.5), (8.0, None)}


def test_a_butteraugli_that_is_lacking_is_measured(greys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "butteraugli", lambda original, decoded: 2.5)
    known = measure([Shift().coder()], greys)
    assert {row.butteraugli for row in known.rows} == {None}
    more = measure([Shift().coder()], greys, known=known, butteraugli=True)
    assert {row.butteraugli for row in more.rows} == {2.5}


def test_saved_rows_need_the_same_codec_and_machine(tmp_path: Path) -> None:
    row = Row("shift", "human", 5.0, "a", 1, 0.1, 30.0, None, None, None, 0.0, 0.0)
    path = tmp_path / "rd.json"
    head: dict[str, Any] = {"format": rate_distortion.FORMAT, "data": "kodak"}
    head |= {"machine": {"cores": 2, "torch_threads": 2}, "codecs": {"shift": "version 1"}}
    head |= {"model": "shift", "ours": ["shift"], "command": "ugicm-train rd"}
    found = {"images": {"a": "00"}, "rows": [row._asdict()], "rate_targets": []}
    rate_distortion.write_report(path, head | found)
    before = path.read_bytes()
    for same in (
        {},
        {"machine": {"cores": 2, "torch_threads": 1}},
        {"codecs": {"other": "version 2"}},
    ):
        measured, codecs = read_measurement(path, head | same)
        assert measured.rows == [row]
        assert codecs == {"shift": "version 1"}
    for other, message in (
        ({"codecs": {"shift": "version 2"}}, "codec shift 'version 1', now it is 'version 2'"),
        ({"machine": {"cores": 3}}, "cores 2, now it is 3"),
        ({"data": "mine"}, "data 'kodak', now it is 'mine'"),
        ({"format": 3}, "format 2, now it is 3"),
    ):
        with pytest.raises(ValueError, match=rf"rd\.json was measured with {message}: give another --out"):
            read_measurement(path, head | other)
    assert path.read_bytes() == before
    assert read_measurement(tmp_path / "none.json", head) == (Measurement({}, [], []), {})


def test_joined_measurements(greys: Path) -> None:
    whole = measure([Shift().coder()], greys)
    parts = [measure([Shift().coder()], greys, part=Part(index, 2)) for index in (1, 0)]
    assert [list(part.images) for part in parts] == [["sub/b.png"], ["a.png"]]
    both = joined(parts)
    assert both.images == whole.images
    assert {row[:10] for row in both.rows} == {row[:10] for row in whole.rows}
    cheaper = whole.rows[0]._replace(bytes=1)
    newer = joined([Measurement(whole.images, [cheaper], []), whole])
    assert len(newer.rows) == len(whole.rows)
    assert cheaper in newer.rows
    # What is known of other pixels does not count.
    changed = joined([Measurement({cheaper.image: "00"}, [], []), whole])
    assert {row.image for row in changed.rows} == whole.images.keys() - {cheaper.image}


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures in"):
        measure([Shift().coder()], tmp_path)


def test_compare_knows_sources_and_ranges() -> None:
    points = [{"quality": q, "bpp": 0.1 * 2**q, "psnr_db": 26 + 3 * q, "ms_ssim": None} for q in range(5)]
    dearer = [point | {"bpp": 2 * point["bpp"]} for point in points]
    curves = [
        {"codec": "ours", "view": "human", "points": points},
        {"codec": "peer", "view": "human", "points": dearer},
    ]
    anchors = {"vtm": [Point(p["bpp"] / 2, p["psnr_db"], 0.9) for p in points]}
    results = compare(curves, ["ours"], anchors)
    assert {entry["metric"] for entry in results} == {"psnr_db"}  # ours has no MS-SSIM here
    percents = {(e["source"], e["reference"], e["bpp_range"]): e["percent"] for e in results}
    assert percents[("measured", "peer", None)] == pytest.approx(-50)
    assert percents[("published", "vtm", (0.2, 0.9))] == pytest.approx(100)
    assert len(percents) == 2 * 3


def test_what_is_equally_good_at_every_rate_is_no_curve() -> None:
    exact = [{"quality": q, "bpp": 0.1 + q, "psnr_db": 100.0, "ms_ssim": 1.0} for q in range(2)]
    curves = [{"codec": "ours", "view": "human", "points": exact}]
    assert compare(curves, ["ours"], {"vtm": [Point(0.1, 30.0), Point(0.2, 33.0)]}) == []


def test_ours_are_compared_over_the_same_qualities() -> None:
    def codec(name: str, qualities: range, factor: float) -> dict[str, Any]:
        points = [
            {"quality": q, "bpp": factor * 0.1 * 2**q, "psnr_db": 26 + 3 * q, "ms_ssim": None}
            for q in qualities
        ]
        return {"codec": name, "view": "human", "points": points}

    # Against this anchor, ours gain at high rates only, where the refined codec was not measured.
    anchors = {"vtm": [Point(0.1 * 2**q * (2 if q > 2 else 1), 26 + 3 * q) for q in range(5)]}
    curves = [codec("ours", range(5), 1.0), codec("refined", range(2), 0.9)]
    percents = {e["codec"]: e["percent"] for e in compare(curves, ["ours", "refined"], anchors)[::3]}
    assert percents == {"ours": pytest.approx(0, abs=0.01), "refined": pytest.approx(-10, abs=0.01)}
    alone = compare(curves[:1], ["ours"], anchors)
    assert alone[0]["percent"] < -10
    # A range of rates says for itself what is compared.
    assert alone[1:3] == compare(curves, ["ours", "refined"], anchors)[1:3]


def test_check_counts_what_must_not_happen() -> None:
    def row(quality: float, psnr: float, view: str = "human") -> Row:
        return Row("ours", view, quality, "a", 100, 1.01, psnr, None, None, 1.0, 0.0, 0.0)

    targets = [RateTarget("ours", "a", 0.5, bpp) for bpp in (0.5, 0.486, 0.484, 0.501, None)]
    result = check([row(50, 32), row(1, 30), row(100, 31)], targets, "ours")
    assert result["real_above_estimated_bpp_percent"] == pytest.approx(1)
    assert result["quality_steps"] == 2
    assert result["quality_steps_with_lower_psnr"] == [{"image": "a", "from": 50, "to": 100}]
    assert (result["rate_targets_met_within_3_percent"], result["rate_targets"]) == (2, 4)
    assert result["machine_view_most_below_human"] is None
    both = [row(50, 32), row(1, 30), row(1, 29.5, "machine"), row(50, 20.0, "machine")]
    worst = check(both, targets, "ours")["machine_view_most_below_human"]
    assert worst == {"psnr_db": 12.0, "image": "a", "quality": 50}


def test_read_anchors(tmp_path: Path) -> None:
    path = tmp_path / "anchors.csv"
    path.write_text(CSV, encoding="utf-8-sig")  # as spreadsheets write it
    anchors = read_anchors(path)
    assert [point.bpp for point in anchors["vtm"]] == [0.1, 0.4, 0.8]
    assert anchors["old"][0] == Point(0.5, 30.0, None)
    path.write_text("codec,bpp\nvtm,0.1\n")
    with pytest.raises(ValueError, match="not a row of codec, bpp, psnr_db, ms_ssim"):
        read_anchors(path)
    path.write_text("name,bpp,psnr_db,ms_ssim\nvtm,0.1,28,0.93\n")
    with pytest.raises(ValueError, match="not a row of codec, bpp, psnr_db, ms_ssim"):
        read_anchors(path)
    path.write_text("codec,bpp,psnr_db,ms_ssim\nvtm,0.1,28,11.5\n")
    with pytest.raises(ValueError, match=r"an MS-SSIM is in 0\.\.1, not in dB"):
        read_anchors(path)
    for values in ("0,30,.9", "-1,30,.9", "nan,30,.9", "0.5,inf,.9", "0.5,30,nan"):
        path.write_text(f"{CSV}vtm,{values}\n")
        with pytest.raises(ValueError, match=rf"anchors\.csv.*'bpp': '{values.partition(',')[0]}'"):
            read_anchors(path)
    path.write_text(f"{CSV}{'v' * 200_000},1,30,.9\n")
    with pytest.raises(ValueError, match=r"anchors\.csv is no CSV file: field larger than field limit"):
        read_anchors(path)


@pytest.mark.parametrize("name", installed_peers())
def test_peers_trade_rate_for_distortion(name: str, photo: NDArray[np.uint8]) -> None:
    coder = pillow_coder(name)
    few = replace(coder, qualities=coder.qualities[::4])
    rows = list(measure_image(few, "photo", photo[:192, :192]))
    assert [row.bytes for row in rows] == sorted(row.bytes for row in rows)
    assert [row.psnr_db for row in rows] == sorted(row.psnr_db for row in rows)
    assert rows[-1].psnr_db > 35
    assert all(row.ms_ssim is not None and 0.5 < row.ms_ssim < 1 for row in rows)


def test_what_gives_other_numbers_has_another_identity(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read_model(tiny_store / "tiny")
    tensors = stored.tensors | {"preference.fold.bias": stored.tensors["preference.fold.bias"] + 1}
    write_model(tmp_path, stored.config, tensors, {})
    assert read_model(tmp_path).digest == stored.digest  # of the same bitstreams
    found: list[Coder] = []
    for folder, precision in (
        (tiny_store / "tiny", "float32"),
        (tmp_path, "float32"),
        (tmp_path, "bfloat16"),
    ):
        codec = load_codec(folder, device="cpu", precision=precision)
        found.append(ugicm_coder(codec, folder))
    found += [refined_coder(found[0], codec, steps, (50.0,)) for steps in (10, 20)]
    feature, qualities, options = PEERS["webp"]
    for method in (4, 6):
        monkeypatch.setitem(PEERS, "webp", (feature, qualities, options | {"method": method}))
        found.append(pillow_coder("webp"))
    assert len({coder.identity for coder in found}) == len(found)


def test_a_picture_of_another_shape_is_another(tmp_path: Path) -> None:
    hashes = set()
    for size in ((20, 40), (40, 20)):
        PIL.Image.new("RGB", size, "grey").save(tmp_path / "a.png")
        hashes.add(measure([Shift().coder()], tmp_path).images["a.png"])
    assert len(hashes) == 2


def test_unknown_peer() -> None:
    with pytest.raises(ValueError, match="no peer 'gif'; there are jpeg"):
        pillow_coder("gif")


def test_peers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    monkeypatch.setattr(coders.features, "check", lambda feature: feature != "avif")
    assert installed_peers() == ["jpeg", "webp"]
    with pytest.raises(ValueError, match="pillow-jxl-plugin is not installed; leave it out of --peers"):
        pillow_coder("jxl")
    with pytest.raises(ValueError, match="Pillow was built without avif; leave it out of --peers"):
        pillow_coder("avif")


def test_psnr_and_ms_ssim_of_known_pictures(photo: NDArray[np.uint8]) -> None:
    crop = photo[:176, :176]
    assert metrics.psnr_db(crop, crop) == metrics.LOSSLESS_DB
    assert metrics.ms_ssim(crop, crop) == pytest.approx(1, abs=1e-5)
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert metrics.psnr_db(black, white) == pytest.approx(0)
    with pytest.raises(ValueError, match="different sizes"):
        metrics.psnr_db(black, crop)


def test_ms_ssim_of_flat_pictures_is_that_of_their_means() -> None:
    """No contrast to compare: what is left is the luminance of the coarsest scale, by its weight."""
    first, second = (np.full((176, 176, 3), value, np.uint8) for value in (0, 10))
    constant = (0.01 * 255) ** 2
    luminance = constant / (10**2 + constant)
    assert metrics.ms_ssim(first, second) == pytest.approx(luminance**0.1333, abs=1e-4)


@pytest.mark.skipif(not metrics.butteraugli_installed(), reason="the program butteraugli is not installed")
def test_butteraugli_orders_damage(photo: NDArray[np.uint8]) -> None:
    crop = photo[:128, :128]
    coder = pillow_coder("jpeg")
    good, bad = (coder.decode(coder.encode(crop, q), 0.0) for q in (90, 10))
    distances = [metrics.butteraugli(crop, picture) for picture in (crop, good, bad)]
    assert distances[0] == 0
    assert distances == sorted(distances, key=lambda d: d or 0.0)
    assert metrics.butteraugli(crop[:8], bad[:8]) is None


def test_estimate_is_close_to_the_real_bitstream(
    tiny_codec: Codec, tiny_store: Path, photo: NDArray[np.uint8]
) -> None:
    coder = ugicm_coder(tiny_codec, tiny_store / "tiny")
    assert coder.estimate_bits is not None
    for quality in (20.0, 80.0):
        data = coder.encode(photo, quality)
        assert coder.estimate_bits(photo, quality, data) == pytest.approx(8 * (len(data) - 32), rel=0.01)
    flat = np.full((64, 64, 3), 90, np.uint8)
    assert coder.estimate_bits(flat, 20.0, coder.encode(flat, 20.0)) is None  # stored exactly


def test_rate_control_is_measured_only_inside_the_reach(
    tiny_codec: Codec, tiny_store: Path, photo: NDArray[np.uint8]
) -> None:
    coder = ugicm_coder(tiny_codec, tiny_store / "tiny")
    assert coder.encode_to_bpp is not None
    assert coder.encode_to_bpp(photo, 1e-3) is None
    assert coder.encode_to_bpp(photo, 1e3) is None
    middle = metrics.bits_per_pixel(coder.encode(photo, 50.0), photo)
    data = coder.encode_to_bpp(photo, middle)
    assert data is not None
    assert 0.97 * middle <= metrics.bits_per_pixel(data, photo) <= middle


def _parse(add_arguments: Any, *arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_command_writes_json_table_and_plot(
    tiny_store: Path, photo: NDArray[np.uint8], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, anchors = tmp_path / "photos", tmp_path / "rd" / "rd.json", tmp_path / "anchors.csv"
    folder.mkdir()
    PIL.Image.fromarray(photo[:176, :200]).save(folder / "cat.png")
    anchors.write_text(CSV)
    options = ["--data", folder, "--out", out, "--anchors", anchors, "--device", "cpu", "--no-butteraugli"]
    arguments = _parse(
        rate_distortion.add_arguments, tiny_store / "tiny", *options, "--qualities", 20, 90, "--peers", "jpeg"
    )
    assert rate_distortion.run(arguments) == 0
    result = json.loads(out.read_text())
    assert {(row["codec"], row["view"]) for row in result["rows"]} == {
        ("tiny", "human"),
        ("tiny", "machine"),
        ("jpeg", "human"),
    }
    assert len(result["rows"]) == 2 * 2 + len(PEERS["jpeg"][1])
    table = out.with_suffix(".md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "| VTM (VVC), published |" in table
    assert "| JPEG, measured |" in table
    assert "No means" not in table
    assert re.search(r"; transforms in b?float\d\d \(tiny\); times .*, \d+ threads?\.", table)
    with PIL.Image.open(out.with_suffix(".png")) as plot:
        assert plot.width > plot.height > 500

    assert rate_distortion.run(arguments) == 0  # nothing is measured again, not even the times
    assert json.loads(out.read_text())["rows"] == result["rows"]

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    again = _parse(report.add_arguments, out, "--insert", readme, "--plot", tmp_path / "plot.svg")
    assert report.run(again) == 0
    assert readme.read_text() == f"before\n{report.BEGIN}\n{table.strip()}\n{report.END}\nafter\n"
    assert "<svg" in (tmp_path / "plot.svg").read_text()[:1000]

    assert report.run(_parse(report.add_arguments, out, "--summary", readme)) == 0
    short = readme.read_text()
    assert "| BD-rate, 0.15–0.9 bpp, against | PSNR, tiny | MS-SSIM, tiny |\n" in short  # noqa: RUF001
    assert "| VTM (VVC), published | " in short
    assert "quality" not in short


def test_a_smaller_measurement_keeps_the_larger(
    tiny_store: Path, greys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rd.json"
    command = ["rd", str(tiny_store / "tiny"), "--data", str(greys), "--device", "cpu", "--no-butteraugli"]
    command += ["--out", str(out)]
    whole = [*command, "--qualities", "20", "50", "90", "--peers", "jpeg", "webp", "--refine", "1"]
    assert main(whole) == 0
    first = json.loads(out.read_text())
    assert main([*command, "--qualities", "20", "90", "--peers", "jpeg"]) == 0
    second = json.loads(out.read_text())
    key = ("codec", "view", "quality", "image")
    for name in ("rows", "rate_targets"):
        by_key = [
            {tuple(item.get(part) for part in (*key, "target_bpp")): item for item in each[name]}
            for each in (first, second)
        ]
        assert by_key[0] == by_key[1]  # times included
    assert first["codecs"] == second["codecs"]
    assert {line["codec"] for line in second["curves"]} == {"tiny", "jpeg"}
    assert {len(line["points"]) for line in second["curves"] if line["codec"] == "tiny"} == {2}
    table = out.with_suffix(".md").read_text()
    assert "webp" not in table.lower()
    assert re.search(r"No means of MS-SSIM: .* below 161 pixels have none, the first of \d is a\.png", table)
    assert main(whole) == 0
    third = json.loads(out.read_text())
    assert (third["curves"], third["bd_rates"]) == (first["curves"], first["bd_rates"])

    (greys / "a.png").unlink()
    before = out.read_bytes()
    assert main(whole) == 1
    assert "has 1 pictures that" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_jobs_measure_the_same(tiny_store: Path, photo: NDArray[np.uint8], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, left in (("a.png", 0), ("b.png", 40), ("c.png", 80)):
        PIL.Image.fromarray(photo[:64, left : left + 64]).save(folder / name)
    command = ["rd", str(tiny_store / "tiny"), "--data", str(folder), "--device", "cpu", "--no-butteraugli"]
    command += ["--qualities", "20", "90", "--peers", "jpeg", "--out"]
    assert main([*command, str(tmp_path / "one.json")]) == 0
    assert main([*command, str(tmp_path / "two.json"), "--jobs", "2"]) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert list(two["images"]) == ["a.png", "b.png", "c.png"]
    for name in ("rows", "rate_targets"):
        seen = [
            [{key: value for key, value in row.items() if not key.endswith("_s")} for row in report[name]]
            for report in (one, two)
        ]
        assert seen[0] == seen[1]
    assert two["command"].endswith("two.json --jobs 2")
    assert sorted(path.name for path in tmp_path.glob("two*")) == ["two.json", "two.md", "two.png"]


def test_a_stopped_measurement_stops_its_parts(tmp_path: Path) -> None:
    code = (
        "import torch\n"  # starts processes of its own
        "from ugicm_train.evaluation import parts\n"
        "popen = parts.subprocess.Popen\n"
        "def start(command, **options):\n"
        "    process = popen(['sleep', '100'], **options)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        "parts.subprocess.Popen = start\n"
        "parts.measure_parts([], 2, lambda: 2)\n"
    )
    measuring = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert measuring.stdout is not None
    pids = [int(measuring.stdout.readline()) for _ in range(2)]
    time.sleep(0.2)  # until it waits for them
    measuring.terminate()
    measuring.wait(timeout=60)
    measuring.stdout.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_parts_end_with_a_killed_measurement(tmp_path: Path) -> None:
    part = (
        "import os, time; from ugicm_train.evaluation.parts import end_with_parent; end_with_parent(); "
        "os.write(1, b'%d\\n' % os.getpid()); time.sleep(20); print('still there')"
    )
    code = (
        "import sys, torch\n"  # torch starts processes of its own
        "from ugicm_train.evaluation import parts\n"
        "popen = parts.subprocess.Popen\n"
        f"start = lambda command, **options: popen([sys.executable, '-c', {part!r}], **options)\n"
        "parts.subprocess.Popen = start\n"
        "parts.measure_parts([], 2, lambda: 2)\n"
    )
    measuring = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert measuring.stdout is not None
    pids = [int(measuring.stdout.readline()) for _ in range(2)]
    for pid in pids:
        os.kill(pid, 0)
    measuring.kill()
    measuring.wait(timeout=60)
    assert measuring.stdout.read() == ""  # until the last part has closed it
    measuring.stdout.close()


@pytest.mark.parametrize(("pictures", "started"), [(0, 0), (1, 0), (2, 2), (9, 3)])
def test_no_more_parts_than_pictures(pictures: int, started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(parts, "subprocess", argparse.Namespace(Popen=start))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    before = signal.getsignal(signal.SIGTERM)
    parts.measure_parts(["rd"], 3, lambda: pictures)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [command[5] for command in commands] == [f"{index}/{started}" for index in range(started)]


def test_a_failed_part_is_an_error(greys: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["rd", "no-such-model", "--data", str(greys), "--out", str(tmp_path / "rd.json")]
    assert main([*command, "--jobs", "2"]) == 1
    assert "2 of 2 parts failed" in capfd.readouterr().err


def test_one_measurement_in_a_folder_at_a_time(
    greys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rd", "ugicm-s", "--data", str(greys), "--out", str(tmp_path / "rd.json")]
    with locked(tmp_path):
        assert main(command) == 1
    assert f"another run writes to {tmp_path}" in capsys.readouterr().err


def test_its_own_plot_is_not_measured(greys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (greys / "rd.json", greys / "results" / "rd.json"):
        assert main(["rd", "ugicm-s", "--data", str(greys), "--out", str(out)]) == 1
        assert f"--out {out} is within {greys}" in capsys.readouterr().err


def test_refined_qualities_need_refinement(
    greys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rd", "ugicm-s", "--data", str(greys), "--out", str(tmp_path / "rd.json")]
    assert main([*command, "--refine-qualities", "20", "80"]) == 1
    assert "--refine-qualities needs --refine STEPS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--qualities", "0", "50"], "a quality must be in 1..100, got 0"),
        (["--qualities", "50", "50"], "at least 2 different qualities are needed, got 1"),
        (["--refine", "2", "--refine-qualities", "20", "nan"], "a quality must be in 1..100, got nan"),
        (["--refine", "-1"], "refine must be in 0..10000 steps, got -1"),
        (["--out", "rd.md"], "--out must end with .json, got rd.md"),
        (["--out", "rd"], "--out must end with .json, got rd"),
    ],
)
def test_what_cannot_be_measured(
    greys: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rd", "no-such-model", "--data", str(greys), "--out", str(tmp_path / "rd.json")]
    assert main([*command, *options, "--jobs", "2"]) == 1
    assert capsys.readouterr().err == f"ugicm-train: {message}\n"


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b'{"format": 1, "tasks": {}}', b'{"codecs": {}}', b"\xff\xfe"]
)
def test_other_files_are_no_reports(
    tiny_store: Path, greys: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    for command in (
        ["report", str(path)],
        ["rd", str(tiny_store / "tiny"), "--data", str(greys), "--out", str(path), "--device", "cpu"],
    ):
        assert main(command) == 1
        assert f"ugicm-train: {path} is no rd.json" in capsys.readouterr().err
    assert path.read_bytes() == content


def test_points_of_both_views_and_times_in_milliseconds() -> None:
    point = {"quality": 20.0, "bpp": 0.25, "psnr_db": 30.0, "ms_ssim": 0.95, "butteraugli": None}
    point |= {"encode_s": 0.0123, "decode_s": 0.0045}
    curves = [
        {"codec": "ours", "view": "human", "points": [point]},
        {"codec": "ours", "view": "machine", "points": [point | {"psnr_db": 29.0, "encode_s": 7.0}]},
        {"codec": "peer", "view": "human", "points": [point, point]},
    ]
    *_, row = report._points({"model": "ours", "curves": curves})
    assert row == "| 20 | 0.250 | 30.00 | 0.9500 |  | 29.00 | 0.9500 |  | 12 | 4 |"


def test_insert_needs_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("nothing here")
    with pytest.raises(ValueError, match="needs the lines"):
        report.insert(path, "text")


def test_unfinished_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rd.json"
    begun = dict.fromkeys(rate_distortion.ALWAYS, "") | {"command": "ugicm-train rd x"}
    for more in ({}, {"curves": []}):
        path.write_text(json.dumps(begun | more))
        with pytest.raises(ValueError, match="is not finished; run its command again: ugicm-train rd x"):
            report.run(_parse(report.add_arguments, path))


@pytest.mark.parametrize("name", ["rd.json", "rd.tmp", "rd"])
def test_files_are_whole_whatever_their_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("before")

    def write(text: str, size: int) -> None:
        with written_whole(path) as beside:
            beside.write_text(text[:size])
            if size < len(text):
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write("after", 2)
    assert path.read_text() == "before"
    write("after", 5)
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_files_beside_and_links_stay(tmp_path: Path) -> None:
    for name in ("card.md", "card.tmp"):
        (tmp_path / name).write_text("before")
    (tmp_path / "link.md").symlink_to("card.md")
    with written_whole(tmp_path / "link.md") as beside:
        beside.write_text("after")
    assert (tmp_path / "link.md").is_symlink()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "card.md": "after",
        "card.tmp": "before",
        "link.md": "after",
    }

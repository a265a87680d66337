"""``ugicm-train rd``: rate-distortion curves of a model and its peers through real bitstreams.

How the numbers are made: every byte that a decoder needs counts. PSNR is that of the 8-bit RGB picture,
over its three channels. A point of a curve is the mean of the pictures' bpp and the mean of their PSNR (in
dB) or MS-SSIM at one setting, as CompressAI does. BD-rates are defined in `bdrate`. Times are wall-clock,
one picture at a time, in process, after one warm-up call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from ugicm_train.evaluation import metrics
from ugicm_train.evaluation.anchors import METRICS, Point, curve, points_of, read_anchors
from ugicm_train.evaluation.bdrate import bd_rate
from ugicm_train.evaluation.coders import (
    DEFAULT_QUALITIES,
    add_peers_argument,
    checked_qualities,
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
    read_images,
    rounded,
)
from ugicm_train.evaluation.parts import Part, end_with_parent, kept_alone, measure_parts, part_files
from ugicm_train.evaluation.parts import add_arguments as add_part_arguments
from ugicm_train.files import check_apart, written_whole

FORMAT = 2
"""Version of the layout of rd.json."""
BPP_RANGES = ((0.2, 0.9), (0.15, 0.9))
"""Rates that BD-rates are also restricted to."""
RATE_TOLERANCE = 0.03
"""Share of the target that rate control may leave unused."""


def mean_curves(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Means over the pictures: one curve per codec and view, one point per quality."""
    groups: dict[tuple[str, str], dict[float, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row.codec, row.view), {}).setdefault(row.quality, []).append(row)
    fields = ("bpp", "psnr_db", "ms_ssim", "butteraugli", "encode_s", "decode_s")
    return [
        {
            "codec": codec,
            "view": view,
            "points": [
                {"quality": quality} | {name: _mean(getattr(row, name) for row in members) for name in fields}
                for quality, members in sorted(points.items())
            ],
        }
        for (codec, view), points in groups.items()
    ]


def compare(
    curves: Sequence[Mapping[str, Any]], ours: Sequence[str], anchors: Mapping[str, Sequence[Point]]
) -> list[dict[str, Any]]:
    """BD-rates in percent of both views of the codecs `ours` against peers in `curves` and anchors.

    Without a range of rates, those of all of `ours` are over the same qualities of a view.
    """
    references = [
        ("measured", c["codec"], points_of(c))
        for c in curves
        if c["codec"] not in ours and c["view"] == "human"
    ] + [("published", codec, list(points)) for codec, points in anchors.items()]
    results = []
    for mine in (c for c in curves if c["codec"] in ours):
        for (source, codec, points), metric in itertools.product(references, METRICS):
            test, reference = curve(points_of(mine), metric), curve(points, metric)
            if test is None or reference is None:
                continue
            same_view = [c for c in curves if c["codec"] in ours and c["view"] == mine["view"]]
            beside = [line for c in same_view if (line := curve(points_of(c), metric))]
            for bpp_range in (None, *BPP_RANGES):
                percent = bd_rate(reference, test, bpp_range=bpp_range, beside=() if bpp_range else beside)
                results.append(
                    {
                        "codec": mine["codec"],
                        "view": mine["view"],
                        "reference": codec,
                        "source": source,
                        "metric": metric,
                        "bpp_range": bpp_range,
                        "percent": None if percent is None else round(percent, 2),
                    }
                )
    return results


def check(rows: Sequence[Row], targets: Sequence[RateTarget], ours: str) -> dict[str, Any]:
    """What must hold besides the curves: estimate, monotony, rate control, the two views alike."""
    mine = [row for row in rows if row.codec == ours and row.view == "human"]
    human_psnr = {(row.image, row.quality): row.psnr_db for row in mine}
    below: list[dict[str, Any]] = [
        {
            "psnr_db": round(human_psnr[row.image, row.quality] - row.psnr_db, 2),
            "image": row.image,
            "quality": row.quality,
        }
        for row in rows
        if row.codec == ours and row.view == "machine"
    ]
    by_image: dict[str, list[Row]] = {}
    for row in sorted(mine, key=lambda row: row.quality):
        by_image.setdefault(row.image, []).append(row)
    steps = [pair for image_rows in by_image.values() for pair in itertools.pairwise(image_rows)]
    estimated = [(row.bpp, row.estimated_bpp) for row in mine if row.estimated_bpp]
    hits = [
        (1 - RATE_TOLERANCE) * target.target_bpp <= target.bpp <= target.target_bpp
        for target in targets
        if target.codec == ours and target.bpp is not None
    ]
    real, estimate = sum(r for r, _ in estimated), sum(e for _, e in estimated)
    return {
        "real_above_estimated_bpp_percent": round(100 * (real / estimate - 1), 3) if estimate else None,
        "quality_steps": len(steps),
        "quality_steps_with_lower_psnr": [
            {"image": low.image, "from": low.quality, "to": high.quality}
            for low, high in steps
            if high.psnr_db < low.psnr_db
        ],
        "rate_targets": len(hits),
        "rate_targets_met_within_3_percent": sum(hits),
        "machine_view_most_below_human": max(below, key=lambda each: each["psnr_db"], default=None),
    }


def describe_machine() -> dict[str, Any]:
    """Processor, cores and versions that times and bytes may depend on."""
    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write rd.json in one step, one row a line."""
    lists = {key: report[key] for key in ("rows", "rate_targets")}
    text = json.dumps({key: value for key, value in report.items() if key not in lists}, indent=1)
    for key, items in lists.items():
        lines = ",\n  ".join(json.dumps(item) for item in items)
        text = f'{text[:-2]},\n "{key}": [\n  {lines}\n ]\n}}'
    with written_whole(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


ALWAYS = ("format", "model", "ours", "command", "machine", "data", "codecs", "images", "rows", "rate_targets")
"""What a report has from the beginning."""
FINALLY = ("checks", "bd_rates", "curves", "anchors")
"""What it has when it is finished."""


def read_report(path: Path) -> dict[str, Any]:
    """What `write_report` wrote, finished or not.

    Raises:
        ValueError: the file is of another kind.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is no rd.json: {error}") from error
    if not isinstance(report, dict):
        raise ValueError(f"{path} is no rd.json")
    if missing := [name for name in ALWAYS if name not in report]:
        raise ValueError(f"{path} is no rd.json: it lacks {', '.join(missing)}")
    return report


def read_measurement(path: Path, head: Mapping[str, Any]) -> tuple[Measurement, dict[str, str]]:
    """What an earlier rd.json has, of whichever codecs, and the identities of these.

    Args:
        path: of the file; nothing where there is none.
        head: of the report that goes on from there: format, machine, data, codecs.

    Raises:
        ValueError: the file is of another kind, machine or data, or of another codec of the same name.
    """
    if not path.exists():
        return Measurement({}, [], []), {}
    report = read_report(path)
    before = _settings(report)
    for name, now in _settings(head).items():
        new = name.startswith("codec ") and name not in before
        if not new and before.get(name) != now:
            raise ValueError(
                f"{path} was measured with {name} {before.get(name)!r}, now it is {now!r}: "
                "give another --out or remove the file"
            )
    return Measurement(
        report["images"],
        [Row(**row) for row in report["rows"]],
        [RateTarget(**target) for target in report["rate_targets"]],
    ), report["codecs"]


def _settings(report: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for rows to stand in one report, by the name that errors give it."""
    return (
        {name: report[name] for name in ("format", "data")}
        # Threads change times alone, which `--jobs` does as well.
        | {name: value for name, value in report["machine"].items() if name != "torch_threads"}
        | {f"codec {name}": identity for name, identity in report["codecs"].items()}
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train rd``."""
    parser.add_argument("model", help="name of a model in the store, or its folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures, such as Kodak")
    parser.add_argument("--out", type=Path, required=True, help="rd.json; what an earlier one has is kept")
    parser.add_argument("--anchors", type=Path, help="CSV of published points: codec,bpp,psnr_db,ms_ssim")
    parser.add_argument(
        "--qualities", type=float, nargs="+", default=DEFAULT_QUALITIES, help="1..100, at least two"
    )
    add_peers_argument(parser)
    parser.add_argument(
        "--refine", type=int, metavar="STEPS", help="measure the model with refined latents, too; slow"
    )
    parser.add_argument(
        "--refine-qualities", type=float, nargs="+", help="1..100, at least two (default: --qualities)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--butteraugli",
        action=argparse.BooleanOptionalAction,
        default=metrics.butteraugli_installed(),
        help="also run the butteraugli program (default: where it is installed)",
    )
    add_part_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, then write rd.json, and beside it the table (.md) and the plot (.png)."""
    if arguments.out.suffix != ".json":  # table and plot have the same name with theirs
        raise ValueError(f"--out must end with .json, got {arguments.out}")
    check_apart(arguments.out, arguments.data)
    with kept_alone(arguments.out.parent, arguments.part):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from ugicm.codec.refine import check_steps
    from ugicm.codec.store import load_codec, model_path
    from ugicm_train.evaluation.report import plot, table

    if arguments.refine_qualities and not arguments.refine:
        raise ValueError("--refine-qualities needs --refine STEPS")
    check_steps(arguments.refine or 0)
    qualities = checked_qualities(arguments.qualities, least=2)
    refined = checked_qualities(arguments.refine_qualities or qualities, least=2)
    anchors = read_anchors(arguments.anchors) if arguments.anchors else {}
    out: Path = arguments.out
    part: Part | None = arguments.part
    if part is None:
        measure_parts(arguments.argv, arguments.jobs, lambda: len(read_images(arguments.data)))
    else:
        end_with_parent()
    folder = model_path(arguments.model)
    codec = load_codec(folder, device=arguments.device, precision=arguments.precision)
    ours = ugicm_coder(codec, folder, qualities)
    own = [ours]
    if arguments.refine:
        own.append(refined_coder(ours, codec, arguments.refine, refined))
    coders = [*own, *map(pillow_coder, arguments.peers)]
    head: dict[str, Any] = {
        "format": FORMAT,
        "model": codec.name,
        "model_digest": codec.digest,
        "ours": [coder.name for coder in own],
        "command": shlex.join(["ugicm-train", *arguments.argv]),
        "machine": describe_machine(),
        "data": arguments.data.resolve().name,
        "codecs": {coder.name: coder.identity for coder in coders},
    }
    earlier = []
    for file in (*part_files(out), out):
        rows, codecs = read_measurement(file, head)
        earlier.append(rows)
        head["codecs"] = codecs | head["codecs"]
    known = joined(earlier)
    there = {path.relative_to(arguments.data).as_posix() for path in read_images(arguments.data)}
    if gone := sorted(known.images.keys() - there):
        raise ValueError(
            f"{out} has {len(gone)} pictures that {arguments.data} lacks, the first is {gone[0]}: "
            "give another --out or remove the file"
        )

    def save(measured: Measurement, **results: Any) -> dict[str, Any]:
        lists = {
            "rows": [row._asdict() for row in measured.rows],
            "rate_targets": [target._asdict() for target in measured.targets],
        }
        report = head | {"images": measured.images} | results | lists
        write_report(part.file(out) if part else out, report)
        return report

    measured = measure(
        coders,
        arguments.data,
        part=part,
        butteraugli=arguments.butteraugli,
        known=known,
        save=save,
    )
    if part:
        return 0
    curves = mean_curves(measured.rows)
    report = save(
        joined([measured, known]),
        checks=check(measured.rows, measured.targets, ours.name),
        bd_rates=compare(curves, head["ours"], anchors),
        curves=curves,
        anchors={name: [point._asdict() for point in points] for name, points in anchors.items()},
    )
    for file in part_files(out):
        file.unlink()
    text = table(report)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    plot([report], out.with_suffix(".png"))
    print(text)
    return 0


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None where a value is missing."""
    items = list(values)
    known = [value for value in items if value is not None]
    return rounded(statistics.fmean(known)) if len(known) == len(items) else None

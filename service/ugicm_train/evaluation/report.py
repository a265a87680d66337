"""``ugicm-train report``: the tables and the plot of README and model cards, from rd.json alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ugicm_train.evaluation.anchors import LABELS, METRICS, Point, curve, points_of
from ugicm_train.evaluation.bdrate import Curve
from ugicm_train.evaluation.metrics import MS_SSIM_MIN_SIDE
from ugicm_train.evaluation.rate_distortion import BPP_RANGES, FINALLY, read_report
from ugicm_train.files import written_whole

BEGIN, END = "<!-- rate-distortion: begin -->", "<!-- rate-distortion: end -->"
"""Lines of a Markdown file between which `insert` writes."""
SUMMARY_RANGE = BPP_RANGES[-1]
"""Bits per pixel that `summary` is about."""
MAX_BPP = 1.6
"""Right end of the plot."""
MARKERS = "s^vD<>pPX*hd"
"""Of published codecs, of which there are more than colours that can be told apart."""

LINES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""Of measured peers."""


def table(report: Mapping[str, Any]) -> str:
    """Markdown: BD-rates of the human view, then our operating points, then how it was measured."""
    machine, checks = report["machine"], report["checks"]
    threads = machine["torch_threads"]
    lines = [line for codec in report["ours"] for line in (*_bd_rates(report, codec), "")]
    lines += [*_points(report), ""]
    lines.append(
        f"{len(report['images'])} pictures of `{report['data']}`; every byte of the bitstream counts; "
        f"means of the pictures' values. {machine['processor']}, {machine['cores']} cores"
        f"{', ' + machine['gpu'] if machine['gpu'] else ''}, torch {machine['torch']}, "
        f"Pillow {machine['pillow']}; transforms in {' and '.join(_precisions(report))}; times are of one "
        f"picture at a time, {threads} thread{'s' if threads > 1 else ''}."
    )
    if len(report["ours"]) > 1:
        lines.append("Common rates are those of the qualities that the other codec and all of ours reach.")
    if missing := {row["image"] for row in report["rows"] if row["ms_ssim"] is None}:
        lines.append(
            f"No means of MS-SSIM: pictures with a side below {MS_SSIM_MIN_SIDE} pixels have none, "
            f"the first of {len(missing)} is {min(missing)}."
        )
    if (above := checks["real_above_estimated_bpp_percent"]) is not None:
        lines.append(f"Real bitstreams are {above:+.2f} % against the entropy model's estimate.")
    lower = len(checks["quality_steps_with_lower_psnr"])
    lines.append(
        f"Steps to a higher quality that lowered a picture's PSNR: {lower} of {checks['quality_steps']}."
    )
    if checks["rate_targets"]:
        lines.append(
            f"Size targets met within 3 % below: {checks['rate_targets_met_within_3_percent']} "
            f"of {checks['rate_targets']}."
        )
    if (worst := checks["machine_view_most_below_human"]) is not None:
        lines.append(
            f"The machine view's PSNR is at most {worst['psnr_db']:.1f} dB below the human's "
            f"({worst['image']}, quality {worst['quality']:g})."
        )
    return "\n".join([*lines, "", f"`{report['command']}`", ""])


def summary(report: Mapping[str, Any]) -> str:
    """Markdown: BD-rates of the human views of all of our codecs between `SUMMARY_RANGE` bits per pixel."""
    low, high = SUMMARY_RANGE
    chosen = [entry for entry in report["bd_rates"] if entry["bpp_range"] == list(SUMMARY_RANGE)]
    title = f"BD-rate, {low:g}–{high:g} bpp, against"  # noqa: RUF001
    return "\n".join(_bd_table(title, chosen, lambda entry: f"{METRICS[entry['metric']]}, {entry['codec']}"))


def _bd_rates(report: Mapping[str, Any], codec: str) -> list[str]:
    """Columns: metric and range of rates."""

    def column(entry: Mapping[str, Any]) -> str:
        low_high = entry["bpp_range"]
        span = f"{low_high[0]:g}–{low_high[1]:g} bpp" if low_high else "common rates"  # noqa: RUF001
        return f"{METRICS[entry['metric']]}, {span}"

    title = f"BD-rate of {codec} (human view) against"
    return _bd_table(title, [entry for entry in report["bd_rates"] if entry["codec"] == codec], column)


def _bd_table(
    title: str, entries: Iterable[Mapping[str, Any]], column: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    """Rows: references of the human views among the entries; columns in the order in which they come."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for entry in entries:
        if entry["view"] != "human":
            continue
        columns[column(entry)] = None
        value = "–" if entry["percent"] is None else f"{entry['percent']:+.1f} %"  # noqa: RUF001
        rows.setdefault((entry["source"], entry["reference"]), {})[column(entry)] = value
    if not rows:
        return []
    return [
        f"| {title} | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(
            f"| {LABELS.get(reference, reference)}, {source} | "
            f"{' | '.join(cells.get(name, '') for name in columns)} |"
            for (source, reference), cells in rows.items()
        ),
    ]


def _precisions(report: Mapping[str, Any]) -> Iterator[str]:
    """What the transforms of our codecs are computed in, as their identities say (`coders.ugicm_coder`)."""
    for codec in report["ours"]:
        _, _, precision, *_ = report["codecs"][codec].split()
        yield f"{precision} ({codec})"


def _points(report: Mapping[str, Any]) -> list[str]:
    """Rows: qualities; human and machine view side by side."""
    views = {c["view"]: c["points"] for c in report["curves"] if c["codec"] == report["model"]}
    columns = {
        "psnr_db": ("PSNR (dB)", ".2f"),
        "ms_ssim": ("MS-SSIM", ".4f"),
        "butteraugli": ("Butteraugli", ".2f"),
    }
    titles = [f"{title}, {view}" for view in views for title, _ in columns.values()]
    lines = [
        f"| quality | bpp | {' | '.join(titles)} | encode (ms) | decode (ms) |",
        f"|---:|---:|{'---:|' * len(titles)}---:|---:|",
    ]
    for points in zip(*views.values(), strict=True):
        cells = [
            "" if point[field] is None else f"{point[field]:{spec}}"
            for point in points
            for field, (_, spec) in columns.items()
        ]
        first = points[0]
        times = f"{1000 * first['encode_s']:.0f} | {1000 * first['decode_s']:.0f}"
        lines.append(f"| {first['quality']:g} | {first['bpp']:.3f} | {' | '.join(cells)} | {times} |")
    return lines


def plot(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """PSNR and MS-SSIM over bpp: our models, the peers of the first report, and its published anchors."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), layout="constrained")
    panels = figure.subplots(1, 2)
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    first = reports[0]
    published = {name: [Point(**point) for point in points] for name, points in first["anchors"].items()}
    peers = {c["codec"]: points_of(c) for c in first["curves"] if c["codec"] not in first["ours"]}
    for axes, metric in zip(panels, METRICS, strict=True):
        for index, (name, points) in enumerate(published.items()):
            style = {"color": colors[index % 10], "linewidth": 1, "marker": MARKERS[index % len(MARKERS)]}
            style |= {"markersize": 5, "markerfacecolor": "white"}
            label = f"{LABELS.get(name, name)}, published"
            _draw(axes, curve(points, metric), label=label, **style)
        for index, (name, points) in enumerate(peers.items()):
            label = f"{LABELS.get(name, name)}, measured"
            style = {"color": "0.35", "linestyle": LINES[index % len(LINES)], "linewidth": 1.2}
            _draw(axes, curve(points, metric), label=label, **style)
        for index, report in enumerate(reports):
            for measured in report["curves"]:
                plain = measured["codec"] == report["model"]
                human = measured["view"] == "human"
                # Of refined codecs, the human view only: their machine views lie as close to it.
                if measured["codec"] in report["ours"] and (plain or human):
                    style = {"color": ("black", "crimson")[index % 2], "linewidth": 2.4 if human else 1.2}
                    style["linestyle"] = "-" if human else "--"
                    if not plain:
                        style |= {"color": "magenta", "linewidth": 1.6}
                    label = f"{measured['codec']}, {measured['view']}"
                    _draw(
                        axes,
                        curve(points_of(measured), metric),
                        label=label,
                        marker="o",
                        markersize=4,
                        **style,
                    )
        axes.set_xlim(0, MAX_BPP)
        axes.set_xlabel("bits per pixel")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR (dB)")
    panels[1].set_ylabel("MS-SSIM in dB, -10 log10(1 - MS-SSIM)")
    figure.suptitle(f"{first['data']}, {len(first['images'])} pictures, real bitstreams")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, line: Curve | None, **style: Any) -> None:
    """Draw the part of a curve inside the plot, with one point beyond so that it reaches the edge."""
    if line is None:
        return
    pairs = sorted(zip(line.bpp, line.quality, strict=True))
    inside = sum(bpp <= MAX_BPP for bpp, _ in pairs)
    axes.plot(*zip(*pairs[: inside + 1], strict=True), **style)


def insert(path: Path, text: str) -> None:
    """Replace what a Markdown file has between the lines `BEGIN` and `END`.

    Raises:
        ValueError: the file lacks them.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}")
    with written_whole(path) as beside:
        beside.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train report``."""
    parser.add_argument("reports", type=Path, nargs="+", metavar="rd.json", help="one per model")
    parser.add_argument(
        "--insert", type=Path, nargs="*", default=[], help="Markdown files to write the tables into"
    )
    parser.add_argument(
        "--summary", type=Path, nargs="*", default=[], help="Markdown files to write a short one into"
    )
    parser.add_argument("--plot", type=Path, help="picture to draw the curves into (.png, .svg)")


def run(arguments: argparse.Namespace) -> int:
    """Write the tables into the given files, or print them, and draw the plot."""
    reports = [read_report(path) for path in arguments.reports]
    for path, report in zip(arguments.reports, reports, strict=True):
        if not set(FINALLY) <= set(report):
            raise ValueError(f"{path} is not finished; run its command again: {report['command']}")
    text = "\n".join(map(table, reports))
    for path in arguments.insert:
        insert(path, text)
    for path in arguments.summary:
        insert(path, "\n\n".join(map(summary, reports)))
    if not (arguments.insert or arguments.summary):
        print(text)
    if arguments.plot:
        plot(reports, arguments.plot)
    return 0

"""Results of ``ugicm-train evaluate``: BD-rates, scores at equal rate, tables and plots.

Scores of few pictures are noisy, and a curve that falls for a step has no one rate per score: for BD-rates,
scores are first made monotone over the rate (least-squares isotonic regression).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw

from ugicm_train.data import read_image
from ugicm_train.evaluation.anchors import LABELS
from ugicm_train.evaluation.bdrate import Curve, bd_rate
from ugicm_train.evaluation.coders import Coder
from ugicm_train.evaluation.metrics import bits_per_pixel, psnr_db

ORIGINAL = "original"
"""Stands for the uncompressed pictures in place of a codec."""
MAX_BPP = 1.0
"""Right end of the plots, and about the highest rate that is measured."""

TITLES = {
    "top-1": "Classes, by labels",
    "mAP": "Boxes, by labels",
    "mask mAP": "Masks, by labels",
    "mIoU": "Pixels, by labels",
    "agreement": "Classes, by agreement",
    "mAP of agreement": "Boxes, by agreement",
    "IoU of agreement": "Pixels, by agreement",
}
"""Of plots: what is asked and who says what is right, by the metric."""
PANEL = (3.7, 3.3)
"""Inches of a panel of a plot."""


class Point(NamedTuple):
    """All pictures of a task at one setting."""

    quality: float
    strength: float
    bpp: float
    psnr_db: float
    score: float


def line_of(points: Sequence[Point], strength: float) -> list[tuple[float, float]]:
    """Rate and score of the points of one view, by rate."""
    return sorted((p.bpp, p.score) for p in points if p.strength == strength)


def curve(points: Sequence[Point], strength: float) -> Curve | None:
    """Score over bpp of one view, made monotone; None where fewer than two scores are left."""
    from scipy.optimize import isotonic_regression

    view = line_of(points, strength)
    if not view:
        return None
    bpp, scores = zip(*view, strict=True)
    monotone = isotonic_regression(scores).x
    if len(set(monotone.tolist())) < 2:
        return None
    return Curve(bpp, monotone.tolist())


def score_at(points: Sequence[Point], strength: float, bpp: float) -> float | None:
    """Score at a rate, linear in log bpp between the measured points; None outside them."""
    view = line_of(points, strength)
    if not view or not view[0][0] <= bpp <= view[-1][0]:
        return None
    rates, scores = zip(*view, strict=True)
    return float(np.interp(math.log(bpp), np.log(rates), scores))


def compare(curves: Mapping[str, Sequence[Point]], ours: str) -> dict[str, Any]:
    """BD-rates of the machine view at equal score, and the scores of all codecs at its rates."""
    mine = curves[ours]
    machine = curve(mine, 1.0)
    peers = {name: points for name, points in curves.items() if name not in (ours, ORIGINAL)}
    references = {name: curve(points, 0.0) for name, points in {f"{ours} human": mine, **peers}.items()}
    rates = {
        name: None if machine is None or line is None else bd_rate(line, machine)
        for name, line in references.items()
    }
    at_equal_rate = [
        {
            "bpp": point.bpp,
            "machine": point.score,
            "human": score_at(mine, 0.0, point.bpp),
            **{name: score_at(points, 0.0, point.bpp) for name, points in peers.items()},
        }
        for point in sorted(mine, key=lambda p: p.bpp)
        if point.strength == 1.0
    ]
    return {
        "bd_rate_percent": {n: None if r is None else round(r, 2) for n, r in rates.items()},
        "at_equal_rate": at_equal_rate,
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown: BD-rates per task with their standard errors, then scores at equal rate per task."""
    tasks = report["tasks"]
    references = list(dict.fromkeys(name for t in tasks.values() for name in t["bd_rate_percent"]))
    lines = [
        f"| BD-rate of {report['model']} (machine view) at equal score against | {' | '.join(tasks)} |",
        f"|---|{'---:|' * len(tasks)}",
    ]
    for reference in references:
        cells = [
            _percent(t["bd_rate_percent"].get(reference), t["bd_rate_error"].get(reference))
            for t in tasks.values()
        ]
        lines.append(f"| {reference} | {' | '.join(cells)} |")
    for name, task in tasks.items():
        columns = [column for column in task["at_equal_rate"][0] if column != "bpp"]
        lines += [
            "",
            f"**{name}**: {task['metric']} at equal rate, {task['pictures']} pictures; "
            f"{task['original']:.3f} uncompressed",
            "",
            f"| bpp | {' | '.join(columns)} |",
            f"|---:|{'---:|' * len(columns)}",
        ]
        for row in task["at_equal_rate"]:
            cells = ["" if row[c] is None else f"{row[c]:.3f}" for c in columns]
            lines.append(f"| {row['bpp']:.3f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{report['command']}`", ""])


def _percent(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:+.1f} %" if error is None else f"{value:+.1f} ± {error:.1f} %"


def _title(name: str, task: Mapping[str, Any]) -> str:
    """What a network is asked, who says what is right, and the network."""
    return f"{TITLES.get(task['metric'], task['metric'])}\n{_network(name)}"


def _network(task: str) -> str:
    """Of the name that the command line gives a task."""
    return task.partition(" agreement, ")[0].removesuffix(" masks")


def _panels(count: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, at most `columns` a row; what is left of the last row is empty."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.grid(alpha=0.3)
    return figure, panels[:count]


def _save(figure: Any, legend_of: Any, path: Path) -> None:
    """With one legend below all panels, that of one of them."""
    figure.legend(*legend_of.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=120)


def plot_scores(report: Mapping[str, Any], path: Path) -> None:
    """One panel per task: score over bpp of every codec and view."""
    tasks = report["tasks"]
    figure, panels = _panels(len(tasks), 3)
    for axes, (name, task) in zip(panels, tasks.items(), strict=True):
        for codec, rows in task["curves"].items():
            points = [Point(**row) for row in rows]
            if codec == ORIGINAL:
                axes.axhline(points[0].score, color="0.6", linestyle=":", label="uncompressed")
                continue
            views = (0.0, 1.0) if codec == report["model"] else (0.0,)
            for strength in views:
                line = line_of(points, strength)
                style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2}
                label = LABELS.get(codec, codec)
                if codec == report["model"]:
                    style = {"color": "crimson" if strength else "black", "linewidth": 2.2}
                    label = f"{codec}, {'machine' if strength else 'human'} view"
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3.5, label=label, **style)
        axes.set_title(_title(name, task), fontsize=10)
        axes.set(xlabel="bits per pixel", ylabel=task["metric"], xlim=(0, MAX_BPP))
    _save(figure, panels[0], path)


def plot_strengths(report: Mapping[str, Any], path: Path) -> None:
    """Task scores over strength, one line per quality; then the PSNR, that of the first task's pictures."""
    from matplotlib import colormaps

    tasks = report["tasks"]
    figure, panels = _panels(len(tasks) + 1, 4)
    shown = [(name, task, "score") for name, task in tasks.items()]
    shown.append((*next(iter(tasks.items())), "psnr_db"))
    for axes, (name, task, field) in zip(panels, shown, strict=True):
        points = [Point(**row) for row in task["curves"][report["model"]]]
        qualities = sorted({p.quality for p in points})
        for index, quality in enumerate(qualities):
            line = sorted((p for p in points if p.quality == quality), key=lambda p: p.strength)
            axes.plot(
                [p.strength for p in line],
                [getattr(p, field) for p in line],
                marker="o",
                markersize=3.5,
                # The rest of the map is too light for white paper.
                color=colormaps["viridis"](0.75 * index / max(1, len(qualities) - 1)),
                label=f"quality {quality:g}",
            )
        title, label = _title(name, task), task["metric"]
        if field == "psnr_db":
            title, label = f"PSNR\npictures of {_network(name)}", "PSNR (dB)"
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="strength", ylabel=label)
    _save(figure, panels[0], path)


def contact_sheet(coder: Coder, quality: float, images: Mapping[str, Path], path: Path) -> None:
    """Rows of original, human view and machine view, with rate and PSNR."""
    caption, gap = 16, 6
    rows = []
    for name, file in images.items():
        image = read_image(file)
        data = coder.encode(image, quality)
        bpp = bits_per_pixel(data, image)
        cells = [(f"{name}, {image.shape[1]}x{image.shape[0]}", image)]
        for view, strength in (("human", 0.0), ("machine", 1.0)):
            decoded = coder.decode(data, strength)
            cells.append((f"{view}, {bpp:.3f} bpp, {psnr_db(image, decoded):.2f} dB", decoded))
        rows.append(cells)
    width = max(image.shape[1] for cells in rows for _, image in cells)
    heights = [cells[0][1].shape[0] + caption + gap for cells in rows]
    sheet = PIL.Image.new("RGB", (3 * (width + gap) - gap, sum(heights)), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    top = 0
    for cells, height in zip(rows, heights, strict=True):
        for column, (text, image) in enumerate(cells):
            left = column * (width + gap)
            draw.text((left, top + 2), text, fill="black")
            sheet.paste(PIL.Image.fromarray(image), (left, top + caption))
        top += height
    sheet.save(path)

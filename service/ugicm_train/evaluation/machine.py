"""``ugicm-train evaluate``: what decoded pictures are worth to networks that the codec never saw.

Every picture of every task is coded with real bitstreams at several qualities, decoded for people and for
machines, and judged; the same with the peers. A point of a curve is the mean bpp of the pictures and the
task's score over all of them. One folder holds everything:

    judgements.jsonl    one line per picture, written at once: an interrupted run goes on from there
    machine.json        scores, BD-rates, comparison at equal rate
    machine.md          the same as tables
    machine.png         task scores over bpp; strength.png where strengths between 0 and 1 are asked for
    sheet.png           original, human view and machine view side by side

BD-rates at equal task score compare the two views of the same bitstreams: how many bits the machine view
saves. UG-ICM (Yin et al., AAAI 2025) compares it with another codec instead, the same one trained for people
alone (`--plain`).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import shlex
import shutil
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ugicm_train.data import read_image
from ugicm_train.evaluation import adaptors
from ugicm_train.evaluation.agreement import Agreement, SameBoxes, SameClasses, SamePixels
from ugicm_train.evaluation.coders import (
    HUMAN_ONLY,
    Coder,
    add_peers_argument,
    checked_qualities,
    pillow_coder,
    ugicm_coder,
)
from ugicm_train.evaluation.journal import Entry, Journal, Key
from ugicm_train.evaluation.machine_report import (
    MAX_BPP,
    ORIGINAL,
    Point,
    compare,
    contact_sheet,
    plot_scores,
    plot_strengths,
    table,
)
from ugicm_train.evaluation.measurement import read_images
from ugicm_train.evaluation.metrics import Image, bits_per_pixel, psnr_db
from ugicm_train.evaluation.parts import Part, end_with_parent, kept_alone, measure_parts, part_files
from ugicm_train.evaluation.parts import add_arguments as add_part_arguments
from ugicm_train.evaluation.progress import Progress
from ugicm_train.evaluation.rate_distortion import describe_machine
from ugicm_train.evaluation.tasks import (
    BoxMap,
    CocoMap,
    MaskMap,
    MeanIou,
    Task,
    Top1,
    check_images,
    read_instances,
    read_labels,
)
from ugicm_train.files import check_apart, written_whole

FORMAT = 1
"""Version of the layout of machine.json."""
JUDGEMENTS, REPORT, TABLE, PLOT = "judgements.jsonl", "machine.json", "machine.md", "machine.png"
STRENGTH_PLOT, SHEET = "strength.png", "sheet.png"
DEFAULT_QUALITIES = (1.0, 12.0, 25.0, 38.0, 50.0, 62.0, 75.0)
PEER_QUALITIES: Mapping[str, tuple[float, ...]] = {
    "jpeg": (5, 10, 15, 20, 30, 40, 50, 65),
    "webp": (1, 5, 10, 20, 35, 50, 65, 80),
    "avif": (10, 20, 30, 40, 50, 60, 70),
    "jxl": (5, 15, 30, 45, 60, 70, 80),
}
"""Denser at low rates than for PSNR curves: tasks are decided there."""
SHEET_PICTURES = 4
GROUPS = 10
"""Parts of the pictures that are left out in turn, for the error of a BD-rate."""


class Use(NamedTuple):
    """A task that has a picture, and the name it has there."""

    task: Task
    name: str


def judge_picture(uses: Sequence[Use], coder: Coder, quality: float, path: Path, journal: Journal) -> None:
    """Let every task judge every view of one picture; coded once, and only if the journal lacks something."""
    lacking: dict[float, list[tuple[Use, Key]]] = {}
    for use in uses:
        for strength in coder.views.values():
            key = Key(use.task.name, coder.name, quality, strength, use.name)
            if journal.get(key) is None:
                lacking.setdefault(strength, []).append((use, key))
    if not lacking:
        return
    image = read_image(path)
    data = coder.encode(image, quality)
    bpp = round(bits_per_pixel(data, image), 6)
    for strength, judges in lacking.items():
        decoded = coder.decode(data, strength)
        psnr = round(psnr_db(image, decoded), 4)
        for use, key in judges:
            journal.add(key, Entry(bpp, psnr, use.task.judge(use.name, decoded)))


def points_of(
    task: Task,
    codec: str,
    quality: float,
    strength: float,
    parts: Sequence[Collection[str]],
    journal: Journal,
) -> list[Point]:
    """A point of a curve for each of several choices of pictures, by name, from the journal."""
    names = dict.fromkeys(name for part in parts for name in part)
    entries = {name: journal[Key(task.name, codec, quality, strength, name)] for name in names}
    scores = task.scores({name: entry.judgement for name, entry in entries.items()}, parts)
    return [
        Point(
            quality,
            strength,
            statistics.fmean(entries[name].bpp for name in part),
            statistics.fmean(entries[name].psnr_db for name in part),
            score,
        )
        for part, score in zip(parts, scores, strict=True)
    ]


def measure_curves(
    coder: Coder,
    tasks: Sequence[Task],
    images: Mapping[str, Mapping[str, Path]],
    journal: Journal,
    progress: Progress,
) -> dict[str, list[Point]]:
    """Points of one codec on every task, from the lowest quality up to about `MAX_BPP`.

    ``images``: of each task, by its name; a picture that several tasks share is coded once.
    """
    curves: dict[str, list[Point]] = {task.name: [] for task in tasks}
    wanted = list(tasks)
    for quality in sorted(coder.qualities):
        uses: dict[Path, list[Use]] = {}
        for task in wanted:
            for name, path in images[task.name].items():
                uses.setdefault(path.resolve(), []).append(Use(task, name))
        progress.start(f"{coder.name}, quality {quality:g}", len(uses))
        for path, of_path in uses.items():
            judge_picture(of_path, coder, quality, path, journal)
            progress.advance()
        for task in list(wanted):
            for strength in coder.views.values():
                (point,) = points_of(task, coder.name, quality, strength, [images[task.name]], journal)
                progress.say(
                    f"{task.name}: {coder.name} quality {quality:g} strength {strength:g}: "
                    f"{point.bpp:.3f} bpp, {task.metric} {point.score:.4f}, {point.psnr_db:.2f} dB"
                )
                curves[task.name].append(point)
            if point.bpp > MAX_BPP:  # of all views: they share the bitstreams
                wanted.remove(task)
    return curves


def bd_rate_errors(
    task: Task, curves: Mapping[str, Sequence[Point]], ours: str, names: Sequence[str], journal: Journal
) -> dict[str, float | None]:
    """Standard errors of the BD-rates for the choice of pictures, in percent points.

    Delete-a-group jackknife: everything again without each tenth of the pictures. Empty where there are fewer
    than two pictures a group; None where a part has no BD-rate.
    """
    views = {
        name: [point for point in points if point.strength in (0.0, 1.0)]
        for name, points in curves.items()
        if name != ORIGINAL
    }
    if len(names) < 2 * GROUPS:
        return {}
    parts = [[name for index, name in enumerate(names) if index % GROUPS != group] for group in range(GROUPS)]
    points_of_parts = {
        name: [points_of(task, name, p.quality, p.strength, parts, journal) for p in points]
        for name, points in views.items()
    }
    rates: dict[str, list[float | None]] = {}
    for group in range(GROUPS):
        part = {name: [points[group] for points in lines] for name, lines in points_of_parts.items()}
        for reference, rate in compare(part, ours)["bd_rate_percent"].items():
            rates.setdefault(reference, []).append(rate)
    errors: dict[str, float | None] = {}
    for reference, found in rates.items():
        known = [rate for rate in found if rate is not None]
        whole = len(known) == GROUPS
        errors[reference] = round((GROUPS - 1) ** 0.5 * statistics.pstdev(known), 2) if whole else None
    return errors


def original_coder() -> Coder:
    """The pictures themselves; a peer that costs nothing and loses nothing."""

    def decode(data: bytes, strength: float) -> Image:
        del strength
        return np.load(io.BytesIO(data))

    def encode(image: Image, quality: float) -> bytes:
        del quality
        buffer = io.BytesIO()
        np.save(buffer, image)
        return buffer.getvalue()

    return Coder(name=ORIGINAL, identity=ORIGINAL, qualities=(0.0,), encode=encode, decode=decode)


def files_of(images: Mapping[str, Mapping[str, Path]]) -> set[Path]:
    """The different files among the pictures of several tasks."""
    return {path.resolve() for named in images.values() for path in named.values()}


def chosen_images(
    tasks: Sequence[Task], limit: int | None, part: Part | None = None
) -> dict[str, dict[str, Path]]:
    """Pictures of each task, by its name: those of a part, of so many evenly spread ones."""
    images = {task.name: dict(task.images()) for task in tasks}
    for of_task, named in images.items():
        if limit is not None and limit < len(named):
            chosen = np.linspace(0, len(named) - 1, limit).round().astype(int)
            images[of_task] = {name: named[name] for name in np.array(list(named))[chosen].tolist()}
    if part is not None:
        # A picture of several tasks is in one part only.
        mine = set(part.of(files_of(images)))
        images = {
            of_task: {name: path for name, path in named.items() if path.resolve() in mine}
            for of_task, named in images.items()
        }
    return images


def take_parts(folder: Path) -> None:
    """Add what parts judged to the journal in `folder`."""
    path = folder / JUDGEMENTS
    for own in part_files(path):
        with path.open("a", encoding="utf-8") as journal:
            # The last line of both may have been cut off by a kill.
            journal.write("\n")
            journal.writelines(f"{line}\n" for line in own.read_text(encoding="utf-8").splitlines())
        own.unlink()


def evaluate(
    ours: Coder,
    peers: Sequence[Coder],
    tasks: Sequence[Task],
    folder: Path,
    *,
    limit: int | None = None,
    command: Sequence[str] = (),
    part: Part | None = None,
) -> dict[str, Any]:
    """Measure everything that the journal in `folder` lacks; write and return the report.

    Args:
        ours: our codec; `views` name the strengths to decode with, 0 and 1 among them.
        peers: other codecs.
        tasks: with different names, none of them a codec's.
        folder: output.
        limit: use only so many pictures of each task, evenly spread.
        command: command line of this, for the report.
        part: measure a part of the pictures only, with a journal of its own, and report nothing.

    Raises:
        ValueError: a name is used twice, or a task has no pictures.
    """
    check_images(tasks)
    folder.mkdir(parents=True, exist_ok=True)
    coders = [original_coder(), ours, *peers]
    names = [*(task.name for task in tasks), *(coder.name for coder in coders)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tasks and codecs need different names, {twice[0]!r} is used twice")
    path = folder / JUDGEMENTS
    if part is not None:
        own = part.file(path)
        if path.exists() and not own.exists():
            shutil.copy(path, own)
        path = own
    identities = {task.name: task.identity for task in tasks} | {c.name: c.identity for c in coders}
    report: dict[str, Any] = {
        "format": FORMAT,
        "model": ours.name,
        "command": shlex.join(["ugicm-train", *command]),
        "machine": describe_machine(),
        "identities": identities,
        "tasks": {},
    }
    content = functools.cache(adaptors.content)  # several tasks may share a picture
    pictures = {task.name: {name: content(of) for name, of in task.images().items()} for task in tasks}
    journal, progress = Journal(path, identities, pictures), Progress()
    try:
        images = chosen_images(tasks, limit, part)
        tasks = [task for task in tasks if images[task.name]]
        measured = {c.name: measure_curves(c, tasks, images, journal, progress) for c in coders}
        if part is not None:
            return report
        progress.start("errors of the BD-rates", len(tasks))
        for task in tasks:
            curves = {name: of_tasks[task.name] for name, of_tasks in measured.items()}
            report["tasks"][task.name] = {
                "metric": task.metric,
                "pictures": len(images[task.name]),
                "original": curves[ORIGINAL][0].score,
                **compare(curves, ours.name),
                "bd_rate_error": bd_rate_errors(task, curves, ours.name, list(images[task.name]), journal),
                "curves": {name: [point._asdict() for point in points] for name, points in curves.items()},
            }
            progress.advance()
    finally:
        progress.close()
        journal.close()
    for name, text in ((REPORT, json.dumps(report, indent=1) + "\n"), (TABLE, table(report))):
        with written_whole(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")
    plot_scores(report, folder / PLOT)
    if set(ours.views.values()) - {0.0, 1.0}:
        plot_strengths(report, folder / STRENGTH_PLOT)
    return report


# ------------------------------------------------------------------ command line


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    """The tasks that ``--top1``, ``--map``, ``--mask-map``, ``--miou`` and ``--agree`` name."""
    tasks: list[Top1 | CocoMap | MeanIou | Agreement] = []
    # One network for all tasks that name it, so that it sees a picture once.
    classifier = functools.cache(lambda network: remembered(adaptors.load_classifier(network)))
    segmenter = functools.cache(lambda network: remembered(adaptors.load_segmenter(network)))
    detector = functools.cache(lambda network, names: remembered(adaptors.load_detector(network, names)))

    def describe(network: str, judge: Callable[[Image], Any], *data: str) -> tuple[str, str]:
        name, own = Path(network.rpartition(":")[2]).stem, getattr(judge, "identity", "")
        return name, " ".join([adaptors.identity_of(network), *filter(None, [own]), *data])

    for network, folder in arguments.top1:
        labels_file = Path(folder) / "labels.csv"
        labels, judge = read_labels(labels_file), classifier(network)
        name, identity = describe(network, judge, Path(folder).name, identity_of_data(labels_file))
        tasks.append(Top1(name, judge, Path(folder), labels, identity))
    for kind, given, suffix in ((BoxMap, arguments.map, ""), (MaskMap, arguments.mask_map, " masks")):
        for network, folder, instances in given:
            judge = detector(network, categories_of(Path(instances)))
            name, identity = describe(network, judge, Path(folder).name, identity_of_data(Path(instances)))
            tasks.append(kind(name + suffix, judge, Path(folder), Path(instances), identity))
    for network, folder, masks in arguments.miou:
        judge, classes = segmenter(network), arguments.classes
        data = (Path(folder).name, identity_of_data(Path(masks)), f"{classes} classes")
        name, identity = describe(network, judge, *data)
        tasks.append(MeanIou(name, judge, Path(folder), Path(masks), classes, identity))
    for kind, network, folder in arguments.agree:
        images = Path(folder)
        task: type[Agreement]
        match kind:
            case "classes":
                task, judge = SameClasses, classifier(network)
            case "boxes":
                task, judge = SameBoxes, detector(network, None)
            case "pixels":
                task, judge = SamePixels, segmenter(network)
            case _:
                raise ValueError(f"--agree needs classes, boxes or pixels, got {kind!r}")
        name, identity = describe(network, judge, images.name)
        tasks.append(task(f"{name} agreement, {images.name}", judge, images, f"{kind} {identity}"))
    names = [task.name for task in tasks]
    # One network on several folders.
    tasks = [
        replace(task, name=f"{task.name}, {task.folder.name}") if names.count(task.name) > 1 else task
        for task in tasks
    ]
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(
            "give tasks of different names with --top1, --map, --mask-map, --miou, --agree; "
            f"got {names or 'none'}"
        )
    return [*tasks]


def remembered(network: Callable[[Image], Any]) -> Callable[[Image], Any]:
    """The network, asked again only for another picture than the last."""
    last: list[tuple[Image, Any]] = []

    def ask(image: Image) -> Any:
        if not last or last[0][0] is not image:
            last[:] = [(image, network(image))]
        return last[0][1]

    ask.identity = getattr(network, "identity", "")  # type: ignore[attr-defined]
    return ask


def identity_of_data(path: Path) -> str:
    """Name of a file or folder of labels, and what is in it: judgements by others are not reused."""
    if path.is_file():
        return adaptors.identity_of(str(path))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    together = " ".join(f"{file.relative_to(path)} {adaptors.content(file)}" for file in files)
    return f"{path.name} {hashlib.sha256(together.encode()).hexdigest()[:16]}"


def categories_of(instances: Path) -> tuple[str, ...]:
    """Names of the categories of a COCO file, in the order of their ids."""
    categories = sorted(read_instances(instances)["categories"], key=lambda category: category["id"])
    return tuple(category["name"] for category in categories)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train evaluate``."""
    parser.epilog = (
        "NETWORK: model.tflite, model.onnx, fastestdet:model.onnx, torchvision:NAME, or FILE.py:FUNCTION, "
        "where the function returns the network as a callable on RGB pictures"
    )
    parser.add_argument("model", help="name of a model in the store, or its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder; an interrupted run goes on there")
    for option, text, names in (
        ("--top1", "classifier; IMAGES has labels.csv with file,class_index", ("NETWORK", "IMAGES")),
        ("--map", "detector; INSTANCES is COCO JSON", ("NETWORK", "IMAGES", "INSTANCES")),
        ("--mask-map", "finds objects' pixels; as --map", ("NETWORK", "IMAGES", "INSTANCES")),
        ("--miou", "segmenter; MASKS has class masks NAME.png", ("NETWORK", "IMAGES", "MASKS")),
        (
            "--agree",
            "without labels, against the network's own answer on the original; KIND: classes, boxes, pixels",
            ("KIND", "NETWORK", "IMAGES"),
        ),
    ):
        parser.add_argument(option, action="append", default=[], nargs=len(names), metavar=names, help=text)
    parser.add_argument(
        "--classes",
        type=int,
        default=21,
        help="of the masks of --miou, the background included (default: 21, Pascal VOC's); 255 is never one",
    )
    parser.add_argument(
        "--qualities",
        type=float,
        nargs="+",
        default=DEFAULT_QUALITIES,
        help=f"1..100; one codec's end with the first of more than {MAX_BPP:g} bit per pixel in the mean",
    )
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=(0.0, 1.0), help="0 and 1 are always decoded"
    )
    add_peers_argument(parser)
    parser.add_argument(
        "--plain", metavar="MODEL", help="trained for people alone: its human view is a peer as well"
    )
    parser.add_argument("--limit", type=int, help="use only so many pictures of each task")
    parser.add_argument("--sheet-quality", type=float, default=25.0, help="quality of the contact sheet")
    parser.add_argument(
        "--sheet-images", type=Path, help="folder of the contact sheet's pictures (default: the first task's)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    add_part_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write the results and print the tables."""
    labelled = (*arguments.top1, *arguments.map, *arguments.mask_map, *arguments.miou)
    for folder in (*(task[1] for task in labelled), *(task[-1] for task in arguments.agree)):
        check_apart(arguments.out, Path(folder))
    with kept_alone(arguments.out, arguments.part):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from ugicm.codec.store import load_codec, model_path

    paths = [model_path(name) for name in (arguments.model, arguments.plain) if name]
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"limit must be at least 1, got {arguments.limit}")
    qualities = checked_qualities(arguments.qualities)
    checked_qualities([arguments.sheet_quality])
    strengths = sorted({0.0, 1.0, *arguments.strengths})
    if wrong := [strength for strength in strengths if not 0 <= strength <= 1]:
        raise ValueError(f"a strength must be in 0..1, got {wrong[0]:g}")
    part: Part | None = arguments.part
    sheet = read_images(arguments.sheet_images) if arguments.sheet_images else []
    tasks = functools.cache(lambda: tasks_of(arguments))
    if part is None:
        take_parts(arguments.out)  # of a run that was interrupted, with however many of them
        measure_parts(
            arguments.argv, arguments.jobs, lambda: len(files_of(chosen_images(tasks(), arguments.limit)))
        )
        take_parts(arguments.out)
    else:
        end_with_parent()
    judges = tasks()
    ours, *plain = (
        ugicm_coder(load_codec(path, device=arguments.device, precision=arguments.precision), path, qualities)
        for path in paths
    )
    ours = replace(ours, views={f"strength {strength:g}": strength for strength in strengths})
    peers = [replace(coder, name=f"plain {coder.name}", views=HUMAN_ONLY) for coder in plain]
    peers += [replace(pillow_coder(name), qualities=PEER_QUALITIES[name]) for name in arguments.peers]
    report = evaluate(
        ours, peers, judges, arguments.out, limit=arguments.limit, command=arguments.argv, part=part
    )
    if part is not None:
        return 0
    images = {path.name: path for path in sheet} or judges[0].images()
    first = list(images)[:: max(1, len(images) // SHEET_PICTURES)][:SHEET_PICTURES]
    contact_sheet(
        ours, arguments.sheet_quality, {name: images[name] for name in first}, arguments.out / SHEET
    )
    print(table(report))
    return 0

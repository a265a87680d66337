"""Tasks that score decoded pictures: top-1, COCO mAP of boxes and of masks, mean IoU.

A task judges one picture at a time and scores all judgements together. Judgements are plain JSON values, so
that an interrupted evaluation can go on where it stopped. The network is a callable; `adaptors` makes such
callables from ONNX, LiteRT and torchvision models, and any function with the right result will do.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from ugicm_train.data import is_picture
from ugicm_train.evaluation.metrics import Image
from ugicm_train.files import read_rows

Judgement = Any
"""What a task keeps of one picture: a JSON value."""


class Detections(NamedTuple):
    """Objects found in a picture, n of them."""

    boxes: NDArray[np.floating[Any]]
    """(n, 4) left, top, right, bottom in pixels."""
    scores: NDArray[np.floating[Any]]
    """(n,) confidences, comparable between pictures."""
    classes: NDArray[np.integer[Any]]
    """(n,) index of the class in the annotation file's order of categories."""
    masks: NDArray[np.bool_] | None = None
    """(n, H, W) pixels of each object, from networks that find them."""


Classifier = Callable[[Image], NDArray[Any]]
"""Picture -> scores of the classes."""
Detector = Callable[[Image], Detections]
"""Picture -> `Detections`, or a tuple of the same."""
Segmenter = Callable[[Image], NDArray[np.integer[Any]]]
"""Picture (H, W, 3) -> class of each pixel (H, W)."""


class Task(Protocol):
    """What `ugicm_train.evaluation.machine` evaluates."""

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str:
        """What `score` is called."""
        ...

    @property
    def identity(self) -> str:
        """Network and data; judgements made with another identity are not reused."""
        ...

    def images(self) -> Mapping[str, Path]:
        """Pictures by name, in a fixed order."""
        ...

    def judge(self, name: str, image: Image) -> Judgement:
        """The network's answer on one picture, decoded to the size of the original."""
        ...

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        """Score in 0..1, higher is better, over the pictures judged."""
        ...

    def scores(
        self, judgements: Mapping[str, Judgement], parts: Sequence[Collection[str]]
    ) -> Sequence[float]:
        """`score` of each of several choices among the pictures judged."""
        ...


class Scored:
    """`Task.score` and `Task.scores`, each by the other: a task defines one of them."""

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        (score,) = self.scores(judgements, [judgements])
        return score

    def scores(
        self, judgements: Mapping[str, Judgement], parts: Sequence[Collection[str]]
    ) -> Sequence[float]:
        return [self.score({name: judgements[name] for name in part}) for part in parts]


class MeanScored(Scored):
    """A task whose judgements are numbers: the score is their mean."""

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        return float(np.mean(list(judgements.values())))


def checked_scores(scores: Any, network: str, picture: str) -> NDArray[Any]:
    """A network's scores (classes,) in their own type; ``ValueError`` where they are not finite, or none."""
    values = np.asarray(scores)
    if not (values.size and np.issubdtype(values.dtype, np.number) and np.isfinite(values).all()):
        raise ValueError(f"{network} gives scores of {picture} that are not finite numbers")
    if values.ndim != 1:
        raise ValueError(
            f"{network} gives scores of {picture} in the shape {values.shape}: one per class is needed"
        )
    return values


def checked_integers(classes: Any, network: str, picture: str) -> NDArray[np.integer[Any]]:
    """A network's classes, in any shape, as integers; ``ValueError`` where some are none."""
    values = np.asarray(classes)
    if np.issubdtype(values.dtype, np.integer):
        return values
    if values.dtype != bool and not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{network} gives classes of {picture} that are {values.dtype}, no numbers")
    if not (np.isfinite(values) & (values == np.floor(values))).all():
        raise ValueError(f"{network} gives classes of {picture} that are no whole numbers")
    return values.astype(np.int64)


def checked_detections(found: Any, network: str, picture: str) -> Detections:
    """What a detector returned, its arrays as `Detections` says.

    Raises:
        ValueError: their shapes do not fit, scores or boxes are not finite, or classes are no integers.
    """
    try:
        boxes, scores, classes, masks = Detections(*found)
    except TypeError as error:
        raise ValueError(f"{network} gives no boxes, scores and classes of {picture}: {error}") from error
    edges, values = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
    kinds = checked_integers(classes, network, picture)
    shapes = None if masks is None else np.asarray(masks)
    count = len(edges)
    if not count:
        edges = edges.reshape(0, 4)
    given = (edges.shape, values.shape, kinds.shape)
    if given != ((count, 4), (count,), (count,)) or (shapes is not None and len(shapes) != count):
        raise ValueError(
            f"{network} gives boxes {given[0]}, scores {given[1]} and classes {given[2]} of {picture}"
        )
    if not (np.isfinite(edges).all() and np.isfinite(values).all()):
        raise ValueError(f"{network} gives boxes or scores of {picture} that are not finite")
    return Detections(edges, values, kinds, shapes)


@dataclass(frozen=True)
class Top1(MeanScored):
    """Share of pictures whose best-scored class is the labelled one."""

    name: str
    classify: Classifier
    folder: Path
    labels: Mapping[str, int]
    """Class index of each file in `folder`."""
    identity: str = ""
    metric: ClassVar[str] = "top-1"

    def images(self) -> Mapping[str, Path]:
        return {name: self.folder / name for name in self.labels}

    def judge(self, name: str, image: Image) -> Judgement:
        scores, label = checked_scores(self.classify(image), self.name, name), self.labels[name]
        if not 0 <= label < len(scores):
            raise ValueError(f"{name} has class {label}, {self.name} gives scores of 0 to {len(scores) - 1}")
        return int(np.argmax(scores)) == label


def read_labels(path: Path) -> dict[str, int]:
    """Columns ``file`` and ``class_index`` of a CSV file; ``ValueError`` where it lacks them."""
    try:
        return {row["file"]: int(row["class_index"]) for row in read_rows(path)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not rows of file, class_index: {error}") from error


@dataclass(frozen=True)
class CocoMap(Scored):
    """COCO's mAP over IoU .5 to .95, by pycocotools; what is compared is the subclass's."""

    name: str
    detect: Detector
    folder: Path
    instances: Path
    """COCO JSON."""
    identity: str = ""
    metric: ClassVar[str]
    kind: ClassVar[str]
    """pycocotools' name of what is compared."""
    needed: ClassVar[tuple[str, ...]] = ()
    """Fields of an annotation, besides those that say what it is of."""

    def shapes(self, name: str, found: Detections) -> list[list[Any]]:
        """What is kept of the shape of each object in the picture `name`, JSON values."""
        raise NotImplementedError

    def result(self, shape: list[Any]) -> dict[str, Any]:
        """The field of a COCO result that a kept shape fills."""
        raise NotImplementedError

    @functools.cached_property
    def _dataset(self) -> dict[str, Any]:
        return read_instances(self.instances, self.needed)

    @functools.cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width of the pictures that were annotated, where the file says so."""
        images = self._dataset["images"]
        return {i["file_name"]: (i["height"], i["width"]) for i in images if {"height", "width"} <= i.keys()}

    def images(self) -> Mapping[str, Path]:
        names = [image["file_name"] for image in self._dataset["images"]]
        return {name: self.folder / name for name in names}

    def judge(self, name: str, image: Image) -> Judgement:
        """[class, score, *shape] of each object."""
        (height, width), expected = image.shape[:2], self._sizes.get(name)
        if expected not in (None, (height, width)):
            raise ValueError(
                f"{name} is {width}x{height} (turned upright), its annotations are for a picture of "
                f"{expected[1]}x{expected[0]}"
            )
        found = checked_detections(self.detect(image), self.name, name)
        count = len(self._dataset["categories"])
        if wrong := [c for c in found.classes.tolist() if not 0 <= c < count]:
            raise ValueError(
                f"{self.name} found class {wrong[0]} in {name}; {self.instances} has {count} categories, "
                "whose indexes in the order of their ids a detector gives"
            )
        return kept_rows(found, self.shapes(name, found))

    def scores(
        self, judgements: Mapping[str, Judgement], parts: Sequence[Collection[str]]
    ) -> Sequence[float]:
        dataset = self._dataset
        categories = sorted(category["id"] for category in dataset["categories"])
        ids = {image["file_name"]: image["id"] for image in dataset["images"]}
        results = [
            {"image_id": ids[name], "category_id": categories[c], "score": score, **self.result(shape)}
            for name, rows in judgements.items()
            for c, score, *shape in rows
        ]
        return coco_maps(dataset, results, self.kind, [[ids[name] for name in part] for part in parts])


def read_instances(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Content of a COCO file of instances; ``ValueError`` where it is none.

    ``needed``: fields that every annotation must have besides those that say what it is of.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise ValueError(f"{path} lacks images, annotations or categories: it is no COCO file of instances")
    for kind, fields in {
        "images": ("id", "file_name"),
        "categories": ("id", "name"),
        "annotations": ("image_id", "category_id", *needed),
    }.items():
        if not isinstance(content[kind], list):
            raise ValueError(f"{path}: {kind} is no list")
        for index, item in enumerate(content[kind]):
            if lacking := [name for name in fields if not (isinstance(item, dict) and name in item)]:
                raise ValueError(f"{path}: {kind}[{index}] lacks {', '.join(lacking)}")
            for name in ("id", "image_id", "category_id"):
                # Those of annotations are numbered anew, and some tools write none.
                if name in fields and type(item[name]) is not int:
                    raise ValueError(f"{path}: {name} of {kind}[{index}] is {item[name]!r}, no whole number")
    images, categories = ({item["id"] for item in content[kind]} for kind in ("images", "categories"))
    for index, item in enumerate(content["annotations"]):
        if item["category_id"] not in categories:
            raise ValueError(
                f"{path}: annotations[{index}] is of category {item['category_id']}, which is none"
            )
        box = item.get("bbox", [0, 0, 0, 0])
        if not (
            isinstance(box, list)
            and [type(edge) in (int, float) and math.isfinite(edge) for edge in box] == [True] * 4
        ):
            raise ValueError(f"{path}: bbox of annotations[{index}] is {box!r}, not four finite numbers")
    if content["annotations"] and not any(item["image_id"] in images for item in content["annotations"]):
        raise ValueError(f"{path}: none of its annotations is of a picture that it lists")
    return content


def kept_rows(found: Detections, shapes: Sequence[list[Any]]) -> list[list[Any]]:
    """What is kept of the objects of a picture: [class, score, *shape] of each."""
    rows = zip(found.classes.tolist(), found.scores.tolist(), shapes, strict=True)
    return [[c, round(score, 5), *shape] for c, score, shape in rows]


def box_edges(found: Detections) -> list[list[float]]:
    """Left, top, right and bottom of each box, as they are kept."""
    return [[round(edge, 2) for edge in box] for box in found.boxes.tolist()]


def coco_box(edges: Sequence[float]) -> list[float]:
    """Kept edges -> COCO's left, top, width, height."""
    left, top, right, bottom = edges
    return [left, top, right - left, bottom - top]


def coco_maps(
    dataset: dict[str, Any], results: list[dict[str, Any]], kind: str, parts: Sequence[Collection[int]]
) -> list[float]:
    """COCO's mAP over IoU .5 to .95, of several choices of pictures.

    Args:
        dataset: content of a COCO annotation file.
        results: in COCO's format of results.
        kind: pycocotools' name of what is compared.
        parts: for each choice, the ids of the pictures that count.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not results:
        return [0.0] * len(parts)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        # For pycocotools an object of number 0 is none, and what COCO's own files always say must be said.
        annotations = [
            {"iscrowd": 0, "area": 0, **annotation, "id": number}
            for number, annotation in enumerate(dataset["annotations"], 1)
        ]
        truth.dataset = dataset | {"annotations": annotations}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.imgIds = sorted(set().union(*parts))
        # Of the areas that COCO tells apart only the first, all of them, counts here.
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
        # What takes time, the matches of each class in each picture, is made once.
        ids = np.array(evaluation.params.imgIds)
        matches = np.array(evaluation.evalImgs, object).reshape(-1, len(ids))
        scores = []
        for part in parts:
            chosen = np.isin(ids, list(part))
            evaluation.evalImgs = matches[:, chosen].ravel().tolist()
            for params in (evaluation.params, evaluation._paramsEval):
                params.imgIds = ids[chosen].tolist()
            evaluation.accumulate()
            evaluation.summarize()
            # -1 where there was nothing to find.
            scores.append(max(0.0, float(evaluation.stats[0])))
    return scores


class BoxMap(CocoMap):
    """mAP of boxes; kept are left, top, right, bottom."""

    kind, metric, needed = "bbox", "mAP", ("bbox",)

    def shapes(self, name: str, found: Detections) -> list[list[Any]]:
        del name
        return box_edges(found)

    def result(self, shape: list[Any]) -> dict[str, Any]:
        return {"bbox": coco_box(shape)}


class MaskMap(CocoMap):
    """mAP of instance masks, over the pictures that have them; kept are size and run lengths as COCO's."""

    kind, metric = "segm", "mask mAP"

    def images(self) -> Mapping[str, Path]:
        content = self._dataset
        bare = {a["image_id"] for a in content["annotations"] if not a.get("segmentation")}
        drawn = {a["image_id"] for a in content["annotations"]} - bare
        names = {image["file_name"] for image in content["images"] if image["id"] in drawn}
        return {name: path for name, path in super().images().items() if name in names}

    def shapes(self, name: str, found: Detections) -> list[list[Any]]:
        from pycocotools import mask

        if found.masks is None:
            raise ValueError(
                f"{self.name} gives no masks of {name}; mask mAP needs a network that does, such as "
                "torchvision:maskrcnn_resnet50_fpn"
            )
        runs = [mask.encode(np.asfortranarray(pixels, np.uint8)) for pixels in found.masks]
        return [[run["size"], run["counts"].decode()] for run in runs]

    def result(self, shape: list[Any]) -> dict[str, Any]:
        size, counts = shape
        return {"segmentation": {"size": size, "counts": counts}}


UNKNOWN = 255
"""In a mask: of no class that counts."""


@dataclass(frozen=True)
class MeanIou(Scored):
    """Mean intersection over union of the classes that occur in the masks.

    One confusion matrix over all pictures. Pixels whose mask says `UNKNOWN` are ignored.
    """

    name: str
    segment: Segmenter
    folder: Path
    masks: Path
    """Folder of 8-bit class masks NAME.png of the pictures NAME.*."""
    classes: int = 21
    identity: str = ""
    metric: ClassVar[str] = "mIoU"

    def images(self) -> Mapping[str, Path]:
        masks = {path.stem: path for path in sorted(self.masks.glob("*.png"))}
        pictures: dict[str, Path] = {}
        for path in sorted(filter(is_picture, self.folder.iterdir())):
            mask = masks.get(path.stem)
            if mask is None or path.samefile(mask):
                continue
            if other := pictures.get(path.stem):
                raise ValueError(f"{mask} is the mask of two pictures, {other.name} and {path.name}")
            pictures[path.stem] = path
        return {path.name: path for path in pictures.values()}

    def judge(self, name: str, image: Image) -> Judgement:
        """[true class, predicted class, pixels] of each pair that occurs."""
        path = self.masks / f"{Path(name).stem}.png"
        try:
            with PIL.Image.open(path) as mask:
                truth = np.asarray(mask)
        except OSError as error:
            raise ValueError(f"{path} is no mask that can be read: {error}") from error
        predicted = checked_integers(self.segment(image), self.name, name)
        if predicted.shape != truth.shape:
            raise ValueError(f"{name}: the segmenter returned {predicted.shape} for a mask of {truth.shape}")
        known = truth != UNKNOWN
        if known.any() and (largest := int(truth[known].max())) >= self.classes:
            raise ValueError(
                f"the mask of {name} has class {largest}, of {self.classes} classes; --classes sets how many"
            )
        seen = predicted[known]
        if ((seen < 0) | (seen >= self.classes)).any():
            raise ValueError(
                f"{name}: the segmenter returned classes {seen.min()} to {seen.max()} for masks of "
                f"{self.classes} classes; --classes sets how many"
            )
        pairs = truth[known].astype(np.int64) * self.classes + seen
        values, counts = np.unique(pairs, return_counts=True)
        return [
            [*divmod(value, self.classes), count]
            for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        ]

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        confusion = np.zeros((self.classes, self.classes), np.int64)
        for rows in judgements.values():
            for true, predicted, count in rows:
                confusion[true, predicted] += count
        both = np.diag(confusion)
        union = confusion.sum(0) + confusion.sum(1) - both
        present = confusion.sum(1) > 0
        return float((both[present] / union[present]).mean()) if present.any() else 0.0


def check_images(tasks: Sequence[Task]) -> None:
    """``ValueError`` where a task has no pictures, or one is missing."""
    for task in tasks:
        images = task.images()
        if not images:
            raise ValueError(f"no pictures for the task {task.name}: {task.identity}")
        missing = [str(path) for path in images.values() if not path.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} pictures of {task.name} are missing, the first is {missing[0]}")

"""Tasks without labels: does a network say the same of the decoded picture as of the original?

Labels are few and networks err on originals, too: with some hundred photos, scores against labels move by
more than a codec's change does. A network's own answer on the original is known for every pixel, box and
class, and no picture needs a label.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ugicm_train.evaluation.machine_report import read_image
from ugicm_train.evaluation.measurement import read_images
from ugicm_train.evaluation.metrics import Image
from ugicm_train.evaluation.tasks import (
    Classifier,
    Detections,
    Detector,
    Judgement,
    Segmenter,
    coco_map,
)

SURE = 0.3
"""Detections on the original count as objects from this score on."""


def named_images(folder: Path) -> dict[str, Path]:
    """The pictures under a folder by their path in it."""
    return {str(path.relative_to(folder)): path for path in read_images(folder)}


def probabilities(scores: NDArray[Any]) -> NDArray[np.float64]:
    """What a classifier returns as probabilities: shares of the sum, or softmax where some are negative."""
    values = np.asarray(scores, np.float64)
    if (values < 0).any():
        values = np.exp(values - values.max())
    return values / max(float(values.sum()), 1e-12)


@dataclass(frozen=True)
class SameClasses:
    """Overlap of the classes' probabilities: sum of the smaller of the two, mean over the pictures."""

    name: str
    classify: Classifier
    folder: Path
    identity: str = ""
    metric: str = "agreement"

    def images(self) -> Mapping[str, Path]:
        return named_images(self.folder)

    @functools.cached_property
    def _expected(self) -> dict[str, NDArray[np.float64]]:
        return {}

    def judge(self, name: str, image: Image) -> Judgement:
        if name not in self._expected:
            self._expected[name] = probabilities(self.classify(read_image(self.folder / name)))
        seen = probabilities(self.classify(image))
        return round(float(np.minimum(seen, self._expected[name]).sum()), 6)

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        return float(np.mean(list(judgements.values())))


@dataclass(frozen=True)
class SameBoxes:
    """COCO's mAP of boxes, with what is found in the original (score `SURE` and more) as the truth."""

    name: str
    detect: Detector
    folder: Path
    identity: str = ""
    metric: str = "mAP of agreement"

    def images(self) -> Mapping[str, Path]:
        return named_images(self.folder)

    @functools.cached_property
    def _expected(self) -> dict[str, list[list[float]]]:
        return {}

    def judge(self, name: str, image: Image) -> Judgement:
        """[boxes of the original, boxes of this picture], each [class, score, left, top, right, bottom]."""
        if name not in self._expected:
            found = _rows(self.detect(read_image(self.folder / name)))
            self._expected[name] = [row for row in found if row[1] >= SURE]
        return [self._expected[name], _rows(self.detect(image))]

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        classes = sorted({int(row[0]) for truth, found in judgements.values() for row in (*truth, *found)})
        ids = {name: index for index, name in enumerate(judgements, 1)}
        annotations = [
            {"image_id": ids[name], "category_id": int(c), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for name, (truth, _) in judgements.items()
            for c, _, box in map(_split, truth)
        ]
        dataset = {
            "images": [{"id": index, "file_name": name} for name, index in ids.items()],
            "categories": [{"id": c, "name": str(c)} for c in classes],
            "annotations": [{"id": index, **a} for index, a in enumerate(annotations, 1)],
        }
        results = [
            {"image_id": ids[name], "category_id": int(c), "score": score, "bbox": box}
            for name, (_, found) in judgements.items()
            for c, score, box in map(_split, found)
        ]
        return coco_map(dataset, results, "bbox", list(ids.values())) if annotations else 0.0


def _rows(found: Detections) -> list[list[float]]:
    rows = zip(found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [[c, round(score, 5), *(round(edge, 2) for edge in box)] for c, score, box in rows]


def _split(row: list[float]) -> tuple[float, float, list[float]]:
    c, score, left, top, right, bottom = row
    return c, score, [left, top, right - left, bottom - top]


@dataclass(frozen=True)
class SamePixels:
    """Intersection over union of the class maps of picture and original, over what is not background.

    All pictures together, all classes together: the pixels where both maps show the same object, as a part
    of those where either shows one. A mean over classes would let a rare one, a few pixels, decide.
    """

    name: str
    segment: Segmenter
    folder: Path
    background: int = 0
    identity: str = ""
    metric: str = "IoU of agreement"

    def images(self) -> Mapping[str, Path]:
        return named_images(self.folder)

    @functools.cached_property
    def _expected(self) -> dict[str, NDArray[np.integer[Any]]]:
        return {}

    def judge(self, name: str, image: Image) -> Judgement:
        """[pixels with the same object, pixels with one in either]."""
        if name not in self._expected:
            self._expected[name] = self.segment(read_image(self.folder / name))
        expected, seen = self._expected[name], self.segment(image)
        either = (expected != self.background) | (seen != self.background)
        return [int((either & (expected == seen)).sum()), int(either.sum())]

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        same, either = np.array(list(judgements.values()), np.int64).reshape(-1, 2).sum(0)
        return float(same / either) if either else 0.0

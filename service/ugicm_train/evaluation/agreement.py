"""Tasks without labels: does a network say the same of the decoded picture as of the original?

Labels are few and networks err on originals, too: with some hundred photos, scores against labels move by
more than a codec's change does. A network's own answer on the original is known for every pixel, box and
class, and no picture needs a label.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ugicm_train.data import read_image
from ugicm_train.evaluation.measurement import read_images
from ugicm_train.evaluation.metrics import Image
from ugicm_train.evaluation.tasks import (
    Detections,
    Judgement,
    Scored,
    box_edges,
    coco_box,
    coco_maps,
    kept_rows,
)

SURE = 0.3
"""Detections on the original count as objects from this score on."""


def probabilities(scores: NDArray[Any]) -> NDArray[np.float64]:
    """What a classifier returns as probabilities: shares of the sum, or softmax where some are negative."""
    values = np.asarray(scores, np.float64)
    if (values < 0).any():
        values = np.exp(values - values.max())
    return values / max(float(values.sum()), 1e-12)


@dataclass(frozen=True)
class Agreement(Scored):
    """What the three tasks share."""

    name: str
    network: Callable[[Image], Any]
    folder: Path
    identity: str = ""
    metric: ClassVar[str]

    def images(self) -> Mapping[str, Path]:
        """The pictures under the folder by their path in it."""
        return {str(path.relative_to(self.folder)): path for path in read_images(self.folder)}

    def answer(self, image: Image) -> Any:
        """What is compared of the network's answer."""
        raise NotImplementedError

    def expected(self, name: str) -> Any:
        """The answer on the original, asked for once."""
        if name not in self._expected:
            self._expected[name] = self.answer(read_image(self.folder / name))
        return self._expected[name]

    @functools.cached_property
    def _expected(self) -> dict[str, Any]:
        return {}


class SameClasses(Agreement):
    """Overlap of the classes' probabilities: sum of the smaller of the two, mean over the pictures."""

    metric = "agreement"

    def answer(self, image: Image) -> NDArray[np.float64]:
        return probabilities(self.network(image))

    def judge(self, name: str, image: Image) -> Judgement:
        return round(float(np.minimum(self.answer(image), self.expected(name)).sum()), 6)

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        return float(np.mean(list(judgements.values())))


class SameBoxes(Agreement):
    """COCO's mAP of boxes, with what is found in the original (score `SURE` and more) as the truth."""

    metric = "mAP of agreement"

    def answer(self, image: Image) -> list[list[float]]:
        """[class, score, left, top, right, bottom] of each box."""
        found = Detections(*self.network(image))
        return kept_rows(found, box_edges(found))

    def judge(self, name: str, image: Image) -> Judgement:
        """[boxes of the original, boxes of this picture]."""
        return [[row for row in self.expected(name) if row[1] >= SURE], self.answer(image)]

    def scores(
        self, judgements: Mapping[str, Judgement], parts: Sequence[Collection[str]]
    ) -> Sequence[float]:
        classes = sorted({int(row[0]) for truth, found in judgements.values() for row in (*truth, *found)})
        ids = {name: index for index, name in enumerate(judgements, 1)}
        annotations = [
            {"image_id": ids[name], "category_id": int(c), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for name, (truth, _) in judgements.items()
            for c, _, *edges in truth
            for box in [coco_box(edges)]
        ]
        dataset = {
            "images": [{"id": index, "file_name": name} for name, index in ids.items()],
            "categories": [{"id": c, "name": str(c)} for c in classes],
            "annotations": [{"id": index, **a} for index, a in enumerate(annotations, 1)],
        }
        results = [
            {"image_id": ids[name], "category_id": int(c), "score": score, "bbox": coco_box(edges)}
            for name, (_, found) in judgements.items()
            for c, score, *edges in found
        ]
        return coco_maps(dataset, results, "bbox", [[ids[name] for name in part] for part in parts])


class SamePixels(Agreement):
    """Intersection over union of the class maps of picture and original, over what is not background (0).

    All classes together: the pixels where both maps show the same object, as a part of those where either
    shows one; mean over the pictures where there are any. A mean over classes would let a rare one, a few
    pixels, decide; all pixels of all pictures together, the few objects that fill a picture.
    """

    metric = "IoU of agreement"

    def answer(self, image: Image) -> NDArray[np.integer[Any]]:
        return np.asarray(self.network(image))

    def judge(self, name: str, image: Image) -> Judgement:
        """[pixels with the same object, pixels with one in either]."""
        expected, seen = self.expected(name), self.answer(image)
        either = (expected > 0) | (seen > 0)
        return [int((either & (expected == seen)).sum()), int(either.sum())]

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        shares = [same / either for same, either in judgements.values() if either]
        return float(np.mean(shares)) if shares else 0.0

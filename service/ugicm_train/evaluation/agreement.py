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
    Judgement,
    MeanScored,
    Scored,
    box_edges,
    checked_detections,
    checked_integers,
    checked_scores,
    coco_box,
    coco_maps,
    kept_rows,
)

SURE = 0.3
"""Detections on the original count as objects from this score on."""


def are_shares(scores: NDArray[Any]) -> bool:
    """Whether a classifier's scores are shares, not logits.

    Where nothing is negative, integers are, and so is what sums up to about 1: as near as probabilities do
    that are each rounded to 1/256, as LiteRT's are.
    """
    values = np.asarray(scores)
    about_one = abs(values.sum(dtype=np.float64) - 1) <= 0.01 + values.size / 512
    return bool(values.min() >= 0 and (np.issubdtype(values.dtype, np.integer) or about_one))


def probabilities(*answers: NDArray[Any]) -> list[NDArray[np.float64]]:
    """What one classifier returns of several pictures as probabilities.

    Shares of the sum, or, where one picture's scores are none, softmax of all.
    """
    values = [np.asarray(scores, np.float64) for scores in answers]
    if not all(map(are_shares, answers)):
        values = [np.exp(scores - scores.max()) for scores in values]
    return [scores / max(float(scores.sum()), 1e-12) for scores in values]


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

    def answer(self, name: str, image: Image) -> Any:
        """What is compared of the network's answer on a picture of that name."""
        raise NotImplementedError

    def judge(self, name: str, image: Image) -> Judgement:
        """How the answer on one picture, decoded, compares with the one on the original."""
        raise NotImplementedError

    def expected(self, name: str) -> Any:
        """The answer on the original, asked for once."""
        if name not in self._expected:
            self._expected[name] = self.answer(name, read_image(self.folder / name))
        return self._expected[name]

    @functools.cached_property
    def _expected(self) -> dict[str, Any]:
        return {}


class SameClasses(MeanScored, Agreement):
    """Overlap of the classes' probabilities: sum of the smaller of the two, mean over the pictures."""

    metric = "agreement"

    def answer(self, name: str, image: Image) -> NDArray[Any]:
        return checked_scores(self.network(image), self.name, name)

    def judge(self, name: str, image: Image) -> Judgement:
        both = probabilities(self.answer(name, image), self.expected(name))
        return round(float(np.minimum(*both).sum()), 6)


class SameBoxes(Agreement):
    """COCO's mAP of boxes, with what is found in the original (score `SURE` and more) as the truth."""

    metric = "mAP of agreement"

    def answer(self, name: str, image: Image) -> list[list[float]]:
        """[class, score, left, top, right, bottom] of each box."""
        found = checked_detections(self.network(image), self.name, name)
        return kept_rows(found, box_edges(found))

    def judge(self, name: str, image: Image) -> Judgement:
        """[boxes of the original, boxes of this picture]."""
        return [[row for row in self.expected(name) if row[1] >= SURE], self.answer(name, image)]

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

    def answer(self, name: str, image: Image) -> NDArray[np.integer[Any]]:
        """(H, W) class of each pixel, in bytes where they can hold it: one map stays for each original."""
        classes = checked_integers(self.network(image), self.name, name)
        narrow = classes.min(initial=0) >= 0 and classes.max(initial=0) < 256
        return classes.astype(np.uint8) if narrow else classes

    def judge(self, name: str, image: Image) -> Judgement:
        """[pixels with the same object, pixels with one in either]."""
        expected, seen = self.expected(name), self.answer(name, image)
        either = (expected > 0) | (seen > 0)
        return [int((either & (expected == seen)).sum()), int(either.sum())]

    def score(self, judgements: Mapping[str, Judgement]) -> float:
        shares = [same / either for same, either in judgements.values() if either]
        return float(np.mean(shares)) if shares else 0.0

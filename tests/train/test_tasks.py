"""Tasks score as their definitions say; adaptors feed networks what they expect; runs can be resumed."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from ugicm.codec.codec import Codec
from ugicm_train.cli import main
from ugicm_train.evaluation import adaptors
from ugicm_train.evaluation.agreement import SameBoxes, SameClasses, SamePixels, probabilities
from ugicm_train.evaluation.coders import Coder, pillow_coder, ugicm_coder
from ugicm_train.evaluation.journal import Entry, Journal, Key
from ugicm_train.evaluation.machine import (
    add_arguments,
    bd_rate_errors,
    chosen_images,
    evaluate,
    identity_of_data,
    points_of,
    remembered,
    run,
    tasks_of,
)
from ugicm_train.evaluation.machine_report import (
    Point,
    compare,
    contact_sheet,
    curve,
    plot_scores,
    plot_strengths,
    score_at,
    table,
)
from ugicm_train.evaluation.tasks import (
    BoxMap,
    Detections,
    MaskMap,
    MeanIou,
    Top1,
    check_images,
    read_instances,
    read_labels,
)
from ugicm_train.files import locked

Image = NDArray[np.uint8]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 210)}


def colour_scores(image: Image) -> NDArray[np.float64]:
    """A classifier of colours: the mean of each channel over the middle."""
    height, width = image.shape[:2]
    return image[height // 4 : -height // 4, width // 4 : -width // 4].mean((0, 1))


def save(path: Path, image: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image).save(path)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Pictures of one colour with a little texture, labelled 0, 1, 2."""
    folder, random = tmp_path / "colours", np.random.default_rng(0)
    rows = []
    for index, (name, colour) in enumerate(COLOURS.items()):
        noise = random.integers(-25, 26, (128, 128, 3))
        save(folder / f"{name}.png", np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))
        rows.append([f"{name}.png", index])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "class_index"], *rows])
    return folder


@pytest.fixture
def colour_network(tmp_path: Path) -> str:
    """A classifier of `colours` as the command line names it."""
    file = tmp_path / "mine.py"
    file.write_text("def colours():\n    return lambda image: image.mean((0, 1))\n")
    return f"{file}:colours"


class TestTop1:
    def test_counts_hits(self, colours: Path) -> None:
        labels = read_labels(colours / "labels.csv")
        task = Top1("colours", colour_scores, colours, labels | {"blue.png": 0})
        judgements = {n: task.judge(n, np.asarray(PIL.Image.open(p))) for n, p in task.images().items()}
        assert judgements == {"red.png": True, "green.png": True, "blue.png": False}
        assert task.score(judgements) == pytest.approx(2 / 3)

    def test_labels_of_a_spreadsheet(self, tmp_path: Path) -> None:
        (tmp_path / "labels.csv").write_text("file,class_index\na.png,1\n", encoding="utf-8-sig")
        assert read_labels(tmp_path / "labels.csv") == {"a.png": 1}

    def test_labels_that_no_score_belongs_to(self, colours: Path) -> None:
        task = Top1("colours", colour_scores, colours, {"red.png": 3})
        with pytest.raises(ValueError, match=r"red\.png has class 3, colours gives scores of 0 to 2"):
            task.judge("red.png", np.zeros((8, 8, 3), np.uint8))

    def test_scores_that_are_none(self, colours: Path) -> None:
        picture = np.zeros((8, 8, 3), np.uint8)
        for scores in (np.array([np.nan, 1, 0]), np.array([1, np.inf, 0]), np.zeros(0), [None, 1]):
            for task in (
                Top1("broken", lambda image, scores=scores: scores, colours, {"red.png": 1}),
                SameClasses("broken", lambda image, scores=scores: scores, colours),
            ):
                with pytest.raises(ValueError, match=r"broken gives scores of red\.png that are not finite"):
                    task.judge("red.png", picture)

    def test_scores_of_more_than_one_picture(self, colours: Path) -> None:
        task = Top1("batch", lambda image: np.eye(3), colours, {"red.png": 1})
        with pytest.raises(
            ValueError, match=r"batch gives scores of red\.png in the shape \(3, 3\): one per class"
        ):
            task.judge("red.png", np.zeros((8, 8, 3), np.uint8))

    def test_missing_pictures_are_named(self, colours: Path) -> None:
        task = Top1("colours", colour_scores, colours, {"red.png": 0, "gone.png": 1})
        with pytest.raises(ValueError, match=r"1 pictures of colours are missing.*gone\.png"):
            check_images([task])
        with pytest.raises(ValueError, match="no pictures for the task none"):
            check_images([Top1("none", colour_scores, colours, {})])


class TestBoxMap:
    @pytest.fixture
    def instances(self, tmp_path: Path) -> Path:
        pytest.importorskip("pycocotools")
        boxes = {1: [10, 10, 40, 30], 2: [5, 20, 30, 30]}
        path = tmp_path / "instances.json"
        path.write_text(
            json.dumps(
                {
                    "images": [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in (1, 2)],
                    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
                    "annotations": [
                        {"id": i, "image_id": i, "category_id": 7, "bbox": box, "area": box[2] * box[3]}
                        | {"iscrowd": 0}
                        for i, box in boxes.items()
                    ],
                }
            )
        )
        return path

    def score(self, instances: Path, boxes: dict[str, list[float]], classes: int = 0) -> float:
        found: list[Detections] = []
        task = BoxMap("boxes", lambda image: found[-1], instances.parent, instances)
        judgements = {}
        for name, box in boxes.items():
            found.append(Detections(np.array([box]), np.array([0.9]), np.array([classes])))
            judgements[name] = json.loads(json.dumps(task.judge(name, np.zeros((60, 80, 3), np.uint8))))
        return task.score(judgements)

    def test_right_boxes_score_one(self, instances: Path) -> None:
        right = {"1.png": [10.0, 10, 50, 40], "2.png": [5.0, 20, 35, 50]}
        assert self.score(instances, right) == pytest.approx(1)
        assert self.score(instances, right, classes=1) == 0

    def test_loose_boxes_count_at_low_iou_only(self, instances: Path) -> None:
        # IoU 30 / 40 = .75: right at .5 ... .75, 6 of 10 thresholds.
        loose = {"1.png": [10.0, 10, 50, 50], "2.png": [5.0, 20, 35, 60]}
        assert self.score(instances, loose) == pytest.approx(0.6)

    def test_only_judged_pictures_count(self, instances: Path) -> None:
        assert self.score(instances, {"1.png": [10.0, 10, 50, 40]}) == pytest.approx(1)

    def test_numbers_from_zero_and_what_may_be_left_out(self, instances: Path) -> None:
        content = json.loads(instances.read_text())
        for index, annotation in enumerate(content["annotations"]):
            annotation["id"] = index  # for pycocotools, 0 is no object
            del annotation["iscrowd"], annotation["area"]
        instances.write_text(json.dumps(content))
        right = {"1.png": [10.0, 10, 50, 40], "2.png": [5.0, 20, 35, 50]}
        assert self.score(instances, right) == pytest.approx(1)

    def test_a_plain_tuple_is_as_good(self, instances: Path) -> None:
        box = np.array([[10.0, 10, 50, 40]])
        task = BoxMap("boxes", lambda image: (box, np.ones(1), np.array([1])), instances.parent, instances)
        assert task.judge("1.png", np.zeros((60, 80, 3), np.uint8)) == [[1, 1.0, 10.0, 10.0, 50.0, 40.0]]

    def test_what_is_nearly_an_array_of_integers(self, instances: Path, colours: Path) -> None:
        picture = np.zeros((60, 80, 3), np.uint8)
        for found in (
            ([[10, 10, 50, 40]], [1], [1]),
            (torch.tensor([[10.0, 10, 50, 40]]), torch.ones(1), torch.ones(1)),
        ):
            for task in (
                BoxMap("boxes", lambda image, found=found: found, instances.parent, instances),
                SameBoxes("boxes", lambda image, found=found: found, colours),
            ):
                judgement = json.loads(json.dumps(task.judge("red.png", picture)))
                row = judgement[0] if isinstance(task, BoxMap) else judgement[1][0]
                assert row == [1, 1.0, 10.0, 10.0, 50.0, 40.0]
                assert isinstance(row[0], int)
        box, one = np.array([[10.0, 10, 50, 40]]), np.ones(1)
        for found, message in (
            ((box, np.array([np.nan]), one), r"of red\.png that are not finite"),
            ((box * np.inf, one, one), r"of red\.png that are not finite"),
            ((box, one, one / 2), r"of red\.png that are no whole numbers"),
            ((box, one, ["cat"]), r"of red\.png that are <U3, no numbers"),
            ((box, np.ones(2), one), r"scores \(2,\) .* of red\.png"),
            ((box[0], one, one), r"boxes \(4,\)"),
            ((box, one), "no boxes, scores and classes"),
        ):
            for task in (
                BoxMap("broken", lambda image, found=found: found, instances.parent, instances),
                SameBoxes("broken", lambda image, found=found: found, colours),
            ):
                with pytest.raises(ValueError, match=f"broken gives .*{message}"):
                    task.judge("red.png", picture)

    @pytest.mark.parametrize(
        ("kind", "field"), [("images", "file_name"), ("categories", "name"), ("annotations", "bbox")]
    )
    def test_files_that_lack_something(self, instances: Path, kind: str, field: str) -> None:
        content = json.loads(instances.read_text())
        del content[kind][1][field]
        instances.write_text(json.dumps(content))
        task = BoxMap("boxes", lambda image: None, instances.parent, instances)
        with pytest.raises(ValueError, match=rf"instances\.json: {kind}\[1\] lacks {field}"):
            check_images([task])

    def test_files_whose_content_does_not_fit(self, instances: Path) -> None:
        whole = instances.read_text()
        for kind, change, message in (
            ("images", {"id": "b"}, r"id of images\[1\] is 'b', no whole number"),
            ("categories", {"id": "b"}, r"id of categories\[1\] is 'b', no whole number"),
            ("annotations", {"image_id": None}, r"image_id of annotations\[1\] is None"),
            ("annotations", {"category_id": 8}, r"annotations\[1\] is of category 8, which is none"),
            ("annotations", {"bbox": [0, 0]}, r"bbox of annotations\[1\] is \[0, 0\], not four"),
            ("annotations", {"bbox": [0, 0, 9, math.inf]}, r"bbox of annotations\[1\] is .*, not four"),
        ):
            content = json.loads(whole)
            content[kind][1] |= change
            instances.write_text(json.dumps(content))
            with pytest.raises(ValueError, match=rf"instances\.json: {message}"):
                read_instances(instances)
        content = json.loads(whole)
        for annotation in content["annotations"]:
            annotation["image_id"] += 10
        instances.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"none of its annotations is of a picture that it lists"):
            read_instances(instances)

    def test_classes_and_sizes_that_do_not_fit(self, instances: Path) -> None:
        for found in (2, -1):
            with pytest.raises(ValueError, match=rf"boxes found class {found} in 1\.png.*has 2 categories"):
                self.score(instances, {"1.png": [10.0, 10, 50, 40]}, classes=found)
        nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        task = BoxMap("boxes", lambda image: nothing, instances.parent, instances)
        with pytest.raises(ValueError, match=r"1\.png is 60x80 \(turned upright\).* of 80x60"):
            task.judge("1.png", np.zeros((80, 60, 3), np.uint8))

    def test_nothing_found(self, instances: Path) -> None:
        empty = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        task = BoxMap("boxes", lambda image: empty, instances.parent, instances)
        assert task.score({"1.png": task.judge("1.png", np.zeros((60, 80, 3), np.uint8))}) == 0


class TestMaskMap:
    @pytest.fixture
    def instances(self, tmp_path: Path) -> Path:
        pytest.importorskip("pycocotools")
        path = tmp_path / "instances.json"
        square = [[10, 10, 50, 10, 50, 40, 10, 40]]
        box = {"category_id": 9, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
        path.write_text(
            json.dumps(
                {
                    "images": [
                        {"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in (1, 2, 3)
                    ],
                    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
                    # The second picture has a box alone, the third nothing.
                    "annotations": [
                        {"id": 1, "image_id": 1, "segmentation": square, **box},
                        {"id": 2, "image_id": 2, **box},
                    ],
                }
            )
        )
        return path

    def score(self, instances: Path, rows: int, index: int = 1) -> float:
        masks = np.zeros((1, 60, 80), bool)
        masks[0, 10 : 10 + rows, 10:50] = True
        found = Detections(np.zeros((1, 4)), np.array([0.9]), np.array([index]), masks)
        task = MaskMap("masks", lambda image: found, instances.parent, instances)
        assert list(task.images()) == ["1.png"]
        judgement = json.loads(json.dumps(task.judge("1.png", np.zeros((60, 80, 3), np.uint8))))
        return task.score({"1.png": judgement})

    def test_masks_count_not_boxes(self, instances: Path) -> None:
        content = json.loads(instances.read_text())
        del content["annotations"][1]["bbox"]  # nor need they be there
        instances.write_text(json.dumps(content))
        assert self.score(instances, 30) == pytest.approx(1)
        assert self.score(instances, 30, index=0) == 0
        # IoU 30 / 40 = .75: right at .5 ... .75, 6 of 10 thresholds.
        assert self.score(instances, 40) == pytest.approx(0.6)

    def test_a_network_without_masks_is_named(self, instances: Path) -> None:
        found = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        task = MaskMap("plain masks", lambda image: found, instances.parent, instances)
        with pytest.raises(ValueError, match=r"plain masks gives no masks of 1\.png"):
            task.judge("1.png", np.zeros((60, 80, 3), np.uint8))


class TestMeanIou:
    def test_mean_over_classes_in_the_masks(self, tmp_path: Path) -> None:
        truth = np.array([[0, 0, 1, 1], [0, 255, 1, 1]], np.uint8)
        save(tmp_path / "masks" / "a.png", truth)
        save(tmp_path / "pictures" / "a.jpg", np.zeros((2, 4, 3), np.uint8))
        save(tmp_path / "pictures" / "unlabelled.jpg", np.zeros((2, 4, 3), np.uint8))
        predicted = np.array([[0, 0, 0, 1], [0, 5, 1, 2]], np.uint8)
        task = MeanIou("mask", lambda image: predicted, tmp_path / "pictures", tmp_path / "masks")
        assert list(task.images()) == ["a.jpg"]
        judgement = json.loads(json.dumps(task.judge("a.jpg", np.zeros((2, 4, 3), np.uint8))))
        # Class 0: 3 of 4 pixels; class 1: 2 of 4; class 2 is in no mask.
        assert task.score({"a.jpg": judgement}) == pytest.approx((3 / 4 + 2 / 4) / 2)

    def test_only_pictures_are_pictures(self, tmp_path: Path) -> None:
        save(tmp_path / "masks" / "a.png", np.zeros((2, 4), np.uint8))
        save(tmp_path / "a.jpg", np.zeros((2, 4, 3), np.uint8))
        (tmp_path / "a.txt").write_text("what is known of it")
        task = MeanIou("mask", lambda image: np.zeros((2, 4), np.uint8), tmp_path, tmp_path / "masks")
        assert list(task.images()) == ["a.jpg"]

    def test_masks_are_no_pictures_of_their_own(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", np.zeros((2, 4), np.uint8))
        save(tmp_path / "a.jpg", np.zeros((2, 4, 3), np.uint8))
        task = MeanIou("mask", lambda image: np.zeros((2, 4), np.uint8), tmp_path, tmp_path)
        assert list(task.images()) == ["a.jpg"]
        save(tmp_path / "a.webp", np.zeros((2, 4, 3), np.uint8))
        with pytest.raises(ValueError, match=r"a\.png is the mask of two pictures, a\.jpg and a\.webp"):
            task.images()

    def test_a_damaged_mask_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "masks").mkdir()
        (tmp_path / "masks" / "a.png").write_bytes(b"no picture")
        task = MeanIou("mask", lambda image: image[..., 0], tmp_path, tmp_path / "masks")
        with pytest.raises(ValueError, match=r"masks/a\.png is no mask that can be read"):
            task.judge("a.jpg", np.zeros((1, 2, 3), np.uint8))

    def test_class_maps_of_floats(self, tmp_path: Path) -> None:
        save(tmp_path / "masks" / "a.png", np.array([[1, 0]], np.uint8))
        save(tmp_path / "a.jpg", np.zeros((1, 2, 3), np.uint8))
        for seen, fits in (([[1.0, 0.0]], True), ([[1.5, 0.0]], False), ([[np.nan, 0.0]], False)):
            task = MeanIou("mask", lambda image, seen=seen: np.array(seen), tmp_path, tmp_path / "masks")
            if fits:
                judgement = task.judge("a.jpg", np.zeros((1, 2, 3), np.uint8))
                assert task.score({"a.jpg": json.loads(json.dumps(judgement))}) == 1
                continue
            with pytest.raises(ValueError, match=r"mask gives classes of a\.jpg that are no whole numbers"):
                task.judge("a.jpg", np.zeros((1, 2, 3), np.uint8))

    def test_as_many_classes_as_are_said(self, tmp_path: Path) -> None:
        save(tmp_path / "masks" / "a.png", np.array([[149, 255]], np.uint8))
        save(tmp_path / "a.jpg", np.zeros((1, 2, 3), np.uint8))
        for classes in (150, 21):
            seen = np.array([[149, 0]])
            task = MeanIou("mask", lambda image, seen=seen: seen, tmp_path, tmp_path / "masks", classes)
            if classes == 150:
                assert task.judge("a.jpg", np.zeros((1, 2, 3), np.uint8)) == [[149, 149, 1]]
                continue
            with pytest.raises(ValueError, match=r"a\.jpg has class 149, of 21 classes; --classes"):
                task.judge("a.jpg", np.zeros((1, 2, 3), np.uint8))

    def test_wrong_size_is_an_error(self, tmp_path: Path) -> None:
        save(tmp_path / "masks" / "a.png", np.zeros((2, 4), np.uint8))
        save(tmp_path / "a.jpg", np.zeros((2, 4, 3), np.uint8))
        task = MeanIou("mask", lambda image: np.zeros((4, 2), np.uint8), tmp_path, tmp_path / "masks")
        with pytest.raises(ValueError, match=r"a\.jpg.*\(4, 2\).*\(2, 4\)"):
            task.judge("a.jpg", np.zeros((2, 4, 3), np.uint8))

    def test_classes_that_the_masks_lack_are_an_error(self, tmp_path: Path) -> None:
        save(tmp_path / "masks" / "a.png", np.array([[0, 255]], np.uint8))
        save(tmp_path / "a.jpg", np.zeros((1, 2, 3), np.uint8))
        for predicted, fits in (([[20, 150]], True), ([[21, 0]], False), ([[-1, 0]], False)):
            seen = np.array(predicted)
            task = MeanIou("mask", lambda image, seen=seen: seen, tmp_path, tmp_path / "masks")
            if fits:  # what lies where the mask says nothing is of no account
                assert task.judge("a.jpg", np.zeros((1, 2, 3), np.uint8)) == [[0, 20, 1]]
                continue
            with pytest.raises(ValueError, match="for masks of 21 classes"):
                task.judge("a.jpg", np.zeros((1, 2, 3), np.uint8))


class TestRuntimes:
    def onnx_model(
        self,
        path: Path,
        nodes: list[Any],
        out_shape: list[int],
        extra: list[Any],
        in_shape: tuple[int, ...] = (1, 3, 16, 16),
        out_type: int = 1,
    ) -> Path:
        from onnx import TensorProto, checker, helper, save_model

        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, list(in_shape))],
            [helper.make_tensor_value_info("out", out_type, out_shape)],
            extra,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        checker.check_model(model)
        save_model(model, path)
        return path

    def test_onnx_classifier_and_segmenter(self, tmp_path: Path, colours: Path) -> None:
        pytest.importorskip("onnxruntime")
        helper = pytest.importorskip("onnx").helper
        means = self.onnx_model(
            tmp_path / "means.onnx",
            [helper.make_node("ReduceMean", ["images"], ["out"], axes=[2, 3], keepdims=0)],
            [1, 3],
            [],
        )
        classify = adaptors.load_classifier(str(means))
        green = np.asarray(PIL.Image.open(colours / "green.png"))
        scores = classify(green)
        assert scores.argmax() == 1
        crop = adaptors.centre_crop(green, 16).astype(np.float32) / 255
        expected = (crop.mean((0, 1)) - adaptors.IMAGENET_MEAN) / adaptors.IMAGENET_STD
        np.testing.assert_allclose(scores, expected, atol=1e-4)

        copy = self.onnx_model(
            tmp_path / "copy.onnx",
            [helper.make_node("Identity", ["images"], ["out"])],
            [1, 3, 16, 16],
            [],
        )
        halves = np.zeros((40, 64, 3), np.uint8)
        halves[:, :32, 0], halves[:, 32:, 2] = 255, 255
        classes = adaptors.load_segmenter(str(copy))(halves)
        assert classes.shape == (40, 64)
        assert (classes[:, :30] == 0).all()
        assert (classes[:, 34:] == 2).all()

    def test_onnx_class_map_with_its_axis_kept(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        onnx = pytest.importorskip("onnx")
        node = onnx.helper.make_node("ArgMax", ["images"], ["out"], axis=1)  # keepdims=1
        kind = onnx.TensorProto.INT64
        model = self.onnx_model(tmp_path / "map.onnx", [node], [1, 1, 16, 16], [], out_type=kind)
        blue = np.full((16, 16, 3), (0, 0, 255), np.uint8)
        assert (adaptors.load_segmenter(str(model))(blue) == 2).all()

    @pytest.mark.parametrize("shape", [(8, 3, 16, 16), (1, 3, 16, 32), (1, 16, 16, 3), (1, 3)])
    def test_onnx_models_of_another_input(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        pytest.importorskip("onnxruntime")
        node = pytest.importorskip("onnx").helper.make_node("Identity", ["images"], ["out"])
        model = self.onnx_model(tmp_path / "net.onnx", [node], list(shape), [], shape)
        with pytest.raises(adaptors.NetworkError, match=r"expected tensor\(float\) of \(1, 3, side, side\)"):
            adaptors.load_classifier(str(model))

    def test_networks_of_another_kind(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        helper = pytest.importorskip("onnx").helper
        copy, mean = tmp_path / "copy.onnx", tmp_path / "mean.onnx"
        self.onnx_model(copy, [helper.make_node("Identity", ["images"], ["out"])], [1, 3, 16, 16], [])
        node = helper.make_node("ReduceMean", ["images"], ["out"], axes=[2, 3], keepdims=0)
        self.onnx_model(mean, [node], [1, 3], [])
        picture = np.zeros((16, 16, 3), np.uint8)
        with pytest.raises(adaptors.NetworkError, match="a classifier gives one score for each class"):
            adaptors.load_classifier(str(copy))(picture)
        with pytest.raises(adaptors.NetworkError, match="a segmenter gives a map"):
            adaptors.load_segmenter(str(mean))(picture)
        with pytest.raises(adaptors.NetworkError, match="FastestDet takes 352x352"):
            adaptors.load_detector(f"fastestdet:{copy}", None)

    def test_weights_beside_a_model_are_of_its_identity(self, tmp_path: Path) -> None:
        (tmp_path / "net.onnx").write_bytes(b"graph")
        identities = set()
        for weights in (None, b"old", b"new"):
            if weights is not None:
                (tmp_path / "net.onnx.data").write_bytes(weights)
            identities.add(adaptors.identity_of(str(tmp_path / "net.onnx")))
        assert len(identities) == 3

    def test_classifiers_see_the_middle(self) -> None:
        """Seven eighths of the shorter side."""
        picture = np.zeros((64, 96, 3), np.uint8)
        picture[4:60, 20:76] = 255
        assert (adaptors.centre_crop(picture, 56) == 255).all()
        for edge in (np.s_[4:5], np.s_[59:60], np.s_[:, 20:21], np.s_[:, 75:76]):
            darker = picture.copy()
            darker[edge] = 0
            assert (adaptors.centre_crop(darker, 56) < 255).any()

    def test_the_background_is_no_class(self) -> None:
        class Scores(adaptors.Runtime):
            side = 8

            def __init__(self, count: int) -> None:
                self.count = count

            def __call__(self, image: Image) -> NDArray[np.float32]:
                return np.arange(self.count, dtype=np.float32)

        picture = np.zeros((8, 8, 3), np.uint8)
        for count, first in ((1001, 1), (1000, 0)):
            scores = adaptors.classifier(Scores(count))(picture)
            assert scores.tolist() == list(range(first, count))

    def test_a_coarse_map_lies_where_its_picture_does(self) -> None:
        class Halves(adaptors.Runtime):
            """Class 1 in the right half of the picture, which is twice as wide as high; else 0."""

            side = 32

            def __call__(self, image: Image) -> NDArray[np.int64]:
                assert (image[16:] == adaptors.GREY).all()
                assert (image[:16] == 200).all()
                classes = np.zeros((8, 8), np.int64)
                classes[:4, 4:] = 1
                classes[4:] = 7  # beside the picture
                return classes

        classes = adaptors.segmenter(Halves())(np.full((20, 40, 3), 200, np.uint8))
        np.testing.assert_array_equal(classes, np.indices((20, 40))[1] >= 20)

    def test_class_maps_of_many_classes(self) -> None:
        classes = adaptors.to_original(np.full((2, 2), 299), np.zeros((4, 4, 3), np.uint8))
        assert (classes == 299).all()

    def test_lite_rt_classifier_and_segmenter(self, tmp_path: Path, colours: Path) -> None:
        pytest.importorskip("ai_edge_litert")
        pytest.importorskip("flatbuffers")
        blue = np.asarray(PIL.Image.open(colours / "blue.png"))
        means = tmp_path / "means.tflite"
        means.write_bytes(lite_rt_model("MEAN"))
        assert adaptors.load_classifier(str(means))(blue).argmax() == 2
        largest = tmp_path / "largest.tflite"
        largest.write_bytes(lite_rt_model("ARG_MAX"))
        classes = adaptors.load_segmenter(str(largest))(blue)
        assert classes.shape == blue.shape[:2]
        assert (classes == 2).all()

    def test_lite_rt_scores_are_what_their_integers_mean(self, tmp_path: Path) -> None:
        pytest.importorskip("ai_edge_litert")
        pytest.importorskip("flatbuffers")
        (tmp_path / "means.tflite").write_bytes(lite_rt_model("MEAN", scale=0.5, zero=10))
        scores = adaptors.load_classifier(str(tmp_path / "means.tflite"))(np.full((16, 16, 3), 30, np.uint8))
        assert scores.tolist() == [10.0, 10.0, 10.0]

    def test_lite_rt_floats_are_from_minus_one_to_one(self, tmp_path: Path) -> None:
        pytest.importorskip("ai_edge_litert")
        pytest.importorskip("flatbuffers")
        (tmp_path / "means.tflite").write_bytes(lite_rt_model("MEAN", floats=True))
        picture = np.full((16, 16, 3), (0, 51, 255), np.uint8)
        scores = adaptors.load_classifier(str(tmp_path / "means.tflite"))(picture)
        assert scores.tolist() == pytest.approx([-1.0, -0.6, 1.0])

    @pytest.mark.parametrize("free", ["side", "layout"])
    def test_lite_rt_models_of_another_input(self, tmp_path: Path, free: str) -> None:
        pytest.importorskip("ai_edge_litert")
        pytest.importorskip("flatbuffers")
        shape = (1, -1, -1, 3) if free == "side" else (1, 3, 16, 16)
        (tmp_path / "net.tflite").write_bytes(lite_rt_model("MEAN", shape=shape))
        with pytest.raises(adaptors.NetworkError, match=r"expected \(1, side, side, 3\)"):
            adaptors.load_classifier(str(tmp_path / "net.tflite"))

    def test_fastestdet_reads_its_grid(self, tmp_path: Path) -> None:
        """A network that always answers with one object, whatever it sees."""
        pytest.importorskip("onnxruntime")
        onnx = pytest.importorskip("onnx")
        preds = np.zeros((1, 85, 22, 22), np.float32)
        preds[0, 0, 5, 10] = 1.0
        preds[0, 3:5, 5, 10] = np.log(0.25 / 0.75)  # sigmoid gives a quarter
        preds[0, 5 + 17, 5, 10] = 0.8
        value = onnx.numpy_helper.from_array(preds, "preds")
        zero = onnx.numpy_helper.from_array(np.zeros((1,), np.float32), "zero")
        helper = onnx.helper
        graph = helper.make_graph(
            [
                helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
                helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
                helper.make_node("Add", ["preds", "nothing"], ["out"]),
            ],
            "constant",
            [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 352, 352])],
            [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 85, 22, 22])],
            [value, zero],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.save_model(model, tmp_path / "det.onnx")
        detect = adaptors.load_detector(f"fastestdet:{tmp_path}/det.onnx", None)
        renumbered = adaptors.load_detector(f"fastestdet:{tmp_path}/det.onnx", ["cat", "horse"])
        assert renumbered(np.zeros((220, 440, 3), np.uint8)).classes.tolist() == [1]
        cats = adaptors.load_detector(f"fastestdet:{tmp_path}/det.onnx", ["cat"])
        assert len(cats(np.zeros((220, 440, 3), np.uint8)).scores) == 0
        with pytest.raises(
            adaptors.NetworkError, match=r"none of the annotations' categories \(Cat, Horse\)"
        ):
            adaptors.load_detector(f"fastestdet:{tmp_path}/det.onnx", ["Cat", "Horse"])
        boxes, scores, classes, masks = detect(np.zeros((220, 440, 3), np.uint8))
        assert masks is None
        assert classes.tolist() == [17]
        assert scores[0] == pytest.approx(0.8**0.4, abs=1e-5)
        np.testing.assert_allclose(boxes[0], [200 - 55, 50 - 27.5, 200 + 55, 50 + 27.5], atol=0.1)

    def test_fastestdet_sees_blue_first_and_finds_each_object_once(self, tmp_path: Path) -> None:
        """A network that is as sure of its objects as its first channel is bright."""
        pytest.importorskip("onnxruntime")
        onnx = pytest.importorskip("onnx")
        helper = onnx.helper
        sure, rest = np.zeros((2, 1, 85, 22, 22), np.float32)
        rest[0, 3:5] = np.log(0.25 / 0.75)
        # Two of one class beside each other, of which the second is less likely, and one of another class.
        for column, class_, score in ((10, 17, 0.8), (11, 17, 0.5), (12, 3, 0.4)):
            sure[0, 0, 5, column] = 1.0
            rest[0, 5 + class_, 5, column] = score
        constants = [
            onnx.numpy_helper.from_array(array, name)
            for name, array in (("sure", sure), ("rest", rest), ("first", np.zeros(1, np.int64)))
        ]
        graph = helper.make_graph(
            [
                helper.make_node("Gather", ["images", "first"], ["channel"], axis=1),
                helper.make_node("ReduceMean", ["channel"], ["mean"]),
                helper.make_node("Mul", ["mean", "sure"], ["scaled"]),
                helper.make_node("Add", ["scaled", "rest"], ["out"]),
            ],
            "first channel",
            [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 352, 352])],
            [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 85, 22, 22])],
            constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.save_model(model, tmp_path / "det.onnx")
        detect = adaptors.load_detector(f"fastestdet:{tmp_path}/det.onnx", None)
        found = detect(np.full((44, 44, 3), (255, 255, 51), np.uint8))
        assert found.classes.tolist() == [17, 3]
        # Blue is a fifth of the brightest.
        assert found.scores.tolist() == pytest.approx([0.2**0.6 * 0.8**0.4, 0.2**0.6 * 0.4**0.4], rel=1e-3)

    @pytest.mark.parametrize(("shape", "axis"), [((150, 8, 8), 0), ((8, 8, 150), 2), ((3, 8, 8), 0)])
    def test_scores_of_many_classes(self, shape: tuple[int, ...], axis: int) -> None:
        class Scores(adaptors.Runtime):
            side = 16

            def __call__(self, image: Image) -> NDArray[np.float32]:
                scores = np.zeros(shape, np.float32)
                scores.swapaxes(0, axis)[2] = 1
                return scores

        classes = adaptors.segmenter(Scores())(np.zeros((16, 16, 3), np.uint8))
        np.testing.assert_array_equal(classes, np.full((16, 16), 2))

    def test_wrong_names(self, tmp_path: Path) -> None:
        with pytest.raises(adaptors.NetworkError, match="no file"):
            adaptors.load_classifier("nowhere.onnx")
        (tmp_path / "net.bin").touch()
        with pytest.raises(adaptors.NetworkError, match=r"neither \.tflite nor \.onnx"):
            adaptors.load_segmenter(str(tmp_path / "net.bin"))
        with pytest.raises(adaptors.NetworkError, match="fastestdet:PATH"):
            adaptors.load_detector("net.onnx", [])
        (tmp_path / "net.onnx").write_bytes(b"something else")
        with pytest.raises(adaptors.NetworkError, match=r"net\.onnx is no ONNX model"):
            adaptors.load_classifier(str(tmp_path / "net.onnx"))

    def test_own_networks(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text("def bright():\n    return lambda image: image.mean((0, 1))\n")
        classify = adaptors.load_classifier(f"{file}:bright")
        assert classify(np.full((4, 4, 3), 7, np.uint8)).tolist() == [7, 7, 7]
        with pytest.raises(adaptors.NetworkError, match="no function 'dark'"):
            adaptors.load_classifier(f"{file}:dark")
        (tmp_path / "beside_mine.py").write_text("answer = 3\n")
        file.write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "from beside_mine import answer\n"
            "@dataclass\nclass Network:\n    value: int\n"
            "    def __call__(self, image):\n        return self.value\n"
            "def bright():\n    return Network(answer)\n"
        )
        assert adaptors.load_classifier(f"{file}:bright")(np.zeros((4, 4, 3), np.uint8)) == 3
        (tmp_path / "number.py").write_text("def network():\n    return 3\n")
        with pytest.raises(adaptors.NetworkError, match=r"number\.py:network made 3: a function of pictures"):
            adaptors.load_classifier(f"{tmp_path / 'number.py'}:network")
        (tmp_path / "lacking.py").write_text("import no_such_thing\n")
        with pytest.raises(adaptors.NetworkError, match=r"lacking\.py cannot be imported: .*no_such_thing"):
            adaptors.load_classifier(f"{tmp_path / 'lacking.py'}:network")
        before = adaptors.identity_of(f"{file}:bright")
        file.write_text("def bright():\n    return lambda image: image.max((0, 1))\n")
        assert (changed := adaptors.identity_of(f"{file}:bright")) != before
        (tmp_path / "beside_mine.py").write_text("answer = 4\n")
        assert (beside := adaptors.identity_of(f"{file}:bright")) != changed
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for each in tmp_path.glob("*.py"):
            each.rename(elsewhere / each.name)
        assert adaptors.identity_of(f"{elsewhere / file.name}:bright") == beside

    def test_what_own_networks_say_of_themselves(self, tmp_path: Path, colours: Path) -> None:
        file, weights = tmp_path / "mine.py", tmp_path / "weights"
        file.write_text(
            "from pathlib import Path\n"
            "class Network:\n"
            "    identity = (Path(__file__).parent / 'weights').read_text()\n"
            "    def __call__(self, image):\n        return image.mean((0, 1))\n"
        )
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        common = ["model", "--out", str(tmp_path / "out")]
        identities = set()
        for content in ("first", "second", "first"):
            weights.write_text(content)
            for options in (["--top1"], ["--agree", "classes"]):
                (task,) = tasks_of(parser.parse_args([*common, *options, f"{file}:Network", str(colours)]))
                assert content in task.identity
                identities.add(task.identity)
        assert len(identities) == 4
        # One network may be asked for several things.
        kinds = {
            tasks_of(parser.parse_args([*common, "--agree", kind, f"{file}:Network", str(colours)]))[
                0
            ].identity
            for kind in ("classes", "boxes", "pixels")
        }
        assert len(kinds) == 3
        file.write_text(file.read_text().replace(".read_text()", ""))
        with pytest.raises(adaptors.NetworkError, match="the identity of a network is a string"):
            adaptors.load_classifier(f"{file}:Network")


def lite_rt_model(
    operator: str,
    *,
    scale: float = 1.0,
    zero: int = 0,
    shape: tuple[int, ...] = (1, 16, 16, 3),
    floats: bool = False,
) -> bytes:
    """A LiteRT model on uint8 or floats: MEAN over the places, or ARG_MAX over the channels.

    ``scale`` and ``zero``: what the integers mean; ``shape`` of the input, -1 where it is free.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: str, shape: list[int], kind: int, buffer: int) -> Any:
        out = schema.TensorT()
        out.name, out.shape, out.type, out.buffer = name, shape, kind, buffer
        if kind == schema.TensorType.UINT8:
            out.quantization = schema.QuantizationParametersT()
            out.quantization.scale, out.quantization.zeroPoint = [scale], [zero]
        return out

    kinds = schema.TensorType
    kind = kinds.FLOAT32 if floats else kinds.UINT8
    axes = np.array([1, 2] if operator == "MEAN" else 3, np.int32)
    answer = (
        tensor("out", [1, 3], kind, 0) if operator == "MEAN" else tensor("out", [1, 16, 16], kinds.INT64, 0)
    )
    subgraph = schema.SubGraphT()
    subgraph.tensors = [
        tensor("in", [abs(side) for side in shape], kind, 0),
        tensor("axes", list(axes.shape), kinds.INT32, 1),
        answer,
    ]
    subgraph.tensors[0].shapeSignature = list(shape)
    subgraph.inputs, subgraph.outputs = [0], [2]
    step = schema.OperatorT()
    step.opcodeIndex, step.inputs, step.outputs = 0, [0, 1], [2]
    if operator == "MEAN":
        step.builtinOptionsType = schema.BuiltinOptions.ReducerOptions
        step.builtinOptions = schema.ReducerOptionsT()
    else:
        step.builtinOptionsType = schema.BuiltinOptions.ArgMaxOptions
        step.builtinOptions = schema.ArgMaxOptionsT()
        step.builtinOptions.outputType = kinds.INT64
    subgraph.operators = [step]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, operator)
    code.version = 2 if operator == "MEAN" else 1
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [subgraph]
    empty, constant = schema.BufferT(), schema.BufferT()
    constant.data = np.frombuffer(axes.tobytes(), np.uint8)
    model.buffers = [empty, constant]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class TestTorchvision:
    """Real constructors and preprocessing with random weights: no network access."""

    @pytest.fixture(autouse=True)
    def random_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = pytest.importorskip("torchvision").models
        monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: {})
        monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)

    def test_classifier(self, photo: Image) -> None:
        torch.manual_seed(0)
        scores = adaptors.torchvision_classifier("mobilenet_v3_small")(photo)
        assert scores.shape == (1000,)
        assert np.isfinite(scores).all()

    def test_detector_maps_categories_by_name(self, photo: Image, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        name = "fasterrcnn_mobilenet_v3_large_320_fpn"
        model, weights = adaptors.torchvision_network(name, "detector")
        answer = {
            "boxes": torch.tensor([[0.0, 0, 5, 5], [1, 1, 9, 9], [2, 2, 3, 3]]),
            "scores": torch.tensor([0.9, 0.8, 0.7]),
            "labels": torch.tensor([weights.meta["categories"].index(n) for n in ("dog", "zebra", "cat")]),
            "masks": torch.tensor([0.2, 0.8, 0.6])[:, None, None, None].expand(3, 1, *photo.shape[:2]),
        }
        real = adaptors.torchvision_detector(name, categories=["cat", "dog"])(photo)
        assert real.boxes.shape == (len(real.scores), 4)
        monkeypatch.setattr(
            adaptors, "torchvision_network", lambda *args, **options: (lambda images: [answer], weights)
        )
        found = adaptors.torchvision_detector(name, categories=["cat", "dog"])(photo)
        assert found.classes.tolist() == [1, 0]
        assert found.boxes.tolist() == [[0, 0, 5, 5], [2, 2, 3, 3]]
        assert real.masks is None
        assert found.masks is not None
        assert found.masks.all((1, 2)).tolist() == [False, True]
        assert found.masks.any((1, 2)).tolist() == [False, True]
        assert model.training is False

    def test_segmenter(self, photo: Image) -> None:
        torch.manual_seed(0)
        classes = adaptors.torchvision_segmenter("lraspp_mobilenet_v3_large")(photo)
        assert classes.shape == photo.shape[:2]
        assert classes.max() <= 20

    def test_unknown_and_unreachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = pytest.importorskip("torchvision").models
        with pytest.raises(adaptors.NetworkError, match="no classifier 'resnet1001'"):
            adaptors.load_classifier("torchvision:resnet1001")
        with pytest.raises(adaptors.NetworkError, match="no classifier 'fcn_resnet50'"):
            adaptors.load_classifier("torchvision:fcn_resnet50")

        def refuse(name: str, **options: object) -> None:
            raise OSError("no route")

        monkeypatch.setattr(models, "get_model", refuse)
        with pytest.raises(adaptors.NetworkError, match=r"no route.*put resnet101-.*\.pth into"):
            adaptors.load_classifier("torchvision:resnet101")


class TestResults:
    HUMAN = ((0.1, 0.5), (0.2, 0.6), (0.4, 0.7), (0.8, 0.8))

    def points(self, pairs: Any, strength: float) -> list[Point]:
        return [Point(i, strength, bpp, 30.0, score) for i, (bpp, score) in enumerate(pairs)]

    def test_half_the_rate_is_minus_fifty_percent(self) -> None:
        machine = [(bpp / 2, score) for bpp, score in self.HUMAN]
        curves = {
            "ours": self.points(self.HUMAN, 0.0) + self.points(machine, 1.0),
            "original": [Point(0, 0.0, 99.0, 100.0, 0.9)],
            "jpeg": self.points([(2 * bpp, score) for bpp, score in self.HUMAN], 0.0),
        }
        result = compare(curves, "ours")
        assert result["bd_rate_percent"] == {"ours human": -50.0, "jpeg": -75.0}
        row = result["at_equal_rate"][2]
        assert row["bpp"] == 0.2
        assert row["machine"] == 0.7
        assert row["human"] == pytest.approx(0.6)
        assert row["jpeg"] == pytest.approx(0.5)

    def test_noisy_scores_are_made_monotone(self) -> None:
        noisy = self.points([(0.1, 0.5), (0.2, 0.7), (0.4, 0.6), (0.8, 0.8)], 0.0)
        made = curve(noisy, 0.0)
        assert made is not None
        assert list(made.quality) == pytest.approx([0.5, 0.65, 0.65, 0.8])
        assert curve(self.points([(0.1, 0.5), (0.2, 0.4)], 0.0), 0.0) is None
        assert curve(noisy, 1.0) is None

    def test_no_score_outside_the_measured_rates(self) -> None:
        points = self.points(self.HUMAN, 0.0)
        assert score_at(points, 0.0, 0.09) is None
        assert score_at(points, 0.0, 0.81) is None
        assert score_at(points, 0.0, 0.2**0.5 * 0.4**0.5) == pytest.approx(0.65)


class TestJournal:
    def test_resumes_and_does_not_use_what_changed(self, tmp_path: Path) -> None:
        path, key = tmp_path / "judgements.jsonl", Key("task", "codec", 50.0, 1.0, "a.png")
        first = Journal(path, {"task": "1", "codec": "1"})
        first.add(key, Entry(0.5, 30.0, [[1, 2, 3]]))
        first.close()
        with path.open("a") as file:
            file.write('{"key": ["task", "co')  # killed while writing
        again = Journal(path, {"task": "1", "codec": "1"})
        assert again.get(key) == Entry(0.5, 30.0, [[1, 2, 3]])
        again.add(key._replace(image="b.png"), Entry(0.1, 20.0, True))
        again.close()
        assert len(path.read_text().splitlines()) == 2
        other = Journal(path, {"task": "1", "codec": "2"})
        assert other.get(key) is None
        other.close()

    def test_keeps_what_another_run_asked_for(self, tmp_path: Path) -> None:
        path, key = tmp_path / "judgements.jsonl", Key("task", "codec", 50.0, 1.0, "a.png")
        whole = {"task": "1", "codec": "1", "peer": "1"}
        pictures = {"task": {"a.png": "same"}}
        first = Journal(path, whole, pictures)
        first.add(key, Entry(0.5, 30.0, True))
        first.add(key._replace(codec="peer"), Entry(0.1, 20.0, True))
        first.close()
        for identities, of in (({"task": "1", "codec": "1"}, pictures), ({"other": "1", "peer": "1"}, None)):
            between = Journal(path, identities, of)
            assert between.get(key._replace(codec="peer")) is None
            between.close()
        again = Journal(path, whole, pictures)
        assert again.get(key) == Entry(0.5, 30.0, True)
        assert again.get(key._replace(codec="peer")) == Entry(0.1, 20.0, True)
        again.close()
        assert len(path.read_text().splitlines()) == 2
        another = Journal(path, whole | {"peer": "2"}, pictures)  # another peer of that name
        assert another.get(key._replace(codec="peer")) is None
        another.add(key._replace(codec="peer"), Entry(0.2, 25.0, False))
        another.close()
        first = Journal(path, whole, pictures)
        assert first.get(key._replace(codec="peer")) == Entry(0.1, 20.0, True)
        first.close()
        assert len(path.read_text().splitlines()) == 3

    def test_one_run_at_a_time(self, tmp_path: Path) -> None:
        with (
            locked(tmp_path / "out"),
            pytest.raises(ValueError, match=r"another run writes to .*out: wait for it"),
            locked(tmp_path / "out"),
        ):
            pass
        with locked(tmp_path / "out"):
            pass

    def test_does_not_use_what_was_said_of_replaced_pictures(self, tmp_path: Path) -> None:
        path, key = tmp_path / "judgements.jsonl", Key("task", "codec", 50.0, 1.0, "a.png")
        identities = {"task": "1", "codec": "1"}
        first = Journal(path, identities, {"task": {"a.png": "old", "b.png": "same"}})
        first.add(key, Entry(0.5, 30.0, True))
        first.add(key._replace(image="b.png"), Entry(0.1, 20.0, True))
        first.close()
        again = Journal(path, identities, {"task": {"a.png": "new", "b.png": "same"}})
        assert again.get(key) is None
        assert again.get(key._replace(image="b.png")) == Entry(0.1, 20.0, True)
        again.close()


def test_mean_iou_is_of_all_pictures_together() -> None:
    task = MeanIou("mask", lambda image: image, Path(), Path(), 2)
    # Counts of classes: in the truth, in what was seen, how often.
    judged = {"a": [[0, 0, 3], [0, 1, 1]], "b": [[0, 0, 1], [1, 1, 3]]}
    assert task.score(judged) == pytest.approx((4 / 5 + 3 / 4) / 2)


@pytest.fixture
def ours(tiny_store: Path, tiny_codec: Codec) -> Coder:
    coder = ugicm_coder(tiny_codec, tiny_store / "tiny", (1.0, 50.0))
    return dataclasses.replace(coder, views={"human": 0.0, "half": 0.5, "machine": 1.0})


def test_names_of_tasks_and_codecs_differ(tmp_path: Path, colours: Path, ours: Coder) -> None:
    """Else the identity of one would stand for both in the journal."""
    task = SameClasses("jpeg", colour_scores, colours)
    with pytest.raises(ValueError, match="need different names, 'jpeg' is used twice"):
        evaluate(ours, [pillow_coder("jpeg")], [task], tmp_path)


def test_evaluate_writes_everything_and_resumes(tmp_path: Path, colours: Path, ours: Coder) -> None:
    labels = read_labels(colours / "labels.csv")
    task = Top1("colours", colour_scores, colours, labels, identity="colours 1")
    calls = []

    def counted(image: Image, quality: float) -> bytes:
        calls.append(quality)
        return ours.encode(image, quality)

    counting = dataclasses.replace(ours, encode=counted)
    jpeg = dataclasses.replace(pillow_coder("jpeg"), qualities=(10.0, 30.0))
    shared = SameClasses("same colours", colour_scores, colours, identity="colours 1")
    report = evaluate(counting, [jpeg], [task, shared], tmp_path / "out")
    assert len(calls) == 2 * 3  # once for both tasks
    for name in ("machine.json", "machine.md", "machine.png", "strength.png", "judgements.jsonl"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert json.loads((tmp_path / "out" / "machine.json").read_text()) == report
    assert report["tasks"]["same colours"]["original"] == 1.0
    result = report["tasks"]["colours"]
    assert result["original"] == 1.0
    assert set(result["curves"]) == {"original", "tiny", "jpeg"}
    points = result["curves"]["tiny"]
    assert [(p["quality"], p["strength"]) for p in points] == [(q, s) for q in (1, 50) for s in (0, 0.5, 1)]
    assert points[0]["bpp"] == points[2]["bpp"] < points[3]["bpp"]
    real = [8 * len(ours.encode(np.asarray(PIL.Image.open(colours / n)), 1.0)) / 128**2 for n in labels]
    assert points[0]["bpp"] == pytest.approx(np.mean(real), abs=1e-5)
    calls.clear()
    again = evaluate(counting, [jpeg], [task, shared], tmp_path / "out")
    assert calls == []
    assert again["tasks"] == report["tasks"]
    first = colours / next(iter(labels))
    PIL.Image.open(first).transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT).save(first)
    evaluate(counting, [], [shared], tmp_path / "out")
    assert len(calls) == 2
    calls.clear()
    evaluate(counting, [], [dataclasses.replace(task, identity="colours 2")], tmp_path / "out", limit=2)
    assert len(calls) == 2 * 2


def test_fewer_pictures_are_spread_evenly(colours: Path) -> None:
    task = Top1("task", colour_scores, colours, {f"{index}.png": 0 for index in range(10)})
    assert list(chosen_images([task], 4)["task"]) == ["0.png", "3.png", "6.png", "9.png"]
    assert len(chosen_images([task], 11)["task"]) == 10


def test_table_of_results() -> None:
    task = {
        "metric": "mAP",
        "pictures": 20,
        "original": 0.5,
        "bd_rate_percent": {"ours human": -12.34, "jpeg": None, "webp": 5.0},
        "bd_rate_error": {"ours human": 3.21, "jpeg": None},
        "at_equal_rate": [{"bpp": 0.25, "machine": 0.4321, "human": 0.4, "jpeg": None}],
    }
    lines = table({"model": "ours", "command": "evaluate", "tasks": {"boxes": task}}).splitlines()
    assert lines[2:5] == ["| ours human | -12.3 ± 3.2 % |", "| jpeg |  |", "| webp | +5.0 % |"]
    assert "**boxes**: mAP at equal rate, 20 pictures; 0.500 uncompressed" in lines
    assert lines[lines.index("| bpp | machine | human | jpeg |") + 2] == "| 0.250 | 0.432 | 0.400 |  |"


def test_contact_sheet_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", np.full((50, 40, 3), 100, np.uint8))
    coder = Coder(
        "coder", "", (), lambda image, quality: bytes(int(quality)),
        lambda data, strength: np.full((50, 40, 3), 100 + 5 * (1 + strength), np.uint8),
    )  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda draw, place, text, **_: said.append(text))
    contact_sheet(coder, 25.0, {"a": tmp_path / "a.png"}, tmp_path / "sheet.png")
    assert said == ["a, 40x50", "human, 0.100 bpp, 34.15 dB", "machine, 0.100 bpp, 28.13 dB"]
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        middles = [sheet.getpixel((20 + column * (40 + 6), 16 + 25)) for column in range(3)]
    assert middles == [(value,) * 3 for value in (100, 105, 110)]


def test_other_masks_are_other_data(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.png").write_bytes(b"old")
    before = identity_of_data(masks)
    (masks / "a.png").write_bytes(b"new")
    assert identity_of_data(masks) != before
    (masks / "a.png").write_bytes(b"old")
    assert identity_of_data(masks) == before == f"masks {before.split()[1]}"


def test_plots_of_many_tasks_fit_a_page(tmp_path: Path) -> None:
    curves = {
        "original": [Point(0, 0, 24, 99, 0.9)],
        "ours": [Point(q, s, q / 50, 30 + q / 10, 0.5 + s / 10) for q in (10, 40) for s in (0.0, 0.5, 1.0)],
        "webp": [Point(q, 0, q / 40, 30 + q / 10, 0.5) for q in (10, 40)],
    }
    task = {"metric": "mAP", "curves": {name: [p._asdict() for p in line] for name, line in curves.items()}}
    report = {"model": "ours", "tasks": {f"network {index}": task for index in range(6)}}
    for plot in (plot_scores, plot_strengths):
        plot(report, tmp_path / "plot.png")
        with PIL.Image.open(tmp_path / "plot.png") as picture:
            assert 1000 < picture.width < 2000
            assert picture.height < picture.width < 2.5 * picture.height
        plot(report, tmp_path / "plot.svg")
        assert (tmp_path / "plot.svg").read_text().count('<g id="legend_') == 1


def test_command_line(
    tmp_path: Path, colours: Path, colour_network: str, tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    common = [str(tiny_store / "tiny"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(ValueError, match="--top1, --map, --mask-map, --miou"):
        run(parser.parse_args(common))
    options = ["--qualities", "1", "50", "--peers", "jpeg", "--limit", "2"]
    arguments = parser.parse_args([*common, *options, "--top1", colour_network, str(colours)])
    assert run(arguments) == 0
    assert "BD-rate of tiny (machine view)" in capsys.readouterr().out
    assert not (tmp_path / "out" / "strength.png").exists()
    with PIL.Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 3 * 128

    between = [*common, *options, "--strengths", "0.25", "--top1", colour_network, str(colours)]
    assert run(parser.parse_args(between)) == 0
    (task,) = json.loads((tmp_path / "out" / "machine.json").read_text())["tasks"].values()
    assert {point["strength"] for point in task["curves"]["tiny"]} == {0.0, 0.25, 1.0}
    assert (tmp_path / "out" / "strength.png").exists()

    (tmp_path / "wide").mkdir()
    PIL.Image.new("RGB", (300, 70)).save(tmp_path / "wide" / "wide.png")
    again = [*common, *options, "--top1", colour_network, str(colours)]
    assert run(parser.parse_args([*again, "--sheet-images", str(tmp_path / "wide")])) == 0
    with PIL.Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 3 * 300 > 2 * sheet.height


def test_judgements_by_other_labels_are_not_reused(
    tmp_path: Path, colours: Path, colour_network: str, tiny_store: Path
) -> None:
    command = ["evaluate", str(tiny_store / "tiny"), "--device", "cpu", "--qualities", "1", "--peers"]
    command += ["--top1", colour_network, str(colours), "--out", str(tmp_path / "out")]
    labels, scores = colours / "labels.csv", []
    for text in (labels.read_text(), labels.read_text().replace(",2", ",1")):
        labels.write_text(text)
        assert main(command) == 0
        (task,) = json.loads((tmp_path / "out" / "machine.json").read_text())["tasks"].values()
        scores.append(task["original"])
    assert scores == [1, pytest.approx(2 / 3)]


def test_judgements_of_other_classes_are_not_reused(tmp_path: Path, colours: Path, tiny_store: Path) -> None:
    network = tmp_path / "mine.py"
    network.write_text("def bright():\n    return lambda image: (image[..., 0] > 128) * 2\n")
    for name in COLOURS:
        save(tmp_path / "masks" / f"{name}.png", np.full((128, 128), 2 * (name == "red"), np.uint8))
    command = ["evaluate", str(tiny_store / "tiny"), "--device", "cpu", "--qualities", "1", "--peers"]
    command += ["--miou", f"{network}:bright", str(colours), str(tmp_path / "masks")]
    command += ["--out", str(tmp_path / "out"), "--classes"]
    assert main([*command, "3"]) == 0
    assert main([*command, "2"]) == 1  # not a traceback of a confusion matrix that is too small


def test_a_second_run_is_refused(
    tmp_path: Path, colours: Path, colour_network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "no-such-model", "--top1", colour_network, str(colours), "--out", str(tmp_path)]
    with locked(tmp_path):
        assert main(command) == 1
    assert f"another run writes to {tmp_path}" in capsys.readouterr().err


def test_what_cannot_be_evaluated(
    tmp_path: Path,
    colours: Path,
    colour_network: str,
    tiny_store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "labels.csv").write_text("name,label\na.png,1\n")
    (other / "captions.json").write_text('{"annotations": []}')
    command = ["evaluate", str(tiny_store / "tiny"), "--out", str(tmp_path / "out")]
    for options, message in (
        (["--top1", "torchvision:resnet18", str(other)], "labels.csv: not rows of file, class_index"),
        (["--map", "fastestdet:x.onnx", str(other), str(other / "captions.json")], "it is no COCO file"),
        (["--agree", "classes", "x.onnx", str(tmp_path)], "whose pictures are judged: give another"),
        (
            ["--top1", colour_network, str(colours), "--sheet-images", str(other)],
            "no pictures in",
        ),
        (["--limit", "0"], "limit must be at least 1"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--qualities", "500", "--jobs", "2"], "a quality must be in 1..100, got 500"),
        (["--sheet-quality", "0"], "a quality must be in 1..100, got 0"),
        (["--strengths", "0.5", "2"], "a strength must be in 0..1, got 2"),
    ):
        assert main([*command, *options]) == 1
        assert message in capsys.readouterr().err
    assert main(["evaluate", "x", "--out", str(colours), "--agree", "classes", "x.onnx", str(colours)]) == 1
    assert {path.suffix for path in colours.iterdir()} <= {".png", ".csv"}  # nothing was left there


def test_a_model_for_people_alone_is_a_peer(
    tmp_path: Path, colours: Path, colour_network: str, tiny_store: Path
) -> None:
    model = str(tiny_store / "tiny")
    command = ["evaluate", model, "--plain", model, "--device", "cpu", "--qualities", "1", "50", "--peers"]
    command += ["--agree", "classes", colour_network, str(colours), "--out", str(tmp_path)]
    assert main(command) == 0
    (task,) = json.loads((tmp_path / "machine.json").read_text())["tasks"].values()
    assert set(task["bd_rate_percent"]) == {"tiny human", "plain tiny"}
    human = [point for point in task["curves"]["tiny"] if point["strength"] == 0]
    assert task["curves"]["plain tiny"] == human


def test_jobs_judge_the_same(tmp_path: Path, colours: Path, colour_network: str, tiny_store: Path) -> None:
    command = ["evaluate", str(tiny_store / "tiny"), "--device", "cpu", "--qualities", "1", "50"]
    command += ["--peers", "jpeg", "--top1", colour_network, str(colours)]
    command += ["--agree", "classes", colour_network, str(colours), "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert main([*command, str(tmp_path / "two"), "--jobs", "2"]) == 0
    one, two = (json.loads((tmp_path / name / "machine.json").read_text()) for name in ("one", "two"))
    assert one["tasks"] == two["tasks"]
    assert not list((tmp_path / "two").glob("*part*"))
    lines = [(tmp_path / name / "judgements.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert sorted(lines[0]) == sorted(lines[1])

    # What a killed run of three left is taken, whatever this one's number.
    left = tmp_path / "three" / "judgements.part-1-of-3.jsonl"
    left.parent.mkdir()
    rows = [json.loads(line) for line in lines[0]]
    for row in rows:
        row["entry"][0] = 0.123456  # bits per pixel
    left.write_text("\n".join([*map(json.dumps, rows), '{"key": ["col']))
    assert main([*command, str(tmp_path / "three")]) == 0
    three = json.loads((tmp_path / "three" / "machine.json").read_text())
    points = [p for task in three["tasks"].values() for line in task["curves"].values() for p in line]
    # What its rates then leave to be measured is new.
    assert {p["bpp"] for p in points if p["quality"] <= 50} == {0.123456}
    assert not list((tmp_path / "three").glob("*part*"))


def test_high_rates_of_a_codec_are_skipped(tmp_path: Path, colours: Path, ours: Coder) -> None:
    ours = dataclasses.replace(ours, qualities=(1.0,))
    webp = dataclasses.replace(pillow_coder("webp"), qualities=(1.0, 90.0, 95.0))
    task = Top1("colours", colour_scores, colours, read_labels(colours / "labels.csv"))
    points = evaluate(ours, [webp], [task], tmp_path)["tasks"]["colours"]["curves"]["webp"]
    assert [p["quality"] for p in points] == [1.0, 90.0]
    assert points[0]["bpp"] < 1 < points[1]["bpp"]


class TestAgreement:
    """Tasks whose truth is the network's own answer on the original."""

    def test_classes_overlap(self, colours: Path) -> None:
        def colour_shares(image: Image) -> NDArray[np.float64]:
            return (scores := colour_scores(image)) / max(scores.sum(), 1)

        task = SameClasses("colours", colour_shares, colours)
        assert list(task.images()) == ["blue.png", "green.png", "red.png"]
        original = np.asarray(PIL.Image.open(colours / "red.png"))
        assert task.judge("red.png", original) == pytest.approx(1)
        blue = np.zeros_like(original)
        blue[..., 2] = 255
        assert task.judge("red.png", blue) == pytest.approx(30 / 280, abs=0.01)
        # Of red 220, 30, 30 a third of the way to blue's 20, 40, 210.
        mixed = np.full((64, 64, 3), (153, 33, 90), np.uint8)
        shares = np.array([220, 30, 30]) / 280, np.array([153, 33, 90]) / 276
        assert task.judge("red.png", mixed) == pytest.approx(float(np.minimum(*shares).sum()), abs=0.01)
        assert task.score({"a": 1.0, "b": 0.5}) == 0.75

    def test_scores_below_zero_are_logits(self) -> None:
        np.testing.assert_allclose(probabilities(np.array([-1.0, 1.0])), [[0.1192, 0.8808]], atol=1e-4)
        np.testing.assert_allclose(probabilities(np.array([1, 3], np.uint8)), [[0.25, 0.75]])

    def test_a_network_of_logits_has_none_that_are_shares(self) -> None:
        expected = probabilities(np.array([-0.1, 3.0, 1.0]))
        np.testing.assert_allclose(probabilities(np.array([0.0, 3.1, 1.1])), expected)
        whole = probabilities(np.array([-1, 2], np.int8))
        np.testing.assert_allclose(whole, probabilities(np.array([-1.0, 2.0])))

    def test_two_answers_of_a_network_are_read_alike(self, colours: Path) -> None:
        scores = np.linspace(0, 1, 1000)
        # One sums up to less than what a thousand rounded probabilities may, the other to more.
        less, more = scores * 2.95 / scores.sum(), scores * 2.97 / scores.sum()
        answers = [more, less]
        task = SameClasses("classes", lambda image: answers.pop(0), colours)
        assert task.judge("red.png", np.zeros((64, 64, 3), np.uint8)) > 0.99

    def test_rounded_probabilities_are_shares(self) -> None:
        """As LiteRT's are: most of a thousand classes are rounded to nothing."""
        scores = np.zeros(1000)
        scores[:3] = 0.5, 0.2, 0.1
        np.testing.assert_allclose(probabilities(scores), [scores / 0.8])
        np.testing.assert_allclose(probabilities(np.array([0.3, 0.69])), [np.array([0.3, 0.69]) / 0.99])

    def test_boxes_of_the_original_are_the_truth(self, colours: Path) -> None:
        pytest.importorskip("pycocotools")
        sure, unsure = [10.0, 10, 50, 40], [60.0, 60, 90, 90]

        def detect(image: Image) -> Detections:
            boxes = np.array([sure, unsure]) + (0 if image.any() else 15)
            return Detections(boxes, np.array([0.9, 0.1]), np.array([3, 3]))

        task = SameBoxes("boxes", detect, colours)
        pictures = {name: np.asarray(PIL.Image.open(path)) for name, path in task.images().items()}
        same = {name: json.loads(json.dumps(task.judge(name, p))) for name, p in pictures.items()}
        assert task.score(same) == pytest.approx(1)
        moved = task.judge("red.png", np.zeros_like(pictures["red.png"]))

        def doubt(score: float) -> SameBoxes:
            found = Detections(np.array([sure]), np.array([score]), np.array([3]))
            return SameBoxes("boxes", lambda image: found, colours)

        assert [len(doubt(s).judge("red.png", pictures["red.png"])[0]) for s in (0.29, 0.3)] == [0, 1]
        # The box of score .9 alone is the truth; of two pictures one has it at no threshold.
        assert [row[1] for row in moved[0]] == [0.9]
        assert 0 < task.score({"red.png": moved, "blue.png": same["blue.png"]}) < 0.6
        assert task.score({"red.png": moved}) == 0
        assert task.score({"red.png": [[], moved[1]]}) == 0
        judged = same | {"red.png": moved, "green.png": [[], moved[1]]}
        parts = [["red.png"], ["blue.png"], ["green.png"], ["blue.png", "red.png"], list(judged)]
        expected = [task.score({name: judged[name] for name in part}) for part in parts]
        assert task.scores(judged, parts) == expected
        assert expected[:3] == [0, pytest.approx(1), 0]

    def test_pixels_of_objects(self, colours: Path) -> None:
        def segment(image: Image) -> NDArray[np.int64]:
            classes = np.zeros(image.shape[:2], np.int64)
            classes[: 40 if image.any() else 20, :10] = 7
            return classes

        task = SamePixels("pixels", segment, colours)
        original = np.asarray(PIL.Image.open(colours / "red.png"))
        assert task.judge("red.png", original) == [400, 400]
        assert task.judge("red.png", np.zeros_like(original)) == [200, 400]
        assert task.score({"a": [400, 400], "b": [2, 4], "c": [0, 0]}) == 0.75
        assert task.score({"c": [0, 0]}) == 0
        assert task.expected("red.png").dtype == np.uint8  # one stays for each picture

    def test_pixels_of_many_classes(self, colours: Path) -> None:
        for largest in (256, -1):
            classes = np.full((2, 2), largest)
            task = SamePixels("pixels", lambda image, classes=classes: classes, colours)
            either = 4 * (largest > 0)
            assert task.judge("red.png", np.zeros((2, 2, 3), np.uint8)) == [either, either]

    def test_a_network_sees_a_picture_once(self) -> None:
        seen: list[int] = []
        network = remembered(lambda image: seen.append(int(image[0, 0, 0])) or len(seen))
        pictures = [np.full((2, 2, 3), value, np.uint8) for value in (1, 2)]
        assert [network(pictures[i]) for i in (0, 0, 1, 1, 0)] == [1, 1, 2, 2, 3]
        assert network(pictures[0].copy()) == 4  # equal, but another
        assert seen == [1, 2, 1, 1]

    def test_command_line(self, tmp_path: Path, colours: Path, tiny_store: Path) -> None:
        network = tmp_path / "mine.py"
        network.write_text(
            "def colours():\n    return lambda image: image.mean((0, 1))\n"
            "def bright():\n    return lambda image: (image[..., 0] > 128) * 1\n"
        )
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        common = [str(tiny_store / "tiny"), "--out", str(tmp_path / "out"), "--device", "cpu"]
        common += ["--qualities", "1", "50", "--peers"]
        classes = ["--agree", "classes", f"{network}:colours", str(colours)]
        pixels = ["--agree", "pixels", f"{network}:bright", str(colours)]
        assert run(parser.parse_args([*common, *classes, *pixels])) == 0
        report = json.loads((tmp_path / "out" / "machine.json").read_text())
        for name in ("colours agreement, colours", "bright agreement, colours"):
            assert report["tasks"][name]["original"] == 1
            assert report["tasks"][name]["pictures"] == 3
        with pytest.raises(ValueError, match="--agree needs classes, boxes or pixels, got 'words'"):
            run(parser.parse_args([*common, "--agree", "words", f"{network}:colours", str(colours)]))


class TestErrors:
    """Standard errors of BD-rates for the choice of pictures."""

    NAMES = tuple(f"{i:02}.png" for i in range(40))

    def errors(self, tmp_path: Path, scatter: float) -> dict[str, float | None]:
        """Of pictures whose machine view halves the rate, more or less: by `scatter`."""
        journal = Journal(tmp_path / f"{scatter}.jsonl", {})
        random = np.random.default_rng(1)
        task = SameClasses("task", colour_scores, tmp_path)
        for name in self.NAMES:
            share = 0.5 * np.exp(scatter * random.standard_normal())
            for step in range(4):
                for strength in (0.0, 1.0):
                    bits = 0.1 * 2**step
                    score = 0.2 * (step + np.log2(1 / share) * strength)
                    key = Key("task", "ours", float(step), strength, name)
                    journal.add(key, Entry(bits, 30.0, score))
        points = [
            point
            for step in range(4)
            for strength in (0.0, 1.0)
            for point in points_of(task, "ours", float(step), strength, [self.NAMES], journal)
        ]
        assert compare({"ours": points}, "ours")["bd_rate_percent"]["ours human"] == pytest.approx(-50, abs=8)
        found = bd_rate_errors(task, {"ours": points}, "ours", self.NAMES, journal)
        assert bd_rate_errors(task, {"ours": points}, "ours", self.NAMES[:19], journal) == {}
        journal.close()
        return found

    def test_the_error_of_a_mean_is_known(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """That of the mean of ten groups of pictures, where what is compared is a mean over pictures."""
        journal, task = Journal(tmp_path / "mean.jsonl", {}), SameClasses("task", colour_scores, tmp_path)
        scores = np.random.default_rng(2).normal(0, 1, len(self.NAMES))
        for name, score in zip(self.NAMES, scores, strict=True):
            journal.add(Key("task", "ours", 1.0, 1.0, name), Entry(0.1, 30.0, float(score)))
        points = points_of(task, "ours", 1.0, 1.0, [self.NAMES], journal)
        monkeypatch.setattr(
            "ugicm_train.evaluation.machine.compare",
            lambda curves, ours: {"bd_rate_percent": {"mean": 100 * curves[ours][0].score}},
        )
        found = bd_rate_errors(task, {"ours": points}, "ours", self.NAMES, journal)
        journal.close()
        groups = 100 * scores.reshape(4, 10).mean(0)
        assert found == {"mean": pytest.approx(groups.std(ddof=1) / 10**0.5, abs=0.006)}

    def test_equal_pictures_have_none(self, tmp_path: Path) -> None:
        assert self.errors(tmp_path, 0.0) == {"ours human": 0.0}

    def test_the_error_is_that_of_the_mean(self, tmp_path: Path) -> None:
        # The rate's logarithm scatters by .3: that of its mean by .3 / 40^.5, and -50 % by half of it.
        expected = 100 * 0.5 * 0.3 / 40**0.5
        assert self.errors(tmp_path, 0.3)["ours human"] == pytest.approx(expected, rel=0.5)

"""Networks as the tasks want them: callables on RGB pictures, uint8 (H, W, 3).

A network is named on the command line by

    model.tflite, model.onnx        classifier or segmenter, by its input and output shapes
    fastestdet:model.onnx           FastestDet detector
    torchvision:resnet101           any model of torchvision with its own weights and preprocessing
    evaluators.py:my_network        your own: a function without arguments that returns the callable, whose
                                    `identity`, if there is one, tells apart what it loads
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ugicm_train.evaluation.metrics import Image
from ugicm_train.evaluation.tasks import Classifier, Detections, Detector, Segmenter

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
CROP_SHARE = 0.875
"""Side of the centred square that classifiers see, as part of the shorter side."""
GREY = 128
"""Fills what a segmenter's square input has beside the picture."""
MASK_MIN = 0.5
"""Pixels of an object are those that the network gives at least so much."""
OTHERWISE = "other networks need a function of your own: FILE.py:FUNCTION"
"""What an error about a network's file says at its end."""

Array = NDArray[Any]


class NetworkError(ValueError):
    """A network cannot be loaded; the message says why."""


# ------------------------------------------------------------------ preprocessing


def centre_crop(image: Image, side: int) -> Image:
    """Centred square of `CROP_SHARE` of the shorter side, bicubic to (side, side, 3)."""
    height, width = image.shape[:2]
    crop = int(CROP_SHARE * min(height, width))
    top, left = (height - crop) // 2, (width - crop) // 2
    square = PIL.Image.fromarray(image[top : top + crop, left : left + crop])
    return np.asarray(square.resize((side, side), PIL.Image.Resampling.BICUBIC))


def letterbox(image: Image, side: int) -> tuple[Image, int, int]:
    """Longer side to `side`, at the top left of a grey square; the square, the picture's height and width."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    square = np.full((side, side, 3), GREY, np.uint8)
    square[:height, :width] = np.asarray(
        PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR)
    )
    return square, height, width


def normalised(image: Image) -> NDArray[np.float32]:
    """(H, W, 3) uint8 -> (1, 3, H, W) with the mean and deviation of ImageNet."""
    x = (image.astype(np.float32) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    return x.transpose(2, 0, 1)[None]


def to_original(classes: Array, image: Image) -> NDArray[np.int32]:
    """Class map resized to the size of the picture, nearest neighbour."""
    picture = PIL.Image.fromarray(classes.astype(np.int32))
    size = (image.shape[1], image.shape[0])
    return np.asarray(picture.resize(size, PIL.Image.Resampling.NEAREST))


# ------------------------------------------------------------------ runtimes


class Runtime:
    """A network on square pictures of `side` pixels; what it returns has no batch dimension."""

    side: int

    def __call__(self, image: Image) -> Array:
        """Raw RGB, uint8 (side, side, 3) -> the first output."""
        raise NotImplementedError


class LiteRt(Runtime):
    """LiteRT (TensorFlow Lite) model. A uint8 input takes 0..255 as is, a float input -1..1."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._net = Interpreter(str(path))
        self._net.allocate_tensors()
        self._input, self._output = self._net.get_input_details()[0], self._net.get_output_details()[0]
        # -1 where a side is free.
        shape = self._input["shape_signature"].tolist()
        self.side = shape[1] if len(shape) == 4 else 0
        if self.side < 2 or shape[1:] != [self.side, self.side, 3]:
            raise NetworkError(f"{path}: input of shape {shape}, expected (1, side, side, 3); {OTHERWISE}")
        if self._input["dtype"] not in (np.uint8, np.float32):
            raise NetworkError(f"{path}: input of type {self._input['dtype']}, expected uint8 or float32")

    def __call__(self, image: Image) -> Array:
        x = image if self._input["dtype"] == np.uint8 else (image / np.float32(127.5) - 1).astype(np.float32)
        self._net.set_tensor(self._input["index"], x[None])
        self._net.invoke()
        out = self._net.get_tensor(self._output["index"])[0]
        scale, zero = self._output["quantization"]
        return scale * (out.astype(np.float32) - zero) if scale else out


class Onnx(Runtime):
    """ONNX model with a float32 input (1, 3, side, side), normalised as for ImageNet."""

    def __init__(self, path: Path) -> None:
        self._session = onnx_session(path)
        given = self._session.get_inputs()[0]
        self._name, self.side = given.name, square_side(path, given)

    def __call__(self, image: Image) -> Array:
        return self._session.run(None, {self._name: normalised(image)})[0][0]


def square_side(path: Path, given: Any) -> int:
    """Side of an ONNX model's input; `NetworkError` where it is not float32 (1, 3, side, side)."""
    batch, *shape = given.shape or [0]
    side = shape[-1] if shape else None
    one = batch == 1 or not isinstance(batch, int)  # a name: as many as are given
    if given.type != "tensor(float)" or not isinstance(side, int) or shape != [3, side, side] or not one:
        raise NetworkError(
            f"{path}: input {given.type} of shape {given.shape}, expected tensor(float) of "
            f"(1, 3, side, side); {OTHERWISE}"
        )
    return side


def onnx_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, of no common base
        raise NetworkError(f"{path} is no ONNX model that can be run: {error}") from error


# ------------------------------------------------------------------ networks from files


def classifier(runtime: Runtime) -> Classifier:
    """ImageNet classifier; of 1001 outputs the first, the background, is dropped."""

    def classify(image: Image) -> Array:
        out = runtime(centre_crop(image, runtime.side))
        if max(out.shape, default=0) != out.size:
            raise NetworkError(f"a classifier gives one score for each class, this network {out.shape}")
        scores = out.reshape(-1)
        return scores[1:] if len(scores) == 1001 else scores

    return classify


def segmenter(runtime: Runtime) -> Segmenter:
    """Segmenter whose output is a class map (h, w), or scores (h, w, classes) or (classes, h, w)."""

    def segment(image: Image) -> NDArray[np.int32]:
        square, height, width = letterbox(image, runtime.side)
        out = runtime(square)
        single = out.ndim == 3 and 1 in (out.shape[0], out.shape[2])
        if single and np.issubdtype(out.dtype, np.integer):
            out = out.squeeze(0 if out.shape[0] == 1 else 2)
        elif single or out.ndim not in (2, 3):
            raise NetworkError(
                "a segmenter gives a map of classes or one of scores for each class, this network "
                f"{out.dtype} of shape {out.shape}"
            )
        if out.ndim == 3:
            # What a square picture gives is square.
            out = out.argmax(0 if out.shape[1] == out.shape[2] else 2)
        scale = out.shape[0] / runtime.side  # some networks answer at lower resolution
        rows, columns = (math.ceil(length * scale) for length in (height, width))
        return to_original(out[:rows, :columns], image)

    return segment


def class_indexes(own: Sequence[str], categories: Sequence[str] | None) -> NDArray[np.int64]:
    """Where a detector's classes are among those of the annotations, by name; -1 where they are not.

    Raises:
        NetworkError: none is.
    """
    if categories is None:
        return np.arange(len(own))
    indexes = np.array([categories.index(name) if name in categories else -1 for name in own], np.int64)
    if (indexes < 0).all():
        raise NetworkError(
            f"the detector knows none of the annotations' categories ({', '.join(categories)}); its own are "
            f"{', '.join(own)}"
        )
    return indexes


def fastestdet(path: Path, *, categories: Sequence[str] | None) -> Detector:
    """FastestDet (dog-qiuqiu/FastestDet) as ONNX: (1, 3, 352, 352) BGR in 0..1 -> (1, 85, 22, 22).

    ``categories``: as in `torchvision_detector`; its own are COCO's 80.
    """
    from torchvision.models import get_model_weights
    from torchvision.ops import batched_nms

    session = onnx_session(path)
    side, shape = square_side(path, session.get_inputs()[0]), session.get_outputs()[0].shape
    # Names in place of sizes: they are not known before it runs.
    differs = any(isinstance(a, int) and a != b for a, b in zip(shape[1:], (85, 22, 22), strict=False))
    if side != 352 or differs:
        raise NetworkError(
            f"{path}: from {side}x{side} pixels to {shape}; FastestDet takes 352x352 to (1, 85, 22, 22)"
        )
    # COCO's names in the order of their ids; torchvision has them with the ids that COCO left out.
    coco = get_model_weights("fasterrcnn_resnet50_fpn").DEFAULT.meta["categories"]
    indexes = class_indexes([name for name in coco if name not in ("__background__", "N/A")], categories)

    def detect(image: Image) -> Detections:
        x = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
        x = F.interpolate(x, size=(352, 352), mode="bilinear")  # as cv2.INTER_LINEAR: no antialiasing
        out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0][0])
        best, classes = out[5:].max(0)
        scores = out[0] ** 0.6 * best**0.4
        cells = out.shape[1]
        rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
        centre = torch.stack([out[1].tanh() + columns, out[2].tanh() + rows], -1) / cells
        half = out[3:5].sigmoid().permute(1, 2, 0) / 2
        size = torch.tensor([image.shape[1], image.shape[0]])
        boxes = torch.cat([(centre - half) * size, (centre + half) * size], -1)
        keep = scores > 0.001
        boxes, scores, classes = boxes[keep], scores[keep], classes[keep]
        first = batched_nms(boxes, scores, classes, iou_threshold=0.45)[:100]
        boxes = boxes[first].clamp(min=0).minimum(size.repeat(2))
        found = indexes[classes[first].numpy()]
        known = found >= 0
        return Detections(boxes.numpy()[known], scores[first].numpy()[known], found[known])

    return detect


# ------------------------------------------------------------------ torchvision


def torchvision_network(name: str, kind: str) -> tuple[Any, Any]:
    """A model of torchvision in evaluation mode, with its default weights, and their description.

    Args:
        name: as in ``torchvision.models.list_models()``.
        kind: classifier, detector or segmenter.
    """
    from torchvision import models

    modules = {"classifier": models, "detector": models.detection, "segmenter": models.segmentation}
    if name not in (known := models.list_models(module=modules[kind])):
        raise NetworkError(f"torchvision has no {kind} {name!r}; it has {', '.join(known)}")
    weights = models.get_model_weights(name).DEFAULT
    try:
        model = models.get_model(name, weights=weights)
    except OSError as error:
        raise NetworkError(
            f"torchvision cannot fetch the weights of {name} ({error}): without network access put "
            f"{Path(weights.url).name} into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return model.eval().requires_grad_(False), weights


def torchvision_classifier(name: str) -> Classifier:
    """With torchvision's own preprocessing, as its published accuracies."""
    model, weights = torchvision_network(name, "classifier")
    preprocess = weights.transforms()

    @torch.inference_mode()
    def classify(image: Image) -> Array:
        return model(preprocess(_tensor(image))[None])[0].numpy()

    return classify


def torchvision_detector(name: str, *, categories: Sequence[str] | None) -> Detector:
    """Faster R-CNN, Mask R-CNN (with its masks), RetinaNet, ...

    `categories` are the class names of the annotations, in their order; torchvision's classes that are not
    among them are dropped. None keeps all, by torchvision's own index.
    """
    model, weights = torchvision_network(name, "detector")
    preprocess = weights.transforms()
    indexes = class_indexes(weights.meta["categories"], categories)

    @torch.inference_mode()
    def detect(image: Image) -> Detections:
        found = model([preprocess(_tensor(image))])[0]
        classes = indexes[found["labels"].numpy()]
        known = classes >= 0
        masks = (found["masks"][:, 0] > MASK_MIN).numpy()[known] if "masks" in found else None
        return Detections(
            found["boxes"].numpy()[known], found["scores"].numpy()[known], classes[known], masks
        )

    return detect


def torchvision_segmenter(name: str) -> Segmenter:
    """DeepLabv3, FCN, LR-ASPP with the 21 classes of Pascal VOC."""
    model, weights = torchvision_network(name, "segmenter")
    preprocess = weights.transforms()

    @torch.inference_mode()
    def segment(image: Image) -> NDArray[np.int32]:
        scores = model(preprocess(_tensor(image))[None])["out"][0]
        return to_original(scores.argmax(0).numpy(), image)

    return segment


def _tensor(image: Image) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


# ------------------------------------------------------------------ names


def load_classifier(spec: str) -> Classifier:
    """Classifier by its name on the command line (see the module's text)."""
    if own := _own(spec):
        return own
    if spec.startswith("torchvision:"):
        return torchvision_classifier(spec.removeprefix("torchvision:"))
    return classifier(_runtime(spec))


def load_detector(spec: str, categories: Sequence[str] | None) -> Detector:
    """Detector by its name on the command line; `categories` as in `torchvision_detector`."""
    if own := _own(spec):
        return own
    if spec.startswith("torchvision:"):
        return torchvision_detector(spec.removeprefix("torchvision:"), categories=categories)
    if spec.startswith("fastestdet:"):
        return fastestdet(_file(spec.removeprefix("fastestdet:")), categories=categories)
    raise NetworkError(f"no detector {spec!r}: give fastestdet:PATH, torchvision:NAME or FILE.py:FUNCTION")


def load_segmenter(spec: str) -> Segmenter:
    """Segmenter by its name on the command line."""
    if own := _own(spec):
        return own
    if spec.startswith("torchvision:"):
        return torchvision_segmenter(spec.removeprefix("torchvision:"))
    return segmenter(_runtime(spec))


def identity_of(spec: str) -> str:
    """The name and, where it is of a file, the file's SHA-256; wherever the file lies.

    Of torchvision's networks its version, as their weights and what is done to pictures change with it.

    So for what such a file loads from beside it: the weights of an ONNX model, by the names that exporters
    give them, and other Python files.
    """
    for part in (spec, spec.partition(":")[2], spec.rpartition(":")[0]):
        if part and (path := Path(part)).is_file():
            name = spec.replace(part, path.name)
            if path.suffix == ".py":
                others = sorted(other for other in path.parent.glob("*.py") if other.name != path.name)
            else:
                others = [path.with_name(f"{path.name}{end}") for end in (".data", "_data")]
            files = [path, *filter(Path.is_file, others)]
            return " ".join([name, *map(content, files)])
    return f"{spec} {version('torchvision')}" if spec.startswith("torchvision:") else spec


def content(file: Path) -> str:
    """What identifies the bytes of a file: the first 64 bits of their SHA-256, hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _runtime(spec: str) -> Runtime:
    path = _file(spec)
    if path.suffix == ".tflite":
        return LiteRt(path)
    if path.suffix == ".onnx":
        return Onnx(path)
    raise NetworkError(f"{path} is neither .tflite nor .onnx")


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise NetworkError(f"no file {name!r} for a network")
    return Path(name)


def _own(spec: str) -> Callable[[Image], Any] | None:
    """The callable that ``FILE.py:FUNCTION`` makes; None for other names."""
    file, _, function = spec.rpartition(":")
    if not file.endswith(".py"):
        return None
    module_spec = importlib.util.spec_from_file_location(f"_networks_{Path(file).stem}", _file(file))
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # As for a script: what lies beside it can be imported, and dataclasses find their module.
    sys.modules[module_spec.name] = module
    sys.path.append(str(Path(file).resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except ImportError as error:
        raise NetworkError(f"{file} cannot be imported: {error}") from error
    if not hasattr(module, function):
        raise NetworkError(f"{file} has no function {function!r}")
    network: Callable[[Image], Any] = getattr(module, function)()
    if not callable(network):
        raise NetworkError(f"{spec} made {network!r}: a function of pictures is needed")
    if not isinstance(getattr(network, "identity", ""), str):
        raise NetworkError(f"{spec}: the identity of a network is a string")
    return network

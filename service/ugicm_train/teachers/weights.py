"""Weights of frozen networks, from files of other frameworks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ugicm_train.teachers.distance import TeacherError, require


def read_onnx(path: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """Nodes of an ONNX file's graph, in the order in which they are computed, and its weights by name.

    Raises:
        TeacherError: `onnx` is missing, or the file is none of its.
    """
    onnx = require("onnx", "onnx")
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # of the library that parses it, which is not imported here
        raise TeacherError(f"{path} cannot be read as an ONNX file: {error}") from error
    # Copies, as the arrays are read-only.
    weights = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    return list(graph.node), weights


def convolution(weight: Tensor, bias: Tensor, *, dilation: int = 1) -> nn.Conv2d:
    """Convolution with a weight of (out, in, side, side), `side` odd, that keeps the size of its input."""
    outputs, inputs, side, _ = weight.shape
    layer = nn.Conv2d(inputs, outputs, side, padding=dilation * (side // 2), dilation=dilation)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer

"""Arithmetic per pixel: a guard of speed that does not depend on the clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from ugicm.bench.stages import macs_per_pixel
from ugicm.codec.codec import Codec
from ugicm.codec.config import PRESETS
from ugicm.codec.store import read_model
from ugicm_train.export import model_tensors, write_model
from ugicm_train.model import TrainableCodec

BUDGETS = {"ugicm-s": (12_000, 14_000, 4_000), "ugicm-b": (30_000, 40_000, 6_000)}
"""Multiply-accumulates per pixel: encoder's transforms, decoder's, entropy model."""


@pytest.mark.parametrize("name", BUDGETS)
def test_each_stage_keeps_its_budget(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]
    write_model(tmp_path, config, model_tensors(TrainableCodec(config)), {})
    counted = macs_per_pixel(Codec(read_model(tmp_path), device="cpu", precision="float32"))
    encoder, decoder, entropy = BUDGETS[name]
    assert counted["encoder's entropy model"] == counted["decoder's entropy model"] <= entropy
    assert counted["analysis"] + counted["hyper analysis"] <= encoder
    assert counted["synthesis"] <= decoder
    # The analysis by hand, so that nothing goes uncounted: layers at 1/64 and at 1/256 of the pixels.
    c, m = config.channels, config.latent_channels
    fine, coarse = (5 * width**2 + 9 * width for width in (c, m))
    expected = (192 * c + config.encoder_blocks * fine) / 64 + (4 * c * m + coarse) / 256
    assert counted["analysis"] == pytest.approx(expected)

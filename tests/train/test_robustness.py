"""The generated pictures are what they claim to be; JPEG measured against itself passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ugicm_train.evaluation.coders import pillow_coder
from ugicm_train.evaluation.robustness import GREY, measure, synthetic_pictures, table

PICTURES = synthetic_pictures(128)


def test_same_on_every_call() -> None:
    again = synthetic_pictures(128)
    assert list(again) == list(PICTURES)
    for name, picture in PICTURES.items():
        np.testing.assert_array_equal(again[name], picture)


@pytest.mark.parametrize("name", PICTURES)
def test_shape_and_grey(name: str) -> None:
    picture = PICTURES[name]
    assert picture.dtype == np.uint8
    assert picture.shape == (128, 128, 3)
    without_colour = bool((np.ptp(picture, axis=2) == 0).all())
    assert without_colour == (name in GREY or name == "line art")


def test_contents() -> None:
    assert np.ptp(PICTURES["flat grey"]) == 0
    assert (np.diff(PICTURES["stripes"][..., 0].astype(int), axis=1) % 510 == 255).all()
    assert len(np.unique(PICTURES["grey ramp"])) == 128
    assert PICTURES["noise"].std() == pytest.approx(np.sqrt((256**2 - 1) / 12), rel=0.02)
    assert PICTURES["grain"].std() == pytest.approx(20, rel=0.05)
    for name in ("screenshot", "line art"):  # mostly paper, some ink
        dark = (PICTURES[name].min(2) < 128).mean()
        assert 0.03 < dark < 0.5


def test_jpeg_against_itself_is_level() -> None:
    jpeg = pillow_coder("jpeg")
    results = list(measure(jpeg, jpeg, {name: PICTURES[name] for name in ("grey ramp", "noise")}))
    for result in results:
        assert (result.bytes, result.psnr_db) == (result.jpeg_bytes, result.jpeg_psnr_db)
        assert result.passed
    assert table(results).count("| ok |") == 2


def test_colour_cast_and_lost_detail_fail() -> None:
    jpeg = pillow_coder("jpeg")
    tinted = replace(
        jpeg, decode=lambda data, s: np.maximum(jpeg.decode(data, s), (0, 0, 122)).astype(np.uint8)
    )
    blank = replace(jpeg, decode=lambda data, s: np.full_like(jpeg.decode(data, s), 128))
    (cast,) = measure(tinted, jpeg, {"flat grey": PICTURES["flat grey"]})
    assert cast.shift == pytest.approx(3)
    assert not cast.passed
    (lost,) = measure(blank, jpeg, {"screenshot": PICTURES["screenshot"]})
    assert lost.shift is None
    assert not lost.passed

"""The seam measure sees a step of known size and none where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ugicm_train.evaluation.seams import BORDER_PIXELS, measure_seams

ORIGINAL = np.full((200, 300, 3), 100, np.uint8)


def test_even_error_has_no_step() -> None:
    seams = measure_seams(ORIGINAL, ORIGINAL + 2, 128)
    assert seams.step_db == 0
    assert seams.border_db == pytest.approx(20 * math.log10(255 / 2))


def test_equal_pictures_have_no_step() -> None:
    assert measure_seams(ORIGINAL, ORIGINAL, 128).step_db == 0


def test_double_error_beside_borders_is_six_decibels() -> None:
    decoded = ORIGINAL + 2
    for border in (128, 256):
        decoded[:, border - BORDER_PIXELS : border + BORDER_PIXELS] = 104
    decoded[128 - BORDER_PIXELS : 128 + BORDER_PIXELS] = 104
    assert measure_seams(ORIGINAL, decoded, 128).step_db == pytest.approx(20 * math.log10(2))


def test_picture_edges_are_no_seams() -> None:
    decoded = ORIGINAL + 2
    decoded[:BORDER_PIXELS] = 110
    assert measure_seams(ORIGINAL, decoded, 128).step_db < 0


@pytest.mark.parametrize("tile_side", [300, 8])
def test_nothing_to_measure(tile_side: int) -> None:
    with pytest.raises(ValueError, match="leave no border or no inside"):
        measure_seams(ORIGINAL, ORIGINAL, tile_side)

"""Drawn pictures among the photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ugicm_train.data import CropSampler
from ugicm_train.synthetic import KINDS, Picture, checkerboard, draw_synthetic, flat, stripes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_is_a_picture_that_its_seed_repeats(kind) -> None:  # type: ignore[no-untyped-def]
    def draw(seed: int) -> Picture:
        return kind(np.random.default_rng(seed), 64)

    for seed in range(30):
        picture = draw(seed)
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, draw(seed))
    assert len({draw(seed).tobytes() for seed in range(30)}) > 10


def test_patterns_have_two_colours_and_flat_has_one() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        assert len(np.unique(flat(random, 32).reshape(-1, 3), axis=0)) == 1
        for kind in (stripes, checkerboard):
            assert len(np.unique(kind(random, 32).reshape(-1, 3), axis=0)) <= 2


def test_all_kinds_are_drawn() -> None:
    random = np.random.default_rng(0)
    colours = [len(np.unique(draw_synthetic(random, 32).reshape(-1, 3), axis=0)) for _ in range(200)]
    assert 5 < colours.count(1) < 60
    assert max(colours) > 500


def test_share_of_drawn_crops() -> None:
    grey = torch.full((3, 80, 80), 77, dtype=torch.uint8)
    for share, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 190, 200)):
        crops = CropSampler([grey], size=64, seed=0, synthetic_share=share).batch(200)
        assert crops.shape == (200, 3, 64, 64)
        drawn = int((crops != 77 / 255).flatten(1).any(1).sum())
        assert low <= drawn <= high

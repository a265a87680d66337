"""Regions lie inside the picture, and instances are found where something stands out."""

from __future__ import annotations

import pytest
import torch

from ugicm_train.regions import (
    INSTANCE_SIDE_MIN,
    LOCAL_SIDE_MAX,
    LOCAL_SIDE_MIN,
    Box,
    connected_part,
    cut,
    draw_region,
    instance,
    random_window,
    saliency,
)


@pytest.fixture
def disc() -> torch.Tensor:
    """A red disc of radius 30 around (row 60, column 180) on textured grey, (3, 240, 256)."""
    torch.manual_seed(0)
    picture = 0.5 + 0.02 * torch.randn(3, 240, 256)
    rows, columns = torch.meshgrid(torch.arange(240), torch.arange(256), indexing="ij")
    inside = (rows - 60) ** 2 + (columns - 180) ** 2 < 30**2
    picture[0][inside], picture[1][inside], picture[2][inside] = 0.9, 0.1, 0.1
    return picture.clamp(0, 1)


def test_instance_holds_what_stands_out(disc: torch.Tensor) -> None:
    box = instance(disc)
    assert box is not None
    assert box.top <= 35
    assert box.top + box.height >= 85
    assert box.left <= 155
    assert box.left + box.width >= 205
    assert box.height * box.width < 0.4 * 240 * 256


def test_no_instance_in_a_plain_picture_or_where_all_stands_out() -> None:
    assert instance(torch.full((3, 64, 64), 0.5)) is None
    torch.manual_seed(0)
    halves = torch.zeros(3, 64, 64)
    halves[:, :, 28:] = 1.0
    assert all(instance(halves) is None for _ in range(5))


def test_tiny_instances_get_surroundings(disc: torch.Tensor) -> None:
    small = torch.full_like(disc, 0.5)
    small[0, 100:130, 0:30] = 1.0
    box = instance(small)
    assert box is not None
    assert box.left == 0
    assert box.width >= round(INSTANCE_SIDE_MIN * 256)


def test_connected_part_stops_at_gaps() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:3, 1:3] = True
    mask[3, 3] = True  # touches by its corner
    mask[6:8, 6:8] = True
    part = connected_part(mask, 1, 1)
    assert part.sum() == 5
    assert not part[6:, 6:].any()


def test_saliency_ignores_the_level_of_the_whole_picture(disc: torch.Tensor) -> None:
    torch.testing.assert_close(saliency(disc * 0.5 + 0.25), saliency(disc) * 0.5, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (65, 129), (1, 7), (256, 192)])
def test_regions_lie_inside(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for _ in range(40):
        top, left, height, width = draw_region(torch.rand(3, *size))
        assert top >= 0
        assert left >= 0
        assert height >= 1
        assert width >= 1
        assert top + height <= size[0]
        assert left + width <= size[1]


def test_all_three_scales_are_drawn(disc: torch.Tensor) -> None:
    torch.manual_seed(0)
    boxes = [draw_region(disc) for _ in range(300)]
    whole = sum(box == Box(0, 0, 240, 256) for box in boxes)
    found = instance(disc)
    assert found is not None
    objects = sum(box.left > 100 and box.height < 110 and box.top < 60 for box in boxes)
    assert 60 < whole < 140
    assert objects > 60


def test_windows_vary_in_size_and_place() -> None:
    torch.manual_seed(0)
    boxes = [random_window(100, 200) for _ in range(50)]
    assert all(100 * LOCAL_SIDE_MIN - 1 <= box.height <= 100 * LOCAL_SIDE_MAX + 1 for box in boxes)
    assert len({box.height for box in boxes}) > 10
    assert len({(box.top, box.left) for box in boxes}) > 40


def test_cut_passes_gradients_to_the_box_alone() -> None:
    picture = torch.rand(2, 3, 32, 40, requires_grad=True)
    out = cut(picture, [Box(0, 0, 32, 40), Box(4, 8, 10, 12)], 24)
    assert out.shape == (2, 3, 24, 24)
    out[1].sum().backward()
    assert picture.grad is not None
    assert picture.grad[0].abs().sum() == 0
    assert picture.grad[1, :, 4:14, 8:20].abs().sum() > 0
    outside = picture.grad[1].clone()
    outside[:, 4:14, 8:20] = 0
    assert outside.abs().sum() == 0

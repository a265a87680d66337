"""Regions lie inside the picture, and instances are found where something stands out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from ugicm_train.regions import (
    INSTANCE_SIDE_MIN,
    LOCAL_SIDE_MAX,
    LOCAL_SIDE_MIN,
    connected_parts,
    cut,
    draw_regions,
    instances,
    random_windows,
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


def instance(picture: torch.Tensor) -> list[int] | None:
    boxes, found = instances(picture[None])
    return boxes[0].tolist() if found else None


def test_instance_holds_what_stands_out(disc: torch.Tensor) -> None:
    box = instance(disc)
    assert box is not None
    top, left, height, width = box
    assert top <= 35
    assert top + height >= 85
    assert left <= 155
    assert left + width >= 205
    assert height * width < 0.4 * 240 * 256


def test_each_picture_has_its_own_instance(disc: torch.Tensor) -> None:
    boxes, found = instances(torch.stack([disc, disc.flip(2), torch.full_like(disc, 0.5)]))
    assert found.tolist() == [True, True, False]
    (_, left, _, width), (_, mirrored, _, _) = boxes[:2].tolist()
    assert mirrored == pytest.approx(256 - left - width, abs=1)


def test_instances_are_drawn_in_proportion_to_their_saliency() -> None:
    picture = torch.full((3, 256, 256), 0.5)
    picture[:, 16:64, 16:64] = 1.0
    picture[:, 192:240, 192:240] = 0.8
    torch.manual_seed(0)
    boxes, found = instances(picture.expand(300, 3, 256, 256))
    assert found.all()
    assert 0.55 < float((boxes[:, 0] < 100).float().mean()) < 0.75


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
    _, left, _, width = box
    assert left == 0
    assert width >= round(INSTANCE_SIDE_MIN * 256)


def test_connected_part_stops_at_gaps() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:3, 1:3] = True
    mask[3, 3] = True  # touches by its corner
    mask[6:8, 6:8] = True
    one, other = connected_parts(mask.expand(2, 8, 8), torch.tensor([9, 63]))
    assert one.sum() == 5
    assert not one[6:, 6:].any()
    assert other.sum() == 4
    assert other[6:, 6:].all()


def test_saliency_ignores_the_level_of_the_whole_picture(disc: torch.Tensor) -> None:
    one, half = saliency(torch.stack([disc, disc * 0.5 + 0.25]))
    torch.testing.assert_close(half, one * 0.5, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (65, 129), (1, 7), (256, 192)])
def test_regions_lie_inside(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for top, left, height, width in draw_regions(torch.rand(200, 3, *size)).tolist():
        assert top >= 0
        assert left >= 0
        assert height >= 1
        assert width >= 1
        assert top + height <= size[0]
        assert left + width <= size[1]


def test_all_three_scales_are_drawn(disc: torch.Tensor) -> None:
    torch.manual_seed(0)
    boxes = draw_regions(disc.expand(300, 3, 240, 256)).tolist()
    assert 60 < boxes.count([0, 0, 240, 256]) < 140
    box = instance(disc)
    assert box is not None
    assert boxes.count(box) > 60


def test_windows_vary_in_size_and_place() -> None:
    torch.manual_seed(0)
    boxes = random_windows(torch.rand(50, 3, 100, 200))
    assert ((boxes[:, 2] >= 100 * LOCAL_SIDE_MIN - 1) & (boxes[:, 2] <= 100 * LOCAL_SIDE_MAX + 1)).all()
    assert len(boxes[:, 2].unique()) > 10
    assert len(boxes[:, :2].unique(dim=0)) > 40


@pytest.mark.parametrize("side", [7, 24, 96])
def test_cut_is_torchs_bicubic_with_antialiasing(side: int) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(6, 3, 65, 48)
    boxes = draw_regions(pictures)
    expected = torch.cat(
        [
            interpolate(one[None, :, y : y + h, x : x + w], size=(side, side), mode="bicubic", antialias=True)
            for one, (y, x, h, w) in zip(pictures, boxes.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(cut(pictures, boxes, side), expected, atol=2e-5, rtol=0)


def test_cut_passes_gradients_to_the_box_alone() -> None:
    picture = torch.rand(2, 3, 32, 40, requires_grad=True)
    out = cut(picture, torch.tensor([[0, 0, 32, 40], [4, 8, 10, 12]]), 24)
    assert out.shape == (2, 3, 24, 24)
    out[1].sum().backward()
    assert picture.grad is not None
    assert picture.grad[0].abs().sum() == 0
    assert picture.grad[1, :, 4:14, 8:20].abs().sum() > 0
    outside = picture.grad[1].clone()
    outside[:, 4:14, 8:20] = 0
    assert outside.abs().sum() == 0

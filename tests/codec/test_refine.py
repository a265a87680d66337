"""Refinement at the encoder: cheaper bitstreams that any decoder reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ugicm.codec import codec as codec_module
from ugicm.codec.bitstream import peek
from ugicm.codec.codec import Codec
from ugicm.codec.conditioning import lambda_of, quality_to_level
from ugicm.codec.entropy import SCALE_COUNT
from ugicm.codec.entropy_twin import TRELLIS_FIRST, round_straight
from ugicm.codec.errors import CodecError
from ugicm.codec.refine import ERROR_WEIGHT, Frame, Refiner, draw
from ugicm.codec.store import load_codec

Image = NDArray[np.uint8]
QUALITY = 60.0
STEPS = 70


def cost(codec: Codec, image: Image, data: bytes) -> float:
    """What refinement minimises, in bits, by the real bitstream and the real pixels."""
    (decoded,) = codec.decode([data])
    level = torch.tensor([quality_to_level(peek(data).quality, codec.config.levels)])
    weight = ERROR_WEIGHT * float(lambda_of(codec.config, level)) / 3
    return 8 * len(data) + weight * float(np.square(image.astype(float) - decoded).sum())


@pytest.fixture(scope="module")
def crop(photo: Image) -> Image:
    return np.ascontiguousarray(photo[90:190, 100:230])  # not whole hyper positions


@pytest.mark.parametrize("first", [TRELLIS_FIRST, SCALE_COUNT], ids=["on paths", "alone"])
def test_a_refined_picture_costs_less(tiny_store: Path, crop: Image, first: int) -> None:
    tiny_codec = load_codec("tiny", store=tiny_store, device="cpu")
    # On a CPU this is the decoder's entropy model, too.
    tiny_codec._entropy.trellis = tiny_codec._entropy.trellis._replace(first=first)
    (plain,) = tiny_codec.encode([crop], QUALITY)
    (refined,) = tiny_codec.encode([crop], QUALITY, refine=STEPS)
    assert cost(tiny_codec, crop, refined) < 0.97 * cost(tiny_codec, crop, plain)


def test_what_is_minimised_is_the_cost(
    tiny_codec: Codec, crop: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where symbols are rounded as ever; but for the hyper latent's few bytes and the container's."""
    seen: list[float] = []
    backward = torch.Tensor.backward

    def watched(loss: torch.Tensor) -> None:
        seen.append(float(loss.detach()))
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    monkeypatch.setattr("ugicm.codec.refine.draw", lambda x, temperature, uniform: round_straight(x))
    for quality in (20.0, QUALITY):
        tiny_codec.encode([crop], quality, refine=1)
        (plain,) = tiny_codec.encode([crop], quality)
        assert seen.pop() == pytest.approx(cost(tiny_codec, crop, plain), rel=0.1)


def test_it_is_the_same_every_time(tiny_codec: Codec, crop: Image) -> None:
    torch.manual_seed(1)
    first = tiny_codec.encode([crop, crop[:64]], QUALITY, refine=3)
    torch.manual_seed(2)
    assert tiny_codec.encode([crop, crop[:64]], QUALITY, refine=3) == first


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_caller_in_inference_mode(tiny_store: Path, crop: Image, precision: str) -> None:
    codec = load_codec("tiny", store=tiny_store, device="cpu", precision=precision)
    with torch.inference_mode():
        first = codec.encode([crop], QUALITY, refine=2)
    assert codec.encode([crop], QUALITY, refine=2) == first


def test_tiles_are_refined_within_their_surroundings(
    tiny_codec: Codec, photo: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_module, "TILE_SIDE", 64)
    image = np.ascontiguousarray(photo[60:190, 100:230])
    (plain,) = tiny_codec.encode([image], QUALITY)
    (refined,) = tiny_codec.encode([image], QUALITY, refine=STEPS)
    assert peek(refined) == peek(plain)
    assert peek(refined).tiles == 9
    assert cost(tiny_codec, image, refined) < 0.97 * cost(tiny_codec, image, plain)


def test_a_budget_is_kept_and_buys_more(tiny_codec: Codec, crop: Image) -> None:
    budget = len(tiny_codec.encode([crop], QUALITY)[0]) + 40
    plain = tiny_codec.encode_to_size(crop, max_bytes=budget)
    refined = tiny_codec.encode_to_size(crop, max_bytes=budget, refine=STEPS)
    assert 0.97 * budget < len(refined) <= budget
    errors = [
        np.square(tiny_codec.decode([data])[0] - crop.astype(float)).mean() for data in (plain, refined)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("size", [(130, 130), (8, 300)])
def test_refining_never_makes_a_budget_buy_less(
    tiny_codec: Codec, photo: Image, size: tuple[int, int]
) -> None:
    image = np.ascontiguousarray(photo[: size[0], : size[1]])
    low, high = (len(data) for data in tiny_codec.encode([image] * 2, [1, 60]))
    for share in (0.0, 0.2, 0.4, 0.8):
        budget = round(low + share * (high - low))
        plain, refined = (tiny_codec.encode_to_size(image, max_bytes=budget, refine=n) for n in (0, 10))
        assert len(refined) <= budget
        errors = [
            np.square(tiny_codec.decode([data])[0] - image.astype(float)).mean() for data in (plain, refined)
        ]
        assert errors[1] <= errors[0]


def test_refining_may_be_what_makes_a_picture_fit(tiny_codec: Codec, crop: Image) -> None:
    budget = len(tiny_codec.encode([crop], 1, refine=STEPS)[0])
    with pytest.raises(CodecError, match="at quality 1, over the budget"):
        tiny_codec.encode_to_size(crop, max_bytes=budget)
    assert len(tiny_codec.encode_to_size(crop, max_bytes=budget, refine=STEPS)) == budget


def test_drawn_pictures_are_not_refined_for_nothing(
    tiny_codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    (plain,) = tiny_codec.encode([stripes], QUALITY)
    assert peek(plain).lossless
    monkeypatch.delattr(Codec, "_refine_each")
    assert tiny_codec.encode([stripes], QUALITY, refine=STEPS) == [plain]


@pytest.mark.parametrize("steps", [-1, 10_001])
def test_steps_out_of_range(tiny_codec: Codec, crop: Image, steps: int) -> None:
    with pytest.raises(CodecError, match=rf"refine must be in 0\.\.10000 steps, got {steps}"):
        tiny_codec.encode([crop], QUALITY, refine=steps)
    with pytest.raises(CodecError, match="refine must be"):
        tiny_codec.encode_to_size(crop, max_bytes=5000, refine=steps)


def test_draws_are_between_the_neighbours_and_harden() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([0.1, 0.5, 0.9, -2.25]).repeat(5000, 1).requires_grad_()
    uniform = torch.rand(2, *x.shape, generator=generator)
    soft, hard = draw(x, 0.5, uniform[0]), draw(x, 0.05, uniform[1]).detach()
    for drawn in (soft, hard):
        assert bool((drawn >= x.floor()).all() & (drawn <= x.floor() + 1).all())
    assert (
        float((hard - hard.round()).abs().mean()) < 0.02 < float((soft - soft.round()).detach().abs().mean())
    )
    torch.testing.assert_close(hard.mean(0), torch.tensor([0.0, 0.5, 1.0, -2.0]), atol=0.03, rtol=0)
    soft.sum().backward()
    assert x.grad is not None
    assert float(x.grad.min()) >= 0
    assert bool((x.grad.mean(0) > 0).all())


def test_refined_tiles_see_their_refined_neighbours(
    tiny_codec: Codec, photo: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_module, "TILE_SIDE", 64)
    frames: list[Frame] = []

    def numbered(refiner: Refiner, synthesis: object, frame: Frame, *rest: object) -> torch.Tensor:
        frames.append(frame)
        return torch.full_like(frame.y[frame.rows, frame.columns], float(len(frames)))

    monkeypatch.setattr(Refiner, "__call__", numbered)
    tiny_codec.encode([np.ascontiguousarray(photo[60:190, 100:230])], QUALITY, refine=1)
    assert len(frames) == 9
    last = frames[-1]
    assert last.rows.start > 0 < last.columns.start
    assert bool((last.y[: last.rows.start, : last.columns.start] == 5).all())
    assert bool((last.y[last.rows, : last.columns.start] == 8).all())

"""Grain: the machine view's noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import write_tiny_model
from ugicm.codec.codec import Codec
from ugicm.codec.conditioning import at_level
from ugicm.codec.grain import TILE, add_grain, noise
from ugicm.codec.store import read_model

LEVEL_DEVIATION = 6 / 255


@pytest.fixture
def codecs(tmp_path: Path) -> tuple[Codec, Codec]:
    """One model without and with grain."""
    plain = read_model(write_tiny_model(tmp_path / "tiny"))
    table = torch.full((plain.config.levels,), LEVEL_DEVIATION)
    grainy = plain._replace(tensors=plain.tensors | {"grain": table})
    return Codec(plain, device="cpu", precision="float32"), Codec(grainy, device="cpu", precision="float32")


def test_noise_is_white_and_always_the_same() -> None:
    values = noise(torch.device("cpu"))
    assert float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float(values.std()) == pytest.approx(1, abs=0.01)
    noise.cache_clear()
    assert torch.equal(noise(torch.device("cpu")), values)


def test_each_picture_has_its_own_amount_and_none_is_left_out() -> None:
    pixels = torch.zeros(2, TILE + 3, 2 * TILE + 1, 192)
    add_grain(pixels, torch.tensor([2.0, 5.0]))
    for picture, deviation in zip(pixels, (2.0, 5.0), strict=True):
        for part in (picture, picture[TILE:], picture[:, 2 * TILE :]):
            assert float(part.std()) == pytest.approx(deviation, rel=0.05)


def test_deviation_between_levels() -> None:
    table = torch.tensor([8.0, 4.0, 2.0])
    wanted = torch.tensor([8.0, 6.0, 3.5, 2.0])
    torch.testing.assert_close(at_level(table, torch.tensor([0.0, 0.5, 1.25, 2.0])), wanted)


def test_only_the_machine_view_has_grain(codecs: tuple[Codec, Codec], photo: NDArray[np.uint8]) -> None:
    plain, grainy = codecs
    # Grey enough that no pixel is cut off.
    picture = (photo // 4 + 96).astype(np.uint8)
    bitstream = plain.encode([picture], 90.0)[0]
    assert grainy.encode([picture], 90.0)[0] == bitstream
    np.testing.assert_array_equal(*(codec.decode([bitstream])[0] for codec in codecs))
    for strength in (1.0, 0.5):
        views = [codec.decode([bitstream], strength)[0].astype(float) for codec in codecs]
        difference = views[1] - views[0]
        inside = (views[0] > 30) & (views[0] < 225)
        assert difference[inside].std() == pytest.approx(255 * LEVEL_DEVIATION * strength, rel=0.1)
        np.testing.assert_array_equal(grainy.decode([bitstream], strength)[0], views[1])


def test_qualities_of_one_batch_keep_their_own_amount(
    codecs: tuple[Codec, Codec], photo: NDArray[np.uint8]
) -> None:
    plain, grainy = codecs
    table = torch.zeros(plain.config.levels)
    table[0] = LEVEL_DEVIATION
    grainy._grain = table
    bitstreams = grainy.encode([photo, photo], [1.0, 100.0])
    together = grainy.decode(bitstreams, 1.0)
    for bitstream, picture in zip(bitstreams, together, strict=True):
        np.testing.assert_array_equal(grainy.decode([bitstream], 1.0)[0], picture)
    clean = plain.decode(bitstreams, 1.0)
    assert np.any(clean[0] != together[0])
    np.testing.assert_array_equal(clean[1], together[1])

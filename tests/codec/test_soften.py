"""What the transforms cannot code is blurred at the encoder instead of exploding at the decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ugicm.codec.codec as codec_module
from tests.conftest import write_tiny_model
from ugicm.codec.codec import Codec
from ugicm.codec.inference import Sides
from ugicm.codec.networks import bounded
from ugicm.codec.soften import rms, soften, worse_than_blurred
from ugicm.codec.store import load_codec, read_model


def striped(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A photo with a patch of slanted stripes about two pixels wide, (256, 384, 3)."""
    picture = photo[:256, :384].copy()
    rows, columns = np.mgrid[:256, :384]
    across = columns * np.cos(0.3) + rows * np.sin(0.3)
    patch = ((columns - 190) / 120) ** 2 + ((rows - 128) / 80) ** 2 < 1
    picture[patch] = (120 + 60 * np.sign(np.sin(2 * np.pi * across / 2.2 + 0.3)))[patch][:, None]
    return picture


def psnr(decoded: NDArray[np.uint8], picture: NDArray[np.uint8]) -> float:
    return float(-10 * np.log10(np.square((decoded.astype(float) - picture) / 255).mean()))


def test_stripes_in_a_photo_do_not_explode(photo: NDArray[np.uint8]) -> None:
    codec = load_codec(device="cpu")
    picture = striped(photo)
    for quality in (10.0, 50.0, 90.0):
        data = codec.encode([picture], quality)
        for strength in (0.0, 1.0):
            assert psnr(codec.decode(data, strength)[0], picture) > 17
    # The rest of the picture is as good as it would be; paths of symbols run through all of it, so that what
    # is elsewhere, however plain, moves a part's PSNR by up to .4 dB.
    decoded = codec.decode(codec.encode([picture], 50.0))[0]
    plain = codec.decode(codec.encode([photo[:256, :384]], 50.0))[0]
    left = photo[:256, :32]
    assert psnr(decoded[:, :32], left) > psnr(plain[:, :32], left) - 0.6


def test_pictures_of_a_batch_are_coded_as_they_would_be_alone(photo: NDArray[np.uint8]) -> None:
    codec = load_codec(device="cpu", precision="float32")
    pictures = [photo[:256, :384], striped(photo), photo[30:286, 20:404]]
    assert codec.encode(pictures, 50.0) == [codec.encode([picture], 50.0)[0] for picture in pictures]


def test_torch_of_another_default_type() -> None:
    pixels = torch.arange(64 * 64 * 3).view(1, 64, 64, 3).mul(77).to(torch.uint8)
    times = torch.ones(1, 4, 4, dtype=torch.int64)
    expected = soften(pixels, times)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(soften(pixels, times), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_photos_are_not_softened(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    stored = read_model(write_tiny_model(tmp_path))
    levels = stored.config.levels

    def coded(largest: float) -> bytes:
        tensors = stored.tensors | {"largest": torch.full((levels,), largest)}
        return Codec(stored._replace(tensors=tensors), device="cpu").encode([photo], 50.0)[0]

    assert coded(1e6) == Codec(stored, device="cpu").encode([photo], 50.0)[0]
    # As if every photo were too much: this untrained model decodes all of it worse than its blur.
    assert coded(1e-3) != coded(1e6)


def test_what_stays_oversized_is_bounded_and_found_within_its_margin(
    tmp_path: Path, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read_model(write_tiny_model(tmp_path))
    limit = 1e-3
    tensors = stored.tensors | {"largest": torch.full((stored.config.levels,), limit)}
    codec = Codec(stored._replace(tensors=tensors), device="cpu", precision="float32")
    pixels = torch.from_numpy(photo[None, :144, :192].copy())
    margin = Sides(above=1, below=0, before=2, after=3)
    where = (0, 4, 5)
    softened: list[torch.Tensor] = []

    def worse(decoded: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        assert torch.equal(original, pixels[:, 16:, 32:-48])
        mask = torch.zeros(1, 8, 7, dtype=torch.bool)
        mask[where] = True
        return mask

    def watched(picture: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        assert torch.equal(picture, pixels)
        softened.append(times.clone())
        return soften(picture, times)

    monkeypatch.setattr(codec_module, "worse_than_blurred", worse)
    monkeypatch.setattr(codec_module, "soften", watched)
    y = codec._transform(pixels, 0.0, margin)
    # Three times more, there and nowhere else.
    assert [times.nonzero().tolist() for times in softened] == [[[0, 5, 7]]] * 3
    assert [int(times.max()) for times in softened] == [1, 2, 3]
    expected = codec._analysis_for(0.0)(soften(pixels, softened[-1]), margin)
    assert float(rms(y)[where]) == pytest.approx(limit, rel=1e-3)
    expected[where] = y[where]
    torch.testing.assert_close(y, expected)


def test_softening_is_local() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8)
    times = torch.zeros(1, 16, 16, dtype=torch.int64)
    torch.testing.assert_close(soften(pixels, times), pixels)
    times[0, 8, 8] = 3
    softened = soften(pixels, times)
    assert torch.equal(softened[:, :64], pixels[:, :64])
    there = (slice(None), slice(120, 152), slice(120, 152))
    assert softened[there].float().std() < 0.3 * pixels[there].float().std()
    times[0, 8, 8] = 1
    assert softened[there].float().std() < soften(pixels, times)[there].float().std()


def test_noise_is_worse_than_blur_and_a_good_picture_is_not() -> None:
    torch.manual_seed(0)
    original = (128 + 30 * torch.randn(1, 64, 64, 3)).clamp(0, 255).byte()
    decoded = original.clone()
    assert not worse_than_blurred(decoded, original).any()
    decoded[:, :16, :16] = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    worse = worse_than_blurred(decoded, original)[0]
    assert worse[:2, :2].all()
    assert not worse[2:, 2:].any()


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_bounded_latents_keep_their_direction(limit: float) -> None:
    y = torch.randn(1, 4, 4, 8) * torch.rand(1, 4, 4, 1) * 5
    out = bounded(y, limit, -1)
    assert float(rms(out).max()) <= limit * 1.001
    small = rms(y) <= limit
    torch.testing.assert_close(out[small], y[small])
    torch.testing.assert_close(torch.cosine_similarity(out, y, -1), torch.ones(1, 4, 4))
    torch.testing.assert_close(bounded(y.movedim(-1, 1), limit, 1).movedim(1, -1), out)

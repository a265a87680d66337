"""The transforms in production against those in training, whole and in windows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import TINY
from ugicm.codec.bitstream import Header
from ugicm.codec.codec import tile_windows
from ugicm.codec.inference import InferenceAnalysis, InferenceHyperAnalysis, InferenceSynthesis
from ugicm.codec.networks import LATENT_MAX, Analysis, HyperAnalysis, Synthesis

BLOCKS = (1, 2, 3, 8)


@pytest.fixture
def pixels(photo: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(photo[:256, :448]))[None]


def header(pixels: torch.Tensor) -> Header:
    """In tiles of which the last are narrower than the margin of 8 blocks."""
    _, height, width, _ = pixels.shape
    return Header(version=1, width=width, height=height, quality=50, model_digest=bytes(8), tile_side=192)


def loud(module: torch.nn.Module) -> None:
    """Branches of the blocks start near zero; here every layer and filter matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("project.weight", "merge.weight")):
                parameter.mul_(5)
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            if "gate" in name:
                parameter.mul_(4)  # into the bound of the hidden layers


@torch.inference_mode()
@pytest.mark.parametrize("blocks", BLOCKS)
def test_analysis(pixels: torch.Tensor, blocks: int) -> None:
    network = Analysis(dataclasses.replace(TINY, encoder_blocks=blocks))
    loud(network)
    expected = network(pixels.permute(0, 3, 1, 2) / 255).permute(0, 2, 3, 1)
    prepared = InferenceAnalysis(network, torch.float32)
    whole = prepared(pixels)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for window in tile_windows(header(pixels), prepared.margin):
        rows, columns = (slice(16 * s.start, 16 * s.stop) for s in (window.rows, window.columns))
        part = prepared(pixels[:, rows, columns], window.margin)
        same = whole[:, window.top :, window.left :][:, : window.height, : window.width]
        torch.testing.assert_close(part, same, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_an_analysis_that_explodes_is_bounded_and_learns_from_it(pixels: torch.Tensor) -> None:
    network = Analysis(TINY)
    loud(network)
    with torch.no_grad():
        network.down.weight.mul_(1000)
    x = pixels.permute(0, 3, 1, 2) / 255
    latent = network(x)
    length = latent.norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, LATENT_MAX))
    with torch.no_grad():
        prepared = InferenceAnalysis(network, torch.float32)(pixels)
    torch.testing.assert_close(prepared, latent.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-3)
    latent[:, 0].sum().backward()
    assert network.unfold.weight.grad is not None
    assert network.unfold.weight.grad.isfinite().all()
    assert network.unfold.weight.grad.abs().max() > 0


@torch.inference_mode()
@pytest.mark.parametrize("blocks", BLOCKS)
def test_synthesis(pixels: torch.Tensor, blocks: int) -> None:
    network = Synthesis(dataclasses.replace(TINY, decoder_blocks=blocks))
    loud(network)
    y = torch.randn(1, 16, 28, TINY.latent_channels)
    network.fold.weight.mul_(0.15 / network(y.permute(0, 3, 1, 2)).std())  # few pixels are cut off
    expected = network(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).mul(255).round().clamp(0, 255)
    prepared = InferenceSynthesis(network, torch.float32)
    whole = prepared(y).int()
    assert (whole - expected).abs().max() <= 1
    assert (whole != expected).float().mean() < 0.01
    for window in tile_windows(header(pixels), prepared.margin):
        part = prepared(y[:, window.rows, window.columns], window.margin).int()
        same = whole[:, 16 * window.top :, 16 * window.left :][:, : part.shape[1], : part.shape[2]]
        assert part.shape[1:3] == (16 * window.height, 16 * window.width)
        assert (part - same).abs().max() <= 1


@torch.inference_mode()
def test_hyper_analysis() -> None:
    network = HyperAnalysis(TINY)
    loud(network)
    y = 20 * torch.randn(2, 8, 12, TINY.latent_channels)
    expected = network(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    z = InferenceHyperAnalysis(network, torch.float32)(y)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)

"""A stored model can be trained further: it restores to what it was exported from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import TINY, tiny_trainable, write_tiny_model
from ugicm.codec.codec import Codec
from ugicm.codec.conditioning import lambda_of
from ugicm.codec.store import read_model
from ugicm_train.export import export, model_tensors, read_training, write_model
from ugicm_train.losses import Judge
from ugicm_train.restore import fit_prior, hyper_tables, move_levels, move_rates, restore, start_from
from ugicm_train.train import TrainOptions, load_checkpoint, train


def test_export_of_a_restored_model_is_the_stored_model() -> None:
    tensors = model_tensors(tiny_trainable())
    again = model_tensors(restore(TINY, tensors))
    fitted = [name for name in tensors if name.startswith("tables.z.")]
    for name in tensors.keys() - set(fitted):
        torch.testing.assert_close(again[name], tensors[name], rtol=0, atol=0)


def test_prior_is_fitted_to_its_tables() -> None:
    model = tiny_trainable()
    with torch.no_grad():
        model.prior.location.add_(torch.randn_like(model.prior.location))
        model.prior.log_scale.uniform_(-1, 1.5)
    tensors = model_tensors(model)
    fresh = tiny_trainable().prior
    excess = fit_prior(fresh, *hyper_tables(tensors))
    assert excess < 0.005  # bits a symbol


def test_levels_move_to_another_range_of_lambda() -> None:
    wider = dataclasses.replace(TINY, lambda_max=TINY.lambda_max * 4)
    model = start_from(tiny_trainable(), wider)
    gains = tiny_trainable().gains
    torch.testing.assert_close(model.gains.log_gain[0], gains.log_gain[0])
    assert (model.gains.log_gain[-1] > gains.log_gain[-1]).all()
    # Back again: linear between the same ends.
    move_levels(model.gains, wider, TINY)
    torch.testing.assert_close(model.gains.log_gain, gains.log_gain)


def test_transforms_of_a_rate_stay_in_another_range_of_lambda() -> None:
    # Twice as far on either side of the same middle.
    ratio = (TINY.lambda_max / TINY.lambda_min) ** 0.5
    wider = dataclasses.replace(TINY, lambda_min=TINY.lambda_min / ratio, lambda_max=TINY.lambda_max * ratio)
    old, new = tiny_trainable(), start_from(tiny_trainable(), wider)
    x, y = torch.rand(1, 3, 64, 64), torch.rand(1, TINY.latent_channels, 4, 4)
    for level in (torch.tensor([value]) for value in (0.0, 0.7, 1.0, 1.8, 2.0)):
        wide = (lambda_of(TINY, level) / wider.lambda_min).log() / np.log(ratio**4) * 2
        torch.testing.assert_close(new.latent_of(x, wide), old.latent_of(x, level))
        torch.testing.assert_close(new.machine_view(y, wide, 1.0), old.machine_view(y, level, 1.0))
    # The other way round.
    parts = (new.synthesis, new.synthesis_low, new.synthesis_high)
    move_rates(*parts, wider, TINY)
    for part, before in zip(parts, (old.synthesis, old.synthesis_low, old.synthesis_high), strict=True):
        for name, weight in before.state_dict().items():
            torch.testing.assert_close(part.state_dict()[name], weight, atol=1e-6, rtol=1e-5)


def test_a_larger_model_starts_as_a_smaller_one_is() -> None:
    small = tiny_trainable().eval()
    with torch.no_grad():
        for part in (small.analysis_low, small.synthesis_high, small.preference, small.preference_low):
            for parameter in part.parameters():
                parameter.normal_(0, 0.01)
    larger = dataclasses.replace(TINY, channels=2 * TINY.channels, context_blocks=TINY.context_blocks + 1)
    x, level = torch.rand(2, 3, 64, 64), torch.full((2,), 0.7)
    with torch.no_grad():
        before = small(x, level, noise=False)
        after = start_from(small, larger)(x, level, noise=False)
        # A wider model computes the same, and new blocks little more.
        wider = start_from(small, dataclasses.replace(TINY, channels=2 * TINY.channels))
        same = wider(x, level, noise=False)
    torch.testing.assert_close(same.human, before.human, atol=1e-5, rtol=0)
    torch.testing.assert_close(same.machine, before.machine, atol=1e-5, rtol=0)
    torch.testing.assert_close(same.bpp, before.bpp, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.human, before.human, atol=0.1, rtol=0)
    # What is new can learn: it hears something.
    assert bool((wider.analysis.unfold.weight[TINY.channels :].abs() > 0).any())


def test_a_run_starts_with_the_weights_of_a_model(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    data = tmp_path / "photo.png"
    PIL.Image.fromarray(photo).save(data)
    stored = read_model(write_tiny_model(tmp_path / "model"))
    options = TrainOptions(steps=1, batch=1, crop=64, matrix_lr=0.0, other_lr=0.0, ema=0.5, device="cpu")
    train(TINY, options, [data], tmp_path / "run", start=str(tmp_path / "model"))
    state = load_checkpoint(tmp_path / "run")
    torch.testing.assert_close(state["model"]["analysis.down.weight"], stored.tensors["analysis.down.weight"])

    class Blind:
        def draw(self) -> Judge:
            return lambda machine, original: (machine - original).mean((1, 2, 3)) * 0

    train(
        TINY, options, [data], tmp_path / "run", resume="checkpoint.pt", teacher=Blind(), teacher_name="blind"
    )
    export(tmp_path / "run", tmp_path / "exported")
    record = read_training(tmp_path / "exported")
    assert record["start"]["weights"] == stored.weights_sha256
    assert record["teachers"] == [{"teacher": "blind", "weight": options.teacher_weight}]
    assert record["steps"] == 2

    write_model(tmp_path / "held", TINY, stored.tensors | {"reach": torch.tensor([1.0, 0.5, 0.25])}, {})
    with pytest.raises(ValueError, match=r"reach 1 0\.5 0\.25.*--reach 1 1 1"):
        train(TINY, options, [data], tmp_path / "run2", start=str(tmp_path / "held"))
    other = dataclasses.replace(TINY, decoder_blocks=1)
    with pytest.raises(ValueError, match=rf"decoder_blocks {TINY.decoder_blocks} \(wanted 1\)"):
        train(other, options, [data], tmp_path / "run2", start=str(tmp_path / "model"))


def test_a_run_has_the_config_of_the_model_that_it_starts_from(
    tmp_path: Path, photo: NDArray[np.uint8]
) -> None:
    data = tmp_path / "photo.png"
    PIL.Image.fromarray(photo).save(data)
    wide = dataclasses.replace(TINY, name="wide", lambda_max=2.0)
    write_model(tmp_path / "model", wide, model_tensors(start_from(tiny_trainable(), wide)), {})
    options = TrainOptions(steps=1, batch=1, crop=64, device="cpu")
    train(None, options, [data], tmp_path / "run", start=str(tmp_path / "model"))
    assert load_checkpoint(tmp_path / "run")["config"] == wide.to_dict()


def test_decoded_views_are_those_that_were_trained(
    tiny_store: Path, tiny_codec: Codec, photo: NDArray[np.uint8]
) -> None:
    stored = read_model(tiny_store / "tiny")
    model = restore(stored.config, stored.tensors).eval()
    for quality in (1.0, 25.75, 50.5, 100.0):
        bitstream = tiny_codec.encode([photo[:128, :192]], quality)[0]
        y_hat = tiny_codec.unpack(bitstream).y_hat
        assert y_hat is not None
        level = torch.tensor([(quality - 1) / 99 * (stored.config.levels - 1)])
        pictures = []
        for strength in (0.0, 0.5, 1.0):
            with torch.no_grad():
                latent = y_hat.permute(2, 0, 1)[None] * model.gains(level)[1]
                view = model.machine_view(latent, level, strength)[0]
            expected = (view.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
            pictures.append(tiny_codec.decode([bitstream], strength)[0])
            np.testing.assert_allclose(pictures[-1], expected, atol=1)
        assert (pictures[0] != pictures[2]).any()

"""The hyper latent's coding: contexts know only what is decoded, and every symbol comes back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ugicm.codec.coder import TOTAL, SymbolDecoder, SymbolEncoder
from ugicm.codec.errors import ModelStoreError
from ugicm.codec.hyper_prior import CONTEXTS, HyperPrior, contexts, phases

Choice = NDArray[np.uint8]


def prior(choice: Choice, tables: int) -> HyperPrior:
    """Tables of symbols -1, 0, 1 and escapes, each likelier to give 0 than the one before."""
    rows = [
        [TOTAL // 4 - 8**k, TOTAL // 4 + 3 * 8**k, TOTAL // 4 - 8**k, TOTAL // 4 - 8**k]
        for k in range(tables)
    ]
    return HyperPrior(
        {
            "tables.z.frequencies": torch.tensor(rows, dtype=torch.int32).flatten(),
            "tables.z.lengths": torch.full((tables,), 4, dtype=torch.int32),
            "tables.z.choice": torch.from_numpy(choice),
        }
    )


def varied(channels: int, levels: int = 3) -> Choice:
    shape = (levels, CONTEXTS, channels)
    return np.random.default_rng(0).integers(0, 7, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (2, 2), (5, 7)])
def test_every_position_has_one_phase(shape: tuple[int, int]) -> None:
    assert (np.sum(phases(*shape), 0) == 1).all()


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 4), (3, 6, 5)])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_symbols_come_back(shape: tuple[int, int, int], rate: float) -> None:
    z = np.random.default_rng(1).integers(-3, 4, shape).astype(np.int16)
    z.flat[0] = 511  # escape, and far beyond what contexts tell apart
    coder = prior(varied(3), 7)
    encoder = SymbolEncoder()
    coder.write(encoder, z, rate)
    decoder = SymbolDecoder(encoder.finish())
    assert np.array_equal(coder.read(decoder, shape, rate), z)
    decoder.finish()


def test_contexts_look_at_earlier_phases_only() -> None:
    z = np.random.default_rng(2).integers(-4, 5, (2, 6, 7)).astype(np.int16)
    order = phases(6, 7)
    for phase, mask in enumerate(order):
        known = np.any(order[:phase], 0) if phase else np.zeros((6, 7), bool)
        assert np.array_equal(contexts(z, phase)[:, mask], contexts(np.where(known, z, 0), phase)[:, mask])


def test_context_is_the_sum_of_the_neighbours() -> None:
    z = np.zeros((1, 4, 4), np.int16)
    middle: Callable[[int], int] = lambda phase: int(contexts(z, phase)[0, 1, 1])  # noqa: E731
    assert middle(0) == 0
    half = CONTEXTS // 2
    seen = []
    for total in (-9, -4, -2, 0, 1, 3, 5):
        z[0, 0, 0], z[0, 2, 1] = total, -total
        seen.append((middle(1), middle(2)))
    assert [diagonal for diagonal, _ in seen] == list(range(1, 1 + half))
    assert [adjacent for _, adjacent in seen][1:4] == [1 + half + k for k in (5, 4, 3)]
    assert len({adjacent for _, adjacent in seen}) == half


def test_rates_and_contexts_choose_the_table() -> None:
    zeros = np.zeros((4, 8, 8), np.int16)

    def size(choice: Choice, rate: float) -> int:
        encoder = SymbolEncoder()
        prior(choice, 7).write(encoder, zeros, rate)
        return len(encoder.finish())

    by_level = np.repeat(np.array([0, 6], np.uint8), 4).reshape(2, 1, 4)
    assert size(by_level, 0.4) == size(by_level[:1], 1.0) > size(by_level, 0.6) == size(by_level[1:], 0.0)
    # Zeros around: context 0 in the first phase, the middle one of each half afterwards.
    certain = np.zeros((1, CONTEXTS, 4), np.uint8)
    certain[:, [0, 4, 4 + CONTEXTS // 2]] = 6
    assert size(certain, 0.0) == size(by_level, 1.0)


@pytest.mark.parametrize("choice", [varied(3)[0], varied(3)[:, :2], varied(3) + 1])
def test_a_choice_that_does_not_fit_is_refused(choice: Choice) -> None:
    with pytest.raises(ModelStoreError, match="choice of hyper tables"):
        prior(choice, 7)

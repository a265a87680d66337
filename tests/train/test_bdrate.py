"""BD-rates: exact where the answer is known, and the usual values for published points."""

from __future__ import annotations

import math

import pytest

from ugicm_train.evaluation.bdrate import Curve, bd_rate, decibels

# ln bpp is linear in the quality, 3 dB per doubling, and PCHIP reproduces straight lines.
REFERENCE = Curve((0.1, 0.2, 0.4, 0.8, 1.6), (26.0, 29.0, 32.0, 35.0, 38.0))
# 6 dB per doubling: cheaper than the reference above 29 dB, dearer below.
STEEP = Curve((0.1 * 2**0.25, 0.1 * 2**0.75, 0.1 * 2**1.5), (24.5, 27.5, 32.0))

# Kodak, PSNR of RGB, means over the pictures, as published with CompressAI.
VTM = Curve(
    (0.0482, 0.1125, 0.2458, 0.4905, 0.8748, 1.4308, 2.3246, 3.6326),
    (26.145, 28.493, 31.2, 34.262, 37.42, 40.424, 43.506, 46.592),
)
BPG = Curve(
    (0.0678, 0.161, 0.3516, 0.6847, 1.1997, 1.9297, 3.0579, 4.7031),
    (26.195, 28.682, 31.595, 34.857, 38.26, 41.479, 44.703, 47.633),
)
MBT2018_MEAN = Curve(
    (0.1239, 0.198, 0.3072, 0.4606, 0.6617, 0.9144, 1.2342, 1.6191),
    (27.699, 29.359, 31.129, 32.951, 34.968, 36.911, 38.838, 40.633),
)
CHENG2020 = Curve(
    (0.1196, 0.1838, 0.271, 0.4174, 0.5945, 0.8057),
    (28.582, 29.969, 31.343, 33.39, 35.119, 36.704),
)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("bpp_range", [None, (0.2, 0.9), (0.25, 0.5)])
def test_constant_ratio(factor: float, bpp_range: tuple[float, float] | None) -> None:
    test = Curve([factor * bpp for bpp in VTM.bpp], VTM.quality)
    assert bd_rate(VTM, test, bpp_range=bpp_range) == pytest.approx(100 * (factor - 1), abs=1e-9)


def test_mean_log_ratio_over_the_shared_quality() -> None:
    # Shared: 26..32 dB. There log2(test / reference) falls linearly from 0.5 to -0.5.
    assert bd_rate(REFERENCE, STEEP) == pytest.approx(0, abs=1e-9)


def test_bpp_range_is_that_of_the_reference() -> None:
    # The reference spends 0.2..0.4 at 29..32 dB: log2 ratio 0 to -0.5, on average -0.25.
    expected = 100 * (2**-0.25 - 1)
    assert bd_rate(REFERENCE, STEEP, bpp_range=(0.2, 0.4)) == pytest.approx(expected)
    # Beyond 32 dB the test curve ends, so the upper limit changes nothing.
    assert bd_rate(REFERENCE, STEEP, bpp_range=(0.2, 1.0)) == pytest.approx(expected)
    # Below 0.1 the reference ends: the range is open there.
    assert bd_rate(REFERENCE, STEEP, bpp_range=(0.01, 9)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("test", "against_vtm", "against_bpg"),
    [(BPG, 22.0, 0.0), (MBT2018_MEAN, 21.3, -3.3), (CHENG2020, 3.7, -18.9)],
)
def test_published_codecs(test: Curve, against_vtm: float, against_bpg: float) -> None:
    assert bd_rate(VTM, test) == pytest.approx(against_vtm, abs=0.05)
    assert bd_rate(BPG, test) == pytest.approx(against_bpg, abs=0.05)


def test_a_range_ends_where_the_test_curve_begins() -> None:
    reference = Curve((0.1, 0.2, 0.4, 0.8, 1.6), (26.0, 29.0, 32.0, 35.0, 38.0))
    late = Curve((0.1 * 2**1.25, 0.1 * 2**1.5), (30.5, 32.0))
    assert bd_rate(reference, late, bpp_range=(0.2, 0.4)) == pytest.approx(100 * (2**-0.375 - 1))


def test_a_range_is_that_of_the_curves_beside() -> None:
    # At 29..32 dB the log2 ratio falls from 0 to -0.5, at 26..29 dB from 0.5 to 0.
    for qualities, expected in (((29.0, 50.0), 2**-0.25), ((20.0, 29.0), 2**0.25), ((26.0, 32.0), 1.0)):
        beside = [Curve((0.1, 0.2), qualities)]
        assert bd_rate(REFERENCE, STEEP, beside=beside) == pytest.approx(100 * (expected - 1), abs=1e-9)
    assert bd_rate(REFERENCE, STEEP, beside=[Curve((0.1, 0.2), (33.0, 34.0))]) is None


def test_order_of_points_does_not_matter() -> None:
    shuffled = Curve(CHENG2020.bpp[::-1], CHENG2020.quality[::-1])
    assert bd_rate(VTM, shuffled) == bd_rate(VTM, CHENG2020)


def test_of_equal_quality_the_cheapest_point_counts() -> None:
    wasteful = Curve((*CHENG2020.bpp, 2.0), (*CHENG2020.quality, 36.704))
    assert bd_rate(VTM, wasteful) == bd_rate(VTM, CHENG2020)


def test_no_shared_quality() -> None:
    assert bd_rate(REFERENCE, Curve((0.1, 0.2), (40.0, 41.0))) is None
    assert bd_rate(REFERENCE, STEEP, bpp_range=(1.0, 1.5)) is None


@pytest.mark.parametrize("bpp_range", [(0.01, 0.1), (1.6, 9.0), (2.0, 9.0)])
def test_a_reference_that_never_spends_so_many_bits(bpp_range: tuple[float, float]) -> None:
    test = Curve([bpp / 2 for bpp in REFERENCE.bpp], REFERENCE.quality)
    assert bd_rate(REFERENCE, test, bpp_range=bpp_range) is None


@pytest.mark.parametrize(
    "curve",
    [
        Curve((0.1,), (30.0,)),
        Curve((0.1, 0.2), (30.0, 30.0)),
        Curve((0.0, 0.2), (30.0, 31.0)),
        Curve((0.1, 0.2), (30.0, math.inf)),
    ],
)
def test_refuses_what_is_no_curve(curve: Curve) -> None:
    with pytest.raises(ValueError, match="a curve"):
        bd_rate(REFERENCE, curve)


def test_decibels() -> None:
    assert decibels(0.99) == pytest.approx(20)
    assert decibels(1.0) == pytest.approx(100)

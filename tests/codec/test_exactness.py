"""The claim of the project: what one machine encodes, every other decodes to the same integers."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.codec.reference_entropy import ReferenceEntropy, assemble
from tests.conftest import batch_sizes
from ugicm.codec import dense as dense_module
from ugicm.codec import entropy
from ugicm.codec.bitstream import parse
from ugicm.codec.codec import Codec, latent_size
from ugicm.codec.coder import SYMBOL_LIMIT
from ugicm.codec.conditioning import rate_of
from ugicm.codec.config import PRESETS, ModelConfig
from ugicm.codec.dense import FUSED, dense
from ugicm.codec.entropy import SKIP_INDEX, EntropyModel, TileSymbols
from ugicm.codec.entropy_twin import EntropyNetwork
from ugicm.codec.errors import ModelStoreError
from ugicm.codec.fixed_point import BITS_MAX, BITS_MIN, SUM_LIMIT, input_grid, largest_sums
from ugicm.codec.store import StoredModel, read_model
from ugicm_train.export import latent_tables, prior_tables
from ugicm_train.model import FactorizedPrior

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def stored(tiny_store: Path) -> StoredModel:
    return read_model(tiny_store / "tiny")


@pytest.fixture(scope="module")
def reference(stored: StoredModel) -> ReferenceEntropy:
    return ReferenceEntropy(stored.config, {k: v.numpy() for k, v in stored.tensors.items()})


def unpacked(codec: Codec, data: bytes) -> tuple[TileSymbols, torch.Tensor]:
    """Symbols and latent of a picture of one tile, as `Codec.unpack` decodes them."""
    header, (segment,) = parse(data, max_pixels=codec.max_pixels)
    size = latent_size(header.width, header.height)
    return codec._cpu_entropy.unpack(segment, *size, rate_of(header.quality))


def check_against_reference(
    config: ModelConfig, reference: ReferenceEntropy, tile: TileSymbols, y_hat: torch.Tensor
) -> None:
    symbols = assemble(config, tile.y)
    indexes, y_hat_units = reference.parameters(tile.z.astype(np.int64), symbols)
    np.testing.assert_array_equal(assemble(config, tile.indexes), indexes)
    np.testing.assert_array_equal((y_hat.double() * 64).permute(2, 0, 1).numpy(), y_hat_units)


def test_equals_int64_reference_on_random_latents(stored: StoredModel, reference: ReferenceEntropy) -> None:
    model = EntropyModel(stored.config, stored.tensors, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, 2, 3, stored.config.hyper_channels, generator=generator) * 40
    y = torch.randn(1, 8, 12, stored.config.latent_channels, generator=generator) * 20
    y[..., 0] *= 30  # far beyond the tables: escapes, and context beyond its clamp
    (tile,) = model.quantise(z, y)
    decoded, y_hat = model.unpack(model.pack(tile, 0.3), 8, 12, 0.3)
    assert len({int(i) for step in tile.indexes for i in step.flat}) > 10, "indexes should vary"
    check_against_reference(stored.config, reference, decoded, y_hat)


def largest_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random weights whose rows reach the limit of exact sums, and tables."""
    random = np.random.default_rng(3)
    tensors = {}
    for key, value in EntropyNetwork(config).state_dict().items():
        if not key.endswith(".weight"):
            continue
        name = key.removesuffix(".weight")
        # A context layer's bound has room for "base" in it, which takes more with every place.
        most = 10 if name.startswith("context.") else BITS_MAX
        bits = torch.from_numpy(random.integers(BITS_MIN, most, len(value), endpoint=True))
        weight = torch.from_numpy(random.normal(0, 1, value.shape))
        rows = weight.flatten(1).abs().sum(1).view(-1, *[1] * (weight.ndim - 1))
        weight = (weight / rows * ((SUM_LIMIT >> 1) / input_grid(name).end)).round().clamp(-32767, 32767)
        spare = SUM_LIMIT - 1 - largest_sums(name, weight, torch.zeros(len(bits)), bits)
        bias = spare * torch.from_numpy(random.choice([-1, 1], len(bits)))
        for kind, part, dtype in (
            ("weight", weight, torch.int16),
            ("bias", bias, torch.int32),
            ("bits", bits, torch.uint8),
        ):
            tensors[f"entropy.{name}.{kind}"] = part.to(dtype)
    tensors |= latent_tables()
    prior = prior_tables(FactorizedPrior(config.hyper_channels))
    for part, array in zip(("frequencies", "lengths"), prior, strict=True):
        tensors[f"tables.z.{part}"] = torch.from_numpy(array)
    tensors["tables.z.choice"] = torch.arange(config.hyper_channels, dtype=torch.uint8).view(1, 1, -1)
    return tensors


def test_equals_int64_reference_at_the_largest_magnitudes() -> None:
    """Rows at the limit of what is exact in float32, and saturated activations, at the shipped sizes."""
    config = dataclasses.replace(PRESETS["ugicm-s"], context_blocks=1)
    tensors = largest_tensors(config)
    random = np.random.default_rng(3)
    model = EntropyModel(config, tensors, torch.device("cpu"))
    reference = ReferenceEntropy(config, {name: value.numpy() for name, value in tensors.items()})
    z = torch.from_numpy(random.normal(0, 200, (1, 1, 1, config.hyper_channels)))
    y = torch.from_numpy(random.normal(0, 300, (1, 4, 4, config.latent_channels)))
    (tile,) = model.quantise(z, y)
    decoded, y_hat = model.unpack(model.pack(tile, 1.0), 4, 4, 1.0)
    check_against_reference(config, reference, decoded, y_hat)
    assert SUM_LIMIT // 2 < reference.largest < SUM_LIMIT


@pytest.mark.parametrize("kind", ["weight", "bias", "bits"])
def test_a_model_whose_sums_are_not_exact_is_refused(kind: str) -> None:
    config = dataclasses.replace(PRESETS["ugicm-s"], context_blocks=1)
    tensors = largest_tensors(config)
    tensor = tensors[f"entropy.trunk.0.expand.{kind}"]
    if kind == "bits":
        tensor[5] = BITS_MAX + 1
    else:
        tensor[5] += tensor[5].sign()
    with pytest.raises(ModelStoreError, match=r"entropy layer trunk\.0\.expand of ugicm-s is not exact"):
        EntropyModel(config, tensors, torch.device("cpu"))


def test_equals_int64_reference_on_a_photo(
    tiny_codec: Codec,
    stored: StoredModel,
    reference: ReferenceEntropy,
    photo: NDArray[np.uint8],
) -> None:
    data = tiny_codec.encode([photo[:128, 64:256]], 80)[0]
    check_against_reference(stored.config, reference, *unpacked(tiny_codec, data))


def test_a_hyper_latent_beyond_its_limit(stored: StoredModel, reference: ReferenceEntropy) -> None:
    """An encoder writes none, but a bitstream may have one; sums would no longer be exact."""
    model = EntropyModel(stored.config, stored.tensors, torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(1, 2, 3, stored.config.hyper_channels, generator=generator) * 600
    y = torch.randn(1, 8, 12, stored.config.latent_channels, generator=generator)
    (tile,) = model.quantise(z, y)
    beyond = tile._replace(z=np.where(np.abs(tile.z) == 511, 60 * tile.z, tile.z))
    assert (beyond.z != tile.z).any()
    decoded, y_hat = model.unpack(model.pack(beyond, 0.3), 8, 12, 0.3)
    np.testing.assert_array_equal(decoded.z, beyond.z)
    check_against_reference(stored.config, reference, decoded, y_hat)


@pytest.mark.parametrize("size", [1e6, math.inf])
def test_latents_beyond_every_symbol(stored: StoredModel, size: float) -> None:
    model = EntropyModel(stored.config, stored.tensors, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(1, 2, 3, stored.config.hyper_channels, generator=generator) * 40
    y = torch.randn(1, 8, 12, stored.config.latent_channels, generator=generator)
    (tile,) = model.quantise(z, torch.where(y > 1, size, torch.where(y < -1, -size, y)))
    decoded, _ = model.unpack(model.pack(tile, 0.3), 8, 12, 0.3)
    largest = 0
    for sent, got in zip(tile.y, decoded.y, strict=True):
        np.testing.assert_array_equal(got, sent)
        largest = max(largest, int(np.abs(got).max()))
    assert largest > SYMBOL_LIMIT - 8


def random_symbols(model: EntropyModel) -> bytes:
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(1, 2, 3, model.config.hyper_channels, generator=generator) * 40
    y = torch.randn(1, 8, 12, model.config.latent_channels, generator=generator) * 20
    (tile,) = model.quantise(z, y)
    return b"".join(part.tobytes() for part in (tile.z, *tile.y, *tile.indexes))


def test_settings_that_round_products_change_nothing(
    stored: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EntropyModel(stored.config, stored.tensors, torch.device("cpu"))
    expected = random_symbols(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert random_symbols(model) == expected
    before = torch.get_float32_matmul_precision()
    dtypes = []

    def spy(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        dtypes.append(x.dtype)
        return dense(x, *rest)

    monkeypatch.setattr(entropy, "dense", spy)
    try:
        torch.set_float32_matmul_precision("medium")
        assert random_symbols(model) == expected
    finally:
        torch.set_float32_matmul_precision(before)
    # Not every processor obeys the setting, but all get float64, which it does not reach.
    assert set(dtypes) == {torch.float64}


@pytest.mark.parametrize("digits", [8, 11], ids=["bfloat16", "TF32"])
def test_products_that_lose_digits_are_noticed(
    stored: StoredModel, monkeypatch: pytest.MonkeyPatch, digits: int
) -> None:
    """As an environment variable can make them do, unseen by torch's settings."""
    expected = random_symbols(EntropyModel(stored.config, stored.tensors, torch.device("cpu")))

    def rounded(x: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**digits).round(), exponent - digits)

    def lossy(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.dtype == torch.float32:
            x, weight = rounded(x), rounded(weight)
        return dense(x, weight, *rest)

    monkeypatch.setattr(entropy, "dense", lossy)
    model = EntropyModel(stored.config, stored.tensors, torch.device("cpu"))
    assert random_symbols(model) == expected
    # With rounding as coarse as bfloat16's it would have mattered even here.
    monkeypatch.setattr(model, "_float32_is_exact", not model._float32_is_exact)
    assert model._float32_is_exact
    if digits == 8:
        assert random_symbols(model) != expected


def test_many_pictures_without_onednn() -> None:
    """torch then convolves 16 or more by Winograd's algorithm, which rounds."""
    config = dataclasses.replace(PRESETS["ugicm-s"], context_blocks=1)
    model = EntropyModel(config, largest_tensors(config), torch.device("cpu"))
    single, double = (
        model._weights[torch.float32].to(dtype).layers["trunk.0.spatial"]
        for dtype in (torch.float32, torch.float64)
    )
    x = torch.randint(4096, (16, 8, 8, config.entropy_channels), generator=torch.Generator().manual_seed(7))
    with torch.backends.mkldnn.flags(enabled=False):
        sums = model._convolved(x.float(), single)
    assert torch.equal(sums.double(), model._convolved(x.double(), double))


def test_skipped_symbols_are_zero(stored: StoredModel) -> None:
    model = EntropyModel(stored.config, stored.tensors, torch.device("cpu"))
    z = torch.full((1, 2, 2, stored.config.hyper_channels), -300.0)
    z[..., ::2] = 300
    y = torch.full((1, 8, 8, stored.config.latent_channels), 9.0)
    (tile,) = model.quantise(z, y)
    skipped = np.concatenate([step.reshape(-1) for step in tile.indexes]) == SKIP_INDEX
    symbols = np.concatenate([step.reshape(-1) for step in tile.y])
    assert skipped.any()
    assert (~skipped).any()
    assert not symbols[skipped].any()


class Setting(NamedTuple):
    threads: int
    precision: str
    fused: bool
    batched: bool


SETTINGS = [
    Setting(*values)
    for values in itertools.product((1, 2), ("float32", "bfloat16"), (False, True), (False, True))
]


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def apply(setting: Setting, patch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(setting.threads)
    patch.setattr(dense_module, "FUSED", FUSED if setting.fused else frozenset())


def _flatten(tile: TileSymbols) -> bytes:
    return b"".join(part.tobytes() for part in (tile.z, *tile.y, *tile.indexes))


def test_every_setting_decodes_every_other(
    stored: StoredModel, photo: NDArray[np.uint8], restore_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """{1, 2 threads} x {float32, bf16} x {plain, fused products} x {alone, in a batch of 5}."""
    picture = photo[40:140, 100:230]
    others = [photo[i : i + 100, 2 * i : 2 * i + 130] for i in (0, 13, 26, 39)]
    sizes = batch_sizes(monkeypatch)
    codecs = {
        precision: Codec(stored, device="cpu", precision=precision) for precision in ("float32", "bfloat16")
    }
    coded: dict[Setting, tuple[bytes, bytes]] = {}
    for setting in SETTINGS:
        apply(setting, monkeypatch)
        codec = codecs[setting.precision]
        images = [*others[:2], picture, *others[2:]] if setting.batched else [picture]
        latent = codec.analyse(images, 70)[2 if setting.batched else 0]
        coded[setting] = codec.pack(latent), _flatten(*latent.tiles)
    pictures: dict[tuple[bytes, str], NDArray[np.uint8]] = {}
    for setting in SETTINGS:
        apply(setting, monkeypatch)
        codec = codecs[setting.precision]
        for data, symbols in set(coded.values()):
            latents = [codec.unpack(data)]
            assert _flatten(unpacked(codec, data)[0]) == symbols
            if setting.batched:
                latents += [codec.unpack(other) for other in codec.encode(others, 70)]
            decoded = codec.synthesise(latents, 0.0)[0]
            first = pictures.setdefault((data, setting.precision), decoded)
            assert np.abs(first.astype(int) - decoded).max() <= 1
    assert [set(some) for some in sizes] == [{1, 4, 5}, {1, 5}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_and_cpu_decode_each_other(
    stored: StoredModel, photo: NDArray[np.uint8], precision: str
) -> None:
    cpu = Codec(stored, device="cpu", precision=precision)
    cuda = Codec(stored, device="cuda", precision=precision)
    on_gpu = EntropyModel(stored.config, stored.tensors, torch.device("cuda"))
    for encoder in (cpu, cuda):
        latent = encoder.analyse([photo], 70)[0]
        data = encoder.pack(latent)
        for decoder in (cpu, cuda):
            assert _flatten(unpacked(decoder, data)[0]) == _flatten(*latent.tiles)
        tile = latent.tiles[0]
        height, width = (2 * side for side in tile.y[0].shape[1:3])
        again, _ = on_gpu.unpack(on_gpu.pack(tile, 0.5), height, width, 0.5)
        assert _flatten(again) == _flatten(tile)
        first, second = cpu.decode([data])[0], cuda.decode([data])[0]
        limit = 1 if precision == "float32" else 4
        assert np.abs(first.astype(int) - second).max() <= limit


def test_golden_bitstream_keeps_its_meaning() -> None:
    """Made once by the model beside it. A change here means that old bitstreams no longer decode."""
    codec = Codec(read_model(GOLDEN / "model"), device="cpu", precision="float32")
    data = (GOLDEN / "photo.ugic").read_bytes()
    expected = (GOLDEN / "symbols.sha256").read_text().strip()
    assert hashlib.sha256(_flatten(unpacked(codec, data)[0])).hexdigest() == expected
    picture = codec.decode([data])[0]
    assert picture.shape == (96, 131, 3)

"""Pixels to bits and back: sizes, batches, tiles, budgets and refusals."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ugicm.codec.codec as codec_module
from tests.conftest import batch_sizes
from ugicm.codec.bitstream import MAX_SIDE, parse, peek, serialise
from ugicm.codec.codec import Codec, latent_size
from ugicm.codec.errors import (
    CodecError,
    LimitExceededError,
    MalformedBitstreamError,
    ModelMismatchError,
)
from ugicm.codec.store import load_codec, read_model

Photo = NDArray[np.uint8]


def psnr(a: Photo, b: Photo) -> float:
    return float(-10 * np.log10(max(np.mean((a.astype(float) - b) ** 2), 1e-9) / 255**2))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 200), (63, 64), (64, 64), (65, 129), (300, 451)])
def test_any_size_round_trips(tiny_codec: Codec, photo: Photo, height: int, width: int) -> None:
    image = photo[:height, :width]
    data = tiny_codec.encode([image], 90)[0]
    decoded = tiny_codec.decode([data])[0]
    assert decoded.shape == image.shape
    assert decoded.dtype == np.uint8
    assert psnr(decoded, image) > 20
    header = peek(data)
    assert (header.width, header.height, header.quality) == (width, height, 90)


def test_mixed_batch_equals_single_images(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [photo, photo[:64, :64], photo[::-1], photo[:64, 64:128], photo]
    qualities = [20.0, 90.0, 20.4, 90.2, 55.5]
    coded, decoded = batch_sizes(monkeypatch)
    together = tiny_codec.encode(images, qualities)
    assert coded == [2, 2, 1]
    for image, quality, data in zip(images, qualities, together, strict=True):
        alone = tiny_codec.encode([image], quality)[0]
        assert psnr(*tiny_codec.decode([alone, data])) > 45
    strengths = [0.0, 1.0, 0.5, 1.0, 0.0]
    decoded.clear()
    pictures = tiny_codec.decode(together, strengths)
    assert decoded == [1, 2, 1, 1]
    for data, strength, picture in zip(together, strengths, pictures, strict=True):
        alone_picture = tiny_codec.decode([data], strength)[0].astype(int)
        assert np.abs(alone_picture - picture).max() <= 1


def test_batches_are_bounded_with_their_padding(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips of one pixel's width are 64 wide to the networks."""
    monkeypatch.setattr(codec_module, "BATCH_PIXELS", 4 * 64 * 128)
    coded, _ = batch_sizes(monkeypatch)
    tiny_codec.analyse([photo[row : row + 1, :100] for row in range(10)])
    assert coded == [4, 4, 2]


def test_quality_trades_bytes_for_fidelity(tiny_codec: Codec, photo: Photo) -> None:
    coded = tiny_codec.encode([photo] * 4, [1, 30, 65, 100])
    sizes = [len(data) for data in coded]
    values = [psnr(photo, picture) for picture in tiny_codec.decode(coded)]
    assert sizes == sorted(sizes)
    assert values[0] < min(values[1:]) - 0.1


@pytest.mark.parametrize("part", ["analysis", "synthesis"])
@pytest.mark.parametrize("end", ["low", "high"])
def test_every_rate_has_transforms_of_its_own(tiny_store: Path, photo: Photo, part: str, end: str) -> None:
    stored = read_model(tiny_store / "tiny")
    level = {
        name: torch.zeros_like(tensor) if name.startswith(f"{part}_{end}.") else tensor
        for name, tensor in stored.tensors.items()
    }
    tilted, plain = (
        Codec(stored._replace(tensors=tensors), device="cpu", precision="float32")
        for tensors in (stored.tensors, level)
    )
    for quality, same in ((1.0, end == "high"), (50.5, True), (100.0, end == "low")):
        data = [codec.encode([photo], quality)[0] for codec in (tilted, plain)]
        assert (data[0] == data[1]) is (same or part == "synthesis")
        pictures = [codec.decode(data[:1])[0] for codec in (tilted, plain)]
        assert np.array_equal(*pictures) is (same or part == "analysis")


def test_transforms_are_made_once_and_the_latest_used_stay(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []

    def make(codec: Codec, tilt: float) -> float:
        made.append(tilt)
        return -tilt

    monkeypatch.setattr(codec_module, "TRANSFORMS_KEPT", 2)
    monkeypatch.setattr(Codec, "_make_analysis", make)
    codec = load_codec("tiny", store=tiny_store, device="cpu")
    assert [codec._analysis_for(tilt) for tilt in (1, 2, 1, 3, 1, 2)] == [-1, -2, -1, -3, -1, -2]
    assert made == [1, 2, 3, 2]


def test_strength_changes_the_picture_not_the_bits(tiny_codec: Codec, photo: Photo) -> None:
    data = tiny_codec.encode([photo])[0]
    views = [tiny_codec.decode([data], s)[0].astype(int) for s in (0.0, 0.3, 1.0)]
    assert np.abs(views[0] - views[2]).max() > 2
    assert np.abs(views[0] - views[1]).max() > 0
    np.testing.assert_array_equal(views[0], tiny_codec.decode([data], 0.0)[0])


def test_a_latent_serves_several_views(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    [data] = tiny_codec.encode([photo])
    size = latent_size(photo.shape[1], photo.shape[0])
    views = [tiny_codec.decode([data], strength)[0] for strength in (0.0, 1.0)]
    for map_bytes in (1, 1 << 40):
        monkeypatch.setattr("ugicm.codec.codec.MAP_BYTES", map_bytes)
        latent = tiny_codec.unpack(data)
        assert latent.nbytes == 4 * math.prod(size) * tiny_codec.config.latent_channels
        both = tiny_codec.synthesise([latent, latent], [0.0, 1.0])
        assert all(map(np.array_equal, both, views))


def test_overhead_is_at_most_32_bytes(tiny_codec: Codec, photo: Photo) -> None:
    data = tiny_codec.encode([photo])[0]
    (segment,) = parse(data, max_pixels=1 << 30).segments
    assert len(data) - len(segment) <= 32


def test_tiles_match_the_whole_picture(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transforms look across tile borders, so that tiling leaves no seam."""
    whole = tiny_codec.decode(tiny_codec.encode([photo], 80))[0]
    monkeypatch.setattr(codec_module, "TILE_SIDE", 128)
    data = tiny_codec.encode([photo], 80)[0]
    header, segments = parse(data, max_pixels=1 << 30)
    assert (header.tile_side, header.tiles, len(segments)) == (128, 12, 12)
    tiled = tiny_codec.decode([data])[0]
    # Means differ where the entropy model does not look across; the pictures differ by rounding only.
    assert psnr(whole, tiled) > 35
    assert abs(psnr(photo, tiled) - psnr(photo, whole)) < 0.05
    staged = tiny_codec.pack(tiny_codec.analyse([photo], 80)[0])
    assert staged == data
    # The same latent, synthesised in windows and at once, is the same picture.
    latent = tiny_codec.unpack(data)
    untiled = latent._replace(header=type(header)(**{**vars(header), "tile_side": 0}))
    at_once, in_windows = (tiny_codec.synthesise([item])[0].astype(int) for item in (untiled, latent))
    assert np.abs(at_once - in_windows).max() <= 1


def test_symbols_that_are_unlike_those_of_photos_are_not_lost(photo: Photo) -> None:
    """The entropy model is certain of zeros where stripes have the largest numbers of all."""
    shipped = load_codec(device="cpu")
    wave = 127.5 + 90 * np.sin(np.arange(256) * 2 * np.pi / 2.5)
    noise = np.random.default_rng(0).normal(0, 3, (256, 256, 3))
    stripes = np.clip(wave[:, None] + noise, 0, 255).astype(np.uint8)
    [lower], [data] = shipped.encode([stripes], 60), shipped.encode([stripes], 95)
    [refined] = shipped.encode([stripes], 95, refine=1)
    least = psnr(stripes, shipped.decode([lower])[0])
    for each in (data, refined):
        for strength in (0.0, 1.0):
            assert psnr(stripes, shipped.decode([each], strength)[0]) > least
    other = photo[:256, :256]
    assert shipped.encode([other, stripes], 95) == [*shipped.encode([other], 95), data]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_encode_to_size_uses_the_budget(tiny_codec: Codec, photo: Photo, share: float) -> None:
    low, high = (len(data) for data in tiny_codec.encode([photo] * 2, [1, 100]))
    budget = int(low + share * (high - low))
    for data in (
        tiny_codec.encode_to_size(photo, max_bytes=budget),
        tiny_codec.encode_to_size(photo, target_bpp=budget * 8 / photo[..., 0].size + 1e-9),
    ):
        assert 0.97 * budget <= len(data) <= budget
        assert tiny_codec.decode([data])[0].shape == photo.shape
        # About the best quality that fits, or one that leaves half a percent.
        (better,) = tiny_codec.encode([photo], peek(data).quality + 0.25)
        assert len(data) >= 0.995 * budget or len(better) > budget


def test_encode_to_size_keeps_the_best_quality_when_all_fits(tiny_codec: Codec, photo: Photo) -> None:
    data = tiny_codec.encode_to_size(photo, max_bytes=10_000_000)
    assert peek(data).quality == 100


def test_a_few_bytes_buy_the_best_quality_that_takes_as_many(tiny_codec: Codec, photo: Photo) -> None:
    """Entropy-coded words make small sizes come in steps."""
    image = np.ascontiguousarray(photo[:17, :3])
    qualities = np.arange(1, 100.5, 0.5)
    sizes = [len(data) for data in tiny_codec.encode([image] * len(qualities), qualities.tolist())]
    assert len(set(sizes)) < len(qualities) / 4
    for size in sorted(set(sizes))[:-1]:
        quality = peek(tiny_codec.encode_to_size(image, max_bytes=size)).quality
        assert quality > next(q for q, needed in zip(qualities, sizes, strict=True) if needed > size) - 1


def test_a_search_holds_one_latent_at_a_time(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    latents = Codec._latents

    def watched(codec: Codec, image: Photo, tilt: float) -> Iterator[torch.Tensor]:
        assert not [ref for ref in made if ref() is not None]
        for part in latents(codec, image, tilt):
            made.append(weakref.ref(part))
            yield part

    monkeypatch.setattr(Codec, "_latents", watched)
    tiny_codec.encode_to_size(photo, max_bytes=len(tiny_codec.encode([photo], 70)[0]))
    assert len(made) > 1


def test_encode_to_size_says_what_is_needed(tiny_codec: Codec, photo: Photo) -> None:
    with pytest.raises(CodecError, match=r"needs \d+ bytes at quality 1, over the budget of 50"):
        tiny_codec.encode_to_size(photo, max_bytes=50)
    with pytest.raises(CodecError, match="exactly one"):
        tiny_codec.encode_to_size(photo)
    with pytest.raises(CodecError, match="positive"):
        tiny_codec.encode_to_size(photo, target_bpp=-1)
    for size in (float("nan"), 1500.0, "1500"):
        with pytest.raises(CodecError, match="max_bytes must be a whole number"):
            tiny_codec.encode_to_size(photo, max_bytes=size)  # type: ignore[arg-type]
    crop, enough = photo[:64, :64], 10**400
    best = tiny_codec.encode_to_size(crop, max_bytes=10**6)
    assert tiny_codec.encode_to_size(crop, max_bytes=enough) == best
    assert tiny_codec.encode_to_size(crop, target_bpp=10.0**300) == best
    for rate in ("1", [1, 2], 10**400):
        with pytest.raises(CodecError, match="target_bpp"):
            tiny_codec.encode_to_size(crop, target_bpp=rate)  # type: ignore[arg-type]


def test_a_bitstreams_own_rate_is_enough_for_it(tiny_codec: Codec) -> None:
    for height in range(33, 43):
        picture = np.random.default_rng(height).integers(0, 256, (height, 61, 3), np.uint8)
        (data,) = tiny_codec.encode([picture], 1)
        rate = 8 * len(data) / (height * 61)
        assert len(tiny_codec.encode_to_size(picture, target_bpp=rate)) == len(data)
        with pytest.raises(CodecError, match=f"budget of {len(data) - 1} bytes;"):
            tiny_codec.encode_to_size(picture, target_bpp=np.nextafter(rate, 0))


def test_not_a_number_of_steps(tiny_codec: Codec, photo: Photo) -> None:
    for steps in (1.0, "1", None):
        with pytest.raises(CodecError, match="refine must be in 0"):
            tiny_codec.encode([photo[:64, :64]], refine=steps)  # type: ignore[arg-type]


def test_bitstreams_as_other_bytes(tiny_codec: Codec, photo: Photo) -> None:
    (data,) = tiny_codec.encode([photo[:64, :64]])
    (picture,) = tiny_codec.decode([data])
    for other in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert np.array_equal(tiny_codec.decode([other])[0], picture)  # type: ignore[list-item]
    for wrong in (data, ["text"]):
        with pytest.raises(CodecError, match=r"a bitstream is bytes, got (int|str)"):
            tiny_codec.decode(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("quality", [0.5, 101, float("nan")])
def test_quality_out_of_range(tiny_codec: Codec, photo: Photo, quality: float) -> None:
    with pytest.raises(CodecError, match=r"quality must be in 1\.\.100"):
        tiny_codec.encode([photo], quality)


@pytest.mark.parametrize("strength", [-0.01, 1.5, float("nan")])
def test_strength_out_of_range(tiny_codec: Codec, photo: Photo, strength: float) -> None:
    data = tiny_codec.encode([photo[:64, :64]])
    with pytest.raises(CodecError, match=r"strength must be in 0\.\.1"):
        tiny_codec.decode(data, strength)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        None,
    ],
)
def test_not_an_image(tiny_codec: Codec, image: NDArray[np.generic] | None) -> None:
    with pytest.raises(CodecError, match="an image is uint8"):
        tiny_codec.encode([image])  # type: ignore[list-item]


@pytest.mark.parametrize("quality", ["high", "5", b"5", None, [50.0, 60.0], 10**400])
def test_not_a_quality(tiny_codec: Codec, photo: Photo, quality: Any) -> None:
    with pytest.raises(CodecError, match="quality"):
        tiny_codec.encode([photo[:64, :64]], quality)


@pytest.mark.parametrize("kind", [int, np.int64, np.float32])
def test_any_kind_of_number_is_a_quality(tiny_codec: Codec, photo: Photo, kind: Callable[[int], Any]) -> None:
    crop = photo[:64, :64]
    assert tiny_codec.encode([crop], kind(50)) == tiny_codec.encode([crop], 50.0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("theirs", [torch.bfloat16, torch.float16])
def test_autocast_of_the_caller_changes_nothing(
    tiny_store: Path, photo: Photo, precision: str, theirs: torch.dtype
) -> None:
    codec = load_codec("tiny", store=tiny_store, device="cpu", precision=precision)
    crop = photo[:64, :96]

    def everything() -> tuple[list[bytes], list[bytes]]:
        data = codec.encode([crop], 50)
        refined = codec.encode([crop], 50, refine=2)
        return data + refined, [image.tobytes() for image in codec.decode(data, 0.5)]

    expected = everything()
    with torch.autocast("cpu", theirs):
        assert everything() == expected


def test_too_many_pixels(tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_codec.encode([photo])[0]
    monkeypatch.setattr(tiny_codec, "max_pixels", 100_000)
    with pytest.raises(LimitExceededError, match=r"135300 is over the limit of 100000.*UGICM_MAX"):
        tiny_codec.encode([photo])
    with pytest.raises(LimitExceededError, match="UGICM_MAX_PIXELS"):
        tiny_codec.decode([data])


@pytest.mark.parametrize("shape", [(1, MAX_SIDE + 1, 3), (MAX_SIDE + 1, 1, 3)])
def test_too_long_a_side(tiny_codec: Codec, shape: tuple[int, ...]) -> None:
    image = np.zeros(shape, np.uint8)
    with pytest.raises(LimitExceededError, match=r"1048577 is over the limit of 1048576; scaling it down"):
        tiny_codec.analyse([image])
    with pytest.raises(LimitExceededError):
        tiny_codec.encode([image])


def test_foreign_model_is_refused_by_name(tiny_codec: Codec, photo: Photo) -> None:
    header, segments = parse(tiny_codec.encode([photo])[0], max_pixels=1 << 30)
    other = type(header)(**{**vars(header), "model_digest": bytes(8)})
    with pytest.raises(ModelMismatchError, match=r"needs model 0000000000000000, but tiny \("):
        tiny_codec.decode([serialise(other, segments)])


def test_hostile_payload_behind_a_valid_checksum(tiny_codec: Codec, photo: Photo) -> None:
    """Random, truncated and extended payloads end in an error or a picture, never in a crash."""
    header, (segment,) = parse(tiny_codec.encode([photo])[0], max_pixels=1 << 30)
    random = np.random.default_rng(5)
    refused = 0
    attempts = [b"", segment[:-4], segment[:40], segment + bytes(8), b"\xff" * len(segment)]
    attempts += [random.bytes(int(n) * 4) for n in random.integers(1, 2000, 20)]
    attempts.append(segment[:3])
    for payload in attempts:
        try:
            picture = tiny_codec.decode([serialise(header, [payload])])[0]
        except MalformedBitstreamError:
            refused += 1
        else:
            assert picture.shape == photo.shape
    assert refused > len(attempts) // 2


@pytest.mark.parametrize("side", [1, 63, 64, 128, 1024, 1 << 20])
def test_tiles_are_of_the_one_side(tiny_codec: Codec, photo: Photo, side: int) -> None:
    header, (segment,) = parse(tiny_codec.encode([photo[:64, :100]])[0], max_pixels=1 << 30)
    tiled = replace(header, tile_side=side)
    with pytest.raises(MalformedBitstreamError, match=rf"100x64 picture has tiles of 0 .* says {side}"):
        tiny_codec.decode([serialise(tiled, [segment] * tiled.tiles)])


def test_tiles_of_another_side_are_not_read(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tens of millions of tiles, a byte each, would take minutes to be read and refused."""
    header, _ = parse(tiny_codec.encode([photo[:64, :64]])[0], max_pixels=1 << 30)
    data = serialise(replace(header, tile_side=1), [b""] * 64 * 64)
    monkeypatch.setattr(codec_module.container, "parse", None)
    with pytest.raises(MalformedBitstreamError, match="tiles of 0 pixels a side"):
        tiny_codec.decode([data])


def test_a_large_picture_is_never_one_tile(tiny_codec: Codec, photo: Photo) -> None:
    header, segments = parse(tiny_codec.encode([photo])[0], max_pixels=1 << 30)
    with pytest.raises(MalformedBitstreamError, match=r"10000x9000 picture has tiles of 1024 .* says 0"):
        tiny_codec.decode([serialise(replace(header, width=10_000, height=9_000), segments)])


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [
        (1024, 1024, 0),
        (1025, 1023, 0),
        (1025, 1024, 1024),
        (512, 2048, 0),
        (513, 2048, 1024),
        # Of strips, what the networks see counts: twice as much.
        (1 << 15, 1, 0),
        (1, (1 << 15) + 1, 1024),
    ],
)
def test_which_pictures_have_tiles_is_part_of_the_format(width: int, height: int, side: int) -> None:
    """Decoders refuse others."""
    assert codec_module._tile_side(width, height) == side


def test_a_strip_counts_with_its_padding(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a strip of 2^20 x 1 pixels would go through the networks as 2^20 x 64 at once."""
    strip = np.concatenate([photo[:1], photo[1:2]], 1)[:, :600]
    whole = tiny_codec.decode(tiny_codec.encode([strip], 80))[0]
    monkeypatch.setattr(codec_module, "TILE_SIDE", 128)
    data = tiny_codec.encode([strip], 80)[0]
    header, _ = parse(data, max_pixels=1 << 30)
    assert (header.tile_side, header.tiles) == (128, 5)
    # Each tile has rows of its own, and so other paths along them.
    assert np.abs(tiny_codec.decode([data])[0].astype(int) - whole).max() <= 5


def test_threads_share_a_codec(tiny_codec: Codec, photo: Photo) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(index: int) -> Photo:
        return tiny_codec.decode(tiny_codec.encode([photo[index:]], 50), index / 10)[0]

    with ThreadPoolExecutor(4) as pool:
        for index, picture in enumerate(pool.map(work, range(8))):
            assert np.abs(picture.astype(int) - work(index)).max() <= 1


def test_a_batch_decodes_each_at_its_own_quality(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decoded = batch_sizes(monkeypatch)
    bitstreams = tiny_codec.encode([photo, photo], [18.2, 20.9])  # of one transform, and far apart in gains
    together = tiny_codec.decode(bitstreams, 1.0)
    assert decoded == [2]
    for data, picture in zip(bitstreams, together, strict=True):
        assert np.abs(tiny_codec.decode([data], 1.0)[0].astype(int) - picture).max() <= 1


def test_the_analysis_looks_across_tiles(
    tiny_codec: Codec, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tilt = tiny_codec._tilt(tiny_codec._header(photo, 80))
    (whole,) = tiny_codec._latents(photo, tilt)
    monkeypatch.setattr(codec_module, "TILE_SIDE", 128)
    windows = codec_module.tile_windows(tiny_codec._header(photo, 80), 0)
    assert len(windows) > 4
    for window, y in zip(windows, tiny_codec._latents(photo, tilt), strict=True):
        torch.testing.assert_close(y, whole[window.rows, window.columns], atol=1e-4, rtol=0)


def test_a_batch_shows_as_much_of_the_machine_view_as_each_alone(
    tiny_store: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = read_model(tiny_store / "tiny")
    reach = {"reach": torch.tensor([1.0, 0.0, 0.0])}
    codec = Codec(stored._replace(tensors=stored.tensors | reach), device="cpu", precision="float32")
    crop = photo[:64, :64]
    qualities = [1 + 99 * rate / 32 for rate in (7.6, 8.4)]  # of one transform, but for the machine's part
    bitstreams = codec.encode([crop, crop], qualities)
    _, decoded = batch_sizes(monkeypatch)
    together = codec.decode(bitstreams, 1.0)
    assert decoded == [1, 1]
    for data, picture in zip(bitstreams, together, strict=True):
        np.testing.assert_array_equal(codec.decode([data], 1.0)[0], picture)

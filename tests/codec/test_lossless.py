"""Drawn pictures kept exactly: when, how small, and what hostile data come to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PillowImage

from ugicm.codec import codec as codec_module
from ugicm.codec import lossless
from ugicm.codec.bitstream import parse, peek, serialise
from ugicm.codec.codec import Codec
from ugicm.codec.errors import CodecError, MalformedBitstreamError

Image = NDArray[np.uint8]


def stripes(height: int, width: int) -> Image:
    columns = np.where(np.arange(width) % 2, 255, 0).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(columns[None, :, None], (height, width, 3)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (33, 1), (64, 64), (5, 16383)])
def test_data_come_back_as_they_were(shape: tuple[int, int]) -> None:
    for image in (stripes(*shape), np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)):
        data = lossless.compress(image)
        np.testing.assert_array_equal(lossless.decompress(data, shape[1], shape[0]), image)


def test_photos_are_not_tried(photo: Image) -> None:
    assert not lossless.promising(photo)
    assert lossless.promising(stripes(300, 451))
    for shape in ((16, lossless.MAX_SIDE + 1), (lossless.MAX_SIDE + 1, 64)):
        assert not lossless.promising(stripes(*shape))
    # Looked at are rows all over the picture.
    framed = photo.copy()
    framed[:4] = 0
    assert not lossless.promising(framed)


def test_stripes_are_kept_exactly_in_both_views(tiny_codec: Codec) -> None:
    image = stripes(150, 131)
    (data,) = tiny_codec.encode([image], 50.0)
    assert peek(data).lossless
    assert len(data) < 120
    for decoded in tiny_codec.decode([data, data], [0.0, 1.0]):
        np.testing.assert_array_equal(decoded, image)


def test_stages_and_batches_keep_their_order(tiny_codec: Codec, photo: Image) -> None:
    photo = photo[:128, :128]
    images = [photo, stripes(128, 128), photo[::-1], stripes(128, 128)[:, 1:]]
    latents = tiny_codec.analyse(images, 50.0)
    bitstreams = [tiny_codec.pack(latent) for latent in latents]
    assert [peek(data).lossless for data in bitstreams] == [False, True, False, True]
    assert bitstreams == tiny_codec.encode(images, 50.0)
    decoded = tiny_codec.synthesise([tiny_codec.unpack(data) for data in bitstreams], 0.0)
    for index in (1, 3):
        np.testing.assert_array_equal(decoded[index], images[index])
    (alone,) = tiny_codec.decode([bitstreams[2]])
    np.testing.assert_array_equal(decoded[2], alone)


def test_each_view_is_a_picture_of_its_own(tiny_codec: Codec) -> None:
    image = stripes(64, 64)
    latent = tiny_codec.unpack(tiny_codec.encode([image])[0])
    human, machine = tiny_codec.synthesise([latent, latent], [0.0, 1.0])
    human[:] = 7
    np.testing.assert_array_equal(machine, image)
    np.testing.assert_array_equal(tiny_codec.synthesise([latent])[0], image)


def test_the_smaller_of_the_two_is_kept(tiny_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "PROMISING_BPP", 100.0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (data,) = tiny_codec.encode([noise], 1.0)
    assert not peek(data).lossless
    assert len(data) < len(lossless.compress(noise))


def test_large_pictures_are_compressed_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:90, :110]
    image = np.stack([x * 2, (x // 9 + y // 7) % 5 * 50, np.sin(x * y / 50) * 100 + 120], -1).astype(np.uint8)
    thorough = lossless.compress(image)
    monkeypatch.setattr(lossless, "THOROUGH_PIXELS", 90 * 110)
    assert lossless.compress(image) == thorough
    monkeypatch.setattr(lossless, "THOROUGH_PIXELS", 90 * 110 - 1)
    assert len(lossless.compress(image)) > len(thorough)
    np.testing.assert_array_equal(lossless.decompress(lossless.compress(image), 110, 90), image)


def test_large_pictures_are_kept_whole(tiny_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "TILE_SIDE", 64)
    image = stripes(150, 131)
    for data in (tiny_codec.encode([image])[0], tiny_codec.pack(tiny_codec.analyse([image])[0])):
        assert (peek(data).lossless, peek(data).tile_side) == (True, 0)
        np.testing.assert_array_equal(tiny_codec.decode([data])[0], image)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("most", [10_000, 1000])  # it warns of more, and refuses twice as many
def test_pillow_does_not_warn_of_many_pixels(
    tiny_codec: Codec, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    image = stripes(150, 131)
    (data,) = tiny_codec.encode([image])
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", most)
    np.testing.assert_array_equal(tiny_codec.decode([data])[0], image)


def test_budget_is_spent_on_exactness_where_it_suffices(tiny_codec: Codec) -> None:
    image = stripes(128, 128)
    exact = tiny_codec.encode_to_size(image, max_bytes=200)
    assert peek(exact).lossless
    np.testing.assert_array_equal(tiny_codec.decode([exact])[0], image)


def test_the_least_budget_is_that_of_exactness(tiny_codec: Codec) -> None:
    image = stripes(128, 128)
    needed = len(tiny_codec.encode([image], 1.0)[0])
    with pytest.raises(CodecError, match=rf"needs {needed} bytes at quality 1, over the budget of 40"):
        tiny_codec.encode_to_size(image, max_bytes=40)
    assert len(tiny_codec.encode_to_size(image, max_bytes=needed)) == needed


def test_header_says_so_and_allows_no_tiles(tiny_codec: Codec) -> None:
    (data,) = tiny_codec.encode([stripes(64, 64)])
    assert data[9] == 2
    header, segments = parse(data, max_pixels=1 << 20)
    with pytest.raises(ValueError, match="a lossless picture has no tiles"):
        replace(header, tile_side=64)
    body = bytearray(serialise(replace(header, lossless=False, tile_side=64), segments))
    body[9] = 3
    with pytest.raises(MalformedBitstreamError, match="a lossless picture has no tiles"):
        peek(bytes(body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "truncated"),
        (lambda data: data[:4], "truncated"),
        (lambda data: b"\0" + data[1:], "not those of a 64x48 picture"),
        (lambda data: lossless.compress(stripes(48, 65)), "not those of a 64x48 picture"),
        # A picture of 16384 x 16384 would be allocated by whoever believed it.
        (lambda data: data[:1] + b"\xff\xff\xff\x0f" + data[5:], "not those of a 64x48 picture"),
        (lambda data: data[:12], "damaged"),
    ],
)
def test_hostile_data_are_refused(tiny_codec: Codec, change, message: str) -> None:  # type: ignore[no-untyped-def]
    (data,) = tiny_codec.encode([stripes(48, 64)])
    header, (segment,) = parse(data, max_pixels=1 << 20)
    with pytest.raises(MalformedBitstreamError, match=message):
        tiny_codec.decode([serialise(header, [change(segment)])])

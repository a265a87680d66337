"""Image files of every accepted kind become the RGB picture that a viewer would show, or one clear error."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from ugicm.choices import ImageFormat
from ugicm.codec.errors import CodecError, LimitExceededError
from ugicm.server.images import (
    ACCEPTED_MEDIA_TYPES,
    FORMATS,
    MAX_SIDE,
    MEDIA_TYPES,
    MalformedImageError,
    UnsupportedImageError,
    read_image,
    write_image,
)

MAX_PIXELS = 1 << 20
RAMP = np.linspace(0, 255, 20 * 30 * 3).astype(np.uint8).reshape(20, 30, 3)
"""Smooth and without symmetry, so that lossy formats stay close and every turn shows."""


def file(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def read(data: bytes) -> NDArray[np.uint8]:
    return read_image(data, max_pixels=MAX_PIXELS)


def png(bits: int, colour: int, rows: NDArray[np.generic], *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG file written by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = rows.shape[:2]
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
        *extra,
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def tiff(bits: int, white_is_zero: bool, rows: NDArray[np.generic], *extra: tuple[int, int, int]) -> bytes:
    """A grey TIFF file written by hand; `extra` are further tags: number, type, value."""
    height, width = rows.shape[:2]
    channels = rows.size // (height * width)
    photometric = 0 if white_is_zero else 1
    data = rows.tobytes()
    if bits == 12:  # two values in three bytes
        pairs = rows.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        data = b"".join(int(value).to_bytes(3, "big") for value in packed)
    per_sample = bits | bits << 16  # two numbers in one field, for two channels
    tags = [(256, 4, width), (257, 4, height), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, channels), (278, 4, height), (279, 4, len(data)), *extra]
    fields = [struct.pack("<HHII", number, kind, 1, value) for number, kind, value in tags]
    fields.append(struct.pack("<HHII", 258, 3, channels, per_sample if channels == 2 else bits))
    fields.sort(key=lambda field: struct.unpack("<H", field[:2]))
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(data))
        + data
        + struct.pack("<H", len(fields))
        + b"".join(fields)
        + bytes(4)
    )


GREY16, COLOUR16, GREY16_ALPHA, COLOUR16_ALPHA = (16, 0), (16, 2), (16, 4), (16, 6)


@pytest.mark.parametrize(
    ("format", "tolerance"),
    [("PNG", 0), ("BMP", 0), ("TIFF", 0), ("JPEG", 6), ("WEBP", 12), ("AVIF", 6)],
)
def test_formats(format: str, tolerance: int) -> None:
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "AVIF": {"quality": 98}, "WEBP": {"quality": 98}}
    pixels = read(file(Image.fromarray(RAMP), format, **options.get(format, {})))
    assert pixels.shape == RAMP.shape
    assert np.abs(pixels.astype(int) - RAMP).max() <= tolerance


def test_result_can_be_handed_to_torch() -> None:
    pixels = read(file(Image.fromarray(RAMP), "PNG"))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


def test_gif_palette() -> None:
    picture = Image.fromarray(RAMP).quantize(64)
    assert np.array_equal(read(file(picture, "GIF")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_several_frames_the_first(format: str) -> None:
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = file(frames[0], format, save_all=True, append_images=frames[1:], **options.get(format, {}))
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.abs(read(data).astype(int) - [255, 0, 0]).max() <= 2


def test_photo_with_further_pictures_inside_is_a_jpeg() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    data = file(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(read(data).astype(int) - [254, 0, 0]).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}, "AVIF": {"quality": 98}}
    stored = Image.fromarray(RAMP)
    stored.info["exif"] = exif.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(stored))
    data = file(Image.fromarray(RAMP), format, exif=exif, **options.get(format, {}))
    assert expected.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    pixels = read(data)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_nonsense_in_exif_does_not_cost_the_picture() -> None:
    for body in (b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9):
        data = file(Image.fromarray(RAMP), "JPEG", exif=b"Exif\0\0" + body)
        assert read(data).shape == RAMP.shape


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_rounded(format: str, dtype: str) -> None:
    grey = np.array([[0, 128, 129, 256, 257, 32767, 32896, 65406, 65407, 65535]], dtype)
    expected = [0, 0, 1, 1, 1, 127, 128, 254, 255, 255]
    data = png(*GREY16, grey.astype(">u2")) if format == "PNG" else file(Image.fromarray(grey), "TIFF")
    assert read(data)[0].tolist() == [[value] * 3 for value in expected]


def test_32_bit_integers_are_taken_as_16_bit() -> None:
    grey = np.array([[-5, 0, 32896, 65535, 1 << 20]], np.int32)
    assert read(file(Image.fromarray(grey), "TIFF"))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_floating_point_is_clipped() -> None:
    grey = np.array([[-1.0, 0.0, 0.5, 1.0, 7.0, np.inf, -np.inf, np.nan]], np.float32)
    pixels = read(file(Image.fromarray(grey), "TIFF"))
    assert pixels[0, :, 1].tolist() == [0, 0, 128, 255, 255, 255, 0, 0]


def test_16_bit_colour() -> None:
    colour = (RAMP.astype(np.uint16) << 8) + 77
    assert np.array_equal(read(png(*COLOUR16, colour.astype(">u2"))), RAMP)


def test_16_bit_alpha_is_blended_with_white() -> None:
    grey = np.array([[[0, 65535], [0, 0], [0, 32768]]], ">u2")
    assert read(png(*GREY16_ALPHA, grey))[0].tolist() == [[0] * 3, [255] * 3, [127] * 3]
    colour = np.array([[[0, 65535, 0, 65535], [0, 65535, 0, 0]]], ">u2")
    assert read(png(*COLOUR16_ALPHA, colour))[0].tolist() == [[0, 255, 0], [255] * 3]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_blended_with_white(format: str) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = np.arange(16).reshape(4, 4) * 17
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    pixels = read(file(Image.fromarray(rgba), format, **options))
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels - expected).max() <= 1


def test_transparent_colours() -> None:
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert read(file(palette, "PNG", transparency=1))[0].tolist() == [[10, 20, 30], [255] * 3]
    assert read(file(palette, "PNG", transparency=b"\x80\xff"))[0].tolist() == [[132, 137, 142], [40, 50, 60]]
    assert read(file(palette, "GIF", transparency=0))[0].tolist() == [[255] * 3, [40, 50, 60]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert read(file(grey, "PNG", transparency=7))[0].tolist() == [[255] * 3, [8] * 3]
    colour = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    assert read(file(colour, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [1, 2, 4]]


def test_one_grey_of_16_bits_may_be_transparent() -> None:
    grey = np.array([[7, 263, 65535]], ">u2")  # the first two are 0 and 1 in 8 bits
    transparent = [(b"tRNS", b"\x00\x07")]
    assert read(png(*GREY16, grey, *transparent))[0].tolist() == [[255] * 3, [1] * 3, [255] * 3]


def test_one_colour_of_16_bits_may_be_transparent() -> None:
    colour = np.array([[[0x1234, 0x5678, 0x9ABC], [0x1334, 0x5678, 0x9ABC]]], ">u2")
    key = (b"tRNS", b"\x12\x34\x56\x78\x9a\xbc")
    assert read(png(*COLOUR16, colour, key))[0].tolist() == [[255] * 3, [0x13, 0x56, 0x9A]]


def test_transparent_colour_beyond_8_bits_is_no_error() -> None:
    colour = (RAMP.astype(np.uint16) * 257).astype(">u2")
    assert read(png(*COLOUR16, colour, (b"tRNS", b"\xff\xff" * 3))).shape == RAMP.shape


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "CMYK", "YCbCr", "LAB"])
def test_modes(mode: str) -> None:
    if mode == "LAB":
        source, target = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(Image.fromarray(RAMP), source, target, outputMode="LAB")
        assert picture is not None
    else:
        picture = Image.fromarray(RAMP).convert(mode)
    pixels = read(file(picture, "TIFF"))
    expected = RAMP if mode == "LAB" else np.asarray(picture.convert("RGB"))
    assert np.abs(pixels.astype(int) - expected).max() <= 4


def test_cmyk_jpeg_is_not_inverted() -> None:
    picture = Image.new("RGB", (16, 16), (240, 30, 20)).convert("CMYK")
    assert np.abs(read(file(picture, "JPEG")).astype(int) - [240, 30, 20]).max() <= 4


SWAPPED_PRIMARIES = {"rXYZ": "gXYZ", "gXYZ": "rXYZ"}


def profile(**changed: str) -> bytes:
    """The sRGB profile under another name, with some tags pointing at the data of others."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", data, 128)
    tags = {bytes(data[132 + 12 * i : 136 + 12 * i]).decode(): 136 + 12 * i for i in range(count)}
    old = bytes(data)
    for name, other in changed.items():
        data[tags[name] : tags[name] + 8] = old[tags[other] : tags[other] + 8]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
def test_icc_profile_is_applied(format: str) -> None:
    """Under a profile whose red and green are exchanged, stored red is seen as green."""
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    stored = Image.new("RGB", (16, 16), "red")
    data = file(stored, format, icc_profile=profile(**SWAPPED_PRIMARIES), **options.get(format, {}))
    assert np.abs(read(data).astype(int) - [0, 255, 0]).max() <= 4


def test_icc_profile_with_elements_of_its_own_is_ignored() -> None:
    """They may be as many as one likes, and all the same; lcms would prefer them."""
    swapped = profile(**SWAPPED_PRIMARIES)
    assert swapped[128:].count(b"cprt") == 1
    stored = Image.new("RGB", (16, 16), (255, 0, 0))
    for tag, seen in ((b"cprt", [0, 255, 0]), (b"D2B0", [255, 0, 0])):
        data = file(stored, "PNG", icc_profile=swapped.replace(b"cprt", tag))
        assert np.abs(read(data).astype(int) - seen).max() <= 4


def test_icc_profile_with_alpha_and_palette() -> None:
    swapped = profile(**SWAPPED_PRIMARIES)
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (255, 0, 0, 0))
    pixels = read(file(rgba, "PNG", icc_profile=swapped))[0]
    assert np.abs(pixels.astype(int) - [[0, 255, 0], [255] * 3]).max() <= 4
    palette = Image.new("RGB", (2, 1), "red").quantize(2)
    assert np.abs(read(file(palette, "PNG", icc_profile=swapped)).astype(int) - [0, 255, 0]).max() <= 4


def test_a_profile_that_claims_much_takes_little() -> None:
    claims = bytearray(profile())
    claims[(at := claims.index(b"mluc") + 8) : at + 4] = struct.pack(">I", (511 << 20) // 24)
    data = file(Image.fromarray(RAMP), "PNG", icc_profile=bytes(claims))
    # Of a process of its own: what lcms takes is seen in the highest resident size alone. Not that of
    # getrusage, which begins with the parent's.
    code = (
        "import re, sys; from ugicm.server.images import read_image\n"
        "data = sys.stdin.buffer.read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); read_image(data, max_pixels=10**6); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert int(done.stdout) < 100 << 10  # KiB; it was 256 MiB


@pytest.mark.parametrize("name", ["sRGB", "test"])
def test_srgb_profile_changes_nothing(name: str) -> None:
    srgb = profile().replace("test".encode("utf-16-be"), name.encode("utf-16-be"))
    assert np.array_equal(read(file(Image.fromarray(RAMP), "PNG", icc_profile=srgb)), RAMP)


def test_a_profile_is_not_taken_by_its_name() -> None:
    swapped = profile(**SWAPPED_PRIMARIES).replace("test".encode("utf-16-be"), "sRGB".encode("utf-16-be"))
    data = file(Image.new("RGB", (16, 16), "red"), "PNG", icc_profile=swapped)
    assert np.abs(read(data).astype(int) - [0, 255, 0]).max() <= 4


def test_a_long_profile_and_long_texts_of_a_png() -> None:
    swapped = profile(**SWAPPED_PRIMARIES) + bytes(2 << 20)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("XML:com.adobe.xmp", 3_000_000 * "x", zip=True)
    data = file(Image.new("RGB", (16, 16), "red"), "PNG", icc_profile=swapped, pnginfo=texts)
    assert np.abs(read(data).astype(int) - [0, 255, 0]).max() <= 4


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "I;16"])
@pytest.mark.parametrize(
    "bad",
    [b"", b"nonsense", profile()[:200], profile()[:128] + b"\xff" * 300],
    ids=["empty", "nonsense", "truncated", "damaged"],
)
def test_unusable_icc_profile_is_ignored(mode: str, bad: bytes) -> None:
    picture = Image.fromarray(RAMP).convert("L" if mode == "I;16" else mode).convert(mode)
    plain, tagged = (file(picture, "TIFF", **options) for options in ({}, {"icc_profile": bad}))
    assert np.array_equal(read(tagged), read(plain))


@pytest.mark.parametrize("kind", [2, 3])
def test_a_profile_that_is_no_bytes_is_ignored(kind: int) -> None:
    assert read(tiff(8, False, RAMP[..., 0], (34675, kind, 65))).shape == RAMP.shape


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflated", [False, True])
def test_separate_planes_of_16_bits(order: str, deflated: bool) -> None:
    """By hand: red, green and blue, each a strip of its own."""
    planes = [(RAMP[..., i].astype(np.uint16) * 257).astype(f"{order}u2").tobytes() for i in range(3)]
    strips = [zlib.compress(plane) if deflated else plane for plane in planes]
    starts = [8 + sum(map(len, strips[:i])) for i in range(3)]
    values = [[16] * 3, starts, [len(strip) for strip in strips]]
    after = 8 + sum(map(len, strips))
    lists = b"".join(struct.pack(f"{order}3I", *each) for each in values)
    tags = [(256, 1, 30), (257, 1, 20), (258, 3, after), (259, 1, 8 if deflated else 1), (262, 1, 2)]
    tags += [(273, 3, after + 12), (277, 1, 3), (278, 1, 20), (279, 3, after + 24), (284, 1, 2)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, *rest) for tag, *rest in tags)
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, after + len(lists))
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    assert np.array_equal(read(head + b"".join(strips) + lists + directory), RAMP)


@pytest.mark.parametrize(
    ("kind", "sample_format", "expected"),
    [("i2", 2, [0, 0, 1, 127]), ("i4", 2, [0, 0, 128, 255]), ("f4", 3, [0, 0, 128, 255])],
)
@pytest.mark.parametrize("order", "<>")
def test_compressed_numbers_of_either_order(
    kind: str, sample_format: int, expected: list[int], order: str
) -> None:
    values = {"i2": [-5, 0, 257, 32767], "i4": [-5, 0, 32896, 1 << 20], "f4": [-1, 0, 0.5, 7]}[kind]
    pixels = zlib.compress(np.array(values, order + kind).tobytes())
    tags = [(256, 4), (257, 1), (258, 8 * int(kind[1])), (259, 8), (262, 1), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(pixels)), (339, sample_format)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    data = head + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    assert read(data)[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    ("bits", "white_is_zero"), [(8, False), (8, True), (12, False), (16, False), (16, True)]
)
def test_grey_tiff(bits: int, white_is_zero: bool) -> None:
    grey = RAMP[..., 0]
    values = (255 - grey if white_is_zero else grey) / 255 * (2**bits - 1)
    stored = np.rint(values).astype(np.uint8 if bits == 8 else np.uint16)
    assert np.array_equal(read(tiff(bits, white_is_zero, stored))[..., 1], grey)


def test_premultiplied_grey() -> None:
    """50 at half opacity, stored as 25, over white."""
    pixels = read(tiff(8, False, np.full((20, 30, 2), (25, 128), np.uint8), (338, 3, 1)))
    assert np.abs(pixels.astype(int) - round((50 * 128 + 255 * 127) / 255)).max() <= 2


def test_pixels_that_cannot_be_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise TypeError("no such conversion")

    monkeypatch.setattr("ugicm.server.images.to_rgb", fail)
    with pytest.raises(MalformedImageError, match="no such conversion"):
        read(file(Image.fromarray(RAMP), "PNG"))


@pytest.mark.parametrize("step", ["ugicm.server.images.to_rgb", "PIL.Image.Image.load"])
def test_too_little_memory_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(image: Image.Image) -> None:
        raise MemoryError

    data = file(Image.fromarray(RAMP), "BMP")
    monkeypatch.setattr(step, fail)
    with pytest.raises(MemoryError):
        read(data)


def test_profile_for_other_pixels_is_ignored() -> None:
    grey = Image.fromarray(RAMP[..., 0])
    assert np.array_equal(read(file(grey, "PNG", icc_profile=profile())), read(file(grey, "PNG")))


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"%PDF-1.7", b"\0" * 100])
def test_other_files_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedImageError, match="PNG, JPEG, WEBP, AVIF, BMP, TIFF, GIF"):
        read(data)


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO", "PCX", "JPEG2000"])
def test_formats_that_pillow_knows_but_we_do_not_open(format: str) -> None:
    with pytest.raises(UnsupportedImageError):
        read(file(Image.fromarray(RAMP), format))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated(format: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = file(Image.fromarray(noise), format)
    with pytest.raises(MalformedImageError, match="truncated"):
        read(data[: int(part * len(data))])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("format", FORMATS)
def test_no_pixels_at_all(format: str) -> None:
    with pytest.raises(CodecError):
        read(file(Image.fromarray(RAMP), format)[:13])


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=100)
@given(
    format=st.sampled_from(FORMATS),
    flips=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 255)), min_size=1, max_size=8),
)
def test_damage_ends_in_a_picture_or_a_codec_error(format: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(file(Image.fromarray(RAMP), format))
    for position, mask in flips:
        data[position % len(data)] ^= mask
    try:
        pixels = read(bytes(data))
    except CodecError:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


@pytest.mark.parametrize("format", FORMATS)
def test_pixel_limit(format: str) -> None:
    data = file(Image.new("RGB", (40, 25)), format)
    assert read_image(data, max_pixels=1000).shape == (25, 40, 3)
    message = "40x25 image: 1000 is over the limit of 999; UGICM_MAX_PIXELS"
    with pytest.raises(LimitExceededError, match=message) as caught:
        read_image(data, max_pixels=999)
    assert (caught.value.limit, caught.value.actual) == (999, 1000)


def test_decompression_bomb_is_refused_before_decoding() -> None:
    side = 20_000  # 1.2 GB decoded
    bomb = png(8, 2, np.zeros((1, 1, 3), np.uint8)).replace(
        struct.pack(">II", 1, 1), struct.pack(">II", side, side)
    )
    header = bomb[12:29]
    bomb = bomb.replace(bomb[29:33], struct.pack(">I", zlib.crc32(header)))
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceededError, match="20000x20000"):
            read(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_more_pixels_than_pillow_would_allow() -> None:
    """Pillow refuses 179 megapixels on its own; here only `max_pixels` counts."""
    data = file(Image.new("1", (20_000, 9_000)), "TIFF", compression="group4")
    with pytest.raises(LimitExceededError, match="20000x9000 image: 180000000"):
        read(data)


def test_compressed_bmp() -> None:
    """Pillow reads every run on its own."""
    end_of_line = bytes(2)
    runs = b"".join(bytes((1, x % 256)) + (x % 200 == 199) * end_of_line for x in range(200 * 200))
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    offset = 14 + 40 + len(palette)
    head = b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, 200, 200, 1, 8, 1, len(runs), 0, 0, 256, 0)
    expected = (np.arange(200 * 200) % 256).reshape(200, 200)[::-1]
    assert np.array_equal(read(head + info + palette + runs)[..., 0], expected)


def test_long_exif_is_not_looked_at() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned, long = exif.tobytes(), exif.tobytes() + bytes(1 << 20)
    image = Image.fromarray(RAMP)
    assert read(file(image, "PNG", exif=turned)).shape == (30, 20, 3)
    assert read(file(image, "PNG", exif=long)).shape == RAMP.shape


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_narrow_pictures(size: tuple[int, int]) -> None:
    assert read(file(Image.new("RGB", size), "PNG")).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("format", MEDIA_TYPES)
@pytest.mark.parametrize("shape", [(20, 30, 3), (1, 1, 3), (33, 2, 3)])
def test_write(format: ImageFormat, shape: tuple[int, int, int]) -> None:
    rgb = np.resize(RAMP, shape)
    data = write_image(rgb, format)
    if format == "npy":
        assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), rgb)
    elif format == "jpeg":
        assert read(data).shape == shape
    else:
        assert np.array_equal(read(data), rgb)


def test_jpeg_is_close_and_not_subsampled() -> None:
    data = write_image(RAMP, "jpeg")
    assert np.abs(read(data).astype(int) - RAMP).max() <= 12
    with Image.open(io.BytesIO(data)) as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


def test_written_media_types_are_what_the_files_are() -> None:
    for format, media_type in MEDIA_TYPES.items():
        if format != "npy":
            with Image.open(io.BytesIO(write_image(RAMP, format))) as image:
                assert image.get_format_mimetype() == media_type
                assert media_type in ACCEPTED_MEDIA_TYPES


@pytest.mark.parametrize("format", MAX_SIDE)
def test_sides_beyond_what_a_format_holds(format: ImageFormat) -> None:
    limit = MAX_SIDE[format]
    assert read(write_image(np.zeros((1, limit, 3), np.uint8), format)).shape == (1, limit, 3)
    with pytest.raises(CodecError, match=f"{format} holds at most {limit} pixels per side, .* 1x{limit + 1}"):
        write_image(np.zeros((limit + 1, 1, 3), np.uint8), format)

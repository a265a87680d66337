from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import save_file

from ugicm.server import images as server_images
from ugicm_train.cli import main
from ugicm_train.data import CropSampler, DataError, pack, read_image, read_photos
from ugicm_train.evaluation.measurement import read_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, (width, height) in {
        "a.png": (80, 70), "sub/b.png": (200, 64), "c.webp": (64, 300), "small.png": (300, 20),
    }.items():  # fmt: skip
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path, lossless=True)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    return tmp_path / "photos"


def test_shards_hold_the_photos(folder: Path, tmp_path: Path) -> None:
    direct = dict(read_photos([folder], min_side=64))
    assert {name: tuple(photo.shape) for name, photo in direct.items()} == {
        "a.png": (3, 70, 80),
        "c.webp": (3, 300, 64),
        "sub/b.png": (3, 64, 200),
    }
    shards = pack([folder], tmp_path / "shards", max_bytes=60_000, min_side=64)
    assert len(shards) == 3
    packed = dict(read_photos([tmp_path / "shards"], min_side=64))
    assert packed.keys() == direct.keys()
    assert all(torch.equal(packed[name], direct[name]) for name in direct)
    (tmp_path / "file").touch()
    modes = {path.stat().st_mode for path in (*shards, tmp_path / "file")}
    assert len(modes) == 1  # that of any new file: other machines' users read shards, too


def test_photos_of_equal_names_are_all_packed(folder: Path, tmp_path: Path) -> None:
    shards = pack([folder, folder, folder], tmp_path / "shards", max_bytes=10**9, min_side=64)
    packed = dict(read_photos(shards, min_side=64))
    assert len(packed) == 3 * 3
    for name, photo in read_photos([folder], min_side=64):
        assert all(torch.equal(packed[key], photo) for key in (name, f"{name} (2)", f"{name} (3)"))


def pictures() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Files that a plain conversion to RGB gets wrong, and how to save them."""
    ramp = np.linspace(0, 255, 6 * 4 * 4).astype(np.uint8).reshape(6, 4, 4)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return {
        "hidden colours.png": (Image.fromarray(ramp), {}),
        "one colour.png": (palette, {"transparency": 1}),
        "16 bit.png": (Image.fromarray(np.arange(0, 65535, 1000, np.uint16)[None]), {}),
        "32 bit.tif": (Image.fromarray(np.array([[-5, 0, 32896, 65535, 1 << 20]], np.int32)), {}),
        "float.tif": (Image.fromarray(np.array([[-1, 0.5, 1, 7, np.nan]], np.float32)), {}),
        "turned.png": (Image.fromarray(ramp[..., :3]), {"exif": exif}),
        "damaged.jpg": (Image.fromarray(ramp[..., :3]), {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"}),
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", pictures())
def test_pictures_are_those_that_the_server_codes(tmp_path: Path, name: str) -> None:
    picture, options = pictures()[name]
    picture.save(tmp_path / name, **options)
    expected = server_images.read_image((tmp_path / name).read_bytes(), max_pixels=1 << 20)
    np.testing.assert_array_equal(read_image(tmp_path / name), expected)
    ((_, photo),) = read_photos([tmp_path], min_side=1)
    np.testing.assert_array_equal(photo.permute(1, 2, 0), expected)


def test_crops_are_windows_of_the_photos(folder: Path) -> None:
    photos = [photo for _, photo in read_photos([folder], min_side=64)]
    sampler = CropSampler(photos, size=64, seed=3)
    batch = sampler.batch(8)
    assert batch.shape == (8, 3, 64, 64)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    views = [
        window
        for photo in photos
        for flipped in (photo, photo.flip(2))
        for window in flipped.unfold(1, 64, 1).unfold(2, 64, 1).reshape(3, -1, 64, 64).unbind(1)
    ]
    for crop in batch:
        pixels = (crop * 255).round().to(torch.uint8)
        assert any(torch.equal(pixels, view) for view in views)
    assert not torch.equal(sampler.batch(8), batch)
    again = CropSampler(photos, size=64, seed=3).batch(8)
    assert torch.equal(again, batch)


def test_photos_are_drawn_by_the_root_of_their_area_and_mirrored() -> None:
    dark = torch.zeros(3, 64, 64, dtype=torch.uint8)
    dark[:, :, 32:] = 50
    light = torch.full((3, 64, 64 * 9), 255, dtype=torch.uint8)
    crops = CropSampler([dark, light], size=64, seed=0).batch(800)
    dark_ones = crops[crops.amax((1, 2, 3)) < 0.5]
    assert len(dark_ones) == pytest.approx(800 / 4, abs=50)
    mirrored = int((dark_ones[:, 0, 0, 0] > 0).sum())
    assert mirrored == pytest.approx(len(dark_ones) / 2, abs=30)


def test_photos_are_shrunk_as_far_as_a_crop_fits() -> None:
    # Columns in turn 0 and 1: once shrunk to about half or less, all grey.
    columns = torch.tensor([0, 255], dtype=torch.uint8).repeat(128).expand(3, 256, 256)
    crops = CropSampler([columns, columns[:, :70]], size=64, seed=0, min_scale=0.25).batch(100)
    contrast = crops.std((1, 2, 3))
    assert crops.shape == (100, 3, 64, 64)
    assert (
        0.25 < float((contrast < 0.1).float().mean()) < 0.55
    )  # of the larger photo, two thirds of the draws
    assert float((contrast > 0.2).float().mean()) > 0.3
    whole = CropSampler([columns], size=64, seed=0).batch(100)
    assert set(whole.unique().tolist()) == {0.0, 1.0}


def test_errors_name_the_way_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor a file"):
        list(read_photos([tmp_path / "nowhere"], min_side=64))
    with pytest.raises(DataError, match=r"lower --crop .* or add photos"):
        CropSampler([torch.zeros(3, 64, 64, dtype=torch.uint8)], size=128, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no photo in .*empty"):
        list(read_photos([tmp_path / "empty"], min_side=64))
    with pytest.raises(DataError, match="no photo of at least 5000 pixels"):
        pack([folder], tmp_path / "shards", max_bytes=1000, min_side=5000)


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    (shard,) = pack([folder], tmp_path / "shards", max_bytes=10**9, min_side=64)
    for file, length in ((folder / "a.png", 3000), (shard, 3000)):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(DataError, match=f"{file.name} (cannot be read as a picture|is damaged)"):
            list(read_photos([file.parent], min_side=64))


def test_linked_folders_and_hidden_files(folder: Path, tmp_path: Path) -> None:
    """What macOS leaves beside a picture is called like it and is none."""
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (folder / "a.png").rename(tmp_path / "elsewhere" / "c.png")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "._b.png").write_bytes(b"no picture")
    names = [path.relative_to(folder).as_posix() for path in read_images(folder)]
    assert "linked/c.png" in names
    assert not [name for name in names if "._" in name or "back" in name]
    assert {name for name, _ in read_photos([folder], min_side=1)} == set(names)


def test_a_folder_may_be_called_like_a_picture(folder: Path) -> None:
    names = [name for name, _ in read_photos([folder], min_side=1)]
    (folder / "sub").rename(folder / "sub.png")
    assert [name for name, _ in read_photos([folder], min_side=1)] == [
        name.replace("sub/", "sub.png/") for name in names
    ]
    assert len(read_images(folder)) == len(names)


def test_shards_of_before_are_not_mixed_with_new_ones(folder: Path, tmp_path: Path) -> None:
    pack([folder], tmp_path / "shards", max_bytes=60_000, min_side=64)
    with pytest.raises(DataError, match="holds shards already"):
        pack([folder / "a.png"], tmp_path / "shards", max_bytes=60_000, min_side=64)


def test_drawn_crops_may_be_drawn_before(folder: Path) -> None:
    photos = [photo for _, photo in read_photos([folder], min_side=64)]
    sampler = CropSampler(photos, size=64, seed=3, synthetic_share=1.0, drawn_before=2)
    kinds = {crop.numpy().tobytes() for _ in range(4) for crop in sampler.batch(8)}
    assert len(kinds) == 2


def test_photos_are_decoded_few_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (tmp_path / f"{number:02d}.png").touch()
    decoded = []

    def decode(path: Path) -> torch.Tensor:
        decoded.append(path.name)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    monkeypatch.setattr("ugicm_train.data._decode", decode)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    photos = read_photos([tmp_path], min_side=1)
    names = [next(photos)[0]]
    time.sleep(0.2)
    assert len(decoded) <= 5
    names += [name for name, _ in photos]
    assert names == sorted(decoded) == [f"{number:02d}.png" for number in range(30)]


def test_a_full_disk_leaves_no_part_of_a_shard(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        options = ["--max-mb", "0.02", "--min-side", "64"]
        code = main(["pack", str(folder), "--out", str(tmp_path / "shards"), *options])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert f"cannot write {tmp_path / 'shards' / '00001.shard.safetensors'}: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["00000.shard.safetensors"]


def test_shards_are_of_photos(tmp_path: Path) -> None:
    shard = tmp_path / "a.shard.safetensors"
    for photo, message in (
        (torch.zeros(3, 70, 70), "of torch.float32"),
        (torch.zeros(70, 70, dtype=torch.uint8), r"w is \(70, 70\) of"),
        (torch.zeros(70, 70, 3, dtype=torch.uint8), r"w is \(70, 70, 3\) of"),
    ):
        save_file({"w": photo}, shard)
        with pytest.raises(DataError, match=rf"{shard.name} holds no photos: .*{message}"):
            list(read_photos([shard], min_side=1))


def test_shards_lie_beside_their_source(folder: Path) -> None:
    for out in (folder / "shards", folder / "sub" / ".." / "shards", folder):
        with pytest.raises(DataError, match="would hold its photos twice"):
            pack([folder], out, max_bytes=1000, min_side=1)
    assert not (folder / "shards").exists()

"""The command line from end to end, with the tiny model in this process."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

import ugicm
from ugicm.cli import app
from ugicm.codec import bitstream
from ugicm.codec.codec import Codec
from ugicm.server.check import Finding
from ugicm.server.settings import Settings


@pytest.fixture(autouse=True)
def store(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MODEL_STORE", str(tiny_store)), ("MODEL", "tiny"), ("PRECISION", "float32")):
        monkeypatch.setenv(f"UGICM_{name}", value)


@pytest.fixture
def photos(photo: NDArray[np.uint8], tmp_path: Path) -> list[Path]:
    """Three photos of different formats and sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    files = [folder / "a.png", folder / "b.jpg", folder / "c.webp"]
    for index, file in enumerate(files):
        Image.fromarray(photo[: 70 + index, : 90 + 20 * index]).save(file)
    return files


def ugicm_(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def run_(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own, which must succeed."""
    command = [sys.executable, "-m", "ugicm", *map(str, arguments)]
    return subprocess.run(command, env=environment(), check=True, **options)


def environment(**variables: str) -> dict[str, str]:
    """In which another process finds the packages that this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}


def names(folder: Path) -> list[str]:
    """Files of a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def bitstream_50(photo: NDArray[np.uint8], tiny_codec: Codec) -> bytes:
    return tiny_codec.encode([photo[:70, :90]], 50.0)[0]


@pytest.fixture
def encoded(bitstream_50: bytes, tmp_path: Path) -> Path:
    """The first of `photos` at quality 50."""
    out = tmp_path / "photo.ugic"
    out.write_bytes(bitstream_50)
    return out


def test_encode_one_file(photos: list[Path], tmp_path: Path, tiny_codec: Codec) -> None:
    out = tmp_path / "photo.ugic"
    result = ugicm_("encode", photos[0], "-o", out, "--quality", 70)
    assert result.exit_code == 0
    data = out.read_bytes()
    assert data == tiny_codec.encode([pixels(photos[0])], 70.0)[0]
    assert f"{len(data)} bytes  {8 * len(data) / (90 * 70):.3f} bpp" in result.stdout
    assert result.stderr == ""


def test_quality_is_50_unless_given(photos: list[Path], tmp_path: Path, bitstream_50: bytes) -> None:
    assert ugicm_("encode", photos[0], "-o", tmp_path / "photo.ugic").exit_code == 0
    assert (tmp_path / "photo.ugic").read_bytes() == bitstream_50


def test_refine_reaches_the_codec(
    photos: list[Path], tmp_path: Path, tiny_codec: Codec, bitstream_50: bytes
) -> None:
    out = tmp_path / "photo.ugic"
    assert ugicm_("encode", photos[0], "-o", out, "--refine", 2).exit_code == 0
    assert out.read_bytes() == tiny_codec.encode([pixels(photos[0])], 50.0, refine=2)[0] != bitstream_50
    options = ("--max-bytes", len(bitstream_50), "--refine", 2)
    assert ugicm_("encode", photos[0], "-o", out, *options).exit_code == 0
    expected = tiny_codec.encode_to_size(pixels(photos[0]), max_bytes=len(bitstream_50), refine=2)
    assert out.read_bytes() == expected


@pytest.mark.parametrize("preference", ["human", "machine"])
def test_decode_one_file(encoded: Path, tmp_path: Path, tiny_codec: Codec, preference: str) -> None:
    out = tmp_path / "view.png"
    assert ugicm_("decode", encoded, "-o", out, "--preference", preference).exit_code == 0
    expected = tiny_codec.decode([encoded.read_bytes()], float(preference == "machine"))[0]
    assert np.array_equal(pixels(out), expected)


def test_the_two_views_differ(encoded: Path, tmp_path: Path) -> None:
    human, machine = tmp_path / "human.png", tmp_path / "machine.png"
    assert ugicm_("decode", encoded, "-o", human).exit_code == 0
    assert ugicm_("decode", encoded, "-o", machine, "--preference", "machine").exit_code == 0
    assert not np.array_equal(pixels(human), pixels(machine))


@pytest.mark.parametrize("strength", [0, 0.25])
def test_strength_overrides_preference(
    encoded: Path, tmp_path: Path, tiny_codec: Codec, strength: float
) -> None:
    out = tmp_path / "view.png"
    options = ("--preference", "machine", "--strength", strength)
    assert ugicm_("decode", encoded, "-o", out, *options).exit_code == 0
    assert np.array_equal(pixels(out), tiny_codec.decode([encoded.read_bytes()], strength)[0])


def test_folders(photos: list[Path], tmp_path: Path) -> None:
    middle, out = tmp_path / "new" / "bitstreams", tmp_path / "views"
    result = ugicm_("encode", *photos, "-o", middle)
    assert result.exit_code == 0
    assert names(middle) == ["a.ugic", "b.ugic", "c.ugic"]
    assert result.stdout.count(" bpp\n") == 3
    assert ugicm_("decode", *sorted(middle.iterdir()), "-o", out).exit_code == 0
    assert [pixels(out / f"{name}.png").shape for name in "abc"] == [(70, 90, 3), (71, 110, 3), (72, 130, 3)]


@pytest.mark.parametrize("folder", ["made/", "."])
def test_one_file_into_a_folder(photos: list[Path], tmp_path: Path, folder: str) -> None:
    assert ugicm_("encode", photos[0], "-o", f"{tmp_path}/{folder}").exit_code == 0
    assert (tmp_path / folder / "a.ugic").is_file()


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ((), "view", "PNG"),
        ((), "view.webp", "WEBP"),
        ((), "view.JPG", "JPEG"),
        ((), "view.jpeg", "JPEG"),
        (("--format", "jpeg"), "view.png", "JPEG"),
        (("--format", "webp"), "view.tmp", "WEBP"),
    ],
)
def test_decoded_format(
    encoded: Path, tmp_path: Path, arguments: tuple[str, ...], name: str, kind: str
) -> None:
    assert ugicm_("decode", encoded, "-o", tmp_path / name, *arguments).exit_code == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == kind


def test_decode_to_npy(encoded: Path, tmp_path: Path, tiny_codec: Codec) -> None:
    assert ugicm_("decode", encoded, "-o", f"{tmp_path}/", "--format", "npy").exit_code == 0
    expected = tiny_codec.decode([encoded.read_bytes()])[0]
    assert np.array_equal(np.load(tmp_path / "photo.npy", allow_pickle=False), expected)


@pytest.mark.parametrize("quality", [20.0, 70.0])
@pytest.mark.parametrize("option", ["--max-bytes", "--bpp"])
def test_budgets(photos: list[Path], tmp_path: Path, tiny_codec: Codec, option: str, quality: float) -> None:
    """The budget that one quality needs gives about that quality."""
    budget = len(tiny_codec.encode([pixels(photos[0])], quality)[0]) + 8
    out = tmp_path / "out.ugic"
    value = budget if option == "--max-bytes" else 8 * budget / (90 * 70)
    assert ugicm_("encode", photos[0], "-o", out, option, value).exit_code == 0
    assert 0.97 * budget < out.stat().st_size <= budget
    assert bitstream.peek(out.read_bytes()).quality == pytest.approx(quality, abs=7)


@pytest.mark.parametrize("bpp", ["inf", "1e308"])
def test_a_budget_without_a_bound(photos: list[Path], tmp_path: Path, bpp: str) -> None:
    out = tmp_path / "out.ugic"
    assert ugicm_("encode", photos[0], "-o", out, "--bpp", bpp).exit_code == 0
    assert bitstream.peek(out.read_bytes()).quality > 99.9


def test_impossible_budget(photos: list[Path], tmp_path: Path) -> None:
    result = ugicm_("encode", photos[0], "-o", tmp_path / "out.ugic", "--max-bytes", 10)
    assert result.exit_code == 1
    assert "over the budget of 10 bytes; raise max_bytes or target_bpp (--max-bytes, --bpp)" in result.stderr
    assert not (tmp_path / "out.ugic").exists()


def test_names_cannot_forge_lines(photos: list[Path], tmp_path: Path) -> None:
    good, bad = (tmp_path / name for name in ("a\nugicm: b\x1b[2J.png", "c\nd -> e.png"))
    photos[0].rename(good)
    bad.write_bytes(b"no picture")
    result = ugicm_("encode", good, bad, "-o", tmp_path / "out")
    (said,), (failed,) = result.stdout.splitlines(), result.stderr.splitlines()
    assert "a\\nugicm: b\\x1b[2J.png -> " in said
    assert failed.startswith(f"ugicm: {tmp_path}/c\\nd -> e.png: ")


def test_whether_files_may_be_read_is_found_out_one_by_one(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As superuser, nothing is unreadable: so the file is one to those that ask only."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        folders = (photos[0].parent, out)
        patch.setattr(os, "access", lambda path, mode: mode != os.R_OK or Path(path).parent not in folders)
        assert ugicm_("encode", *photos, "-o", out).exit_code == 0
        streams = sorted(out.iterdir())
        assert len(streams) == len(photos)
        assert ugicm_("decode", *streams, "-o", out).exit_code == 0
        assert ugicm_("info", streams[0]).exit_code == 0


@pytest.mark.parametrize("arguments", [["info", "{}"], ["encode", "{}", "{}", "-o", "{}"], ["--help"]])
def test_what_is_said_cannot_be_written(photos: list[Path], tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "streams").mkdir()
    stream = tmp_path / "a.ugic"
    assert ugicm_("encode", photos[0], "-o", stream).exit_code == 0
    files = iter([stream] if "info" in arguments else [*photos[:2], tmp_path / "streams"])
    command = [argument if argument != "{}" else str(next(files)) for argument in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ugicm", *command],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "ugicm: standard output: No space left on device\n")


def test_one_bad_file_does_not_lose_the_others(photos: list[Path], tmp_path: Path) -> None:
    broken, text, missing = (tmp_path / name for name in ("broken.png", "notes.txt", "missing.png"))
    broken.write_bytes(photos[0].read_bytes()[:500])
    text.write_text("no picture")
    out = tmp_path / "out"
    result = ugicm_("encode", photos[0], broken, missing, text, photos[1], "-o", out)
    assert result.exit_code == 1
    assert names(out) == ["a.ugic", "b.ugic"]
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    for line, file, message in zip(
        lines,
        (broken, missing, text),
        ("damaged or truncated", "No such file or directory", "not an image in one of the formats PNG"),
        strict=True,
    ):
        assert line.startswith(f"ugicm: {file}: ")
        assert message in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:4], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:], "checksum mismatch"),
        (lambda data: b"\x89PNG\r\n\x1a\n" + data, "not a ugicm bitstream"),
        (lambda data: data.replace(b"\r\n", b"\n", 1), "text-mode transfer"),
    ],
    ids=["short", "very short", "empty", "flipped bit", "foreign", "text mode"],
)
@pytest.mark.parametrize("command", ["decode", "info"])
def test_damaged_bitstream(encoded: Path, tmp_path: Path, damage: object, message: str, command: str) -> None:
    assert callable(damage)
    encoded.write_bytes(damage(encoded.read_bytes()))
    output = ("-o", tmp_path / "out.png") if command == "decode" else ()
    result = ugicm_(command, encoded, *output)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"ugicm: {encoded}: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_bitstream_of_another_model(encoded: Path, tmp_path: Path) -> None:
    parsed = bitstream.parse(encoded.read_bytes(), max_pixels=1 << 20)
    header = bitstream.Header(**{**vars(parsed.header), "model_digest": b"\1" * 8})
    encoded.write_bytes(bitstream.serialise(header, parsed.segments))
    result = ugicm_("decode", encoded, "-o", tmp_path / "out.png")
    assert result.exit_code == 1
    assert "needs model 0101010101010101, but tiny" in result.stderr


def test_unknown_model(photos: list[Path], tmp_path: Path) -> None:
    result = ugicm_("encode", photos[0], "-o", tmp_path / "out.ugic", "--model", "large")
    assert result.exit_code == 1
    assert result.stderr.startswith("ugicm: large: no model 'large' in ")


@pytest.mark.parametrize("device", ["abacus", "meta", "mps", "hpu", "privateuseone"])
def test_unknown_device(photos: list[Path], tmp_path: Path, device: str) -> None:
    result = ugicm_("encode", photos[0], "-o", tmp_path / "out.ugic", "--device", device)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert device in result.stderr


def test_pixel_limit(
    photos: list[Path], encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ugicm.server.images.load_pixels", None)  # noticed in the header
    result = ugicm_("encode", photos[0], "-o", tmp_path / "out.ugic", "--max-pixels", 6299)
    assert result.exit_code == 1
    assert "90x70 image: 6300 is over the limit of 6299; UGICM_MAX_PIXELS changes it" in result.stderr
    result = ugicm_("decode", encoded, "-o", tmp_path / "out.png", "--max-pixels", 6299)
    assert result.exit_code == 1
    assert "UGICM_MAX_PIXELS" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "a.png"), "Missing option '--output'"),
        (("encode", "-o", "out"), "Missing argument"),
        (("encode", "a.png", "-o", "out", "--quality", "0.5"), "Invalid value for '--quality'"),
        (("encode", "a.png", "-o", "out", "--quality", "50", "--bpp", "1"), "only one of"),
        (("encode", "a.png", "-o", "out", "--max-bytes", "9", "--bpp", "1"), "only one of"),
        (("encode", "a.png", "-o", "out", "--bpp", "-1"), "must be positive, got -1"),
        (("encode", "a.png", "-o", "out", "--bpp", "nan"), "must be positive, got nan"),
        (("decode", "a.ugic", "-o", "out", "--strength", "1.5"), "Invalid value for '--strength'"),
        (("decode", "a.ugic", "-o", "out", "--preference", "dog"), "Invalid value for '--preference'"),
        (("decode", "a.ugic", "-o", "out.tif"), "'.tif' is none of"),
        (("decode", "a.ugic", "-o", "out", "--format", "tif"), "Invalid value for '--format'"),
        (("encode", "x/a.png", "y/a.jpg", "-o", "out"), "would both be written to"),
        (("encode", "a.png", "-o", "none/out.ugic"), "there is no folder none for out.ugic"),
        (("encode", "a.png", "-o", f"{'long' * 100}/out.ugic"), "there is no folder long"),
        (("encode", "a.png", "-o", "out.ugic", "--quality", "nan"), "nan is not a number"),
        (("encode", "a.png", "-o", ""), "the name of the output is empty"),
        (("encode", "a.png", "-o", "out", "--refine", "20000"), "refine must be in 0..10000 steps"),
        (("decode", "a.ugic", "-o", "out.png", "--strength", "nan"), "nan is not a number"),
        (("transcode",), "No such command"),
    ],
)
def test_usage_errors(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ugicm_(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_input_is_never_overwritten(photos: list[Path]) -> None:
    before = photos[0].read_bytes()
    result = ugicm_("encode", photos[0], "-o", photos[0])
    assert result.exit_code == 2
    assert "overwritten by the result of" in " ".join(result.stderr.split())
    assert photos[0].read_bytes() == before


def test_a_dash_is_no_file(photos: list[Path], tmp_path: Path) -> None:
    for arguments in ((photos[0], "-o", "-"), ("-", "-o", tmp_path / "a.ugic")):
        result = ugicm_("encode", *arguments)
        assert result.exit_code == 2
        assert "/dev/stdin, /dev/stdout" in " ".join(result.stderr.split())


def test_no_input_is_overwritten_through_a_link(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.ugic").symlink_to(photos[1])
    before = photos[1].read_bytes()
    result = ugicm_("encode", *photos, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "would be overwritten by the result of" in " ".join(result.stderr.split())
    assert photos[1].read_bytes() == before


def test_a_link_is_written_through(photos: list[Path], tmp_path: Path) -> None:
    link, file = tmp_path / "link.ugic", tmp_path / "elsewhere.ugic"
    link.symlink_to(file)
    assert ugicm_("encode", photos[0], "-o", link).exit_code == 0
    assert link.is_symlink()
    assert bitstream.peek(file.read_bytes()).width == 90


def test_a_pipe_is_written_to_and_stays(photos: list[Path], tmp_path: Path, bitstream_50: bytes) -> None:
    """As a device is: run by root, ``-o /dev/null`` would make a file of it for the whole system."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        result = ugicm_("encode", photos[0], "-o", pipe)
        assert result.exit_code == 0
        assert result.stdout == ""  # which the pipe may be
        assert " bpp" in result.stderr
        assert pipe.is_fifo()
        assert os.read(reader, 1 << 16) == bitstream_50
    finally:
        os.close(reader)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_goes_on_from_where_it_is(
    photos: list[Path], tmp_path: Path, bitstream_50: bytes, name: str
) -> None:
    """A file that is open there is neither replaced nor emptied."""
    out = tmp_path / "both"
    with out.open("wb") as file:
        file.write(b"before")
        file.flush()
        done = run_("encode", photos[0], "-o", name, stdout=file, stderr=subprocess.PIPE)
        file.write(b"after")
    assert out.read_bytes() == b"before" + bitstream_50 + b"after"
    assert b" bpp" in done.stderr
    assert names(tmp_path) == ["both", "photos"]


def test_standard_input_may_be_a_socket(encoded: Path, bitstream_50: bytes) -> None:
    """Node.js gives its children sockets for pipes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(bitstream_50)
        ours.shutdown(socket.SHUT_WR)
        done = run_("info", "/dev/stdin", "--json", stdin=theirs, stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["bytes"] == len(bitstream_50)


def test_standard_streams_may_be_closed(photos: list[Path], tmp_path: Path) -> None:
    def close() -> None:
        os.close(1)
        os.close(2)

    run_("encode", *photos, "-o", tmp_path / "out", preexec_fn=close)
    assert names(tmp_path / "out") == ["a.ugic", "b.ugic", "c.ugic"]


def test_a_file_that_may_not_be_written_is_not_replaced(
    photos: list[Path], encoded: Path, bitstream_50: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anything
    result = ugicm_("encode", photos[1], "-o", encoded)
    assert (result.exit_code, result.stderr) == (1, f"ugicm: {encoded}: Permission denied\n")
    assert encoded.read_bytes() == bitstream_50


def test_a_replaced_file_keeps_its_permissions(photos: list[Path], encoded: Path) -> None:
    encoded.chmod(0o600)
    assert ugicm_("encode", photos[1], "-o", encoded).exit_code == 0
    assert stat.S_IMODE(encoded.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 34.3 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_a_picture_too_large_for_memory_does_not_lose_the_others(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    encode = Codec.encode

    def first_fails(codec: Codec, images: list[NDArray[np.uint8]], *rest: Any, **options: Any) -> Any:
        if images[0].shape == pixels(photos[0]).shape:
            raise error
        return encode(codec, images, *rest, **options)

    monkeypatch.setattr(Codec, "encode", first_fails)
    result = ugicm_("encode", *photos, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == f"ugicm: {photos[0]}: not enough memory for a picture of this size\n"
    assert names(tmp_path / "out") == ["b.ugic", "c.ugic"]


def test_other_errors_of_torch_are_not_hidden(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **options: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Codec, "encode", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        ugicm_("encode", photos[0], "-o", tmp_path / "out.ugic")


def test_the_longest_name(photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / f"{'a' * 250}.ugic"
    assert ugicm_("encode", photos[0], "-o", out).exit_code == 0
    assert out.is_file()


def test_a_failed_write_names_the_output(photos: list[Path], tmp_path: Path) -> None:
    taken, out = tmp_path / "out" / "a.ugic", tmp_path / "out"
    taken.mkdir(parents=True)
    too_long = tmp_path / f"{'a' * 300}.ugic"
    for arguments, name, message in (
        ((photos[0], "-o", "/dev/fd/99"), "/dev/fd/99", "Bad file descriptor"),
        ((*photos[:2], "-o", out), taken, "Is a directory"),
        ((photos[0], "-o", too_long), too_long, "File name too long"),
    ):
        result = ugicm_("encode", *arguments)
        assert result.exit_code == 1
        assert result.stderr == f"ugicm: {name}: {message}\n"
    assert names(out) == ["a.ugic", "b.ugic"]


def test_names_that_are_not_text(photos: list[Path], tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    odd.write_bytes(photos[0].read_bytes())
    process = subprocess.run(
        [sys.executable, "-m", "ugicm", "encode", odd, photos[1], "-o", tmp_path / "out"],
        capture_output=True,
        env=environment(PYTHONIOENCODING="utf-8:strict"),  # as in a locale like en_US.UTF-8
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert process.stdout.count(b" bpp\n") == 2


def test_output_folder_that_is_a_file(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("file")
    result = ugicm_("encode", *photos, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == f"ugicm: {tmp_path / 'out'}: File exists\n"


def test_replaces_an_older_result(photos: list[Path], encoded: Path) -> None:
    before = encoded.read_bytes()
    assert ugicm_("encode", photos[1], "-o", encoded).exit_code == 0
    assert encoded.read_bytes() != before


def test_a_failed_write_leaves_the_older_result(
    photos: list[Path], encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = encoded.read_bytes()

    def disk_full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    result = ugicm_("encode", photos[1], "-o", encoded)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert encoded.read_bytes() == before
    assert names(encoded.parent) == ["photo.ugic", "photos"]


def test_written_files_follow_the_umask(photos: list[Path], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert ugicm_("encode", photos[0], "-o", tmp_path / "out.ugic").exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.ugic").stat().st_mode) == 0o640


def test_the_model_is_loaded_once(
    photos: list[Path], tmp_path: Path, tiny_codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_codec(*arguments: object, **options: object) -> Codec:
        calls.append((arguments, options))
        return tiny_codec

    monkeypatch.setattr("ugicm.codec.store.load_codec", load_codec)
    options = {"store": Path("s"), "device": "d", "precision": "p", "max_pixels": 99999}
    given = ["--model", "m", "--model-store", "s", "--device", "d", "--precision", "p", "--max-pixels", 99999]
    assert ugicm_("encode", *photos, "-o", tmp_path / "out", *given).exit_code == 0
    assert calls == [(("m",), options)]
    bitstreams = sorted((tmp_path / "out").iterdir())
    assert ugicm_("decode", *bitstreams, "-o", tmp_path / "views", *given).exit_code == 0
    assert calls == [(("m",), options)] * 2


def test_info(encoded: Path, tiny_codec: Codec) -> None:
    result = ugicm_("info", encoded, "--json")
    assert result.exit_code == 0
    size = encoded.stat().st_size
    assert json.loads(result.stdout) == {
        "width": 90,
        "height": 70,
        "quality": 50.0,
        "bytes": size,
        "bpp": round(8 * size / 6300, 4),
        "model_digest": tiny_codec.digest,
        "tile_side": 0,
        "tiles": 1,
        "lossless": False,
        "version": 1,
    }
    shown = ugicm_("info", encoded).stdout
    assert f"model digest  {tiny_codec.digest}\n" in shown


def test_info_of_a_missing_file(tmp_path: Path) -> None:
    result = ugicm_("info", tmp_path / "none.ugic")
    assert result.exit_code == 1
    assert result.stderr == f"ugicm: {tmp_path / 'none.ugic'}: No such file or directory\n"


def test_progress_on_a_terminal_and_results_in_a_pipe(photos: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from ugicm.cli import main; main()", "encode", *photos, broken, "-o", "out"],
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=tmp_path,
        env=environment(TERM="xterm", COLUMNS="500"),
    )
    os.close(stderr)
    shown = b""
    with contextlib.suppress(OSError):  # Linux: the other side is closed
        while part := os.read(terminal, 1 << 16):
            shown += part
    os.close(terminal)
    results, _ = process.communicate()
    assert process.returncode == 1
    assert results.decode().count(" bpp\n") == len(results.splitlines()) == 3
    assert b"100%" in shown
    assert f"ugicm: {broken}: the header of the image is damaged".encode() in shown


def test_serve_passes_options_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("ugicm.server.serve.serve", seen.append)
    monkeypatch.setenv("UGICM_PORT", "9001")
    monkeypatch.setenv("UGICM_MAX_PIXELS", "1234567")
    assert ugicm_("serve", "--host", "0.0.0.0", "--device", "cpu").exit_code == 0
    assert ugicm_("serve", "--port", 9002, "--model", "other", "--model-store", "models").exit_code == 0
    first, second = seen
    assert (first.host, first.port, first.device, first.model) == ("0.0.0.0", 9001, "cpu", "tiny")
    assert (second.host, second.port, second.model) == ("127.0.0.1", 9002, "other")
    assert second.model_store == Path("models")
    assert first.max_pixels == second.max_pixels == 1234567


def test_serve_names_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UGICM_MAX_PIXELS", "many")
    result = ugicm_("serve", "--port", 99999)
    assert result.exit_code == 2
    ports, pixels = sorted(result.stderr.splitlines(), reverse=True)
    assert ports.startswith("ugicm: UGICM_PORT: ")
    assert ports.endswith("65535, got 99999")
    assert pixels.startswith("ugicm: UGICM_MAX_PIXELS: ")
    assert pixels.endswith("got 'many'")


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ugicm_("check")
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "ok    settings", "ok    model", "ok    cache", "ok    round trip",
    ]  # fmt: skip
    monkeypatch.setenv("UGICM_MODEL", "large")
    result = ugicm_("check")
    assert result.exit_code == 1
    assert "FAIL  model: no model 'large'" in result.stdout


def test_check_fails_whatever_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UGICM_MAX_PIXEL", "5")
    result = ugicm_("check")
    assert result.exit_code == 1
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "FAIL  settings", "ok    model", "ok    cache", "ok    round trip",
    ]  # fmt: skip


def test_check_ends_where_the_cache_hangs(tmp_path: Path) -> None:
    code = (
        "import sys, time; from ugicm.cli import main; from ugicm.server.backends import FileCache\n"
        "FileCache._check = lambda self: time.sleep(1000)\n"
        "sys.argv = ['ugicm', 'check']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(UGICM_CACHE_URL=f"file://{tmp_path}", UGICM_CACHE_TIMEOUT_S="0.2"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "FAIL  cache: file: " in done.stdout
    assert "ok    round trip" in done.stdout


def test_health(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(b'{"status":"ready"}')

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("UGICM_PORT", str(server.server_port))
        result = ugicm_("health")
        server.shutdown()
    assert (result.exit_code, result.stdout) == (0, '{"status":"ready"}\n')
    result = ugicm_("health")
    assert result.exit_code == 1
    assert f"http://127.0.0.1:{server.server_port}/readyz" in result.stderr
    monkeypatch.setenv("UGICM_PORT", "tcp://10.96.0.7:80")  # of Kubernetes
    asked = []
    monkeypatch.setattr(
        "ugicm.server.check.health", lambda *where: asked.append(where) or Finding("", True, "")
    )
    assert ugicm_("health").exit_code == 0
    assert asked == [("127.0.0.1", 8000)]
    monkeypatch.setenv("UGICM_PORT", "many")
    assert ugicm_("health").exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["encode", "--help"], ["--version"], ["info", "FILE"]])
def test_light_commands_import_nothing_heavy(encoded: Path, arguments: list[str]) -> None:
    arguments = [str(encoded) if argument == "FILE" else argument for argument in arguments]
    code = (
        f"import sys; sys.argv = ['ugicm', *{arguments!r}]\n"
        "from ugicm.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'fastapi', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert process.returncode == 0, process.stderr


def test_version() -> None:
    assert ugicm_("--version").stdout == f"ugicm {ugicm.__version__}\n"


def test_no_arguments_shows_help() -> None:
    result = ugicm_()
    assert "encode" in result.output
    assert "decode" in result.output


@pytest.mark.parametrize(
    ("variables", "count"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_leave_their_cores_unless_told_otherwise(
    variables: dict[str, str], count: str
) -> None:
    """Told before torch, which reads it once."""
    code = (
        "import os, sys; import ugicm.cli\n"
        "ugicm.cli.app = lambda: print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))\n"
        "ugicm.cli.main()"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", count]

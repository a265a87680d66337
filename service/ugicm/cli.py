"""``ugicm``: encode, decode, info, serve, check, health, bench.

Everything heavy is imported inside the command that needs it, so help and `info` start at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ugicm import __version__
from ugicm.choices import ImageFormat, Preference
from ugicm.codec import bitstream
from ugicm.codec.errors import MAX_PIXELS_SETTING, CodecError
from ugicm.codec.store import DEFAULT_MAX_PIXELS, DEFAULT_MODEL, STORE_VARIABLE
from ugicm.server.kubernetes import DEFAULT_PORT, port_or_default

if TYPE_CHECKING:
    from ugicm.codec.codec import Codec
    from ugicm.server.settings import Settings

DEFAULT_QUALITY = 50.0
SPIN_COUNT = "10000"
"""How often a thread of OpenMP looks for work before it sleeps: some tens of microseconds."""

app = typer.Typer(
    name="ugicm",
    help="Neural image codec for people and machines: one bitstream, two views.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


SUFFIXES: dict[str, ImageFormat] = {
    ".png": "png",
    ".webp": "webp",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".npy": "npy",
}

Output = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="OUT", help="File for one input; folder for several (made if missing)."
    ),
]
# Whether a file may be read shows when it is: others are done before and after.
Photos = Annotated[
    list[Path],
    typer.Argument(metavar="PHOTO...", help="PNG, JPEG, WebP, AVIF, BMP, TIFF or GIF.", readable=False),
]
Bitstreams = Annotated[list[Path], typer.Argument(metavar="FILE.ugic...", help="Bitstreams.", readable=False)]
Model = Annotated[
    str, typer.Option(envvar="UGICM_MODEL", help="Model name in the store, or path of its folder.")
]
ModelStore = Annotated[
    Path | None, typer.Option(envvar=STORE_VARIABLE, help="Folder of models  [default: the shipped one]")
]
Device = Annotated[str, typer.Option(envvar="UGICM_DEVICE", help="auto, cpu, cuda, cuda:1 ...")]
Precision = Annotated[
    str, typer.Option(envvar="UGICM_PRECISION", help="Of the transforms: auto, float32, bfloat16.")
]
MaxPixels = Annotated[
    int, typer.Option(envvar=MAX_PIXELS_SETTING, min=1, help="Largest picture, width * height.")
]


def main() -> None:
    """Entry point of the ``ugicm`` script."""
    # Closed by the caller: what is said is said to nobody.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is imported. By default, threads keep their cores for milliseconds while they wait,
        # and on a busy machine everything takes longer (docs/performance.md).
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        app()
    except OSError as error:  # of what is said; of files they are reported where they happen
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what it still holds would fail again
        raise SystemExit(_failed("standard output", error).exit_code) from None


def _number(value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # within any limits, as far as typer can see
        raise typer.BadParameter("nan is not a number")
    return value


def _port(value: str | int) -> int:
    return int(port_or_default(value))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ugicm {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


@app.command()
def encode(
    photos: Photos,
    output: Output,
    quality: Annotated[
        float | None,
        typer.Option(min=1, max=100, callback=_number, help="1 smallest .. 100 best  [default: 50]"),
    ] = None,
    bpp: Annotated[float | None, typer.Option(help="Best quality within this many bits per pixel.")] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Best quality within this many bytes per file.")
    ] = None,
    refine: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="STEPS",
            help="Optimise each picture's latent in so many steps; 40 save about 3 % and take 1½ minutes a "
            "megapixel on a processor core with AVX2.",
        ),
    ] = 0,
    model: Model = DEFAULT_MODEL,
    model_store: ModelStore = None,
    device: Device = "auto",
    precision: Precision = "auto",
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
) -> None:
    """Encode photos to bitstreams (.ugic)."""
    if sum(option is not None for option in (quality, bpp, max_bytes)) > 1:
        raise typer.BadParameter("give only one of --quality, --bpp and --max-bytes")
    if bpp is not None and not bpp > 0:
        raise typer.BadParameter(f"--bpp must be positive, got {bpp:g}")
    jobs = _plan(photos, output, bitstream.SUFFIX)
    from ugicm.codec.refine import check_steps

    try:
        check_steps(refine)
    except CodecError as error:
        raise typer.BadParameter(str(error)) from None
    codec = _load(model, model_store, device, precision, max_pixels)
    from ugicm.server.images import read_image

    def work(photo: bytes) -> tuple[bytes, str]:
        image = read_image(photo, max_pixels=max_pixels)
        if bpp is None and max_bytes is None:
            data = codec.encode([image], DEFAULT_QUALITY if quality is None else quality, refine=refine)[0]
        else:
            data = codec.encode_to_size(image, max_bytes=max_bytes, target_bpp=bpp, refine=refine)
        height, width = image.shape[:2]
        return data, f"{len(data)} bytes  {_bpp(data, width, height):.3f} bpp"

    _run(jobs, work, "encode")


@app.command()
def decode(
    files: Bitstreams,
    output: Output,
    preference: Annotated[
        Preference,
        typer.Option(help="View for human eyes, or for detectors, classifiers, segmenters."),
    ] = "human",
    strength: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=_number,
            help="0 human .. 1 machine, anything between; overrides --preference.",
        ),
    ] = None,
    format: Annotated[
        ImageFormat | None, typer.Option(help="[default: by the suffix of OUT, else png]", show_default=False)
    ] = None,
    model: Model = DEFAULT_MODEL,
    model_store: ModelStore = None,
    device: Device = "auto",
    precision: Precision = "auto",
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
) -> None:
    """Decode bitstreams to pictures."""
    if strength is None:
        strength = float(preference == "machine")
    if format is None:
        suffix = "" if _is_folder(files, output) else Path(output).suffix.lower()
        if suffix and suffix not in SUFFIXES:
            raise typer.BadParameter(f"{suffix!r} is none of {', '.join(SUFFIXES)}; give --format")
        format = SUFFIXES.get(suffix, "png")
    jobs = _plan(files, output, next(suffix for suffix, name in SUFFIXES.items() if name == format))
    codec = _load(model, model_store, device, precision, max_pixels)
    from ugicm.server.images import write_image

    def work(data: bytes) -> tuple[bytes, str]:
        image = codec.decode([data], strength)[0]
        return write_image(image, format), f"{image.shape[1]}x{image.shape[0]}"

    _run(jobs, work, "decode")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE.ugic", help="A bitstream.", readable=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check a bitstream and show what its header says; needs no model."""
    try:
        data = _read(file)
        header = bitstream.parse(data, max_pixels=bitstream.MAX_SIDE**2).header
    except (CodecError, OSError) as error:
        raise _failed(file, error) from None
    facts = {
        "width": header.width,
        "height": header.height,
        "quality": header.quality,
        "bytes": len(data),
        "bpp": round(_bpp(data, header.width, header.height), 4),
        "model_digest": header.model_digest.hex(),
        "tile_side": header.tile_side,
        "tiles": header.tiles,
        "lossless": header.lossless,
        "version": header.version,
    }
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        for name, value in facts.items():
            typer.echo(f"{name.replace('_', ' '):<13} {value}")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (UGICM_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 picks one (UGICM_PORT).")] = None,
    model: Annotated[str | None, typer.Option(help="Model name or folder (UGICM_MODEL).")] = None,
    model_store: Annotated[Path | None, typer.Option(help=f"Folder of models ({STORE_VARIABLE}).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda ... (UGICM_DEVICE).")] = None,
) -> None:
    """Run the HTTP service until SIGTERM or Ctrl-C; UGICM_* variables set everything else."""
    # The first process of a container ignores signals without a handler; until the server has its own:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Whoever starts us may ignore it; then nobody learns how the processes that read images end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    from ugicm.server.serve import serve as run

    run(_settings(host=host, port=port, model=model, model_store=model_store, device=device))


@app.command()
def check() -> None:
    """Try what the service needs: variables, model, cache, a round trip. Exits with 1 if one fails."""
    from ugicm.server.backends import threads_hang
    from ugicm.server.check import check as run

    ok = True
    for finding in run(_settings()):
        typer.echo(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
        ok = ok and finding.ok
    if threads_hang():
        sys.stdout.flush()
        os._exit(int(not ok))
    if not ok:
        raise typer.Exit(1)


@app.command()
def health(
    host: Annotated[str, typer.Option(envvar="UGICM_HOST", help="Address of the service.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="UGICM_PORT", parser=_port, metavar="INTEGER", help="Its TCP port.")
    ] = DEFAULT_PORT,
) -> None:
    """Ask a running service whether it is ready; exits with 1 if not. For container health checks."""
    from ugicm.server.check import health as ask

    finding = ask(host, port)
    typer.echo(finding.detail, err=not finding.ok)
    if not finding.ok:
        raise typer.Exit(1)


@app.command()
def bench(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PHOTO]...", help="Photos to tile pictures from  [default: a drawn one]", readable=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    megapixels: Annotated[str, typer.Option(help="Sizes, comma-separated.")] = "0.1,0.4,1,4,24",
    batches: Annotated[
        str, typer.Option(help="Pictures at a time, comma-separated; several are of 1 megapixel at most.")
    ] = "1,8",
    quality: Annotated[
        float, typer.Option(help="1 (smallest) to 100 (best).", min=1, max=100, callback=_number)
    ] = DEFAULT_QUALITY,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="0: as torch chooses.")] = 0,
    peers: Annotated[bool, typer.Option(help="Time Pillow's formats too.")] = True,
    learned: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="CompressAI's networks to time too, comma-separated, or all; slow."
        ),
    ] = "",
    model: Model = DEFAULT_MODEL,
    model_store: ModelStore = None,
    device: Device = "auto",
    precision: Precision = "auto",
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
) -> None:
    """Measure the codec's speed here, stage by stage, beside other codecs and the processor's peak."""
    try:
        sizes = [float(part) for part in megapixels.split(",")]
        counts = [int(part) for part in batches.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"sizes and batches are comma-separated numbers: {error}") from None
    if not all(0 < number < math.inf for number in (*sizes, *counts)):
        raise typer.BadParameter("sizes and batches are above zero and finite")
    codec = _load(model, model_store, device, precision, max_pixels)
    from ugicm.bench.peers import LEARNED
    from ugicm.bench.run import Options, run, table

    networks = LEARNED if learned == "all" else [name for name in learned.split(",") if name]
    if unknown := set(networks) - set(LEARNED):
        raise typer.BadParameter(f"no network {', '.join(unknown)}; there are {', '.join(LEARNED)}")
    options = Options(sizes, counts, quality, threads, peers, networks)
    try:
        report = run(codec, photos or [], options, partial(typer.echo, err=True))
    except (CodecError, OSError, MemoryError, RuntimeError) as error:
        raise _failed("bench", _expected(error)) from None
    for line in [json.dumps(report)] if as_json else table(report):
        typer.echo(line)


def _settings(**options: Any) -> Settings:
    """Settings of the service from the environment; options that are given win."""
    from pydantic import ValidationError

    from ugicm.server.settings import Settings, setting

    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        for problem in error.errors():
            # Secrets are judged all together, without a location: no value of theirs is shown.
            name, shown = "settings", ""
            if problem["loc"]:
                name, shown = setting(str(problem["loc"][0])), f", got {problem['input']!r}"
            _failed(name, ValueError(problem["msg"] + shown))
        raise typer.Exit(2) from None


class _Job(NamedTuple):
    source: Path
    target: Path


def _is_folder(sources: Sequence[Path], output: str) -> bool:
    return len(sources) > 1 or output.endswith(os.sep) or os.path.isdir(output)


def _plan(sources: Sequence[Path], output: str, suffix: str) -> list[_Job]:
    """Where each input's result goes; two inputs never share a file, and no input is overwritten.

    Links are followed, as they are when writing.
    """
    if not output:
        raise typer.BadParameter("the name of the output is empty")
    if "-" in (output, *map(str, sources)):
        raise typer.BadParameter("- is no file: for standard input and output give /dev/stdin, /dev/stdout")
    target = Path(output)
    if _is_folder(sources, output):
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _failed(target, error) from None
        jobs = [_Job(source, target / f"{source.stem}{suffix}") for source in sources]
    else:
        if not os.path.isdir(target.parent):  # said before the work, not after it
            raise typer.BadParameter(f"there is no folder {target.parent} for {target.name}")
        jobs = [_Job(sources[0], target)]
    inputs = {os.path.realpath(source): source for source in sources}
    taken: dict[str, Path] = {}
    for source, file in jobs:
        place = os.path.realpath(file)
        if place in taken:
            raise typer.BadParameter(f"{taken[place]} and {source} would both be written to {file}")
        taken[place] = source
        if place in inputs:
            raise typer.BadParameter(f"{inputs[place]} would be overwritten by the result of {source}")
    return jobs


def _load(model: str, store: Path | None, device: str, precision: str, max_pixels: int) -> Codec:
    from ugicm.codec.store import load_codec

    try:
        return load_codec(model, store=store, device=device, precision=precision, max_pixels=max_pixels)
    except CodecError as error:
        raise _failed(model, error) from None


def _run(jobs: Sequence[_Job], work: Callable[[bytes], tuple[bytes, str]], verb: str) -> None:
    """Do every job; a failure is reported and the others go on. Exits with 1 if any failed."""
    failures = 0
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(
        console=Console(stderr=True),
        disable=len(jobs) < 2 or not sys.stderr.isatty(),
        redirect_stdout=sys.stdout.isatty(),  # results go to standard output even while a bar is shown
        transient=True,
    )
    with progress:
        for source, target in progress.track(jobs, description=verb):
            try:
                result, note = work(_read(source))
                _write(target, result)
            except (CodecError, OSError, MemoryError, RuntimeError) as error:
                _failed(source, _expected(error))
                failures += 1
            else:
                # Into a pipe, or into standard output itself, go the data alone.
                typer.echo(f"{_shown(source)} -> {_shown(target)}  {note}", err=_is_stream(target))
    if failures:
        raise typer.Exit(1)


def _read(path: Path) -> bytes:
    """All of a file, a pipe, or an open file (``/dev/stdin``), which may be a socket and not open by name."""
    if (descriptor := _descriptor(path)) is None:
        return path.read_bytes()
    try:
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            return stream.read()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, data: bytes) -> None:
    """Write all or nothing: an existing file is replaced only by a whole one.

    It keeps its permissions. Links are followed; pipes and devices are written to, not replaced; open files
    (``/dev/stdout``) go on from where they are. Raises ``OSError`` that names `path`.
    """
    try:
        if (descriptor := _descriptor(path)) is not None:
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                stream.write(data)
        elif _is_stream(path):
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(file: Path, data: bytes) -> None:
    if file.exists() and not os.access(file, os.W_OK):  # which alone would not keep it from being replaced
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # Short, as a file's name may be as long as the system allows.
    temporary = file.with_name(f".ugicm.{os.urandom(8).hex()}.tmp")
    try:
        temporary.write_bytes(data)
        if file.exists():
            temporary.chmod(stat.S_IMODE(file.stat().st_mode))
        temporary.replace(file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """A device, a pipe, a socket, or an open file."""
    return (path.exists() and not path.is_file()) or _descriptor(path) is not None


def _descriptor(path: Path) -> int | None:
    """Number of this process's open file that a name such as ``/dev/stdout`` or ``/dev/fd/3`` stands for."""
    own = Path(f"/proc/{os.getpid()}/fd")
    for _ in range(40):  # as many links as the system would follow
        if path.name.isdigit() and Path(os.path.realpath(path.parent)) == own:
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def _expected(error: Exception) -> Exception:
    """One that is no fault of the program; others are raised."""
    if isinstance(error, CodecError | OSError):
        return error
    # Torch says so in words; on a GPU, in a class of its own.
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
        return MemoryError("not enough memory for a picture of this size")
    raise error


def _failed(what: object, error: Exception) -> typer.Exit:
    """Report on one line of standard error; to be raised where nothing can go on."""
    if isinstance(error, OSError):
        what, message = error.filename or what, error.strerror or str(error)
    else:
        message = str(error)
    typer.echo(f"ugicm: {_shown(what)}: {message}", err=True)
    return typer.Exit(1)


def _shown(what: object) -> str:
    """On one line, whatever a file's name has in it; what is no text in it is written as it is."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in str(what))


def _bpp(data: bytes, width: int, height: int) -> float:
    return 8 * len(data) / (width * height)

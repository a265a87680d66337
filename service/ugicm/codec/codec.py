"""Images to bitstreams and back."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple, ParamSpec, TypeVar, cast
from weakref import WeakMethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from ugicm.codec import bitstream as container
from ugicm.codec import lossless
from ugicm.codec.bitstream import Header
from ugicm.codec.conditioning import Gains, at_level, level_of_tilt, quality_to_level, rate_of, tilt_of
from ugicm.codec.config import LATENT_STRIDE, QUALITY_MAX, QUALITY_MIN, padded_size
from ugicm.codec.device import making_modules, pick_device, pick_precision, without_autocast
from ugicm.codec.entropy import EntropyModel, TileSymbols
from ugicm.codec.errors import (
    CodecError,
    LimitExceededError,
    MalformedBitstreamError,
    ModelMismatchError,
    ModelStoreError,
    check_pixels,
)
from ugicm.codec.inference import (
    NO_MARGIN,
    InferenceAnalysis,
    InferenceHyperAnalysis,
    InferenceSynthesis,
    Sides,
)
from ugicm.codec.networks import Analysis, HyperAnalysis, Synthesis, between_rates, bounded, moved
from ugicm.codec.refine import Frame, Refiner, check_steps
from ugicm.codec.soften import BLUR_SHARES, rms, soften, worse_than_blurred
from ugicm.codec.store import DEFAULT_MAX_PIXELS, StoredModel
from ugicm.memory import MAP_BYTES, keep_freed_memory, memory_map

Module = TypeVar("Module", bound=torch.nn.Module)
Part = TypeVar("Part")
Key = ParamSpec("Key")
Result = TypeVar("Result")
Image = NDArray[np.uint8]
"""RGB picture (H, W, 3)."""

TILE_SIDE = 1024
"""Pixels per side of the independently coded tiles of large images."""
BATCH_PIXELS = 4 << 20
"""Pixels, padding included, that go through the networks at once; bounds memory."""
SMALL_BYTES = 500
"""Below, bitstreams of one picture come in few sizes, and many qualities share one."""
LARGEST_RATE = 1e9
"""Bits per pixel, of any bitstream; floating point tells bytes apart up to there."""
TILT_STEPS = 16
"""Shares of the weight differences between rates are rounded to 1/16, so that qualities share transforms."""
REACH_STEPS = 32
"""Shares of the machine's weight differences are rounded to 1/32."""
TRANSFORMS_KEPT = 16
"""Transforms that are kept ready, of each kind."""


class Window(NamedTuple):
    """A tile of an image's latent, with the margin that the transforms look at around it."""

    top: int
    left: int
    height: int
    width: int
    """The tile itself, in latent positions."""
    margin: Sides
    """In latent positions; zero at the picture's border."""

    @property
    def rows(self) -> slice:
        """Latent rows of the tile with its margin."""
        return slice(self.top - self.margin.above, self.top + self.height + self.margin.below)

    @property
    def columns(self) -> slice:
        """Latent columns of the tile with its margin."""
        return slice(self.left - self.margin.before, self.left + self.width + self.margin.after)


class Latent(NamedTuple):
    """An image between the transforms and the bitstream."""

    header: Header
    tiles: tuple[TileSymbols, ...]
    """Integers of each tile, row by row; only after `Codec.analyse`."""
    y_hat: Tensor | None = None
    """Dequantised latent (h, w, M) float32 before the inverse gains; only after `Codec.unpack`."""
    picture: Image | None = None
    """The picture itself, for `Codec.pack` to try lossless coding, or where `Codec.unpack` found it."""

    @property
    def nbytes(self) -> int:
        """Bytes of `y_hat`."""
        return 0 if self.y_hat is None else self.y_hat.nbytes


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Height and width of y, padded to whole positions of z."""
    across, down = padded_size(width, height)
    return down // LATENT_STRIDE, across // LATENT_STRIDE


def tile_windows(header: Header, margin: int) -> list[Window]:
    """Tiles of an image, row by row."""
    height, width = latent_size(header.width, header.height)
    side = header.tile_side // LATENT_STRIDE if header.tile_side else max(height, width)
    return [
        Window(
            top,
            left,
            min(side, height - top),
            min(side, width - left),
            Sides(top, max(0, height - top - side), left, max(0, width - left - side)).within(margin),
        )
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


class Codec:
    """One trained model on one device: pixels to bitstreams and back, at any quality and preference.

    `encode` is `analyse` then `pack`; `decode` is `unpack` then `synthesise`. A server runs the first and
    last on the device's own thread and the two in the middle anywhere. Methods are thread-safe. Processes
    that use it should be spawned, not forked: where torch has computed with several threads before, a forked
    one hangs.
    """

    def __init__(
        self,
        model: StoredModel,
        *,
        device: str = "auto",
        precision: str = "auto",
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        """See `ugicm.codec.store.load_codec`."""
        keep_freed_memory()
        self.config = config = model.config
        self.name, self.digest, self._digest = config.name, model.digest.hex(), model.digest
        self.weights_sha256 = model.weights_sha256
        self._device = pick_device(device)
        self._dtype = pick_precision(precision, self._device)
        self.device, self.precision = str(self._device), str(self._dtype).removeprefix("torch.")
        self.max_pixels = max_pixels

        def load(module: Module, prefix: str) -> Module:
            start = f"{prefix}."
            state = {k.removeprefix(start): v for k, v in model.tensors.items() if k.startswith(start)}
            try:
                # Assigned: torch's default dtype, in which modules are made, may be another.
                module.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise ModelStoreError(
                    f"the weights of {config.name} do not fit its config: {error}"
                ) from error
            return module.requires_grad_(False).to(self._device)

        def by_level(name: str) -> Tensor | None:
            table = model.tensors.get(name)
            if table is not None and (table.shape != (config.levels,) or not table.is_floating_point()):
                raise ModelStoreError(
                    f"{config.name} has {config.levels} levels, but {name} of shape {tuple(table.shape)} and "
                    f"{table.dtype}"
                )
            return table

        with making_modules():
            self._analysis = load(Analysis(config), "analysis")
            self._analysis_low = load(Analysis(config), "analysis_low")
            self._analysis_high = load(Analysis(config), "analysis_high")
            self._hyper_analysis = InferenceHyperAnalysis(
                load(HyperAnalysis(config), "hyper_analysis"), self._dtype
            )
            self._synthesis = load(Synthesis(config), "synthesis")
            self._synthesis_low = load(Synthesis(config), "synthesis_low")
            self._synthesis_high = load(Synthesis(config), "synthesis_high")
            self._preference = load(Synthesis(config), "preference")
            self._preference_low = load(Synthesis(config), "preference_low")
            self._preference_high = load(Synthesis(config), "preference_high")
            self._gains = load(Gains(config.levels, config.latent_channels, 1.0), "gains")
        grain = by_level("grain")
        self._grain = None if grain is None else grain.to(self._device)
        self._reach, self._largest = by_level("reach"), by_level("largest")
        try:
            with making_modules():
                self._entropy = EntropyModel(config, model.tensors, self._device)
                # Decoding follows the entropy coder step by step, on the CPU, wherever the transforms are.
                self._cpu_entropy = (
                    self._entropy
                    if self._device.type == "cpu"
                    else EntropyModel(config, model.tensors, torch.device("cpu"))
                )
        except ModelStoreError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ModelStoreError(f"the entropy model of {config.name} is not valid: {error!r}") from error
        self._stored_entropy = {k: v for k, v in model.tensors.items() if k.startswith("entropy.")}
        self._analysis_for = _kept(self._make_analysis)
        self._synthesis_for = _kept(self._make_synthesis)

    # One call

    def encode(
        self, images: Sequence[Image], quality: float | Sequence[float] = 50.0, *, refine: int = 0
    ) -> list[bytes]:
        """Encode RGB pictures, uint8 (H, W, 3) of any and mixed sizes, to one bitstream each.

        Args:
            images: pictures of at most `max_pixels`.
            quality: 1 (smallest) to 100 (best), one for all or one each.
            refine: steps of optimising each picture's latent (`ugicm.codec.refine`); 100 save some percent of
                the bytes and take hundreds of times as long as encoding without.

        Raises:
            LimitExceededError: a picture is too large.
            CodecError: not a picture, or a quality out of range.
        """
        qualities = _spread(quality, len(images), "quality")
        for image in images:
            self._check_image(image)
        check_steps(refine)
        headers = [self._header(*each) for each in zip(images, qualities, strict=True)]
        small = [i for i, header in enumerate(headers) if not refine and not header.tile_side]
        latents = self.analyse([images[i] for i in small], [qualities[i] for i in small])
        out = {index: self.pack(latent) for index, latent in zip(small, latents, strict=True)}
        for index, image in enumerate(images):
            if index not in out:
                # Tile by tile, so that a large picture's integers are never all in memory.
                out[index] = self._encode_tiles(image, headers[index], refine)
        return [out[index] for index in range(len(images))]

    def decode(self, bitstreams: Sequence[bytes], strength: float | Sequence[float] = 0.0) -> list[Image]:
        """Decode bitstreams to RGB pictures, uint8 (H, W, 3).

        Args:
            bitstreams: whole bitstreams of this model.
            strength: the preference, 0 (human) to 1 (machine), one for all or one each.

        Raises:
            MalformedBitstreamError: damaged, truncated or foreign bytes.
            ModelMismatchError: made by another model.
            LimitExceededError: the picture would be larger than `max_pixels`.
        """
        strengths = _spread(strength, len(bitstreams), "strength")
        return self.synthesise([self.unpack(data) for data in bitstreams], strengths)

    def encode_to_size(
        self,
        image: Image,
        *,
        max_bytes: int | None = None,
        target_bpp: float | None = None,
        refine: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> bytes:
        """The best quality whose whole bitstream fits a budget, or one that leaves half a percent of it.

        Args:
            image: RGB picture, uint8 (H, W, 3).
            max_bytes: budget in bytes; or
            target_bpp: budget in bits per pixel.
            refine: as for `encode`; takes two or three times as long.
            stop: asked after each tile of each attempt; the search ends once it says true.

        Raises:
            CodecError: even quality 1 is larger than the budget, or the work was stopped.
        """
        if (max_bytes is None) == (target_bpp is None):
            raise CodecError("give exactly one of max_bytes and target_bpp")
        self._check_image(image)
        check_steps(refine)
        if max_bytes is None:
            assert target_bpp is not None
            [target_bpp] = _spread(target_bpp, 1, "target_bpp")
            if not target_bpp > 0:
                raise CodecError(f"target_bpp must be positive, got {target_bpp}")
            pixels = image.shape[0] * image.shape[1]
            target_bpp = min(target_bpp, LARGEST_RATE)
            max_bytes = int(target_bpp * pixels / 8) + 1
            # Rounding must not leave a byte too few for a bitstream's own rate, nor one too many.
            while 8 * max_bytes / pixels > target_bpp:
                max_bytes -= 1
        elif not isinstance(max_bytes, int | np.integer):
            raise CodecError(f"max_bytes must be a whole number, got {max_bytes!r}")
        max_bytes = min(int(max_bytes), sys.maxsize)
        exact = None
        if lossless.promising(image):
            _check(stop)
            exact = self._serialise_lossless(self._header(image, QUALITY_MAX), image)
            if len(exact) <= max_bytes:
                return exact

        kept: dict[float, list[Tensor]] = {}

        def latents(tilt: float) -> list[Tensor]:
            """What neighbouring qualities share, as they share the analysis transform."""
            if tilt not in kept:
                kept.clear()  # before others are made: of a large picture they are large
                kept[tilt] = list(_until(stop, self._latents(image, tilt)))
            return kept[tilt]

        def attempt(step: int, refine: int = 0) -> bytes:
            header = self._header(image, step / container.QUALITY_STEPS)
            tiles = self._tiles(latents(self._tilt(header)), image, header, refine)
            return self._serialise(header, _until(stop, tiles))

        def search(budget: float) -> tuple[int, bytes]:
            """Best quality in steps, and its bitstream; of the lowest, if even that is over the budget."""
            low, top = (round(q * container.QUALITY_STEPS) for q in (QUALITY_MIN, QUALITY_MAX))
            best, high = attempt(low), top

            def short() -> bool:
                """More than half a percent below; of a few bytes, many qualities take as many."""
                return len(best) < 0.995 * budget or budget < SMALL_BYTES

            # Bytes grow with quality but for tiny steps.
            while high - low > 8 and len(best) <= budget and short():
                middle = (low + high + 1) // 2
                if len(data := attempt(middle)) <= budget:
                    low, best = middle, data
                else:
                    high = middle
            if high == top and len(best) <= budget and short() and len(data := attempt(top)) <= budget:
                return top, data
            return low, best

        step, best = search(max_bytes)
        if refine:
            tried = [best, refined := attempt(step, refine)]
            if max(map(len, tried)) <= max_bytes:
                # The bytes that refinement saves buy quality in a second go, or in a third, less.
                aim = min(0.995 * max_bytes, max_bytes - 8)  # sizes come in steps of four
                further, _ = search(aim * len(best) / len(refined))
                if further != step:
                    tried.append(again := attempt(further, refine))
                    if len(again) > max_bytes:
                        between = np.interp(aim, (len(refined), len(again)), (step, further))
                        tried.append(attempt(int(between), refine))
            fitting = [data for data in tried if len(data) <= max_bytes]
            best = min(fitting, key=lambda data: self._squared_error(data, image), default=best)
        if len(best) > max_bytes:
            # A drawn picture may need the fewest where it is kept exactly.
            least = len(best) if exact is None else min(len(best), len(exact))
            raise CodecError(
                f"the picture needs {least} bytes at quality {QUALITY_MIN:g}, over the budget of {max_bytes} "
                "bytes; raise max_bytes or target_bpp (--max-bytes, --bpp), or shrink the picture"
            )
        return best

    # The same in stages

    def analyse(
        self,
        images: Sequence[Image],
        quality: float | Sequence[float] = 50.0,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Latent]:
        """Device work of `encode`: transforms and quantisation.

        Pictures may not change until `pack`, which may keep them as they are. ``stop`` is asked after each
        tile of a large picture; ``CodecError`` once it says true.
        """
        qualities = _spread(quality, len(images), "quality")
        for image in images:
            self._check_image(image)
        headers = [self._header(image, q) for image, q in zip(images, qualities, strict=True)]
        out: dict[int, Latent] = {}
        for group in _batches([(*_shape(header), self._tilt(header)) for header in headers]):
            if headers[group[0]].tile_side:
                for index in group:
                    tiles = tuple(_until(stop, self._analyse_image(images[index], headers[index])))
                    out[index] = Latent(headers[index], tiles, picture=images[index])
                continue
            pixels = torch.stack([self._padded(images[index]) for index in group])
            y = self._transform(pixels, self._tilt(headers[group[0]]))
            quantised = self._quantise(y, [headers[index].quality for index in group])
            for index, tile in zip(group, quantised, strict=True):
                out[index] = Latent(headers[index], (tile,), picture=images[index])
        return [out[index] for index in range(len(images))]

    def pack(self, latent: Latent, *, stop: Callable[[], bool] = lambda: False) -> bytes:
        """CPU work of `encode`: entropy coding, or lossless coding where that takes fewer bytes.

        ``stop`` is asked before each tile and before lossless coding; ``CodecError`` once it says true.
        """
        data = self._serialise(latent.header, _until(stop, latent.tiles))
        return self._smaller(data, latent.header, latent.picture, stop)

    def unpack(self, data: bytes, *, stop: Callable[[], bool] = lambda: False) -> Latent:
        """CPU work of `decode`: entropy decoding, exact on every machine. Raises as `decode` does.

        ``stop`` is asked before each tile; ``CodecError`` once it says true.
        """
        if not isinstance(data, bytes):
            try:
                data = bytes(memoryview(data))
            except TypeError as error:
                raise CodecError(f"a bitstream is bytes, got {type(data).__name__}") from error
        header = container.peek(data)
        # Tiles of a sender's choice could be odd, as large as the picture and need gigabytes, or as many as
        # the bytes: checked before they are read.
        side = 0 if header.lossless else _tile_side(header.width, header.height)
        if header.tile_side != side:
            raise MalformedBitstreamError(
                f"a {header.width}x{header.height} picture has tiles of {side} pixels a side (0: it is one "
                f"tile), the bitstream says {header.tile_side}"
            )
        _, segments = container.parse(data, max_pixels=self.max_pixels)
        if header.model_digest != self._digest:
            raise ModelMismatchError(header.model_digest.hex(), f"{self.name} ({self.digest})")
        if header.lossless:
            return Latent(header, (), picture=lossless.decompress(segments[0], header.width, header.height))
        y_hat = self._empty_latent(header)
        for window, segment in _until(stop, zip(tile_windows(header, 0), segments, strict=True)):
            top, left, height, width = window[:4]
            _, part = self._cpu_entropy.unpack(segment, height, width, rate_of(header.quality))
            y_hat[top : top + height, left : left + width] = part
        return Latent(header, (), y_hat)

    @without_autocast
    @torch.inference_mode()
    def synthesise(
        self,
        latents: Sequence[Latent],
        strength: float | Sequence[float] = 0.0,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Image]:
        """Device work of `decode`: the synthesis transform at the given preference.

        ``stop`` is asked before each tile; ``CodecError`` once it says true.
        """
        strengths = _spread(strength, len(latents), "strength")
        for value in strengths:
            if not 0 <= value <= 1:
                raise CodecError(f"strength must be in 0..1, got {value}")
        keys = [
            (*_shape(header), header.lossless, value, self._tilt(header), self._share(header, value))
            for header, value in zip((latent.header for latent in latents), strengths, strict=True)
        ]
        out: dict[int, Image] = {}
        for group in _batches(keys):
            images = self._synthesise_group([latents[i] for i in group], strengths[group[0]], stop)
            out.update(zip(group, images, strict=True))
        return [out[index] for index in range(len(latents))]

    # Parts

    def _synthesise_group(
        self, latents: Sequence[Latent], strength: float, stop: Callable[[], bool]
    ) -> list[Image]:
        """Pictures of one size, preference, `_tilt` and `_share`, window by window."""
        header = latents[0].header
        if header.lossless:
            return [latent.picture.copy() for latent in latents if latent.picture is not None]
        share = self._share(header, strength)
        synthesis = self._synthesis_for(self._tilt(header), share)
        images = [np.empty((header.height, header.width, 3), np.uint8) for _ in latents]
        level = self._levels([latent.header.quality for latent in latents])
        inverse = self._gains(level)[1].permute(0, 2, 3, 1)
        grain = None
        if share and self._grain is not None:
            grain = 255 * share * at_level(self._grain, level)
        for window in _until(stop, tile_windows(header, synthesis.margin)):
            parts = []
            for latent in latents:
                if latent.y_hat is None:
                    raise ValueError("synthesise needs latents from unpack")
                parts.append(latent.y_hat[window.rows, window.columns])
            y_hat = torch.stack(parts).to(self._device) * inverse
            pixels = synthesis(y_hat, window.margin, grain)
            block = pixels.cpu().numpy()
            y0, x0 = window.top * LATENT_STRIDE, window.left * LATENT_STRIDE
            for image, part in zip(images, block, strict=True):
                target = image[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]]
                target[:] = part[: target.shape[0], : target.shape[1]]
        return images

    def _share(self, header: Header, strength: float) -> float:
        """Part of the machine's weight differences and grain at this quality and preference."""
        if self._reach is None or not strength:
            return strength
        level = quality_to_level(header.quality, self.config.levels)
        share = strength * float(
            at_level(self._reach, torch.tensor([level], dtype=torch.float32, device="cpu"))
        )
        # Rounded, so that qualities share transforms; never to the human view's.
        return max(1, round(REACH_STEPS * share)) / REACH_STEPS

    def _tilt(self, header: Header) -> float:
        """Where between the rates the transforms of this quality are, -1 .. 1."""
        level = quality_to_level(header.quality, self.config.levels)
        return round(TILT_STEPS * tilt_of(level, self.config.levels)) / TILT_STEPS

    def _make_analysis(self, tilt: float) -> InferenceAnalysis:
        changes = between_rates(self._analysis_low, self._analysis_high, tilt)
        return InferenceAnalysis(moved(self._analysis, *changes), self._dtype)

    def _moved_synthesis(self, tilt: float, share: float) -> Synthesis:
        rates = between_rates(self._synthesis_low, self._synthesis_high, tilt)
        machine = ((self._preference, 1.0), *between_rates(self._preference_low, self._preference_high, tilt))
        return moved(self._synthesis, *rates, *((change, share * part) for change, part in machine))

    def _make_synthesis(self, tilt: float, share: float) -> InferenceSynthesis:
        return InferenceSynthesis(self._moved_synthesis(tilt, share), self._dtype)

    def _check_image(self, image: Image) -> None:
        if not isinstance(image, np.ndarray):
            raise CodecError(f"an image is uint8 (height, width, 3) RGB, got {type(image).__name__}")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise CodecError(f"an image is uint8 (height, width, 3) RGB, got {image.dtype} {image.shape}")
        check_pixels(image.shape[1], image.shape[0], self.max_pixels)
        if (side := max(image.shape[:2])) > container.MAX_SIDE:
            raise LimitExceededError(
                f"pixels per side of a {image.shape[1]}x{image.shape[0]} image",
                limit=container.MAX_SIDE,
                actual=side,
                setting="scaling it down",
            )

    def _header(self, image: Image, quality: float) -> Header:
        if not QUALITY_MIN <= quality <= QUALITY_MAX:
            raise CodecError(f"quality must be in {QUALITY_MIN:g}..{QUALITY_MAX:g}, got {quality}")
        return Header(
            version=container.VERSION,
            width=image.shape[1],
            height=image.shape[0],
            quality=quality,
            model_digest=self._digest,
            tile_side=_tile_side(image.shape[1], image.shape[0]),
        )

    def _empty_latent(self, header: Header) -> Tensor:
        """Room for the latent of a whole picture, (h, w, M) float32.

        Callers may keep it for long.
        """
        shape = (*latent_size(header.width, header.height), self.config.latent_channels)
        if (size := 4 * math.prod(shape)) < MAP_BYTES:
            return torch.empty(shape, dtype=torch.float32, device="cpu")
        return torch.from_numpy(np.frombuffer(memory_map(size), np.float32).reshape(shape))

    def _levels(self, qualities: Sequence[float]) -> Tensor:
        quality = torch.tensor(qualities, dtype=torch.float32, device=self._device)
        return quality_to_level(quality, self.config.levels)

    def _padded(self, image: Image, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """Part of the picture padded by replication to whole hyper positions, (H, W, 3) uint8.

        `rows` and `columns` are in latent positions of the padded picture.
        """
        height, width = latent_size(image.shape[1], image.shape[0])
        rows, columns = rows or slice(0, height), columns or slice(0, width)
        rows, columns = _scaled(rows), _scaled(columns)
        part = image[rows, columns]
        missing = (rows.stop - rows.start - part.shape[0], columns.stop - columns.start - part.shape[1])
        if any(missing):
            part = np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        return torch.from_numpy(np.array(part))

    @without_autocast
    @torch.inference_mode()
    def _transform(self, pixels: Tensor, tilt: float, margin: Sides = NO_MARGIN) -> Tensor:
        """uint8 (B, H, W, 3) -> y before gains, float32 (B, H/16, W/16, M)."""
        pixels = pixels.to(self._device)
        y = self._analysis_for(tilt)(pixels, margin)
        if self._largest is None:
            return y
        level = torch.tensor(
            [level_of_tilt(tilt, self.config.levels)], dtype=torch.float32, device=self._largest.device
        )
        limit = float(at_level(self._largest, level))
        if bool((rms(y) <= limit).all()):
            return y
        # Each picture of a batch is coded as it would be alone.
        each = [
            self._softened(*part, tilt, level, limit, margin)
            for part in zip(pixels.split(1), y.split(1), strict=True)
        ]
        return torch.cat(each)

    def _softened(
        self, pixels: Tensor, y: Tensor, tilt: float, level: Tensor, limit: float, margin: Sides
    ) -> Tensor:
        """`_transform` of one picture, some of which may be beyond the transforms (`ugicm.codec.soften`)."""
        gain, inverse = (part.permute(0, 2, 3, 1) for part in self._gains(level.to(self._device)))
        original = margin.scaled(LATENT_STRIDE).trim(pixels)
        frame = (margin.before, margin.after, margin.above, margin.below)
        times = torch.zeros(y.shape[:3], dtype=torch.int64, device=y.device)
        while bool((oversized := ~(rms(y) <= limit)).any()):
            decoded = self._synthesis_for(tilt, 0.0)((y * gain).round() * inverse)
            beyond = oversized & worse_than_blurred(decoded, original)
            more = beyond & (times < len(BLUR_SHARES) - 1)
            if not more.any():
                return torch.where(beyond[..., None], bounded(y, limit, -1), y)
            times += more
            y = self._analysis_for(tilt)(soften(pixels, pad(times, frame)), margin)
        return y

    @without_autocast
    @torch.inference_mode()
    def _quantise(self, y: Tensor, qualities: Sequence[float]) -> list[TileSymbols]:
        """Apply to each of ``y`` (B, h, w, M) the gains of its quality, then round."""
        y = y * self._gains(self._levels(qualities))[0].permute(0, 2, 3, 1)
        return self._entropy.quantise(self._hyper_analysis(y), y, self._hyper_analysis)

    def _latents(self, image: Image, tilt: float) -> Iterator[Tensor]:
        """y before gains, (h, w, M) of every tile."""
        for window in tile_windows(self._header(image, QUALITY_MIN), self._analysis_for(tilt).margin):
            pixels = self._padded(image, window.rows, window.columns)[None]
            yield self._transform(pixels, tilt, window.margin)[0]

    def _analyse_image(self, image: Image, header: Header, refine: int = 0) -> Iterator[TileSymbols]:
        return self._tiles(self._latents(image, self._tilt(header)), image, header, refine)

    def _tiles(
        self, latents: Iterable[Tensor], image: Image, header: Header, refine: int
    ) -> Iterator[TileSymbols]:
        """Integers of every tile from y before gains, in so many steps of refinement.

        One tile after the other, as they are asked for.
        """
        if refine:
            yield from self._refine_each(latents, image, header, refine)
            return
        for y in latents:
            yield self._quantise(y[None], [header.quality])[0]

    @cached_property
    @torch.inference_mode(False)
    def _refiner(self) -> Refiner:
        """Made when first asked for: few callers refine, and none of them is a server."""
        return Refiner(
            self.config, self._stored_entropy, self._gains, self._entropy.trellis, self._device, self._dtype
        )

    def _refine_each(
        self, latents: Iterable[Tensor], image: Image, header: Header, steps: int
    ) -> Iterator[TileSymbols]:
        """Tile by tile, each with what its neighbours are so far around it."""
        level = self._levels([header.quality])
        gain = self._gains(level)[0].permute(0, 2, 3, 1)[0]
        whole = self._empty_latent(header)
        for window, y in zip(tile_windows(header, 0), latents, strict=True):
            whole[window.rows, window.columns] = y.cpu()
        whole *= gain.cpu()
        tilt = self._tilt(header)
        with torch.inference_mode(False):  # its gradient is needed, whatever the caller's mode
            synthesis = self._moved_synthesis(tilt, 0.0).to(self._dtype)
        for window in tile_windows(header, self._synthesis_for(tilt, 0.0).margin):
            inside = whole[window.top :, window.left :][: window.height, : window.width]
            with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
                z = self._hyper_analysis(inside[None].to(self._device)).round()
            frame = Frame(
                whole[window.rows, window.columns].to(self._device),
                slice(window.margin.above, window.margin.above + window.height),
                slice(window.margin.before, window.margin.before + window.width),
                torch.from_numpy(image[_scaled(window.rows), _scaled(window.columns)].copy()),
            )
            y = self._refiner(synthesis, frame, z[0], level, steps)
            inside.copy_(y)
            with torch.autocast(self._device.type, enabled=False):
                [tile] = self._entropy.quantise(z, y[None], self._hyper_analysis)
            yield tile

    def _squared_error(self, bitstream: bytes, image: Image) -> float:
        """Of the human view, summed."""
        rows = zip(self.decode([bitstream])[0], image, strict=True)
        return sum(float(np.square(np.subtract(one, other, dtype=np.float32)).sum()) for one, other in rows)

    def _serialise(self, header: Header, tiles: Iterable[TileSymbols]) -> bytes:
        """Entropy-code the tiles and put them into the container."""
        rate = rate_of(header.quality)
        return container.serialise(header, [self._cpu_entropy.pack(tile, rate) for tile in tiles])

    def _serialise_lossless(self, header: Header, image: Image) -> bytes:
        header = dataclasses.replace(header, tile_side=0, lossless=True)
        return container.serialise(header, [lossless.compress(image)])

    def _encode_tiles(self, image: Image, header: Header, refine: int) -> bytes:
        """One picture's bitstream, its integers made tile by tile."""
        if refine and lossless.promising(image):
            exact = self._serialise_lossless(header, image)
            plain = self._serialise(header, self._analyse_image(image, header))
            # Refinement saves some percent: it would be minutes for nothing.
            if 2 * len(exact) <= len(plain):
                return exact
        return self._smaller(
            self._serialise(header, self._analyse_image(image, header, refine)), header, image
        )

    def _smaller(
        self, data: bytes, header: Header, image: Image | None, stop: Callable[[], bool] = lambda: False
    ) -> bytes:
        """The bitstream, or the picture's lossless one if that is worth a try and no larger."""
        if image is None or not lossless.promising(image):
            return data
        _check(stop)
        exact = self._serialise_lossless(header, image)
        return exact if len(exact) <= len(data) else data


def _kept(make: Callable[Key, Result]) -> Callable[Key, Result]:
    """A method that keeps its last results, but not its owner, which would then live on without a use."""
    owner = WeakMethod(make)

    @lru_cache(TRANSFORMS_KEPT)
    def call(*key: Key.args, **keys: Key.kwargs) -> Result:
        method = owner()
        assert method is not None
        return method(*key, **keys)

    return cast(Callable[Key, Result], call)


def _check(stop: Callable[[], bool]) -> None:
    """``CodecError`` if `stop` says true."""
    if stop():
        raise CodecError("the work was stopped")


def _until(stop: Callable[[], bool], parts: Iterable[Part]) -> Iterator[Part]:
    """The parts as they come; ``CodecError`` once `stop` says true."""
    for part in parts:
        _check(stop)
        yield part


def _scaled(positions: slice) -> slice:
    """Pixels of latent positions."""
    return slice(positions.start * LATENT_STRIDE, positions.stop * LATENT_STRIDE)


def _shape(header: Header) -> tuple[int, int, int]:
    return header.width, header.height, header.tile_side


def _tile_side(width: int, height: int) -> int:
    """Pixels per side of the tiles of such a picture, 0 where it is one tile."""
    # A strip a pixel wide is 64 wide to the networks.
    large = width * height > TILE_SIDE**2 or math.prod(padded_size(width, height)) > 2 * TILE_SIDE**2
    return TILE_SIDE if large and max(width, height) > TILE_SIDE else 0


def _spread(value: float | Sequence[float], count: int, what: str) -> list[float]:
    try:
        if isinstance(value, int | float | np.number):
            return [float(value)] * count
        if isinstance(value, str | bytes):
            raise TypeError
        values = [float(item) for item in value]
    except (OverflowError, TypeError, ValueError) as error:
        raise CodecError(f"{what} must be a number, or one for each image, got {value!r}") from error
    if len(values) != count:
        raise CodecError(f"{len(values)} values of {what} for {count} images")
    return values


def _batches(keys: Sequence[tuple[float, ...]]) -> Iterator[list[int]]:
    """Indexes that share a key (width, height, ...), at most `BATCH_PIXELS` of them together."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for (width, height, *_), members in groups.items():
        size = max(1, BATCH_PIXELS // math.prod(padded_size(int(width), int(height))))
        for start in range(0, len(members), size):
            yield members[start : start + size]

"""The exact entropy model: hyper latent and decoded symbols -> means and table indexes, in integers.

A decoder must reproduce the encoder's probabilities to the last bit, or everything after the first
difference is garbage. So this path has no rounding that depends on the machine: weights, biases and
activations are integers times powers of two, carried in float32, and the sums of every layer are proven at
load to stay where float32 is exact, whatever the bitstream says (`ugicm.codec.fixed_point`). So they do not
depend on their order: not on the device, the number of threads or the batch.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ugicm.codec.coder import SYMBOL_LIMIT, Indexes, SymbolDecoder, SymbolEncoder, Symbols, make_tables
from ugicm.codec.config import STEP_XOR, ModelConfig
from ugicm.codec.dense import by_column, dense, has_onednn
from ugicm.codec.entropy_twin import INDEX_OFFSET, EntropyNetwork
from ugicm.codec.errors import ModelStoreError
from ugicm.codec.fixed_point import (
    BASE,
    BITS_MAX,
    BITS_MIN,
    HIDDEN,
    HYPER,
    HYPER1,
    MEAN,
    SEEN,
    SPATIAL,
    SUM_LIMIT,
    TRUNK,
    Grid,
    largest_sums,
    output_bits,
    sum_bits,
)
from ugicm.codec.hyper_prior import HyperPrior
from ugicm.codec.trellis import TrellisTables, parted, rows
from ugicm.codec.viterbi import nearest

SCALE_COUNT = 64
"""Number of logistic tables; standard deviation of table i is 2^((i - 20) 5 / 32), from 0.11 to 105."""
SKIP_INDEX = 0
"""Symbols with this index are certainly zero and not coded."""
Z_LIMIT = 511
LOST_LIMIT = 16.0
"""Steps from its mean beyond which a symbol that counts as certainly zero is lost. Of 236 photos of Kodak,
COCO and ImageNet, one has such symbols (up to 122); in all others they are within 11."""
CALMER = (1.0, 0.75, 0.5, 0.35, 0.25)
"""What the latent is scaled by for the hyper latent where symbols have been lost once, twice and so on;
first, where none have been."""
WORTH = 0.9
"""Another hyper latent must have less than this part of the loss."""
POINT_LIMIT = SYMBOL_LIMIT - 4
"""Largest number before the nearest path of the trellis is looked for, which may be some further away."""
PROBE_BATCH = 16
"""Pictures at a time in the probe of exactness; libraries choose other algorithms for many than for one."""
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
MEAN_UNIT = 1 << MEAN.bits
SEEN_STEP = 1 << (MEAN.bits - SEEN.bits)


class TileSymbols(NamedTuple):
    """The integers that one tile's segment codes."""

    z: Symbols
    """Hyper latent (N, h/4, w/4)."""
    y: tuple[Symbols, ...]
    """Per coding step: symbols (4 positions, h/2, w/2, M/4), on paths of the trellis in its steps."""
    indexes: tuple[Indexes, ...]
    """Per coding step: the table of each symbol, shaped alike."""


Hyper = Callable[[Tensor], Tensor]
"""The hyper transform: y after gains (B, h, w, M) -> z (B, h/4, w/4, N), not yet rounded."""
Choose = Callable[[int, Tensor, Tensor], Tensor]
"""(step, means, indexes) -> what symbols add to the means; all split by position, (4, B, h/2, w/2, M/4)."""


class _Layer(NamedTuple):
    """Weight and bias, scaled so that sums come out in units of the next grid, to be floored."""

    weight: Tensor
    bias: Tensor


LAYER_TYPES = (torch.int16, torch.int32, torch.uint8)
"""Of a layer's weights, biases and their binary places, as stored: sums of these fit int64."""


class _Weights(NamedTuple):
    layers: dict[str, _Layer]
    """By name, without the following."""
    heads: list[_Layer]
    """Per step, stacked by position: the rows of the channel group that is coded there."""
    contexts: list[_Layer]
    """Of steps 1, 2 and 3, stacked by position: the columns of the groups coded there before, in order."""

    def to(self, dtype: torch.dtype) -> _Weights:
        def convert(layer: _Layer) -> _Layer:
            return _Layer(layer.weight.to(dtype), layer.bias.to(dtype))

        return _Weights(
            {name: convert(layer) for name, layer in self.layers.items()},
            [convert(layer) for layer in self.heads],
            [convert(layer) for layer in self.contexts],
        )


def _load_weights(config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device) -> _Weights:
    """Prove that the sums of the stored integers are exact, then scale and arrange them."""
    layers = {}
    # Not on the meta device: what is computed there makes torch import its compiler, which takes a second.
    shapes = {key: value.shape for key, value in EntropyNetwork(config).state_dict().items()}
    stored = {key.removeprefix("entropy.") for key in tensors if key.startswith("entropy.")}
    if unknown := sorted(key for key in stored - set(shapes) if not key.endswith(".bits")):
        raise ModelStoreError(f"entropy layers of {config.name} that its config knows nothing of: {unknown}")
    for name in [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]:
        weight, bias, bits = (tensors[f"entropy.{name}.{kind}"] for kind in ("weight", "bias", "bits"))
        wanted = (shapes[f"{name}.weight"], shapes[f"{name}.bias"], shapes[f"{name}.bias"])
        if (weight.shape, bias.shape, bits.shape) != wanted:
            raise ModelStoreError(f"entropy layer {name} of {config.name} has not the shape of its config")
        if (weight.dtype, bias.dtype, bits.dtype) != LAYER_TYPES:
            raise ModelStoreError(
                f"entropy layer {name} of {config.name} is not of integers as they are stored"
            )
        fewest, most = int(bits.min()), int(bits.max())
        largest = int(largest_sums(name, weight, bias, bits).max())
        if fewest < BITS_MIN or most > BITS_MAX or largest >= SUM_LIMIT:
            raise ModelStoreError(
                f"entropy layer {name} of {config.name} is not exact in float32: binary places {fewest} to "
                f"{most} ({BITS_MIN} to {BITS_MAX} allowed), sums up to {largest} (below {SUM_LIMIT} "
                "allowed); export the model again"
            )
        scale = torch.exp2((output_bits(name, len(bits)) - sum_bits(name, bits)).double())
        layers[name] = _Layer(
            (weight * scale.view(-1, *[1] * (weight.ndim - 1))).to(device, torch.float32),
            (bias * scale).to(device, torch.float32),
        )
    width, size = config.entropy_channels, config.latent_channels // 4
    heads, contexts = [], []
    for step in range(4):
        weight, bias = layers.pop(f"heads.{step}")
        groups = [position ^ STEP_XOR[step] for position in range(4)]
        rows = weight.view(4, 2 * size, width)[groups].transpose(1, 2).contiguous()
        heads.append(_Layer(rows, bias.view(4, 1, 2 * size)[groups]))
        if step:
            weight, bias = layers.pop(f"context.{step - 1}")
            known = [[position ^ STEP_XOR[earlier] for earlier in range(step)] for position in range(4)]
            columns = weight.view(width, 4, size)[:, known].permute(1, 2, 3, 0)
            contexts.append(
                _Layer(columns.reshape(4, step * size, width).contiguous(), bias.expand(4, 1, width))
            )
    for name, (weight, bias) in layers.items():
        if weight.ndim == 2:
            layers[name] = _Layer(by_column(weight), bias)
    return _Weights(layers, heads, contexts)


def _batched(x: Tensor, layer: _Layer) -> Tensor:
    """A layer with other weights at each of the four positions, (4, B, h/2, w/2, C)."""
    return torch.baddbmm(layer.bias, x.flatten(1, 3), layer.weight).view(*x.shape[:4], -1)


def _split(x: Tensor) -> Tensor:
    """(B, h, w, C) -> by position in the squares of 2x2, (4, B, h/2, w/2, C)."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // 2, 2, width // 2, 2, channels).permute(2, 4, 0, 1, 3, 5)
    return squares.reshape(4, batch, height // 2, width // 2, channels)


def _merge(x: Tensor) -> Tensor:
    """Inverse of `_split`."""
    _, batch, height, width, channels = x.shape
    squares = x.view(2, 2, batch, height, width, channels).permute(2, 3, 0, 4, 1, 5)
    return squares.reshape(batch, 2 * height, 2 * width, channels)


def _double(x: Tensor) -> Tensor:
    """Pixel shuffle by two on (B, h, w, 4C), channels in torch's order."""
    batch, height, width, channels = x.shape
    squares = x.view(batch, height, width, channels // 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return squares.reshape(batch, 2 * height, 2 * width, channels // 4)


class EntropyModel:
    """Integer network and tables of one trained model, on one device.

    Tensors are (B, h, w, C) or, split by position in squares of 2x2, (4, B, h/2, w/2, C). They hold integers
    in units of their grid. Symbols that the tables cannot tell apart from zero (index 0) are zero.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """``tensors``: the ``entropy.*`` and ``tables.*`` entries of ``weights.safetensors``.

        Raises:
            ModelStoreError: a layer's sums could leave the range in which they are exact, or layers or tables
                are not those of the config.
        """
        self.config = config
        self.device = device
        self._weights = {torch.float32: _load_weights(config, tensors, device)}
        self._float32_is_exact = self._probe()
        self.hyper_prior = HyperPrior(tensors)
        if (channels := tensors["tables.z.choice"].shape[2]) != config.hyper_channels:
            raise ModelStoreError(
                f"{config.name} has tables of {channels} hyper channels, not {config.hyper_channels}"
            )
        self.y_tables = make_tables(
            tensors["tables.y.frequencies"].numpy(), tensors["tables.y.lengths"].numpy()
        )
        if (count := len(self.y_tables)) != SCALE_COUNT:
            raise ModelStoreError(f"{config.name} has {count} tables of y, not {SCALE_COUNT}")
        self.trellis = TrellisTables.load(tensors, SCALE_COUNT)

    # What carries the integers

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Whether float32 products keep 24 bits here; environment variables can cost some."""
        width = self.config.entropy_channels
        generator = torch.Generator("cpu").manual_seed(0)
        # Activations of 12 bits, one more than TF32 keeps.
        x = torch.randint(
            min(TRUNK.end, HIDDEN.end), (PROBE_BATCH, 8, 8, width), generator=generator, device="cpu"
        )
        x = x.to(self.device)
        results: list[tuple[Tensor, ...]] = []
        for dtype in (torch.float32, torch.float64):
            weights, carried = self._weights[torch.float32].to(dtype), x.to(dtype)
            results.append(
                (
                    dense(carried, *weights.layers["trunk.0.expand"]),
                    self._convolved(carried, weights.layers["trunk.0.spatial"]),
                    _batched(_split(carried), weights.heads[1]),
                )
            )
        return all(torch.equal(single.double(), double) for single, double in zip(*results, strict=True))

    def _carrier(self) -> torch.dtype:
        """float32; float64 where a setting or the machine lets products of float32 lose digits."""
        backends = torch.backends
        if self.device.type == "cuda":
            settings = {backends.cuda.matmul.fp32_precision}
        else:
            settings = {getattr(backends.mkldnn, part).fp32_precision for part in ("matmul", "conv")}
        if self._float32_is_exact and not settings & {"tf32", "bf16"}:
            return torch.float32
        if torch.float64 not in self._weights:
            self._weights[torch.float64] = self._weights[torch.float32].to(torch.float64)
        return torch.float64

    # Layers

    def _dense(self, name: str, x: Tensor, low: float = -np.inf, high: float = np.inf) -> Tensor:
        """Clamped before the floor, which is the same for whole bounds."""
        return dense(x, *self._weights[x.dtype].layers[name], low, high).floor_()

    def _convolved(self, x: Tensor, layer: _Layer) -> Tensor:
        """Depthwise 3x3 with zero padding."""
        weight, bias = layer
        # Not every convolution is a plain sum: on other processors, or without oneDNN (NNPACK, from 16
        # pictures on), it may be by Winograd's algorithm.
        if self.device.type == "cpu" and _IS_X86 and torch.backends.mkldnn.enabled and has_onednn():
            sums = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(bias))
            return sums.permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        sums = bias.expand_as(x).clone()
        for i in range(3):
            for j in range(3):
                sums.addcmul_(padded[:, i : i + height, j : j + width], weight[:, 0, i, j])
        return sums

    def _block(self, name: str, x: Tensor, grid: Grid) -> Tensor:
        """`x` is changed in place."""
        spatial = self._weights[x.dtype].layers[f"{name}.spatial"]
        hidden = self._dense(f"{name}.expand", x, 0, HIDDEN.end - 1)
        hidden = self._convolved(hidden, spatial).floor_().clamp_(0, SPATIAL.end - 1)
        return x.add_(self._dense(f"{name}.project", hidden)).clamp_(-grid.end, grid.end - 1)

    def _walk(self, z: Tensor, choose: Choose) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self._steps(z.to(self._carrier()), choose)

    def _steps(self, z: Tensor, choose: Choose) -> Tensor:
        """Run the four steps; `choose` supplies each step's symbols.

        Returns y_hat in units of `MEAN` by position and coding step, (4, B, h/2, w/2, M).
        """
        size = self.config.latent_channels // 4
        weights = self._weights[z.dtype]
        # Same clamp for whatever a bitstream claims z to be.
        x = _double(self._dense("hyper1", z.clamp(-Z_LIMIT, Z_LIMIT), 0, HYPER1.end - 1))
        x = _double(self._dense("hyper2", x, 0, HYPER.end - 1))
        hidden = self._block("hyper_block", x, HYPER)
        base = _split(self._dense("base", hidden, -BASE.end, BASE.end - 1))
        base *= 2.0 ** (TRUNK.bits - BASE.bits)
        batch, height, width = hidden.shape[:3]
        y_hat = hidden.new_empty(4, batch, height // 2, width // 2, 4 * size)
        seen = torch.empty_like(y_hat)
        for step in range(4):
            if step:
                context = _batched(seen[..., : step * size], weights.contexts[step - 1])
                hidden = _merge(context.add_(base).floor_().clamp_(0, TRUNK.end - 1))
                for block in range(self.config.context_blocks):
                    hidden = self._block(f"trunk.{block}", hidden, TRUNK)
            sums = _batched(_split(hidden), weights.heads[step]).floor_()
            means = sums[..., :size].clamp_(-MEAN.end, MEAN.end - 1)
            indexes = sums[..., size:].add_(INDEX_OFFSET).clamp_(0, SCALE_COUNT - 1)
            coded = slice(step * size, (step + 1) * size)
            torch.add(means, choose(step, means, indexes), out=y_hat[..., coded])
            seen[..., coded] = (y_hat[..., coded] * (1 / SEEN_STEP)).floor_().clamp_(-SEEN.end, SEEN.end - 1)
        return y_hat

    def _follow(self, wanted: Tensor, indexes: Indexes, symbols: Tensor, residuals: Tensor) -> None:
        """Replace those of a batch's ``symbols`` and ``residuals`` that lie on paths of the trellis."""
        batch, size = indexes.shape[1], math.prod(indexes.shape[2:])
        cut = [rows(indexes[:, item].reshape(-1), self.trellis.first) for item in range(batch)]
        lengths = np.concatenate([np.full(len(part), part.shape[1]) for part in cut])
        places = np.zeros((len(lengths), max(part.shape[1] for part in cut)), np.intp)
        counts = np.arange(places.shape[1]) < lengths[:, None]
        position, place = np.divmod(np.concatenate([part.reshape(-1) for part in cut]), size)
        item = np.repeat(np.arange(batch), [part.size for part in cut])
        places[counts] = (position * batch + item) * size + place
        targets = wanted.view(-1)[torch.from_numpy(places).to(self.device)] / self.trellis.step
        x = targets.clamp_(-POINT_LIMIT, POINT_LIMIT).float().cpu().numpy()
        points = torch.from_numpy(nearest(x, None if counts.all() else lengths)[counts]).to(symbols)
        on_paths = torch.from_numpy(places[counts]).to(self.device)
        symbols.view(-1)[on_paths] = points
        residuals.view(-1)[on_paths] = points * self.trellis.step

    @torch.inference_mode()
    def quantise(self, z: Tensor, y: Tensor, hyper: Hyper | None = None) -> list[TileSymbols]:
        """Round a batch: ``z`` (B, h/4, w/4, N) and ``y`` (B, h, w, M) floats after gains.

        Which way a symbol rounds is the encoder's choice and need not be reproducible; what is predicted
        from the symbols is. Where a latent is unlike those of photographs, the model may be certain of zeros
        that are none; with ``hyper``, other hyper latents are then tried, as of a smaller latent.
        """
        tiles, lost = self._rounded(z, y)
        if hyper is not None:
            for item in (lost > 0).flatten(1).any(1).nonzero().view(-1).tolist():
                part = slice(item, item + 1)
                tiles[item] = self._recovered(tiles[item], lost[part], z[part], y[part], hyper)
        return tiles

    def _recovered(self, tile: TileSymbols, lost: Tensor, z: Tensor, y: Tensor, hyper: Hyper) -> TileSymbols:
        """One picture's symbols with a hyper latent by which fewer are lost, if one is found."""
        least, times = lost.sum(), torch.zeros(lost.shape, dtype=torch.int64, device=y.device)
        scales = torch.tensor(CALMER, dtype=y.dtype, device=y.device)
        for _ in CALMER[1:]:
            times = (times + (lost > 0)).clamp_(max=len(CALMER) - 1)
            scale = scales[times].repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None]
            calmer = torch.where(times[..., None] > 0, hyper(y * scale).to(z), z)
            [candidate], lost = self._rounded(calmer, y)
            if (loss := lost.sum()) < WORTH * least:
                tile, least = candidate, loss
            if not loss:
                break
        return tile

    def _rounded(self, z: Tensor, y: Tensor) -> tuple[list[TileSymbols], Tensor]:
        """Symbols, and the squares of the lost ones summed by positions of z, (B, h/4, w/4)."""
        z = z.round().clamp(-Z_LIMIT, Z_LIMIT)
        target = _split(y)
        size = self.config.latent_channels // 4
        kept_symbols: list[Symbols] = []
        kept_indexes: list[Indexes] = []
        lost = y.new_zeros(z.shape[:3])

        def choose(step: int, means: Tensor, indexes: Tensor) -> Tensor:
            parts = [
                part[..., (position ^ STEP_XOR[step]) * size :][..., :size]
                for position, part in enumerate(target)
            ]
            wanted = torch.stack(parts).to(means).mul_(MEAN_UNIT).sub_(means)
            symbols = (wanted / MEAN_UNIT).round_().clamp_(-SYMBOL_LIMIT, SYMBOL_LIMIT)
            certain = indexes == SKIP_INDEX
            beyond = (symbols.abs() > LOST_LIMIT).logical_and_(certain)
            if bool(beyond.any()):
                squares = (symbols * beyond).square_().sum((0, -1)).to(lost)
                lost.add_(squares.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum((2, 4)))
            symbols.mul_(~certain)
            residuals = symbols * MEAN_UNIT
            index = indexes.to(torch.uint8).cpu().numpy()
            self._follow(wanted, index, symbols, residuals)
            kept_symbols.append(symbols.to(torch.int16).cpu().numpy())
            kept_indexes.append(index)
            return residuals

        self._walk(z, choose)
        z_symbols = z.to(torch.int16).permute(0, 3, 1, 2).contiguous().cpu().numpy()
        tiles = [
            TileSymbols(
                z_symbols[item],
                tuple(step[:, item] for step in kept_symbols),
                tuple(step[:, item] for step in kept_indexes),
            )
            for item in range(len(z_symbols))
        ]
        return tiles, lost

    def pack(self, tile: TileSymbols, rate: float) -> bytes:
        """Entropy-code one tile; ``rate``: its quality, from 0 (lowest) to 1 (highest)."""
        encoder = SymbolEncoder()
        self.hyper_prior.write(encoder, tile.z, rate)
        for symbols, indexes in zip(tile.y, tile.indexes, strict=True):
            flat, index = symbols.reshape(-1), indexes.reshape(-1)
            alone, on_paths = parted(index, SKIP_INDEX + 1, self.trellis.first)
            encoder.write(self.y_tables, flat, index, alone)
            self.trellis.write(encoder, flat[on_paths], index[on_paths])
        return encoder.finish()

    @torch.inference_mode()
    def unpack(self, segment: bytes, height: int, width: int, rate: float) -> tuple[TileSymbols, Tensor]:
        """Decode one tile of latent size ``height`` x ``width`` (multiples of 4), of the `rate` of `pack`.

        Returns its symbols and y_hat, (height, width, M) float32 (before the inverse gains).

        Raises:
            MalformedBitstreamError: the segment is not a tile of this size.
        """
        decoder = SymbolDecoder(segment)
        shape = (self.config.hyper_channels, height // 4, width // 4)
        z = self.hyper_prior.read(decoder, shape, rate)
        kept: list[tuple[Symbols, Indexes]] = []

        def choose(step: int, means: Tensor, indexes: Tensor) -> Tensor:
            del step
            index = indexes[:, 0].to(torch.uint8).cpu().numpy()
            flat = index.reshape(-1)
            alone, on_paths = parted(flat, SKIP_INDEX + 1, self.trellis.first)
            symbols = decoder.read(self.y_tables, flat, alone)
            residuals = symbols.astype(np.int32) * MEAN_UNIT
            symbols[on_paths] = points = self.trellis.read(decoder, flat[on_paths])
            residuals[on_paths] = points.astype(np.int32) * self.trellis.step
            kept.append((symbols.reshape(index.shape), index))
            return torch.from_numpy(residuals.reshape(index.shape)).to(means)[:, None]

        start = torch.from_numpy(z).to(self.device).permute(1, 2, 0)[None]
        by_step = self._walk(start, choose)
        decoder.finish()
        tile = TileSymbols(z, tuple(s for s, _ in kept), tuple(i for _, i in kept))
        # From coding order to channel groups.
        by_step = by_step.unflatten(-1, (4, -1))
        groups = [
            part[..., [STEP_XOR.index(group ^ position) for group in range(4)], :]
            for position, part in enumerate(by_step)
        ]
        y_hat = _merge(torch.stack(groups).flatten(-2))[0].float().mul_(1 / MEAN_UNIT)
        return tile, y_hat

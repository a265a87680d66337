"""``ugicm-train integer-cost``: what exactness costs, the float twin of a run against real bitstreams."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ugicm.codec.bitstream import peek
from ugicm.codec.codec import Codec
from ugicm.codec.conditioning import quality_to_level
from ugicm.codec.config import HYPER_STRIDE
from ugicm.codec.entropy import SCALE_COUNT
from ugicm.codec.store import read_model
from ugicm_train.data import DataError, read_image
from ugicm_train.evaluation.coders import checked_qualities
from ugicm_train.evaluation.measurement import read_images
from ugicm_train.evaluation.metrics import bits_per_pixel, psnr_db
from ugicm_train.export import latent_tables, load_average, model_tensors, write_model
from ugicm_train.train import CHECKPOINT, load_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ugicm-train integer-cost``."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures")
    parser.add_argument(
        "--qualities", type=float, nargs="+", default=[10.0, 40.0, 70.0, 100.0], help="1..100"
    )
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="checkpoint file of the run")


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> int:
    """Print bits per pixel and PSNR of both, in float32, for each quality.

    The twin rates the same pictures with the float entropy network, its continuous scales and ideal code
    lengths; the bitstream is counted whole, container included. Both round each symbol alone: what paths of
    the trellis save is another matter.
    """
    qualities = checked_qualities(arguments.qualities)
    images = []
    for file in read_images(arguments.data):
        image = read_image(file)
        if min(image.shape[:2]) < HYPER_STRIDE:
            raise DataError(f"{file} has a side of less than {HYPER_STRIDE} pixels")
        # Whole hyper positions, so that neither side pays for padding.
        height, width = (side // HYPER_STRIDE * HYPER_STRIDE for side in image.shape[:2])
        images.append(np.ascontiguousarray(image[:height, :width]))
    state = load_checkpoint(arguments.run, arguments.checkpoint, needs=("average", "config"))
    twin = load_average(state)
    with TemporaryDirectory() as folder:
        alone = latent_tables(first=SCALE_COUNT)
        write_model(Path(folder), twin.config, model_tensors(twin) | alone, {})
        codec = Codec(read_model(Path(folder)), device="cpu", precision="float32")
    print("| quality | float bpp | real bpp | rate | float dB | real dB |")
    print("|---:|---:|---:|---:|---:|---:|")
    for quality in qualities:
        rows = []
        level = torch.tensor([quality_to_level(quality, twin.config.levels)])
        for image in images:
            x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
            output = twin(x, level, machine_count=0, noise=False)
            view = (output.human[0].permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy()
            data = codec.encode([image], quality)[0]
            if peek(data).lossless:
                raise DataError(f"a picture in {arguments.data} is stored lossless: give photographs")
            rows.append(
                (
                    float(output.bpp),
                    bits_per_pixel(data, image),
                    psnr_db(image, view),
                    psnr_db(image, codec.decode([data])[0]),
                )
            )
        float_bpp, real_bpp, float_db, real_db = np.mean(rows, 0)
        print(
            f"| {quality:g} | {float_bpp:.4f} | {real_bpp:.4f} | {100 * (real_bpp / float_bpp - 1):+.2f} % "
            f"| {float_db:.3f} | {real_db:.3f} |",
            flush=True,
        )
    return 0

"""``ugicm-train``: run, pack, export, average, calibrate, polish, mix and the measurements.

argparse, and a module is imported only for its own command: training needs nothing beyond torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import signal
import sys
from pathlib import Path

from ugicm.codec.config import PRESETS, ModelConfig

MODULE_COMMANDS = {
    "polish": ("ugicm_train.polish", "improve the views of a model's existing bitstreams"),
    "calibrate": (
        "ugicm_train.calibrate",
        "count the hyper latent's tables on photos, for shorter bitstreams",
    ),
    "average": ("ugicm_train.average", "take the mean of models that one has become by further training"),
    "mix": ("ugicm_train.mix", "make one machine view of those of several models"),
    "evaluate": ("ugicm_train.evaluation.machine", "score tasks on decoded views, beside WebP, AVIF ..."),
    "rd": ("ugicm_train.evaluation.rate_distortion", "rate-distortion curves through real bitstreams"),
    "report": ("ugicm_train.evaluation.report", "tables and plot from the results of rd"),
    "integer-cost": ("ugicm_train.evaluation.integer_cost", "what exact integers cost in rate"),
    "robustness": ("ugicm_train.evaluation.robustness", "screenshots, stripes, noise ... against JPEG"),
}
"""Commands that bring their own ``add_arguments(parser)`` and ``run(arguments) -> exit status``.

``arguments.argv`` is the command line, as they record it.
"""


def _config(name: str) -> ModelConfig:
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{name!r} is neither a config.json nor one of {', '.join(PRESETS)}")
    try:
        return ModelConfig.from_json(path)
    except (KeyError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name} describes no model: {error}") from error


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """``chosen``: the command on the command line; the module of no other is imported."""
    parser = argparse.ArgumentParser(prog="ugicm-train", description="Train a ugicm codec.")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="train, or continue a run")
    run.add_argument(
        "--config",
        type=_config,
        help="preset name or config.json (default: that of the checkpoint or of --start, else ugicm-s)",
    )
    run.add_argument("--data", type=Path, nargs="+", required=True, help="folders of photos or shards")
    run.add_argument("--out", type=Path, required=True, help="run folder (checkpoints, log)")
    run.add_argument(
        "--resume",
        nargs="?",
        const="checkpoint.pt",
        metavar="CHECKPOINT",
        help="continue from a checkpoint of the run folder (default: checkpoint.pt)",
    )
    run.add_argument("--start", metavar="MODEL", help="begin with the weights of a stored model")
    from ugicm_train.train import TrainOptions

    kinds = {"minutes": float, "steps": int, "device": str, "threads": int}
    for field in dataclasses.fields(TrainOptions):
        flag, kind = f"--{field.name.replace('_', '-')}", kinds.get(field.name) or type(field.default)
        text = field.metadata["help"]
        if field.default is not None:
            text += " (default: %(default)s)"
        if kind is bool:
            run.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            run.add_argument(flag, type=kind, default=field.default, help=text)

    run.add_argument(
        "--teacher", help="judge of the machine view, such as open_clip:ViT-B-32/openai (default: none)"
    )

    pack = commands.add_parser("pack", help="decode photos once into uint8 shards")
    pack.add_argument("sources", type=Path, nargs="+", help="folders of photos, or single ones")
    pack.add_argument("--out", type=Path, required=True, help="folder to write shards into")
    pack.add_argument("--max-mb", type=float, default=60.0, help="size of a shard in MB")
    pack.add_argument("--min-side", type=int, default=256, help="skip photos with a shorter side")

    export = commands.add_parser("export", help="write the model folder of a run")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("folder", type=Path, help="model folder, such as model_store/ugicm-s")
    export.add_argument("--checkpoint", default="checkpoint.pt", help="checkpoint file of the run")
    export.add_argument("--name", help="model name (default: the folder's)")

    for name, (module, summary) in MODULE_COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = _parser(argv[0] if argv else None).parse_args(argv)
        if arguments.command in MODULE_COMMANDS:
            module = importlib.import_module(MODULE_COMMANDS[arguments.command][0])
            arguments.argv = argv
            return int(module.run(arguments))
        if arguments.command == "run":
            from ugicm_train.train import TrainOptions, train

            names = [field.name for field in dataclasses.fields(TrainOptions)]
            options = TrainOptions(**{name: getattr(arguments, name) for name in names})
            teacher = None
            if arguments.teacher:
                from ugicm_train.teachers import parse_teacher

                teacher = parse_teacher(arguments.teacher, arguments.precision)
            return train(
                arguments.config,
                options,
                arguments.data,
                arguments.out,
                resume=arguments.resume,
                start=arguments.start,
                teacher=teacher,
                teacher_name=arguments.teacher,
            )
        if arguments.command == "pack":
            from ugicm_train.data import pack

            if not 0 < arguments.max_mb < math.inf:
                raise ValueError(f"max-mb must be finite and above 0, got {arguments.max_mb}")
            shards = pack(
                arguments.sources,
                arguments.out,
                max_bytes=int(arguments.max_mb * 1e6),
                min_side=arguments.min_side,
            )
            for shard in shards:
                print(shard)
        elif arguments.command == "export":
            from ugicm_train.export import export

            export(arguments.run, arguments.folder, checkpoint=arguments.checkpoint, name=arguments.name)
    except ModuleNotFoundError as error:
        print(f"ugicm-train: {error}; is the extra installed? pip install 'ugicm[train]'", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"ugicm-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ugicm-train: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0

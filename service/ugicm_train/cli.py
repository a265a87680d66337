"""``ugicm-train``: run, pack, export, average, calibrate, polish, mix and the measurements.

argparse, and a module is imported only for its own command: training needs nothing beyond torch.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

COMMANDS = {
    "run": ("ugicm_train.train", "train, or continue a run"),
    "pack": ("ugicm_train.data", "decode photos once into uint8 shards"),
    "export": ("ugicm_train.export", "write the model folder of a run"),
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
"""Modules of the commands, with ``add_arguments(parser)`` and ``run(arguments) -> exit status``.

``arguments.argv`` is the command line, as they record it.
"""


class _WithDefaults(argparse.HelpFormatter):
    """Says the default of every option that has one worth saying, unless its text does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        if "default" in text or default is False or default in (None, [], argparse.SUPPRESS):
            return text
        if isinstance(default, (list, tuple)):
            return f"{text} (default: {' '.join(map(str, default))})"
        return f"{text} (default: %(default)s)"


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """``chosen``: the command on the command line; the module of no other is imported."""
    parser = argparse.ArgumentParser(prog="ugicm-train", description="Train a ugicm codec.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=_WithDefaults)
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = _parser(argv[0] if argv else None).parse_args(argv)
        arguments.argv = argv
        return int(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))
    except ModuleNotFoundError as error:
        print(f"ugicm-train: {error}; is the extra installed? pip install 'ugicm[train]'", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"ugicm-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ugicm-train: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT

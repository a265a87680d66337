"""Files that are whole at any moment, whatever is killed or full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes that place where the block ends without an error.

    It is `path` with the suffix ``.tmp``, or with one more where that is its own.
    """
    beside = path.with_suffix(".tmp" if path.suffix != ".tmp" else ".tmp.tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # a failed one: no part of a file stays

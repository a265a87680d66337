"""Judgements of an evaluation on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ugicm_train.evaluation.tasks import Judgement
from ugicm_train.files import written_whole


class Key(NamedTuple):
    """What one line of the journal is about."""

    task: str
    codec: str
    quality: float
    strength: float
    image: str


class Entry(NamedTuple):
    """One decoded picture, judged."""

    bpp: float
    psnr_db: float
    judgement: Judgement


class Journal:
    """Judgements on disk, appended as they are made."""

    def __init__(
        self,
        path: Path,
        identities: Mapping[str, str],
        pictures: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Lines of other identities and other pictures are not used, but kept for a later run that has these.

        Args:
            path: of the file.
            identities: of tasks and codecs, by name.
            pictures: of each task, by its name: what identifies a picture, by its name.
        """
        self._identities, self._pictures = identities, pictures or {}
        self._entries: dict[Key, Entry] = {}
        others: list[str] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # cut off by a kill
                    continue
                key = Key(*row["key"])
                if row["of"] == self._of(key):
                    self._entries[key] = Entry(*row["entry"])
                else:
                    others.append(line)
        with written_whole(path) as beside:
            self._file = beside.open("w", encoding="utf-8")
            self._file.writelines(f"{line}\n" for line in dict.fromkeys(others))
            for key, entry in self._entries.items():
                self._write(key, entry)
            self._file.flush()

    def _of(self, key: Key) -> list[str | None]:
        picture = self._pictures.get(key.task, {}).get(key.image)
        return [self._identities.get(key.task), self._identities.get(key.codec), picture]

    def _write(self, key: Key, entry: Entry) -> None:
        self._file.write(json.dumps({"key": key, "of": self._of(key), "entry": entry}) + "\n")

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def __getitem__(self, key: Key) -> Entry:
        return self._entries[key]

    def add(self, key: Key, entry: Entry) -> None:
        self._entries[key] = entry
        self._write(key, entry)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

"""Decoded pictures in memory."""

from __future__ import annotations

from typing import NamedTuple

from ugicm.server.cache import Content, hash_of, lasting
from ugicm.server.single_flight import SingleFlightCache


class PictureKey(NamedTuple):
    """What a decoded picture depends on."""

    id: str
    strength: float
    format: str


class Picture(NamedTuple):
    """A decoded picture, as a file."""

    content: Content
    etag: str
    """Strong entity tag, quoted."""

    @classmethod
    async def of(cls, content: bytes) -> Picture:
        """Of a file; its tag is made once, as whoever asks for a kept picture asks for it."""
        return cls(content, f'"{await hash_of(content)}"')


class PictureCache(SingleFlightCache[PictureKey, Picture]):
    """Pictures by what they depend on."""

    tier = "picture"

    def _keep(self, key: PictureKey, value: Picture) -> None:
        content = lasting(value.content, self._kept.max_bytes)
        self._kept.put(key, Picture(content, value.etag), len(content))

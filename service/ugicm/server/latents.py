"""Decoded latents in memory: what all views of a bitstream share."""

from __future__ import annotations

from typing import Any

from ugicm.server.single_flight import SingleFlightCache


class LatentCache(SingleFlightCache[str, Any]):
    """What `Codec.unpack` made, by the id of the bitstream; its ``nbytes`` count."""

    tier = "latent"

    def _keep(self, key: str, value: Any) -> None:
        # A lossless bitstream's is the picture itself.
        if value.nbytes:
            self._kept.put(key, value, value.nbytes)

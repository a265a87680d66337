"""Choices that command line, service and client share. Each of them starts without what the others need."""

from typing import Literal

ImageFormat = Literal["png", "webp", "jpeg", "npy"]
"""Files that decoded pictures are written to."""
Preference = Literal["human", "machine"]
"""Whom a decoded picture is for."""

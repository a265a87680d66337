"""What can go wrong between pixels and bits. An error about a limit names it, the value and the setting."""

from __future__ import annotations

from typing import Any

MAX_PIXELS_SETTING = "UGICM_MAX_PIXELS"
"""What an operator changes where a picture is too large."""


class CodecError(ValueError):
    """Base of every error that the caller's input or configuration causes."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes hand errors to each other, also those that are not made of their text alone."""
        return _remade, (type(self), self.args, vars(self))


def _remade(kind: type[CodecError], args: tuple[Any, ...], members: dict[str, Any]) -> CodecError:
    error = kind.__new__(kind, *args)
    vars(error).update(members)
    return error


class MalformedBitstreamError(CodecError):
    """The bytes are not a whole, undamaged ugicm bitstream."""


class ModelMismatchError(CodecError):
    """The bitstream was made by a model that is not loaded."""

    def __init__(self, needed: str, loaded: str) -> None:
        super().__init__(
            f"this bitstream needs model {needed}, but {loaded} is loaded; "
            "load the model it was encoded with (--model, UGICM_MODEL)"
        )
        self.needed, self.loaded = needed, loaded


class LimitExceededError(CodecError):
    """A size is over its limit."""

    def __init__(self, what: str, *, limit: int, actual: int, setting: str) -> None:
        super().__init__(f"{what}: {actual} is over the limit of {limit}; {setting} changes it")
        self.limit, self.actual, self.setting = limit, actual, setting


class ModelStoreError(CodecError):
    """The model folder is missing, incomplete or damaged."""


def check_pixels(width: int, height: int, limit: int) -> None:
    """``LimitExceededError`` where a picture has more than `limit` pixels."""
    if width * height > limit:
        raise LimitExceededError(
            f"pixels of a {width}x{height} image",
            limit=limit,
            actual=width * height,
            setting=MAX_PIXELS_SETTING,
        )

"""Sizes as people write them: 600MB, 3GiB."""

from __future__ import annotations

import re
from typing import overload

from bitnest.errors import RecipeError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4,
          "ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}  # fmt: skip


@overload
def parse_size(text: str) -> int: ...
@overload
def parse_size(text: None) -> None: ...
def parse_size(text: str | None) -> int | None:
    """Bytes of a size such as 600MB, 3GiB or 1073741824.

    Raises:
        RecipeError: not a size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None:
        raise RecipeError(f"not a size: '{text}'", hint="for example 3GiB or 600MB")
    value = float(match[1]) * _UNITS[match[2] or ""]
    if value >= 1 << 62:
        raise RecipeError(f"no size of {text[:20]} exists", hint="for example 3GiB or 600MB")
    return int(value)

"""Options that several verbs share, spelt once."""

from __future__ import annotations

import re

import typer

from bitnest.errors import RecipeError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}

Json = typer.Option(False, "--json", help="Print the result as JSON on stdout.")
Quiet = typer.Option(False, "--quiet", "-q", help="No progress, no remarks.")
Remote = typer.Option(
    False, "--trust-remote-code", help="Run Python code that the model brings with it."
)
Device = typer.Option(None, "--device", help="cpu, cuda, cuda:1 ... (default: cuda if present).")


def parse_size(text: str | None) -> int | None:
    """Bytes of a size such as 600MB, 3GiB or 1073741824.

    Raises:
        RecipeError: not a size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if match is None:
        raise RecipeError(f"not a size: '{text}'", hint="for example 3GiB or 600MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])

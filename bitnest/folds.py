"""Folds: how what stands between matrices is changed before a model is compressed, as it is asked.

    smooth=0.5      SmoothQuant with that exponent, where norms make channels
    smooth=dgq      DGQ's smoothing, there
    smooth-all=...  the same, and from v to o and from up to down too
    smooth-free=... smooth-all-free=...    with scales as they are, not rounded to powers of two
    permute         channels from up to down, and inside heads from v to o, the loudest first
    rotate          Hadamard inside heads from v to o, and of the whole residual stream
    rotate=heads    inside heads only

They are carried out in the order rotate, smooth, permute, whatever order they are asked in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bitnest.errors import RecipeError

KINDS = ("rotate", "smooth", "permute")  # in the order in which they are done
SMOOTH = ("smooth", "smooth-all", "smooth-free", "smooth-all-free")
HINT = "smooth=0.5, smooth=dgq, smooth-all=0.5, permute, rotate or rotate=heads"


@dataclass(frozen=True)
class Fold:
    """One fold. kind: one of KINDS. exponent: of smoothing; None for DGQ's. every: smoothing of all
    edges, not of norms only. free: by scales that are no powers of two. heads: rotation inside
    heads only."""

    kind: str
    exponent: float | None = None
    every: bool = False
    free: bool = False
    heads: bool = False

    @classmethod
    def parse(cls, text: str) -> Fold:
        """A fold as it is spelt above.

        Raises:
            RecipeError: it is spelt otherwise, or an exponent that is not from 0 to 1.
        """
        word, equals, value = text.strip().partition("=")
        if word in SMOOTH and equals:
            exponent = None if value == "dgq" else _exponent(value, text)
            return cls("smooth", exponent, "all" in word, "free" in word)
        if word == "permute" and not equals:
            return cls("permute")
        if word == "rotate" and value == ("heads" if equals else ""):
            return cls("rotate", heads=bool(equals))
        raise RecipeError(f"unknown fold '{text}'", hint=HINT)

    def __str__(self) -> str:
        if self.kind == "smooth":
            value = "dgq" if self.exponent is None else f"{self.exponent:g}"
            return f"{SMOOTH[self.every + 2 * self.free]}={value}"
        return "rotate=heads" if self.heads else self.kind


def parse_folds(asked: Iterable[str | Fold]) -> tuple[Fold, ...]:
    """Folds in the order in which they are done.

    Raises:
        RecipeError: one is spelt wrongly, or of a kind that was there already.
    """
    found: dict[str, Fold] = {}
    for item in asked:
        fold = item if isinstance(item, Fold) else Fold.parse(item)
        if found.setdefault(fold.kind, fold) != fold:
            raise RecipeError(
                f"--fold {found[fold.kind]} and --fold {fold} contradict each other",
                hint=f"{fold.kind} once",
            )
    return tuple(found[kind] for kind in KINDS if kind in found)


def describe(record: dict[str, Any]) -> list[str]:
    """Lines for a person on what an artifact's `source.folded` says."""
    done = record.get("done", {})
    lines = [f"folded: {', '.join(record['asked'])} ({sum(done.values())} edges)"]
    lines += [f"  {count} x {what}" for what, count in done.items()]
    for what, count in record.get("skipped", {}).items():
        lines.append(f"  not folded: {count} x {what}")
    if even := record.get("even"):
        lines.append(f"  no scales at {even} edges: channels are as loud as each other there")
    return lines


def _exponent(value: str, text: str) -> float:
    try:
        exponent = float(value)
    except ValueError:
        raise RecipeError(f"unknown fold '{text}'", hint=HINT) from None
    if not 0 <= exponent <= 1:
        raise RecipeError(
            f"--fold {text}: the exponent is a number from 0 to 1",
            hint="0.5 halves the difficulty between inputs and weights; 0.8 leaves weights more",
        )
    return exponent

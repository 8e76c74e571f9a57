"""The widths at which a nested artifact is measured: a row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnest.artifact import Artifact, is_artifact
from bitnest.errors import BitnestError, RecipeError
from bitnest.eval.size import weight_bytes
from bitnest.packed.widths import Widths, nested_widths
from bitnest.quantize.allocation.fitting import Fitting


@dataclass(frozen=True)
class Setting:
    """How a model is read. widths: None is whole. said: what a row's name says of it. nbytes: of
    the weights that are read."""

    widths: Widths | None
    said: str
    nbytes: int


def read_settings(
    paths: Sequence[Path], bits: Sequence[int], sizes: Sequence[int]
) -> list[list[Setting]]:
    """Of every model those it can be read at: one, whole, where it is not nested.

    bits: widths. sizes: bytes that all weights may take; see `quantize.allocation.fitting`.

    Raises:
        RecipeError: no model is nested, or a nested one has none of these widths, or not so small.
    """
    if bits and sizes:
        raise BitnestError("--bits and --size both say what is read", hint="leave out one")
    opened = [Artifact.open(path) if is_artifact(path) else None for path in paths]
    own = [nested_widths(artifact) if artifact is not None else () for artifact in opened]
    if (bits or sizes) and not any(own):
        raise RecipeError(
            "none of these models is nested: each has one width",
            hint=f"leave out {'--bits' if bits else '--size'}, or compress with --nested 2-8",
        )
    settings: list[list[Setting]] = []
    for path, artifact, widths in zip(paths, opened, own, strict=True):
        if not widths or artifact is None or not (bits or sizes):
            settings.append([Setting(None, "", weight_bytes(path))])
        elif sizes:
            fitting = Fitting(artifact)
            fitted = [fitting.fit(size) for size in sizes]
            note = " (planes missing)" if artifact.absent else ""
            settings.append(
                [Setting(f.widths, f"in {f.nbytes:,} bytes{note}", f.nbytes) for f in fitted]
            )
        else:
            if not set(widths) & set(bits):
                raise RecipeError(
                    f"no width {', '.join(map(str, bits))} in this artifact",
                    where=str(path),
                    hint="it has " + ", ".join(map(str, widths)),
                )
            settings.append(
                [Setting(w, f"at {w} bits", weight_bytes(path, w)) for w in bits if w in widths]
            )
    return settings

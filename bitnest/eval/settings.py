"""The widths at which a nested artifact is measured, and the caches: a row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnest.artifact import Artifact, is_artifact
from bitnest.errors import BitnestError, RecipeError
from bitnest.eval.size import weight_bytes
from bitnest.formats.kv import KVFormat, read_kv
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


def read_caches(names: Sequence[str]) -> list[KVFormat | None]:
    """Formats of the KV cache by name, `none` among them; each once.

    Raises:
        FormatError: there is no such format.
    """
    return list(dict.fromkeys(read_kv(name) for name in names))


def artifact_kv(path: Path) -> KVFormat | None:
    """What the artifact in `path` asks for; None for checkpoints.

    Raises:
        FormatError: a format that this bitnest does not know.
    """
    return read_kv(Artifact.open(path).manifest.get("kv")) if is_artifact(path) else None


def check_caches(
    paths: Sequence[Path], formats: Sequence[Sequence[KVFormat | None]], trust_remote_code: bool
) -> None:
    """Refuse models whose cache cannot be quantised, before any is loaded.

    Raises:
        UnsupportedModel: one of those that are to be.
    """
    from transformers import AutoConfig

    from bitnest.packed.kv_cache import check_family

    for path, own in zip(paths, formats, strict=True):
        if any(own):
            check_family(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))

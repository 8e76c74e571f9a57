"""merge, as a function: a checkpoint with LoRA adapters in it, written as a normal checkpoint.

`merged.json` beside its files says what was merged; `writing` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnest.api.writing import write_checkpoint
from bitnest.averaging import run_weights
from bitnest.checkpoint import Checkpoint
from bitnest.errors import RecipeError
from bitnest.lora import Adapter
from bitnest.merged import MergedCheckpoint
from bitnest.progress import Progress

RECORD = "merged.json"


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    tensors: of the checkpoint. changed: how many of them were. sha256: of base, adapters and
    scales. adapters: see `merged.json`.
    """

    path: Path
    tensors: int
    changed: int
    nbytes: int
    sha256: str
    adapters: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "path": str(self.path)}


def merge(
    model: str | Path,
    loras: Sequence[str],
    out: str | Path,
    *,
    weights_from: str | None = None,
    penalty: float = 1.0,
    residual_base: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Write `model` with `loras` merged in into the directory `out`.

    loras: adapter directories, each with `:scale` behind it or 1. weights_from:
    loss or step: the adapters are checkpoints of one run, averaged by that metric with `penalty`
    (see `bitnest.averaging`) and without scales. residual_base: `model` is the
    base that PiSSA's or its like's init left behind. fresh: discard an unfinished run.

    Raises:
        RecipeError: no adapter, or a scale that is no number.
        CheckpointError, UnsupportedModel: one cannot be read, or they do not match.
        ArtifactError: something is in the way, or the disk is full.
    """
    if not loras:
        raise RecipeError("nothing to merge", hint="--lora DIRECTORY, or DIRECTORY:0.5")
    out = Path(out).absolute()
    base = Checkpoint.open(model)
    asked = [parse_lora(text) for text in loras]
    if weights_from is not None:
        if any(scale != 1.0 for _, scale in asked):
            raise RecipeError("weights from the run and scales contradict each other",
                              where="--weights-from", hint="leave out one of them")  # fmt: skip
        paths = [path for path, _ in asked]
        asked = list(zip(paths, run_weights(paths, weights_from, penalty), strict=True))
    adapters = [(Adapter.open(path, residual_base=residual_base), scale) for path, scale in asked]
    merged = MergedCheckpoint.of(base, adapters, trust_remote_code=trust_remote_code)

    def content() -> dict[str, Any]:
        return {"base": base.scan(), "adapters": merged.merged()}

    digest = write_checkpoint(merged, out, record=(RECORD, content), fresh=fresh, progress=progress)
    return MergeResult(
        out, len(base.tensors), len(merged.changes), base.nbytes, digest, merged.merged()
    )


def parse_lora(text: str) -> tuple[Path, float]:
    """PATH or PATH:scale.

    Raises:
        RecipeError: the scale is no finite number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise RecipeError(
            f"'{scale}' is no scale", where=f"--lora {text}", hint=f"--lora {path}:0.5"
        )
    return Path(path), value

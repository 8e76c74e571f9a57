"""merge, as a function: a checkpoint with LoRA adapters in it, written as a normal checkpoint.

`merged.json` beside its files says what was merged; `writing` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnest.api.writing import write_checkpoint
from bitnest.averaging import run_weights
from bitnest.checkpoint import Checkpoint
from bitnest.combining import LINEAR, Combine
from bitnest.errors import RecipeError
from bitnest.lora import Adapter, parse_lora
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
    combine: str = LINEAR,
    density: float | None = None,
    seed: int | None = None,
    residual_base: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Write `model` with `loras` merged in into the directory `out`.

    loras: adapter directories, each with `:scale` behind it or 1. weights_from: loss or step: the
    adapters are checkpoints of one run, averaged by that metric with `penalty` (see
    `bitnest.averaging`) and without scales. combine, density, seed: linear, ties, dare_linear or
    dare_ties, the share of numbers these keep (0.5), and of the random ones (0); see
    `bitnest.combining`. residual_base: `model` is the base that PiSSA's or its like's init left
    behind. fresh: discard an unfinished run.

    Raises:
        RecipeError: no adapter, a scale that is no number, an unknown way to combine.
        MissingExtra: a way to combine that needs peft.
        CheckpointError, UnsupportedModel: one cannot be read, or they do not match.
        ArtifactError: something is in the way, or the disk is full.
    """
    if not loras:
        raise RecipeError("nothing to merge", hint="--lora DIRECTORY, or DIRECTORY:0.5")
    way = _combine(combine, density, seed)
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
    merged = MergedCheckpoint.of(base, adapters, combine=way, trust_remote_code=trust_remote_code)

    def content() -> dict[str, Any]:
        return {"base": base.scan(), "adapters": merged.merged(), **way.to_json()}

    digest = write_checkpoint(merged, out, record=(RECORD, content), fresh=fresh, progress=progress)
    return MergeResult(
        out, len(base.tensors), len(merged.changes), base.nbytes, digest, merged.merged()
    )


def _combine(method: str, density: float | None, seed: int | None) -> Combine:
    if method == LINEAR and density is not None:
        raise RecipeError("--density is for ties and dare", hint="--combine ties")
    if not method.startswith("dare") and seed is not None:
        raise RecipeError("--seed is for dare, which draws at random", hint="--combine dare_ties")
    return Combine(method, 0.5 if density is None else density, seed or 0)

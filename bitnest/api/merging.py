"""merge, as a function: a checkpoint with LoRA adapters in it, written as a normal checkpoint.

Files, their names and the order of tensors are the base's, so every reader of the base reads the
result. `merged.json` beside them says what was merged. A killed run resumes at the file it was in;
every file is read back and held against what was written before the directory gets its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bitnest.artifact import COPIED
from bitnest.averaging import run_weights
from bitnest.checkpoint import Checkpoint
from bitnest.combining import LINEAR, Combine
from bitnest.errors import ArtifactError, CheckpointError, RecipeError
from bitnest.lora import Adapter, parse_lora
from bitnest.merged import MergedCheckpoint
from bitnest.progress import Progress, Silent
from bitnest.quantize.preflight import free_bytes
from bitnest.safetensors_io import DTYPES, Entry
from bitnest.workdir import Workdir, in_the_way, is_empty, sha256_file, storage_error, write_text

RECORD, INDEX = "merged.json", "model.safetensors.index.json"


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


class _Merging(Workdir):
    noun = "checkpoint"


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
        RecipeError: no adapter, or a scale that is no number.
        CheckpointError, UnsupportedModel: one cannot be read, or they do not match.
        ArtifactError: something is in the way, or the disk is full.
    """
    if not loras:
        raise RecipeError("nothing to merge", hint="--lora DIRECTORY, or DIRECTORY:0.5")
    way = _combine(combine, density, seed)
    out, progress = Path(out).absolute(), progress or Silent()
    base = Checkpoint.open(model)
    asked = [parse_lora(text) for text in loras]
    if weights_from is not None:
        if any(scale != 1.0 for _, scale in asked):
            raise RecipeError("weights from the run and scales contradict each other",
                              where="--weights-from", hint="leave out one of them")  # fmt: skip
        paths = [path for path, _ in asked]
        asked = list(zip(paths, run_weights(paths, weights_from, penalty), strict=True))
    adapters = [(Adapter.open(path, residual_base=residual_base), scale) for path, scale in asked]
    if not is_empty(out):
        raise in_the_way(out)
    merged = MergedCheckpoint.of(base, adapters, combine=way, trust_remote_code=trust_remote_code)
    work = _Merging(out, {}, len(_files(base)))
    _check_disk(base, work)
    progress.phase("reading", base.nbytes)
    digest = merged.scan(progress.step)
    work.fingerprint = {
        "base": base.scan(), "files": sorted(f.name for f in _files(base)),
        "adapters": [[a["sha256"], a["scale"]] for a in merged.merged()], **way.to_json(),
    }  # fmt: skip
    try:
        done = work.begin(fresh=fresh)
        _write(merged, work, done, digest, progress)
        work.publish()
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        work.close()
    return MergeResult(
        out, len(base.tensors), len(merged.changes), base.nbytes, digest, merged.merged()
    )


def _combine(method: str, density: float | None, seed: int | None) -> Combine:
    if method == LINEAR and density is not None:
        raise RecipeError("--density is for ties and dare", hint="--combine ties")
    if not method.startswith("dare") and seed is not None:
        raise RecipeError("--seed is for dare, which draws at random", hint="--combine dare_ties")
    return Combine(method, 0.5 if density is None else density, seed or 0)


def _files(base: Checkpoint) -> dict[Path, list[str]]:
    """The base's tensors by file, in the order they lie in."""
    found: dict[Path, list[str]] = {}
    for name, info in sorted(base.tensors.items(), key=lambda item: item[1].start):
        found.setdefault(info.file, []).append(name)
    return dict(sorted(found.items()))


def _check_disk(base: Checkpoint, work: Workdir) -> None:
    there = sum(f.stat().st_size for f in work.work.rglob("*") if f.is_file())
    need, have = base.nbytes + (8 << 20), free_bytes(work.out) + there
    if have < need:
        raise ArtifactError(
            f"the merged checkpoint needs {need:,} bytes of disk, {have:,} are free",
            where=str(work.out.parent),
            hint="free space or choose another -o",
        )


def _write(
    merged: MergedCheckpoint, work: Workdir, done: int, digest: str, progress: Progress
) -> None:
    base = merged.base
    progress.phase("merging", base.nbytes)
    for number, (file, names) in enumerate(_files(base).items()):
        entries = [
            Entry(name, DTYPES[info.dtype], info.shape, partial(merged.read, name))
            for name in names
            for info in [base.tensors[name]]
        ]
        if number >= done:
            work.save_block(number, {}, {file.name: entries})
        progress.step(sum(entry.nbytes for entry in entries), file.name)
    if (base.path / INDEX).exists():
        where = {name: info.file.name for name, info in sorted(base.tensors.items())}
        index = {"metadata": {"total_size": base.nbytes}, "weight_map": where}
        write_text(work.work / INDEX, json.dumps(index, indent=2) + "\n")
    for pattern in ("config.json", "*.jinja", *COPIED):
        for source in sorted(base.path.glob(pattern)):
            if source.is_file():
                shutil.copyfile(source, work.work / source.name)
    record = {
        "base": base.scan(), "sha256": digest, "adapters": merged.merged(),
        **merged.combine.to_json(),
    }  # fmt: skip
    write_text(work.work / RECORD, json.dumps(record, indent=1) + "\n")
    _verify(merged, work, progress)


def _verify(merged: MergedCheckpoint, work: Workdir, progress: Progress) -> None:
    """Hold what lies on disk against what was written.

    Raises:
        CheckpointError: a file or a tensor differs.
    """
    progress.phase("verifying", merged.nbytes)
    written = Checkpoint.open(work.work)
    same = written.tensors.keys() == merged.tensors.keys() and all(
        (info.dtype, info.shape) == (merged.tensors[name].dtype, merged.tensors[name].shape)
        for name, info in written.tensors.items()
    )
    for number in range(work.blocks):
        for name, entry in work.saved_block(number)["files"].items():
            same = same and sha256_file(work.work / name) == entry["sha256"]
            progress.step(entry["bytes"], name)
    if not same:
        raise CheckpointError(
            "what was written reads back differently", where=str(work.work),
            hint="the disk is failing: repeat with --fresh and another -o",
        )  # fmt: skip

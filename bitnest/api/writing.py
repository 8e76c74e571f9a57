"""Any view of a checkpoint (adapters merged in, experts or blocks gone) written as a normal one.

Files, their names and the order of tensors are the base's where it has them, so every reader of the
base reads the result. A killed run resumes at the file it was in; every file is read back and held
against what was written before the directory gets its name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bitnest.artifact import COPIED, config_text, index_text
from bitnest.checkpoint import Checkpoint, read_config
from bitnest.errors import ArtifactError, CheckpointError
from bitnest.progress import Progress, Silent
from bitnest.quantize.preflight import free_bytes
from bitnest.reduced import is_ordinary
from bitnest.safetensors_io import DTYPES, Entry
from bitnest.workdir import Workdir, in_the_way, is_empty, sha256_file, storage_error, write_text

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class _Writing(Workdir):
    noun = "checkpoint"


def write_checkpoint(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    record: tuple[str, Callable[[], Mapping[str, Any]]] | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write `checkpoint` into the directory `out`; the sha256 of what was read.

    record: name and content of a JSON file that says how it came about (default: origin.json, what
    the checkpoint says of itself); "sha256" is added. fresh: discard an unfinished run.

    Raises:
        CheckpointError: weights that are damaged, or a model that transformers alone cannot build.
        ArtifactError: something is in the way, or the disk is full.
    """
    out, progress = Path(out).absolute(), progress or Silent()
    if not is_ordinary(checkpoint.config):
        raise CheckpointError(
            "layers with unequal numbers of experts, or router rows that are none, are no ordinary "
            "model",
            where=str(out),
            hint="keep as many experts in every layer, or compress it to an artifact",
        )
    if not is_empty(out):
        raise in_the_way(out)
    files = _files(checkpoint)
    work = _Writing(out, {}, len(files))
    _check_disk(checkpoint, work)
    progress.phase("reading", checkpoint.nbytes)
    digest = checkpoint.scan(progress.step)
    work.fingerprint = {"source": digest, "files": list(files), "config": checkpoint.config}
    name, content = record or ("origin.json", checkpoint.origin)
    try:
        done = work.begin(fresh=fresh)
        _write(checkpoint, files, work, done, progress)
        written = {**content(), "sha256": digest}
        write_text(work.work / name, json.dumps(written, indent=1) + "\n")
        _verify(checkpoint, work, progress)
        work.publish()
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        work.close()
    return digest


def _files(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Its tensors by the file they are written to, in the order they lie in."""
    found: dict[Path, list[str]] = {}
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: item[1].start):
        found.setdefault(info.file, []).append(name)
    places = sorted(found)
    if len(places) == 1:
        return {SINGLE: found[places[0]]} if not _indexed(checkpoint) else _named(found)
    if _indexed(checkpoint):
        return _named(found)
    count = len(places)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": found[place]
        for number, place in enumerate(places, 1)
    }


def _named(found: Mapping[Path, list[str]]) -> dict[str, list[str]]:
    return {place.name: names for place, names in sorted(found.items())}


def _indexed(checkpoint: Checkpoint) -> bool:
    """Whether its tensors keep the files an index names."""
    index = checkpoint.path / INDEX
    if not index.exists():
        return False
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return {info.file.name for info in checkpoint.tensors.values()} <= named


def _check_disk(checkpoint: Checkpoint, work: Workdir) -> None:
    there = sum(f.stat().st_size for f in work.work.rglob("*") if f.is_file())
    need, have = checkpoint.nbytes + (8 << 20), free_bytes(work.out) + there
    if have < need:
        raise ArtifactError(
            f"the checkpoint needs {need:,} bytes of disk, {have:,} are free",
            where=str(work.out.parent),
            hint="free space or choose another -o",
        )


def _write(
    checkpoint: Checkpoint,
    files: Mapping[str, list[str]],
    work: Workdir,
    done: int,
    progress: Progress,
) -> None:
    progress.phase("writing", checkpoint.nbytes)
    for number, (file, names) in enumerate(files.items()):
        entries = [
            Entry(name, DTYPES[info.dtype], info.shape, partial(checkpoint.read, name))
            for name in names
            for info in [checkpoint.tensors[name]]
        ]
        if number >= done:
            work.save_block(number, {}, {file: entries})
        progress.step(sum(entry.nbytes for entry in entries), file)
    if list(files) != [SINGLE]:
        where = {name: file for file, names in files.items() for name in names}
        write_text(work.work / INDEX, index_text(dict(sorted(where.items())), checkpoint.nbytes))
    for pattern in ("config.json", "*.jinja", *COPIED):
        for source in sorted(checkpoint.path.glob(pattern)):
            if source.is_file():
                shutil.copyfile(source, work.work / source.name)
    if checkpoint.config != read_config(checkpoint.path):
        write_text(work.work / "config.json", config_text(checkpoint.config))


def _verify(checkpoint: Checkpoint, work: Workdir, progress: Progress) -> None:
    """Hold what lies on disk against what was written.

    Raises:
        CheckpointError: a file or a tensor differs.
    """
    progress.phase("verifying", checkpoint.nbytes)
    written = Checkpoint.open(work.work)
    same = written.tensors.keys() == checkpoint.tensors.keys() and all(
        (info.dtype, info.shape) == (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
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

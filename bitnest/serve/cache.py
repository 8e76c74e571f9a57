"""Compressing before serving, once: a directory of artifacts keyed by what they were made from.

    <root>/artifacts/<source name>-<key>/   the artifact, whole when it holds bitnest.json
    <root>/artifacts/<source name>-<key>.lock
    <root>/exports/...                      the same for exports of artifacts to other engines

The key is a SHA-256 over bitnest's version, the options, the content of config.json, and the name,
size and modification time of every file of the source: cheap, and wrong only for weights that were
replaced by others of equal size with their old time stamp.

Processes that want the same artifact wait for each other on the lock file; the system drops the
lock of a process that died. The builder is given the final path, may find there what an earlier run
left, and writes bitnest.json last.

Left out on purpose: deleting old entries (the directory may be removed at any time), and systems
without `fcntl`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitnest import __version__
from bitnest.errors import ArtifactError, CheckpointError

log = logging.getLogger(__name__)

_WHOLE = "bitnest.json"


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/bitnest`, or `~/.cache/bitnest`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bitnest"


def content_key(source: Path, options: Mapping[str, Any]) -> str:
    """64 hex digits that change when `source` or `options` do.

    Raises:
        CheckpointError: `source` holds no config.json.
    """
    config = source / "config.json"
    if not config.is_file():
        raise CheckpointError("not a model directory: no config.json", where=str(source))
    files = [
        [str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(source.rglob("*"))
        if path.is_file()
    ]
    described = {"version": __version__, "options": dict(options), "files": files}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(config.read_bytes())
    return digest.hexdigest()


def cached_artifact(
    source: Path,
    key: Mapping[str, Any],
    build: Callable[[Path], object],
    *,
    root: Path | None = None,
) -> Path:
    """The artifact made from `source` under the options `key`, built now if it is not there.

    build: writes the artifact to the path it is given, bitnest.json last.
    root: instead of `cache_root()`.

    Raises:
        CheckpointError: `source` is not a model directory.
        ArtifactError: `build` returned without writing an artifact.
    """
    target = _place("artifacts", source, key, root)

    def whole() -> bool:
        return (target / _WHOLE).is_file()

    return _once(target, whole, lambda: build(target))


def cached_export(
    source: Path,
    key: Mapping[str, Any],
    build: Callable[[Path], object],
    *,
    root: Path | None = None,
) -> Path:
    """The export made from the artifact `source`, built now if it is not there.

    An export has no last file to look for, so it is built beside its place and renamed. `build` is
    given a path that does not exist.
    """
    target = _place("exports", source, key, root)
    partial = target.with_name(target.name + ".partial")

    def build_beside() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        build(partial)
        partial.rename(target)

    return _once(target, target.is_dir, build_beside)


def _place(kind: str, source: Path, key: Mapping[str, Any], root: Path | None) -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().name) or "model"
    return (root or cache_root()) / kind / f"{name}-{content_key(source, key)[:16]}"


def _once(target: Path, whole: Callable[[], bool], build: Callable[[], object]) -> Path:
    """`target`, built under its lock unless it is whole."""
    if not whole():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock")):
            if not whole():  # another process may just have built it
                log.info("building %s", target)
                build()
        if not whole():
            raise ArtifactError(f"the build left no {_WHOLE}", where=str(target))
    log.info("using %s", target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is building the same; waiting for %s", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield

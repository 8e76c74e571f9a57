"""C kernels: compiled at first use for this machine, cached, loaded with ctypes.

    <cache>/<name>-<key>.so    as `csource` writes them
    cache = $XDG_CACHE_HOME/bitnest/native, or ~/.cache/bitnest/native
    key   = hash of sources, flags, the compiler's version and the CPU's model and features

A library is one file, kernels/<name>.c, or a folder, kernels/<name>/. A damaged one is built again
rather than mapped. Nothing is loaded from a directory or file that another user owns or can write.

Without a compiler, or whatever else is missing, `load` takes a library that came with the package
(`prebuilt`); without that it returns None, and the caller's reference runs. It says once at info
level which it is.

Left out: systems other than POSIX, cross compilation, and removing old libraries.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import stat
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitnest.kernels import csource
from bitnest.kernels.cpu_features import identity
from bitnest.kernels.csource import Unavailable
from bitnest.kernels.prebuilt import find_prebuilt

log = logging.getLogger(__name__)

NATIVE = "-march=native"
SHARED_WRITE = stat.S_IWGRP | stat.S_IWOTH
FAILURES = (Unavailable, OSError, RuntimeError, subprocess.SubprocessError)


@dataclass(frozen=True)
class Found:
    """A library and where it is. level: that it was built for, if it came with the package. why:
    none was built here."""

    library: ctypes.CDLL | None
    file: Path | None = None
    level: str = ""
    why: str = ""


@cache
def load(name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library `name`, built if need be with `flags` after the usual ones, or one that came with
    the package, which has none for any flags.

    None, and a line in the log, if there is neither. Asked once per process: later calls give the
    same answer.
    """
    found = find(name, flags)
    if found.library is None:
        log.info("kernels/%s: the reference in torch runs: %s", name, found.why)
    elif found.level:
        said = "kernels/%s: native code runs, built for %s with the package: %s"
        log.info(said, name, found.level, found.why)
    else:
        log.info("kernels/%s: native code runs", name)
    return found.library


def find(name: str, flags: tuple[str, ...] = ()) -> Found:
    """What `load` loads, without a word."""
    try:
        file = _built(name, (NATIVE, *flags))
        return Found(ctypes.CDLL(str(file)), file)
    except FAILURES as error:
        why = _reason(error)
    try:
        file, level = find_prebuilt(name, flags)
        return Found(ctypes.CDLL(str(file)), file, level, why)
    except FAILURES as error:
        return Found(None, why=f"{why}; {_reason(error)}")


@cache
def build_variant(name: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library as another machine or option would have it, for tests and benchmarks.

    A `-march` among the flags takes the place of `-march=native`; whether this CPU can run the
    result is the caller's to know. None, and a line in the log, if it cannot be built.
    """
    own = () if any(flag.startswith("-march=") for flag in flags) else (NATIVE,)
    try:
        return ctypes.CDLL(str(_built(name, (*own, *flags))))
    except FAILURES as error:
        log.info("kernels/%s %s: not built: %s", name, " ".join(flags), _reason(error))
        return None


def source_hash(name: str) -> str:
    """Eight digits of the sources' hash: what its results depend on."""
    return hashlib.sha256(csource.text_of(name)).hexdigest()[:8]


def cache_directory() -> Path:
    """Where libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "bitnest" / "native"


def _built(name: str, flags: tuple[str, ...]) -> Path:
    if not hasattr(os, "getuid"):
        raise Unavailable(f"not a POSIX system: {platform.system()}")
    compiler, every = csource.find_compiler(), csource.flags_of(name, flags)
    words = [*every, *compiler, csource.compiler_version(compiler)]
    about = [csource.text_of(name), *map(str.encode, words), identity()]
    key = hashlib.sha256(b"\0".join(about)).hexdigest()[:32]
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(directory)
    file = directory / f"{name}-{key}.so"
    if not _whole(file):
        csource.compile_library(name, compiler, every, file)
    return file


def _whole(file: Path) -> bool:
    """Whether the library is there as it was built. A damaged one must not reach the loader."""
    try:
        with file.open("rb") as stream:
            _check_owner(file, os.fstat(stream.fileno()))
            return csource.is_whole(stream.read())
    except FileNotFoundError:
        return False


def _check_private(directory: Path) -> None:
    """Nobody else may put files into the directory, nor another directory in its place."""
    _check_owner(directory, directory.lstat())
    for parent in directory.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise Unavailable(f"anyone can write {parent}")


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid() or found.st_mode & SHARED_WRITE or stat.S_ISLNK(found.st_mode):
        raise Unavailable(f"other users can write {path}")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

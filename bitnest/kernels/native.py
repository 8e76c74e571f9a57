"""C kernels: compiled at first use for this machine, cached, loaded with ctypes.

A library is one file, kernels/<name>.c, or a folder, kernels/<name>/, whose *.c are compiled
together (with threads, -pthread) and whose *.h they include.

    <cache>/<name>-<key>.so = library | SHA-256 of the library (32 bytes, which loaders ignore)
    cache = $XDG_CACHE_HOME/bitnest/native, or ~/.cache/bitnest/native
    key   = hash of sources, flags, the compiler's version and the CPU's model and features

The library is written beside its final name and renamed, so processes that build at once end with
one whole file; the digest tells a damaged one, which is built again rather than mapped. Nothing is
loaded from a directory or file that another user owns or can write.

Flags keep IEEE results: no fast-math, no contraction to fused multiply-adds. Without a compiler, or
whatever else is missing, `load` says so once at info level and returns None: the caller's reference
runs.

Left out: systems other than POSIX, cross compilation, and removing old libraries.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-std=c11", "-ffp-contract=off")
COMPILERS = ("cc", "gcc", "clang")  # after $CC
COMPILE_SECONDS = 300
# Several files may start threads, and call one another by names that libc or torch also has:
# protected ones are bound within the library.
FOLDER_FLAGS = ("-pthread", "-fvisibility=protected")
DIGEST = 32  # bytes of SHA-256
SHARED_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Unavailable(Exception):
    """Why there is no native kernel here."""


@cache
def load(name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library `name`, built if need be with `flags` after the usual ones.

    None, and a line in the log, if it cannot. Asked once per process: later calls give the same
    answer.
    """
    try:
        library = _open(name, flags)
    except (Unavailable, OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("kernels/%s: the reference in torch runs: %s", name, _reason(error))
        return None
    log.info("kernels/%s: native code runs", name)
    return library


@cache
def build_variant(name: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library as another machine or option would have it, for tests and benchmarks.

    A `-march` among the flags takes the place of `-march=native`; whether this CPU can run the
    result is the caller's to know. None, and a line in the log, if it cannot be built.
    """
    try:
        return _open(name, flags)
    except (Unavailable, OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("kernels/%s %s: not built: %s", name, " ".join(flags), _reason(error))
        return None


def source_hash(name: str) -> str:
    """Eight digits of the sources' hash: what its results depend on."""
    return hashlib.sha256(_text(name)).hexdigest()[:8]


def cache_directory() -> Path:
    """Where libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "bitnest" / "native"


def _open(name: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    if not hasattr(os, "getuid"):
        raise Unavailable(f"not a POSIX system: {platform.system()}")
    compiler = _compiler()
    about = [_text(name), *map(str.encode, _flags(name, flags)), _version(compiler), _cpu()]
    key = hashlib.sha256(b"\0".join(about)).hexdigest()[:32]
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(directory)
    file = directory / f"{name}-{key}.so"
    if not _whole(file):
        _build(name, compiler, _flags(name, flags), file)
    return ctypes.CDLL(str(file))


def _build(name: str, compiler: list[str], flags: list[str], file: Path) -> None:
    """Compile to a temporary file, append its digest, rename."""
    handle, temporary = tempfile.mkstemp(prefix=f".{name}-", suffix=".so", dir=file.parent)
    os.close(handle)
    try:
        sources = [str(file) for file in _sources(name) if file.suffix == ".c"]
        command = [*compiler, *sources, *flags, "-o", temporary]  # -l after what needs it
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise Unavailable(f"{compiler[0]} failed: {(lines or [done.stderr.strip()])[0][:200]}")
        library = Path(temporary).read_bytes()
        Path(temporary).write_bytes(library + hashlib.sha256(library).digest())
        os.chmod(temporary, 0o700)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _whole(file: Path) -> bool:
    """Whether the library is there as it was built. A damaged one must not reach the loader."""
    try:
        with file.open("rb") as stream:
            _check_owner(file, os.fstat(stream.fileno()))
            data = stream.read()
    except FileNotFoundError:
        return False
    library, digest = data[:-DIGEST], data[-DIGEST:]
    return hashlib.sha256(library).digest() == digest


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


def _compiler() -> list[str]:
    """Command of the first compiler there is."""
    for command in (os.environ.get("CC", ""), *COMPILERS):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise Unavailable(f"$CC is '{command}': {error}") from error
        if words and shutil.which(words[0]):
            return words
    raise Unavailable("no C compiler: neither $CC nor " + ", ".join(COMPILERS))


def _version(compiler: list[str]) -> bytes:
    done = subprocess.run(
        [*compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS, check=False
    )
    return b"\0".join([*(word.encode() for word in compiler), done.stdout])


def _cpu() -> bytes:
    """What -march=native looks at: model and features of the first core."""
    about = [platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text(errors="replace").partition("\n\n")[0].splitlines()
        wanted = ("vendor", "model", "cpu family", "stepping", "flags", "Features", "CPU ")
        about += [line for line in first if line.startswith(wanted)]
    return "\n".join(about).encode()


def _flags(name: str, extra: tuple[str, ...]) -> list[str]:
    """All flags of a library: the extra ones come last, so they win."""
    own = FOLDER_FLAGS if (SOURCES / name).is_dir() else ()
    usual = [*FLAGS, *own]
    if any(flag.startswith("-march=") for flag in extra):
        usual = [flag for flag in usual if not flag.startswith("-march=")]
    return [*usual, *extra]


def _sources(name: str) -> list[Path]:
    """The file of a library, or the files of its folder by name: *.c and *.h, no folders in it."""
    folder = SOURCES / name
    if not folder.is_dir():
        return [SOURCES / f"{name}.c"]
    found = sorted(file for file in folder.iterdir() if file.suffix in (".c", ".h"))
    if not any(file.suffix == ".c" for file in found):
        raise Unavailable(f"no C source in {folder}")
    return found


def _text(name: str) -> bytes:
    """What a library is made of: one file's bytes, or each file's name, length and bytes."""
    if not (SOURCES / name).is_dir():
        return (SOURCES / f"{name}.c").read_bytes()
    parts = []
    for file in _sources(name):
        data = file.read_bytes()
        parts.append(f"{file.name} {len(data)}\n".encode() + data)
    return b"".join(parts)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

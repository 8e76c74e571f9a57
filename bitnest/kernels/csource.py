"""C sources of the kernels, and compiling them to a library with a digest.

A library is one file, kernels/<name>.c, or a folder, kernels/<name>/, whose *.c are compiled
together (with threads, -pthread) and whose *.h they include.

    <file>.so = library | SHA-256 of the library (32 bytes, which loaders ignore)

The digest tells a damaged library, which must not reach the loader. A library is written beside its
final name and renamed, so processes that build at once end with one whole file.

Flags keep IEEE results: no fast-math, no contraction to fused multiply-adds.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-fPIC", "-shared", "-std=c11", "-ffp-contract=off")
# Several files may start threads, and call one another by names that libc or torch also has:
# protected ones are bound within the library.
FOLDER_FLAGS = ("-pthread", "-fvisibility=protected")
COMPILERS = ("cc", "gcc", "clang")  # without $CC
COMPILE_SECONDS = 300
DIGEST = 32  # bytes of SHA-256


class Unavailable(Exception):
    """Why there is no native kernel here."""


def libraries() -> list[str]:
    """Names of all there are."""
    files = {file.stem for file in SOURCES.glob("*.c")}
    return sorted(files | {file.parent.name for file in SOURCES.glob("*/*.c")})


def flags_of(name: str, extra: tuple[str, ...]) -> list[str]:
    """All flags of a library: the extra ones come last, so they win."""
    return [*FLAGS, *(FOLDER_FLAGS if (SOURCES / name).is_dir() else ()), *extra]


def text_of(name: str) -> bytes:
    """What a library is made of: one file's bytes, or each file's name, length and bytes."""
    if not (SOURCES / name).is_dir():
        return (SOURCES / f"{name}.c").read_bytes()
    parts = []
    for file in _sources(name):
        data = file.read_bytes()
        parts.append(f"{file.name} {len(data)}\n".encode() + data)
    return b"".join(parts)


def find_compiler() -> list[str]:
    """Command of $CC, or of the first compiler there is.

    Raises:
        Unavailable: none, or $CC is not there.
    """
    asked = os.environ.get("CC", "")
    try:
        words = shlex.split(asked)
    except ValueError as error:
        raise Unavailable(f"$CC is '{asked}': {error}") from error
    if words and not shutil.which(words[0]):
        raise Unavailable(f"$CC is '{asked}', which is not there")
    if words:
        return words
    for command in COMPILERS:
        if shutil.which(command):
            return [command]
    raise Unavailable("no C compiler: neither $CC nor " + ", ".join(COMPILERS))


def compiler_version(compiler: list[str]) -> str:
    """What it says of itself."""
    done = subprocess.run(
        [*compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS, check=False
    )
    return done.stdout.decode(errors="replace")


def compile_library(name: str, compiler: list[str], flags: list[str], file: Path) -> None:
    """Compile to a temporary file, append its digest, rename. The files of a folder are compiled at
    the same time, as many as this process has cores.

    Raises:
        Unavailable: the compiler failed.
    """
    sources = [source for source in _sources(name) if source.suffix == ".c"]
    # the longest first: the last to end is then a short one
    sources.sort(key=lambda source: -source.stat().st_size)
    own = [flag for flag in flags if flag != "-shared" and not flag.startswith("-l")]
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=file.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, "-c", str(source), *own, "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(_cores()) as pool:
            list(pool.map(_run, commands))
        made = Path(folder) / "library.so"
        _run([*compiler, *map(str, objects), *flags, "-o", str(made)])
        library = made.read_bytes()
        made.write_bytes(library + hashlib.sha256(library).digest())
        os.chmod(made, 0o700)
        os.replace(made, file)


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise Unavailable(f"{command[0]} failed: {(lines or [done.stderr.strip()])[0][:200]}")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_whole(data: bytes) -> bool:
    """Whether a library's bytes are as they were built."""
    library, digest = data[:-DIGEST], data[-DIGEST:]
    return hashlib.sha256(library).digest() == digest


def _sources(name: str) -> list[Path]:
    """The file of a library, or the files of its folder by name: *.c and *.h, no folders in it."""
    folder = SOURCES / name
    if not folder.is_dir():
        return [SOURCES / f"{name}.c"]
    found = sorted(file for file in folder.iterdir() if file.suffix in (".c", ".h"))
    if not any(file.suffix == ".c" for file in found):
        raise Unavailable(f"no C source in {folder}")
    return found

"""Libraries that come with the package, for machines without a compiler.

    kernels/prebuilt/<name>-<key>-<level>.so        as `csource` writes them
    key = hash of sources and flags: 16 digits; a library of other sources is not taken

`setup.py` makes them when a wheel is built where a compiler is: for every level of the machine's
kind, never for the builder's own CPU, so that the wheel runs on others. The best level that this
CPU has is loaded.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitnest.kernels import csource
from bitnest.kernels.cpu_features import Level, features, levels, usable
from bitnest.kernels.csource import Unavailable

DIRECTORY = Path(__file__).parent / "prebuilt"


def find_prebuilt(name: str, flags: tuple[str, ...] = ()) -> tuple[Path, str]:
    """The library that fits these sources, flags and this CPU best, and its level.

    Raises:
        Unavailable: none, or it is damaged.
    """
    for level in usable(features()):
        file = DIRECTORY / _file_name(name, flags, level)
        if file.is_file():
            if not csource.is_whole(file.read_bytes()):
                raise Unavailable(f"{file} is damaged: install bitnest again")
            return file, level.name
    raise Unavailable("none came with the package")


def build_prebuilt(directory: Path) -> dict[str, str]:
    """Build all libraries for all levels into `directory`: by file, why it failed, or nothing.

    Never raises for want of a compiler.
    """
    try:
        compiler = csource.find_compiler()
        directory.mkdir(parents=True, exist_ok=True)
    except (Unavailable, OSError) as error:
        return {str(directory): str(error)}
    for old in directory.glob("*.so"):
        old.unlink()

    def build(job: tuple[str, Level]) -> tuple[str, str]:
        name, level = job
        file = directory / _file_name(name, (), level)
        try:
            flags = csource.flags_of(name, level.flags)
            csource.compile_library(name, compiler, flags, file)
            file.chmod(0o755)
        except (Unavailable, OSError, subprocess.SubprocessError) as error:
            return file.name, str(error) or type(error).__name__
        return file.name, ""

    jobs = [(name, level) for name in csource.libraries() for level in levels()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(build, jobs))


def _file_name(name: str, flags: tuple[str, ...], level: Level) -> str:
    about = [csource.text_of(name), *(flag.encode() for flag in csource.flags_of(name, flags))]
    key = hashlib.sha256(b"\0".join(about)).hexdigest()[:16]
    return f"{name}-{key}-{level.name}.so"

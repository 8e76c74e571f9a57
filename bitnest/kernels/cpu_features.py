"""What this CPU is: its model, its instructions, and the levels that libraries are built for.

Features have Linux's names in /proc/cpuinfo, which lists an instruction set only if the system
saves its registers. Elsewhere none are known, and the level that needs none is taken.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Level:
    """Machines that one library runs on. flags: of the compiler. needs: features."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_V3 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = frozenset({"avx512_vnni", "avx512vbmi"})

# By machine, from least to most; the psABI's levels, and those with 8-bit dot products.
LEVELS: dict[str, tuple[Level, ...]] = {
    "x86_64": (
        Level("x86-64", ("-march=x86-64",), frozenset()),
        Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
        Level("x86-64-v3-vnni", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
        Level("x86-64-v4", ("-march=x86-64-v4",), _V4),
        Level("x86-64-v4-vnni", ("-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi"), _V4 | _VNNI),
    ),
    "aarch64": (
        Level("armv8-a", ("-march=armv8-a",), frozenset()),
        Level("armv8.2-dotprod", ("-march=armv8.2-a+dotprod",), frozenset({"asimddp"})),
    ),
}


def levels() -> tuple[Level, ...]:
    """Of this kind of machine, from least to most; one without flags if it has none."""
    return LEVELS.get(platform.machine(), (Level(platform.machine(), (), frozenset()),))


def usable(known: frozenset[str]) -> list[Level]:
    """Levels that a CPU with these features runs, best first."""
    return [level for level in reversed(levels()) if level.needs <= known]


@cache
def features() -> frozenset[str]:
    """Features of the first core, by Linux's names; none where they are not known."""
    for line in _first_core():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def model_name() -> str:
    """The CPU's name, or the machine's kind."""
    for line in _first_core():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def identity() -> bytes:
    """What -march=native looks at: model and features of the first core."""
    about = [platform.machine(), platform.processor()]
    wanted = ("vendor", "model", "cpu family", "stepping", "flags", "Features", "CPU ")
    about += [line for line in _first_core() if line.startswith(wanted)]
    return "\n".join(about).encode()


def _first_core() -> list[str]:
    if not CPUINFO.exists():
        return []
    return CPUINFO.read_text(errors="replace").partition("\n\n")[0].splitlines()

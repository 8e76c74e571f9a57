"""Tile sizes: one table per device, made by measuring, and a default.

A table is `tiles/<name>.json`: rows of an operation, the ranges in which they hold, and a tile; the
first row that fits wins. `sm_90.json` is Hopper's; where a device has no table or its table no
row, `default.json` has one. Nothing is measured while serving: `candidates` is for the bench.

    bn       output channels of a tile        bm       tokens of a tile, 16 or more
    span     superblocks read at once (vector only)
    waves    programs per multiprocessor; each gets the same share of all superblocks
    warps, stages                              as Triton has them
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "tiles"
INTERPRETER_PROGRAMS = 3  # multiprocessors that the CPU pretends to have
OPERATIONS = ("vector", "product", "rounded", "experts")


@dataclass(frozen=True)
class Tile:
    """See above."""

    bn: int
    bm: int
    span: int = 1
    waves: int = 4
    warps: int = 4
    stages: int = 3


@cache
def _table(name: str) -> list[dict[str, object]]:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []


@cache
def choose(operation: str, bits: int, m: int, n: int, k: int, name: str = "default") -> Tile:
    """The tile for `operation` on (n, k) codes of `bits` bits and m tokens. name: of the table."""
    given = {"bits": bits, "m": m, "n": n, "k": k}
    for row in _table(name) + _table("default"):
        if row["op"] != operation:
            continue
        if all(low <= given[key] <= high for key, (low, high) in row["where"].items()):  # type: ignore[attr-defined]
            return Tile(**row["tile"])  # type: ignore[arg-type]
    raise AssertionError(f"default.json has no row for {operation} {given}")


def table_name(device: torch.device) -> str:
    """Name of a device's table: its compute capability."""
    if device.type != "cuda":
        return "default"
    return _capability(device.index or 0)


@cache
def _capability(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def programs(tile: Tile, device: torch.device) -> int:
    """How many programs fill the device."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS * tile.waves
    return _multiprocessors(device.index or 0) * tile.waves


def candidates(operation: str, m: int) -> Iterator[Tile]:
    """Tiles worth measuring for m tokens."""
    if operation == "vector":
        for bn, span, waves, warps in itertools.product(
            (8, 16, 32, 64), (1, 2, 4, 8), (2, 4, 8, 16), (2, 4, 8)
        ):
            if bn * span <= 128:
                yield Tile(bn, 1, span, waves, warps, 3)
        return
    widest = 16
    while widest < min(m, 128):
        widest *= 2
    for bn, waves, warps, stages in itertools.product((32, 64, 128), (1, 2, 4), (4, 8), (2, 3, 4)):
        for bm in {max(16, widest // 2), widest}:
            if bn * bm <= 128 * 128 and (bn * bm <= 64 * 128 or warps == 8):
                yield Tile(bn, bm, 1, waves, warps, stages)

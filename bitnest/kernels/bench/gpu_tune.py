"""Tiles measured one by one, for `bitnest/kernels/gpu/tiles/*.json`.

For every shape, width and number of tokens all candidates of `tiles.candidates` are timed, in an
order drawn with a fixed seed, until a fair share of the time is used. A row says the best tile, the
default's time beside it, and how many were tried.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bitnest.formats import parse_format
from bitnest.kernels.bench.gpu_cases import HALF
from bitnest.kernels.bench.gpu_timing import Bench
from bitnest.kernels.bench.weights import copies, random_tensors
from bitnest.kernels.gpu import tiles
from bitnest.kernels.gpu.layout import lay_out
from bitnest.kernels.gpu.linear import linear

WIDTHS = (4, 8, 2, 3, 6)


def tune(
    bench: Bench, sizes: tuple[Sequence[tuple[int, int]], Sequence[int]]
) -> list[dict[str, Any]]:
    """Rows of a table, best tiles first known."""
    shapes, tokens = sizes
    points = [(shape, m, bits) for m in tokens for bits in WIDTHS for shape in shapes]
    if bench.interpreted:
        points = points[:1]
    rows = []
    for done, (shape, m, bits) in enumerate(points):
        if bench.left < 0:
            break
        rows.append(_point(bench, shape, m, bits, bench.left / (len(points) - done)))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _point(
    bench: Bench, shape: tuple[int, int], m: int, bits: int, seconds: float
) -> dict[str, Any]:
    operation = "vector" if m == 1 else "product"
    fmt = parse_format(f"int{bits}-g128")
    weight = lay_out(random_tensors(fmt, shape, bench.device), fmt, shape)
    assert weight is not None
    sets = copies(weight, min(8, bench.sets(weight.nbytes)))
    x = torch.randn(m, shape[1], device=bench.device, dtype=HALF)
    every = list(tiles.candidates(operation, m))
    random.Random(0).shuffle(every)
    until, choose = bench.left - seconds, tiles.choose
    default = choose(operation, bits, m, shape[0], shape[1], tiles.table_name(bench.device))
    best, least, first, tried = default, float("inf"), 0.0, 0
    for tile in (default, *(every[:1] if bench.interpreted else every)):
        if tried and bench.left < until:
            break
        try:
            tiles.choose = lambda *_, t=tile, **__: t  # type: ignore[assignment]
            time = bench.times([lambda w=w: linear(x, w) for w in sets]).median
        except Exception as error:  # noqa: BLE001 - a tile that does not fit the device
            print(f"{tile}: {type(error).__name__}", file=sys.stderr)
            continue
        finally:
            tiles.choose = choose
        tried += 1
        first = first or time
        if time < least:
            best, least = tile, time
    return {
        "op": operation,
        "where": {"bits": [bits] * 2, "m": [m] * 2, "n": [shape[0]] * 2, "k": [shape[1]] * 2},
        "tile": asdict(best), "us": least, "default_us": first, "tried": tried,
    }  # fmt: skip

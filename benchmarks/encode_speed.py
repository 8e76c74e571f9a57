"""Speed of rounding to nearest: MB (10^6 bytes) of bfloat16 weight a core-second, packing included.

    python -m benchmarks.encode_speed [--formats NAME ...] [--shapes OxI ...] [--runs 7]

Times `kernels.encode` where it supports the format, else the block codec in torch (`path`). Beside
it, always, the codec in torch on the first rows of the same matrix (TORCH_BYTES of it) and the
ratio. Bytes are those of the bfloat16 weight read, 2 O I; `stored` is what the format takes.
Time is the thread's CPU time, so that other work on the machine counts only for what it takes of
caches and clock. Medians, with p20 and p80; runs of the two take turns. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitnest.formats import core_format, parse_format
from bitnest.formats.block import BlockFormat
from bitnest.kernels import encode
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.quantize.gptq import rtn

SHAPES = ("4096x4096", "768x2048", "14336x4096")
FORMATS = (
    "int4-g128", "mxfp4", "int2-g128", "int3-g128", "int8-g128", "int4-g128-asym", "mxfp8",
    "nvfp4", "fp6_e3m2-g128", "nf4-g64",
)  # fmt: skip
TORCH_BYTES = 2 << 20
HALF = torch.bfloat16


def main() -> None:
    """Measure every format at every shape, without and with the search for clipping."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"cpu": cpu(), "cores": os.cpu_count(), "encode": encode.implementation()}
    print(f"one thread of {machine['cpu']}, {machine['encode']}; MB/s: median (p20 p80)")
    print(
        f"{'shape':12}{'format':16}{'clip':6}{'path':8}{'MB/s':>20}{'torch MB/s':>18}{'ratio':>8}"
    )
    rows = []
    for text in args.shapes:
        out, width = (int(n) for n in text.split("x"))
        weight = sample(out, width)
        for name in args.formats:
            for clip in (False, True):
                rows.append(measure(weight, core_format(parse_format(name)), clip, args.runs))
                print(line(rows[-1]), flush=True)
    print(json.dumps({"machine": machine, "runs": args.runs, "rows": rows}))


def sample(rows: int, columns: int) -> torch.Tensor:
    """Normal weights with a few outliers, bfloat16."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=rng).mul_(0.02)
    weight[:, ::97] *= 4
    return weight.bfloat16()


def measure(weight: torch.Tensor, fmt: BlockFormat, clip: bool, runs: int) -> dict[str, Any]:
    """Speeds of `runs` runs of both paths, one after the other, after one to warm up."""
    few = weight[: max(1, TORCH_BYTES // (2 * weight.shape[1]))]
    native = encode.supported(fmt) and encode.available()
    kernel = (lambda: encode.encode(weight, fmt, HALF, clip, native=True)) if native else None
    speeds: list[float] = []
    peers: list[float] = []
    for run in range(runs + 1):
        ours = speed(kernel, weight) if kernel else 0.0
        torch_speed = speed(lambda: by_torch(few, fmt, clip), few)
        if run:
            speeds.append(ours if kernel else torch_speed)
            peers.append(torch_speed)
    shape = (weight.shape[0], weight.shape[1])
    return {
        "shape": list(shape),
        "format": fmt.name,
        "clip": clip,
        "path": "native" if native else "torch",
        "bytes": 2 * weight.numel(),
        "stored": fmt.nbytes(shape),
        "mb_s": spread(speeds),
        "torch_mb_s": spread(peers),
        "ratio": round(spread(speeds)["median"] / spread(peers)["median"], 1),
    }


def by_torch(weight: torch.Tensor, fmt: BlockFormat, clip: bool) -> dict[str, torch.Tensor]:
    """The stored tensors by the block codec in torch."""
    return rtn(weight.float()[None], BlockCodec(fmt, HALF, clip)).store(0, slice(None))


def speed(work: Callable[[], object], weight: torch.Tensor) -> float:
    """MB of bfloat16 weight a second of this thread's CPU time."""
    started = time.thread_time()
    work()
    return 2 * weight.numel() / 1e6 / (time.thread_time() - started)


def spread(values: list[float]) -> dict[str, float]:
    """Median, p20, p80 and the best."""
    t = torch.tensor(values, dtype=torch.float64)
    p20, median, p80 = (round(float(t.quantile(q)), 1) for q in (0.2, 0.5, 0.8))
    return {"median": median, "p20": p20, "p80": p80, "best": round(float(t.max()), 1)}


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    ours, peer = row["mb_s"], row["torch_mb_s"]
    shape = "x".join(map(str, row["shape"]))
    own = f"{ours['median']:.0f} ({ours['p20']:.0f} {ours['p80']:.0f})"
    other = f"{peer['median']:.0f} ({peer['p20']:.0f} {peer['p80']:.0f})"
    clip = "yes" if row["clip"] else "no"
    what = f"{shape:12}{row['format']:16}{clip:6}{row['path']:8}"
    return f"{what}{own:>20}{other:>18}{row['ratio']:8.1f}"


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

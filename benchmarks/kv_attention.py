"""Decode attention of one token over a quantised cache, against SDPA on a bfloat16 one.

    python -m benchmarks.kv_attention [--threads 2] [--context 4096 16384] [--head 64 128]

One layer of Hq query heads over H KV heads (32 over 8), batch 1. Milliseconds are medians, with p20
and p80; GB/s counts every byte of the cache once, codes, scales and the 16-bit window, and `share`
compares it with what a loop of wide loads reads in the same run. Calls rotate among enough caches
that none stays in the CPU's own. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.predicted_kl import machine
from bitnest.formats.kv import parse_kv
from bitnest.kernels.cpu import team
from bitnest.kernels.cpu.attention import Held, attend
from bitnest.packed.kv_cache import KVLayer
from bitnest.packed.rotary import Rotation

FORMATS = ("int8", "int4", "fp8", "fp8_e5m2")
CACHE = 96 << 20  # bytes that calls go round, three times the last-level cache
HEADS, SHARE = 8, 4


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--head", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--kv", nargs="+", default=list(FORMATS))
    parser.add_argument("--share", type=int, default=SHARE)
    parser.add_argument("--seconds", type=float, default=0.4)
    args = parser.parse_args()
    library = team.library()
    assert library is not None, "no compiler here"
    library.set_threads(args.threads)
    torch.set_num_threads(args.threads)
    peak = reading(args.threads)
    print(
        f"reading {peak:.1f} GB/s, {args.threads} threads, "
        f"{HEADS * args.share} query heads over {HEADS}"
    )
    print(f"{'head':>4}{'tokens':>8}  {'cache':<10}{'MB':>8}{'ms':>9}{'p20':>9}{'p80':>9}"
          f"{'GB/s':>8}{'share':>8}{'of bf16':>9}")  # fmt: skip
    rows = []
    for head in args.head:
        for tokens in args.context:
            rows += case(args, head, tokens, peak)
    print(f"\n{machine()}")
    print(json.dumps({"rows": rows, "reading": peak, "machine": machine()}))


def case(args: argparse.Namespace, head: int, tokens: int, peak: float) -> list[dict[str, Any]]:
    """SDPA, then every format."""
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, HEADS, tokens, head, generator=g).bfloat16().unbind(0)
    q = torch.randn(1, HEADS * args.share, 1, head, generator=g).bfloat16()
    size = 2 * keys.nbytes
    caches = [(keys.clone(), values.clone()) for _ in range(max(1, CACHE // size))]
    rows_of = q.view(1, HEADS, args.share, head)  # as transformers does for one token
    base = timed([lambda k=k, v=v: F.scaled_dot_product_attention(rows_of, k, v)  # type: ignore[misc]
                  for k, v in caches], args.seconds)  # fmt: skip
    rows = [shown(head, tokens, "sdpa bf16", size, base, peak, base[0])]
    turning = Rotation(10000.0 ** -(torch.arange(head // 2) / (head // 2)))
    for name in args.kv:
        layer = KVLayer(parse_kv(name), rotation=turning)
        layer.update(keys, values)
        size = sum(t.nbytes for t in layer.tensors())
        copies = [copied(layer) for _ in range(max(1, CACHE // size))]
        found = timed([lambda h=h: attend(q, h, head**-0.5) for h in copies], args.seconds)  # type: ignore[misc]
        rows.append(shown(head, tokens, name, size, found, peak, base[0]))
    return rows


def copied(layer: KVLayer) -> Held:
    """What the layer holds, elsewhere in memory."""
    stored = {name: t.clone() for name, t in layer._stored.items()}
    return Held(layer.fmt, stored, layer.keys.clone(), layer.values.clone(), 0, layer.rotation)


def timed(calls: list[Callable[[], Any]], seconds: float) -> tuple[float, float, float]:
    """Median, p20 and p80 in seconds, of calls in turn."""
    times: list[float] = []
    for call in calls[:2]:
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 9:
        call = calls[len(times) % len(calls)]
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    times.sort()
    return times[len(times) // 2], times[len(times) // 5], times[len(times) * 4 // 5]


def reading(threads: int) -> float:
    """GB/s of reading memory, by threads together."""
    library = team.library()
    assert library is not None
    data = torch.ones(128 << 20, dtype=torch.uint8)
    found = timed([lambda: library.stream_read(data.data_ptr(), data.nbytes)], 1.0)
    return data.nbytes / found[1] / 1e9


def shown(
    head: int, tokens: int, name: str, size: int, found: tuple[float, float, float], peak: float,
    base: float,
) -> dict[str, Any]:  # fmt: skip
    """Print a row."""
    ms = [1000 * t for t in found]
    speed = size / found[0] / 1e9
    row = {
        "head": head, "tokens": tokens, "kv": name, "bytes": size, "ms": ms[0], "p20": ms[1],
        "p80": ms[2], "gb_s": speed, "share": speed / peak, "faster": base / found[0],
    }  # fmt: skip
    print(
        f"{head:>4}{tokens:>8}  {name:<10}{size / 1e6:>8.1f}{ms[0]:>9.3f}{ms[1]:>9.3f}"
        f"{ms[2]:>9.3f}{speed:>8.1f}{speed / peak:>8.2f}{base / found[0]:>8.2f}x", flush=True,
    )  # fmt: skip
    return row


if __name__ == "__main__":
    main()

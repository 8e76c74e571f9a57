"""CPU linear layers against the bandwidth of memory and torch's kernels, all in one run.

    python -m benchmarks.kernels_cpu [--json FILE] [--quick] [--bits 4,8] [--formats nf4-g64]
        [--tokens 1,128]

Weights rotate over so many copies that none is in a cache when it is read. Each round times a few
calls of every kernel, after some that are not timed: threads of OpenMP spin for milliseconds after
a call of torch, in the way of others. The table gives medians of all rounds, with 20th and 80th
percentiles in the JSON. Bytes moved: codes and scales as they lie in memory, inputs and outputs
left out. `share`: of the bandwidth that a loop of SIMD loads reaches on the same team of threads.
Rows `in C` call the kernel's C function, as that loop is called; the others also allocate outputs
and check arguments, as torch's kernels do.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bitnest.errors import BitnestError
from bitnest.formats import parse_format
from bitnest.kernels.cpu.arena import allocate
from bitnest.kernels.cpu.layout import lay_out
from bitnest.kernels.cpu.layout_nested import NestedCpuWeight
from bitnest.kernels.cpu.library import NUMBERS, library, threads
from bitnest.kernels.cpu.linear import INPUT_BLOCK, CpuWeight

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
FORMATS = ("fp8-g128", "nf4-g64", "dense", "nest2345678-g128")
TOKENS = (1, 128)
QUICK_SHAPES = [(4096, 4096)]
SECONDS, QUICK_SECONDS = 4.0, 1.0  # for all kernels of a table
SHAPES = [(2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096)]  # (N, K)
COLD = 96 << 20  # bytes that a kernel's copies take at least: three times the L3 here
STREAM = 16 << 20  # bytes that the bandwidth is measured on at a time; of 16 such memories
WARM = 0.008  # seconds
CALLS = 6
Call = Callable[[int], object]


def random_weight(bits: int, rows: int, columns: int) -> CpuWeight:
    """A weight int<bits>-g128 of random codes."""
    fmt = parse_format(f"int{bits}-g128")
    stored = {}
    for name, part in fmt.parts((rows, columns)).items():
        if name == "scales":
            stored[name] = torch.rand(part.shape).add_(0.5).mul_(0.01).bfloat16()
        else:
            stored[name] = torch.randint(-(1 << 31), 1 << 31, part.shape, dtype=torch.int32)
    made = lay_out(stored, fmt, (rows, columns))  # type: ignore[arg-type]
    assert isinstance(made, CpuWeight), "no C compiler here"
    return made


def ours(bits: int, rows: int, columns: int, x: torch.Tensor) -> dict[str, tuple[Call, int]]:
    """Calls of our kernel, from Python and as the C function that it is, and the bytes of each."""
    first = random_weight(bits, rows, columns)
    count = -(-COLD // first.nbytes)
    copies = [first] + [random_weight(bits, rows, columns) for _ in range(count - 1)]
    y = torch.empty(len(x), rows, dtype=x.dtype)
    found = library()
    assert found is not None

    def in_c(i: int) -> object:
        return found.linear(
            copies[i % count].struct, x.data_ptr(), len(x), columns, y.data_ptr(), rows,
            NUMBERS[x.dtype], 2, INPUT_BLOCK,
        )  # fmt: skip

    name, size = f"int{bits}-g128", first.nbytes
    return {name: (lambda i: copies[i % count].product(x), size), f"int{bits} in C": (in_c, size)}


def random_stored(name: str, rows: int, columns: int) -> CpuWeight:
    """A weight of any format of random codes and numbers."""
    fmt = parse_format(name)
    stored = {}
    for part_name, part in fmt.parts((rows, columns)).items():
        if part.dtype == "HALF":
            values = torch.rand(part.shape).add_(0.5).mul_(0.01)
            stored[part_name] = (values.sort().values if values.dim() == 1 else values).bfloat16()
        elif part.dtype == "U8":
            stored[part_name] = torch.randint(120, 126, part.shape, dtype=torch.uint8)
        else:
            stored[part_name] = torch.randint(-(1 << 31), 1 << 31, part.shape, dtype=torch.int32)
    made = lay_out(stored, fmt, (rows, columns))
    assert isinstance(made, CpuWeight), f"no CPU kernel for {name}"
    return made


def of_format(name: str, rows: int, columns: int, x: torch.Tensor) -> dict[str, tuple[Call, int]]:
    """Calls of our kernels for a format; of a nested one at each of its widths, all of whose planes
    are in memory, and the bytes that each reads."""
    first = random_stored(name, rows, columns)
    count = -(-COLD // (first.nbytes // 4 if isinstance(first, NestedCpuWeight) else first.nbytes))
    copies = [first] + [random_stored(name, rows, columns) for _ in range(count - 1)]
    if not isinstance(first, NestedCpuWeight):
        return {name: (lambda i: copies[i % count].product(x), first.nbytes)}
    calls: dict[str, tuple[Call, int]] = {}
    for width in first.fmt.widths:
        size = rows * columns * width // 8 + first.held["scales"].nbytes

        def call(i: int, width: int = width) -> object:
            weight = copies[i % count]
            assert isinstance(weight, NestedCpuWeight)
            return weight.product(x, bits=width)

        calls[f"{first.fmt.kind} {width}"] = call, size
    return calls


def torch_dense(rows: int, columns: int, x: torch.Tensor) -> tuple[Call, int]:
    """torch's bfloat16 linear."""
    size = rows * columns * 2
    copies = [torch.randn(rows, columns).bfloat16() for _ in range(-(-COLD // size))]
    return lambda i: torch.nn.functional.linear(x, copies[i % len(copies)]), size


def torch_int4(rows: int, columns: int, x: torch.Tensor) -> tuple[Call, int]:
    """torch's int4 kernel, groups of 128."""
    size = rows * columns // 2 + rows * columns // 128 * 4
    scales = torch.rand(columns // 128, rows, 2).bfloat16()
    op, copies = torch.ops.aten, []
    for _ in range(-(-COLD // size)):
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        copies.append(op._convert_weight_to_int4pack_for_cpu(codes, 1))
    return lambda i: op._weight_int4pack_mm_for_cpu(x, copies[i % len(copies)], 128, scales), size


def stream() -> tuple[Call, int]:
    """Reads of a part of a large memory."""
    memory = allocate(16 * STREAM).fill_(1)
    found = library()
    assert found is not None
    return lambda i: found.stream_read(memory.data_ptr() + i % 16 * STREAM, STREAM), STREAM


def measure(calls: dict[str, tuple[Call, int]], seconds: float) -> dict[str, dict[str, Any]]:
    """Rounds of a few calls each, for so long: seconds per call and GB/s."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end, i = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or i < 3 * CALLS:
        for name, (call, _) in calls.items():
            warm = time.perf_counter() + WARM
            while time.perf_counter() < warm:
                call(i)
                i += 1
            for _ in range(CALLS):
                start = time.perf_counter()
                call(i)
                taken[name].append(time.perf_counter() - start)
                i += 1
    table = {}
    for name, (_, size) in calls.items():
        times = sorted(taken[name])
        middle = statistics.median(times)
        p20, p80 = (times[int(q * (len(times) - 1))] for q in (0.2, 0.8))
        table[name] = {
            "us": middle * 1e6, "us_p20": p20 * 1e6, "us_p80": p80 * 1e6, "bytes": size,
            "gb_s": size / middle / 1e9, "rounds": len(times),
        }  # fmt: skip
    return table


def compare(
    rows: int, columns: int, tokens: int, widths: Sequence[int], formats: Sequence[str],
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """One shape: every kernel's times, its share of bandwidth and its gain over torch."""
    x = torch.randn(tokens, columns).bfloat16()
    calls = {"stream": stream(), "torch bf16": torch_dense(rows, columns, x)}
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        calls["torch int4"] = torch_int4(rows, columns, x)
    for bits in widths:
        calls |= ours(bits, rows, columns, x)
    for name in formats:
        calls |= of_format(name, rows, columns, x)
    table = measure(calls, seconds)
    for row in table.values():
        row["share"] = row["gb_s"] / table["stream"]["gb_s"]
        row["to_bf16"] = table["torch bf16"]["us"] / row["us"]
        row["to_int4"] = table["torch int4"]["us"] / row["us"] if "torch int4" in table else None
    return table


def measure_all(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], widths: Sequence[int],
    formats: Sequence[str], seconds: float, done: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """threads, isa, torch and rows: N, K, M and the table of each, by kernel. done: called with a
    row as soon as it is there.

    Raises:
        BitnestError: no C kernels here.
    """
    found = library()
    if found is None:
        raise BitnestError("the C kernels were not built", hint="bitnest doctor says why")
    found.set_threads(threads())
    report: dict[str, Any] = {
        "device": "cpu", "threads": threads(), "isa": found.isa().decode(),
        "torch": torch.__version__, "rows": [],
    }  # fmt: skip
    for m in tokens:
        for rows, columns in shapes:
            table = compare(rows, columns, m, widths, formats, seconds)
            report["rows"].append({"N": rows, "K": columns, "M": m, "table": table})
            done(report["rows"][-1])
    return report


def usual(quick: bool, done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """`measure_all` of what `bitnest bench kernels` measures."""
    shapes, seconds = (QUICK_SHAPES, QUICK_SECONDS) if quick else (SHAPES, SECONDS)
    return measure_all(shapes, TOKENS, BITS, FORMATS, seconds, done)


def show(row: dict[str, Any]) -> None:
    """The table of one shape on stdout."""
    print(f"\n{row['N']} x {row['K']}, M = {row['M']}")
    print(f"{'':12} {'us':>9} {'GB/s':>6} {'share':>6} {'/bf16':>6} {'/int4':>6}")
    for name, own in row["table"].items():
        int4 = "" if own["to_int4"] is None else f"{own['to_int4']:6.2f}"
        print(
            f"{name:12} {own['us']:9.1f} {own['gb_s']:6.1f} {own['share']:6.2f} "
            f"{own['to_bf16']:6.2f} {int4}", flush=True,
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one shape, less time")
    parser.add_argument("--bits", default=",".join(map(str, BITS)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--shape", help="NxK, one shape only")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    shapes = QUICK_SHAPES if args.quick else SHAPES
    if args.shape:
        shapes = [tuple(map(int, args.shape.split("x")))]  # type: ignore[list-item]
    done = measure_all(
        shapes, [int(word) for word in args.tokens.split(",")],
        [int(word) for word in args.bits.split(",") if word],
        [word for word in args.formats.split(",") if word],
        QUICK_SECONDS if args.quick else SECONDS, show,
    )  # fmt: skip
    print(f"{done['isa']}, {done['threads']} threads", file=sys.stderr)
    line = json.dumps(done)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()

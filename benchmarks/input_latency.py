"""Seconds per multiply-accumulate of this machine's products with rounded inputs, for `--latency`.

    python -m benchmarks.input_latency -o FILE.json [--weights int8-channel,int6-g128] \
        [--inputs dense,int8-token,int6-g128] [--shapes 1024x1024,4096x1024] [--tokens 64] \
        [--device cpu] [--containers]

What torch has is measured, as it would run: `dense` inputs as a linear layer in bfloat16 and in
float32, the faster of which counts (decoding weights not in it, which a kernel would hide);
integers of one scale per token, or per group of the weights' own width, as `torch._int_mm` on int8
codes, one product per group, with the inputs' rounding and the scaling of what comes out, in the
layout of the weights that is faster. Integers
narrower than 8 bits have no kernel in torch: with --containers they are measured in the int8 one,
which is what they can run in, else they are left out. FP8 and MX inputs are left out on a CPU.
What is left out is named; `bitnest plan --input-time` refuses pairs that the table lacks.

A pair's number is the mean over shapes of the median time over (tokens, out, in). The last line of
stdout is one JSON object; FILE holds the table alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, quantiles

import torch
from torch.nn import functional as F

from benchmarks.format_table import machine
from bitnest.formats import BlockFormat, CodedFormat, parse_format
from bitnest.formats.elements import IntElement
from bitnest.formats.inputs import DENSE, InputFormat, parse_inputs
from bitnest.kernels.inputs import code_inputs

REPEATS, WARM = 30, 5
LEAST_ROWS = 17  # that torch._int_mm takes on CUDA


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--weights", default="int8-channel,int8-g128")
    parser.add_argument("--inputs", default="dense,int8-token,int8-g128,int6-g128,int4-g128")
    parser.add_argument("--shapes", default="1024x1024,4096x1024,1024x4096", help="OUTxIN")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--containers", action="store_true")
    args = parser.parse_args()
    shapes = [tuple(int(n) for n in text.split("x")) for text in args.shapes.split(",")]
    table: dict[str, float] = {}
    rows, missing = [], {}
    print(f"{'pair':<28} {'shape':>12}  median us   p20..p80 us   GMAC/s  runs as")
    for weights in args.weights.split(","):
        for inputs in args.inputs.split(","):
            pair = f"{parse_format(weights).name}/{inputs}"
            reason = unable(weights, inputs, args)
            if reason:
                missing[pair] = reason
                continue
            own = [measure(pair, shape, inputs, args) for shape in shapes]
            for row in own:
                print(f"{pair:<28} {row['out']:>5} x {row['in']:<5} {1e6 * row['median']:>9.1f}  "
                      f"{1e6 * row['p20']:>6.1f}..{1e6 * row['p80']:<7.1f} "
                      f"{row['macs'] / row['median'] / 1e9:>7.1f}  {row['kernel']}")  # fmt: skip
            rows += own
            table[pair] = mean(row["median"] / row["macs"] for row in own)
    for pair, reason in missing.items():
        print(f"{pair:<28} not measured: {reason}")
    print(machine())
    if args.out is not None:
        args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"table": table, "missing": missing, "rows": rows, "machine": machine()}))


def unable(weights: str, inputs: str, args: argparse.Namespace) -> str:
    """Why a pair cannot run here as it is, empty if it can."""
    fmt = parse_format(weights)
    if inputs == DENSE:
        return "" if isinstance(fmt, CodedFormat) else "the weights are not packed"
    wanted = parse_inputs(inputs)
    if not isinstance(fmt, BlockFormat) or not isinstance(fmt.element, IntElement):
        return "torch has no product of such weights with rounded inputs"
    if not isinstance(wanted.element, IntElement) or wanted.scale != "float":
        return "torch has no product of such inputs on this device"
    if wanted.wide is not None or wanted.keep is not None:
        return "torch has no product of channels in two formats"
    columns = 4096
    if fmt.group_size(columns) != (wanted.group or columns):
        return "weights and inputs have groups of different widths"
    if wanted.element.bits < 8 and not args.containers:
        return (
            f"there is no kernel of {wanted.element.bits}-bit inputs on {args.device}; "
            "--containers measures the int8 kernel that they can run in"
        )
    return ""


def measure(
    pair: str, shape: tuple[int, ...], inputs: str, args: argparse.Namespace
) -> dict[str, float | str]:
    """Times of one product."""
    rows, columns = shape
    x = torch.randn(max(args.tokens, LEAST_ROWS), columns, device=args.device)
    w = torch.randn(rows, columns, device=args.device)
    found: dict[str, list[float]] = {}
    if inputs == DENSE:
        for dtype in (torch.bfloat16, torch.float32):
            a, b = x.to(dtype), w.to(dtype)
            found[str(dtype).removeprefix("torch.")] = times(lambda a=a, b=b: F.linear(a, b), x)
    else:
        fmt = parse_inputs(inputs)
        group = fmt.group or columns
        codes = (w * 30).round().clamp(-127, 127).to(torch.int8)
        scales = torch.rand(rows, -(-columns // group), device=args.device)
        parts = codes.T.split(group)
        for layout, own_parts in (("rows", [p.contiguous() for p in parts]), ("columns", parts)):
            found[f"int8, {len(parts)} products, weights by {layout}"] = times(
                lambda own_parts=own_parts: product(x, fmt, own_parts, scales), x
            )
    kernel, own = min(found.items(), key=lambda item: sorted(item[1])[len(item[1]) // 2])
    fifths = quantiles(own, n=5)
    return {
        "pair": pair, "out": rows, "in": columns, "tokens": len(x), "kernel": kernel,
        "median": sorted(own)[len(own) // 2], "p20": fifths[0], "p80": fifths[3],
        "macs": len(x) * rows * columns,
    }  # fmt: skip


def product(
    x: torch.Tensor, fmt: InputFormat, weight: Sequence[torch.Tensor], scales: torch.Tensor
) -> torch.Tensor:
    """x W^T with x (T, I) rounded and W in int8 codes, a (group, O) part for each of its scales
    (O, G)."""
    coded = code_inputs(x, fmt)[0]
    values = coded.values.to(torch.int8)
    y = x.new_zeros(len(x), len(scales))
    for g, (a, b) in enumerate(zip(values.split(len(weight[0]), dim=1), weight, strict=True)):
        y += torch._int_mm(a.contiguous(), b).float() * coded.scales[:, g, None] * scales[:, g]
    return y


def times(call: Callable[[], torch.Tensor], like: torch.Tensor) -> list[float]:
    """Seconds of one call, several times."""
    found = []
    for number in range(WARM + REPEATS):
        started = time.perf_counter()
        call()
        if like.is_cuda:
            torch.cuda.synchronize()
        if number >= WARM:
            found.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    main()

"""Speed of bitnest's kernels on this GPU, in under nine minutes (`make bench-gpu`).

    python -m benchmarks.kernels_gpu [--seconds 500] [--only linear attention ...] [--out FILE]
    python -m benchmarks.kernels_gpu --tune [--seconds 500]      tile candidates, for tiles/*.json
    python -m benchmarks.kernels_gpu --interpret                 the same path, tiny, without a GPU

Each case is checked against its reference first; one that is wrong is not timed. Then calls are
timed with cold L2 (`gpu_timing`): `share` is the bytes that have to move over time over the rate of
a copy on this device, `speedup` the peer's time over ours (cuBLAS in bfloat16; `beside` names it).
Cases come in an order in which those that matter most are first; what the time does not allow is
listed under `left_out`. Kernels are compiled beforehand by several processes (`--warm`), so that
this is not timed. The table goes to stderr as it grows; stdout is one line of JSON, and the same is
written to FILE, `$OUT/kernels_gpu.json` where OUT is set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnest.kernels.bench.gpu_cases import Case
    from bitnest.kernels.bench.gpu_timing import Bench

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
TOKENS = (1, 16, 256, 4, 64, 2, 8, 32, 128)
FORMATS = (
    "int4-g128", "int8-g128", "nest2345678-g128", "int3-g128", "int2-g128", "int6-g128", "mxfp4",
    "fp8_e4m3-channel", "int4-g128-asym", "mxfp8", "nvfp4", "nf4-g64",
)  # fmt: skip
ROUNDED = (
    "int8-channel/int8-token", "int4-g128/int8-token", "dgq4/int8-token", "int6-g128/int6-g128",
)  # fmt: skip
CONTEXTS = ((1, 8192), (1, 131072), (16, 8192), (64, 2048))
OPERATIONS = (
    "linear",
    "experts",
    "rounded",
    "attention",
    "rounding",
    "sparse",
    "lowrank",
    "gemlite",
)
TINY = ((96, 256), (130, 384))
WARMERS = 12

Jobs = list[tuple[str, str, Callable[[], "Iterator[Case]"]]]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if a case was wrong, 2 without a GPU."""
    args = _parse(arguments)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import torch

    from bitnest.kernels.bench.gpu_timing import Bench

    if not args.interpret and not torch.cuda.is_available():
        print("no GPU here: --interpret proves the path on tiny sizes", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cpu" if args.interpret else "cuda")
    bench = Bench(device, time.monotonic() + args.seconds, args.interpret, bool(args.warm))
    if args.warm:
        return _warm(bench, args)
    if args.tune:
        from bitnest.kernels.bench.gpu_tune import tune

        report: dict[str, Any] = {"machine": _machine(bench), "rows": tune(bench, _sizes(args))}
    else:
        if not args.interpret:
            _warm_all(args)
        report = measure(bench, args)
    _save(report, args.out)
    print(json.dumps(report))
    wrong = any(row.get("wrong") for row in report["rows"])
    return 1 if wrong or report.get("failed") else 0


def usual(quick: bool) -> dict[str, Any]:
    """What `bitnest bench kernels` measures; progress goes to stderr. quick: products and
    attention, as many as two minutes allow."""
    words = ["--seconds", "110", "--only", "linear", "attention"] if quick else []
    import torch

    from bitnest.kernels.bench.gpu_timing import Bench

    args = _parse(words)
    torch.manual_seed(0)
    bench = Bench(torch.device("cuda"), time.monotonic() + args.seconds)
    _warm_all(args)
    return {"device": "cuda", **measure(bench, args)}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=500, help="ends within that time")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--warm", metavar="I/N", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _save(report: dict[str, Any], given: Path | None) -> None:
    """Write the report as it stands, so that a run that is stopped leaves what it has."""
    if given is None and os.environ.get("OUT"):
        given = Path(os.environ["OUT"]) / "kernels_gpu.json"
    if given is not None:
        part = given.with_name(f".{given.name}.part")
        part.write_text(json.dumps(report) + "\n", encoding="utf-8")
        part.replace(given)


def _sizes(args: argparse.Namespace) -> tuple[Any, Any]:
    if args.interpret:
        return TINY[:1], (1, 17)
    return SHAPES[:1] if args.warm else SHAPES, TOKENS


def _machine(bench: Bench) -> dict[str, Any]:
    import torch
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if bench.interpreted:
        return {"device": "interpreter", **found}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count, **found,
    }  # fmt: skip


def jobs(bench: Bench, args: argparse.Namespace) -> Jobs:
    """(operation, label, cases) in the order in which they matter."""
    from bitnest.kernels.bench import gpu_cases as c

    dense, (shapes, tokens) = c.Dense(bench), _sizes(args)
    tiny = args.interpret
    found: Jobs = []
    for shape in shapes:
        for name in FORMATS[: 3 if tiny else None]:
            make: Any = partial(c.linear_cases, bench, dense, name, shape, tokens)
            found.append(("linear", f"{name} {shape}", make))
    for name in ROUNDED[: 1 if tiny else None]:
        for shape in shapes:
            make = partial(c.rounded_cases, bench, dense, name, shape, tokens)
            found.append(("rounded", f"{name} {shape}", make))
    found += _expert_jobs(bench, tiny, tokens)
    heads = (2, 2, 64) if tiny else (8, 4, 128)
    contexts = ((2, 150),) if tiny else CONTEXTS
    for name in ("int4-g32-w16", "fp8") if tiny else ("int4", "int8", "fp8"):
        make = partial(c.attention_cases, bench, name, heads, contexts)
        found.append(("attention", name, make))
    columns, some = (256, (3,)) if tiny else (4096, (1, 64, 4096))
    for name, block in (
        ("int8-token", 128),
        ("int4-g128", 0),
        ("int8-token", 0),
        ("fp8-token", 64),
    ):
        make = partial(c.rounding_cases, bench, name, columns, some, block)
        found.append(("rounding", f"{name} {block}", make))
    few = tokens[:2]
    for name in ("int4-g128%2:4", "int4-g128%50", "dense%2:4", "dense%50")[: 1 if tiny else None]:
        for shape in shapes[:2]:
            make = partial(c.sparse_cases, bench, dense, name, shape, few)
            found.append(("sparse", f"{name} {shape}", make))
    for shape in shapes[:2]:
        make = partial(c.low_rank_cases, bench, dense, 32, shape, few)
        found.append(("lowrank", f"r32 {shape}", make))
        for bits in () if tiny else (4, 8, 2):
            make = partial(c.gemlite_cases, bench, bits, shape, tokens[:3])
            found.append(("gemlite", f"int{bits} {shape}", make))
    return [job for job in _woven(found) if job[0] in args.only]


def _expert_jobs(bench: Bench, tiny: bool, tokens: Any) -> Jobs:
    from bitnest.kernels.bench import gpu_experts as e

    found: Jobs = []
    for names in (("int4-g128",), ("int4-g128", "int2-g128", "int8-g128"), ("int8-g128",)):
        for layer in e.TINY if tiny else e.LAYERS:
            make = partial(e.expert_cases, bench, layer, names, tokens)
            found.append(("experts", f"{layer.name} {'+'.join(names)}", make))
    return found[1:2] if tiny else found


def _woven(found: Jobs) -> Jobs:
    """Three of `linear`, then one of every other operation, and so on, so that all are there."""
    queues = {name: [job for job in found if job[0] == name] for name in OPERATIONS}
    order: Jobs = []
    while any(queues.values()):
        for name, queue in queues.items():
            for _ in range(3 if name == "linear" else 1):
                if queue:
                    order.append(queue.pop(0))
    return order


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All cases that the time allows."""
    copy, peak = bench.copy_rate(), bench.product_rate()
    report: dict[str, Any] = {
        "machine": _machine(bench), "copy_bytes_per_s": copy, "bf16_flops_per_s": peak,
        "rows": [], "left_out": [], "missing": {}, "failed": {},
    }  # fmt: skip
    print(f"copy {copy / 1e9:.0f} GB/s, bf16 {peak / 1e12:.1f} TFLOP/s", file=sys.stderr)
    for operation, label, make in jobs(bench, args):
        if bench.left < 0:
            report["left_out"].append(f"{operation} {label}")
            continue
        try:
            for case in make():
                if bench.left < 0:
                    report["left_out"].append(f"{operation} {label} {case.labels.get('m', '')}")
                    break
                report["rows"].append(row(bench, case, copy, peak))
                print(line(report["rows"][-1]), file=sys.stderr, flush=True)
        except ImportError as error:
            report["missing"][f"{operation} {label}"] = str(error)
        except Exception as error:  # noqa: BLE001 - the other cases are worth having
            report["failed"][f"{operation} {label}"] = f"{type(error).__name__}: {error}"
            print(f"{operation} {label}: {error}", file=sys.stderr)
        _save(report, args.out)
    report["seconds_left"] = round(bench.left, 1)
    return report


def row(bench: Bench, case: Case, copy: float, peak: float) -> dict[str, Any]:
    """Check, then time."""
    error = case.error()
    found: dict[str, Any] = {**case.labels, "bytes": case.nbytes, "error": error}
    if not error < case.limit:
        return {**found, "wrong": True}
    ours = bench.times(case.calls)
    found |= {"us": ours.median, "us_p20": ours.p20, "us_p80": ours.p80}
    found["share"] = case.nbytes / ours.median * 1e6 / copy
    found["compute"] = case.work / ours.median * 1e6 / peak
    if case.peer:
        peer = bench.times(case.peer)
        found |= {"beside": case.beside, "peer_us": peer.median, "peer_us_p20": peer.p20}
        found |= {"peer_us_p80": peer.p80, "speedup": peer.median / ours.median}
    return found


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    sizes = " ".join(str(found[k]) for k in ("shape", "heads", "columns") if k in found)
    count = found.get("m", f"{found.get('batch')}x{found.get('n')}")
    bits = f"@{found['bits']}" if found.get("bits") else ""
    head = f"{found['op']:10}{found['format'] + bits:32}{sizes:16}{count!s:>9}"
    if found.get("wrong"):
        return f"{head}  WRONG, relative error {found['error']:.2g}"
    spread = f"{found['us']:9.1f} us ({found['us_p20']:.1f} {found['us_p80']:.1f})"
    beside = f"{found['speedup']:6.2f}x {found['beside']}" if "speedup" in found else ""
    return f"{head}{spread}{found['share']:7.1%} of copy{found['compute']:7.1%} of peak{beside}"


def _warm_all(args: argparse.Namespace) -> None:
    """Compile in several processes what will be run; a third of the time at most."""
    count = max(1, min(WARMERS, (os.cpu_count() or 2) - 2))
    own = ["--seconds", str(args.seconds / 3), "--only", *args.only]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "bitnest.kernels.bench.gpu", "--warm", f"{i}/{count}", *own],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for i in range(count)
    ]  # fmt: skip
    for process in running:
        process.wait()


def _warm(bench: Bench, args: argparse.Namespace) -> int:
    """Every n-th case's first call, at the first shape."""
    share, count = (int(part) for part in args.warm.split("/"))
    number = 0
    for operation, _, make in jobs(bench, args):
        if operation == "gemlite":
            continue
        try:
            for case in make():
                number += 1
                if bench.left < 0:
                    return 0
                if number % count == share:
                    case.calls[0]()
        except ImportError:
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tokens a second of whole models at batch 1: bitnest's C runtime beside llama.cpp, in one run.

    python -m benchmarks.decode_speed --work DIR [--llama DIR] [--size 1.3B] [--size 3B] \\
        [--bits 4] [--bits 8] [--rounds 5] [--threads N] [--planes 2]

Makes, once, in DIR: random Qwen3-MoE checkpoints (`make_random_moe`), and with --llama the GGUF
files that llama-quantize makes of them (Q4_0, Q8_0). Weights are random, so they are rounded to
nearest without calibration: time depends on shapes and formats alone.

    bits   bitnest                         llama.cpp
    4      int4-g128, embedding int6-g128  Q4_0 (4.5 bits, embedding and head Q6_K)
    8      int8-g128                       Q8_0 (8.5 bits)

A round is llama-bench (-p 128 -n 64, its warm-up first) and then the same here: 128 tokens in an
empty cache, 64 single steps from an empty cache, a warm-up first. Rounds of both go in turn; median
and p20/p80 of all their repetitions. Bytes are of all tensors: ours as laid out in memory, padding
included, routers and norms in float32; theirs as in the file. Inputs of matrices are coded in
--planes bytes here, in one (Q8_0) by llama.cpp. Last, a token's time by stage.

stdout ends with one JSON line. Left out: quality (`llama_cpp`), batches, long contexts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import llama_cpp
from benchmarks.make_random_moe import Shape, write
from bitnest.checkpoint import Checkpoint
from bitnest.formats import parse_format
from bitnest.kernels.cpu.runtime import STAGES, runtime
from bitnest.packed.native_model import NativeModel

PROMPT, DECODE = 128, 64
REPEATS = 3  # a round


@dataclass(frozen=True)
class Formats:
    """Of one width: of all matrices, of the embedding (empty: dense), llama.cpp's type."""

    all: str
    embedding: str
    llama: str


SIZES = {
    "1.3B": (Shape(hidden=1024, head_dim=64, vocabulary=8192), 16),
    "3B": (Shape(vocabulary=8192), 18),
}
WIDTHS = {
    4: Formats("int4-g128", "int6-g128", "Q4_0"),
    8: Formats("int8-g128", "int8-g128", "Q8_0"),
}


def checkpoint(work: Path, size: str) -> Path:
    """The random checkpoint, made if it is not there."""
    path = work / size
    if not (path / "model.safetensors.index.json").exists():
        llama_cpp.log(f"{size}: making the checkpoint")
        shape, layers = SIZES[size]
        write(path, shape, layers)
    return path


def gguf(args: argparse.Namespace, size: str, kind: str) -> Path:
    """llama.cpp's file of one type, made if it is not there."""
    file: Path = args.work / f"{size}-{kind}.gguf"
    if file.exists():
        return file
    f16, part = args.work / f"{size}-F16.gguf", file.with_suffix(".part")
    if not f16.exists():
        llama_cpp.log(f"{size}: making the F16 file")
        source = Checkpoint.open(checkpoint(args.work, size))
        llama_cpp.write_f16(source, llama_cpp.layout(source), part)
        part.rename(f16)
    llama_cpp.run(args.llama / "llama-quantize", f16, part, kind, str(os.cpu_count()))
    part.rename(file)
    return file


def rounded(path: Path, formats: Formats) -> Any:
    """The checkpoint as a transformers model, its matrices rounded to nearest and packed."""
    from bitnest.kernels.encode import encode
    from bitnest.packed.loading import load_model
    from bitnest.packed.quantizer import _replace_modules
    from bitnest.sites import find_sites
    from bitnest.skeleton import Skeleton

    sites = [s for s in find_sites(Skeleton.build(Checkpoint.open(path))) if s.kind != "router"]
    sites = [s for s in sites if formats.embedding or s.kind not in {"embedding", "head"}]
    model: Any = load_model(path)
    names = {s.name: formats.embedding if s.kind == "embedding" else formats.all for s in sites}
    chosen = {name: parse_format(fmt) for name, fmt in names.items()}
    stored: dict[str, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for site in sites:
            matrix = site.view(model.get_parameter(site.path)).contiguous()
            fmt: Any = chosen[site.name]
            if matrix.dtype == torch.float16:
                matrix = matrix.float()
            stored[site.name] = encode(matrix, fmt, torch.float16, clip=False).tensors
    records: Any = SimpleNamespace(packed=lambda: [SimpleNamespace(site=s) for s in sites])
    for record, weight in _replace_modules(model, records, chosen):
        weight.load(stored.pop(record.site.name), torch.device("cpu"))
    return model.eval()


def ours(model: NativeModel, tokens: list[int]) -> tuple[float, float]:
    """Tokens a second: prompt, decode."""
    cache = model.cache(PROMPT)
    began = time.perf_counter()
    model.forward(tokens[:PROMPT], cache)
    prompt = time.perf_counter() - began
    cache.crop(0)
    began = time.perf_counter()
    for token in tokens[:DECODE]:
        model.forward([token], cache)
    return PROMPT / prompt, DECODE / (time.perf_counter() - began)


def theirs(args: argparse.Namespace, file: Path) -> tuple[list[float], list[float]]:
    """llama-bench's repetitions."""
    printed = llama_cpp.run(
        args.llama / "llama-bench", "-m", file, "-t", str(args.threads), "-p", str(PROMPT),
        "-n", str(DECODE), "-r", str(REPEATS), "-o", "json", "-oe", "none",
    )  # fmt: skip
    rows = json.loads(printed[printed.index("[") :])
    prompt, decode = (next(r for r in rows if r[key]) for key in ("n_prompt", "n_gen"))
    return prompt["samples_ts"], decode["samples_ts"]


def spread(samples: list[float]) -> dict[str, float]:
    """Median, p20, p80."""
    low, middle, high = np.percentile(samples, (20, 50, 80))
    return {"median": round(middle, 1), "p20": round(low, 1), "p80": round(high, 1)}


def profile(model: NativeModel, tokens: list[int]) -> dict[str, float]:
    """Microseconds of a token by stage."""
    cache = model.cache(PROMPT)
    model.forward(tokens[:1], cache)
    model.seconds[:] = 0
    model.timed = True
    for token in tokens[:DECODE]:
        model.forward([token], cache)
    model.timed = False
    spent = dict(zip(STAGES, model.seconds, strict=True))
    return {name: round(1e6 * float(t) / DECODE, 1) for name, t in spent.items()}


def compare(args: argparse.Namespace, size: str, bits: int) -> dict[str, Any]:
    """One model at one width, both engines."""
    formats = WIDTHS[bits]
    path = checkpoint(args.work, size)
    file = gguf(args, size, formats.llama) if args.llama else None
    llama_cpp.log(f"{size}: rounding to {formats.all}")
    model = NativeModel.of(rounded(path, formats), planes=args.planes)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary, PROMPT).tolist()
    measured: dict[str, list[float]] = {k: [] for k in ("prompt", "decode", "l prompt", "l decode")}
    for number in range(args.rounds):
        if file is not None:
            for key, samples in zip(("l prompt", "l decode"), theirs(args, file), strict=True):
                measured[key] += samples
        ours(model, tokens)
        for _ in range(REPEATS):
            for key, rate in zip(("prompt", "decode"), ours(model, tokens), strict=True):
                measured[key].append(rate)
        llama_cpp.log(f"{size} {bits} bits: round {number + 1} of {args.rounds}")
    row: dict[str, Any] = {
        "size": size,
        "bits": bits,
        "formats": formats.all,
        "bytes": model.nbytes,
    }
    row |= {name: spread(measured[name]) for name in ("prompt", "decode")}
    if file is not None:
        row |= {"llama": formats.llama, "llama_bytes": llama_cpp.measure(file).tensor_bytes}
        for name in ("prompt", "decode"):
            row[f"llama_{name}"] = spread(measured[f"l {name}"])
            ratio = statistics.median(measured[name]) / statistics.median(measured[f"l {name}"])
            row[f"{name}_ratio"] = round(ratio, 3)
    return row | {"token_us": profile(model, tokens)}


def table(rows: list[dict[str, Any]]) -> str:
    """One line per model, width and engine, and the stages of a token."""
    lines = [
        f"{'model':<7}{'engine':<22}{'MB':>8}{'prompt/s':>10}{'p20-p80':>16}{'decode/s':>10}{'p20-p80':>16}"
    ]
    for row in rows:
        for engine, prefix in ((row["formats"], ""), (row.get("llama"), "llama_")):
            if engine is None:
                continue
            line = f"{row['size']:<7}{engine:<22}{row[prefix + 'bytes'] / 1e6:>8.0f}"
            for name in ("prompt", "decode"):
                s = row[prefix + name]
                between = f"{s['p20']:.0f}-{s['p80']:.0f}"
                line += f"{s['median']:>10.1f}{between:>16}"
            lines.append(line)
        stages = ", ".join(f"{name} {us:.0f}" for name, us in row["token_us"].items())
        lines.append(f"       a token: {stages} us")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="keeps models there, gigabytes")
    parser.add_argument("--llama", type=Path, help="directory of llama.cpp's programs")
    parser.add_argument("--size", action="append", choices=tuple(SIZES))
    parser.add_argument("--bits", action="append", type=int, choices=tuple(WIDTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--planes", type=int, default=2, choices=(1, 2, 3))
    return parser.parse_args()


def main() -> None:
    """Make, measure, print."""
    args = parse()
    if (library := runtime()) is None:
        raise SystemExit("the CPU kernels could not be built; see the log")
    library.set_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [
        compare(args, size, bits)
        for size in args.size or ["1.3B"]
        for bits in args.bits or list(WIDTHS)
    ]
    print(table(rows))
    result = {
        "machine": f"{platform.machine()}, {args.threads} threads",
        "protocol": f"prompt {PROMPT}, decode {DECODE}, {args.rounds} rounds x {REPEATS}",
        "planes": args.planes,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

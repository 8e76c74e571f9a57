"""What collecting statistics costs over a plain forward pass.

    python -m benchmarks.collection_overhead [MODEL] [--data FILE] [--runs 7]

Every block of MODEL is run over the same windows plainly (experts by the same reference
arithmetic), with all statistics but Hessians, and with Hessians. The three take turns, and the
ratio of each run to the plain run beside it is taken. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.format_table import machine

LABELS = 2


def main() -> None:
    """Measure and print."""
    import torch

    from bitnest import demo
    from bitnest.calibrate.data import calibration_windows, parse_source
    from bitnest.calibrate.stream import Stream
    from bitnest.checkpoint import Checkpoint
    from bitnest.packed.loading import load_tokenizer
    from bitnest.skeleton import Skeleton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", default=str(demo.calibration_text()))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    skeleton = Skeleton.build(checkpoint)
    tokens = calibration_windows(
        load_tokenizer(checkpoint.path), [parse_source(args.data)],
        samples=args.samples, length=args.length, seed=0,
    ).tokens  # fmt: skip
    cpu = torch.device("cpu")
    half = len(tokens) // 2
    labels = ["a"] * half + ["b"] * (len(tokens) - half)
    stream = Stream(skeleton, tokens, dtype=torch.float32, device=cpu, labels=labels)
    totals: dict[str, list[float]] = {name: [0.0] * args.runs for name in WAYS}
    for layer in range(len(skeleton.blocks)):
        skeleton.fill(f"{skeleton.prefix}.{layer}", dtype=torch.float32, device=cpu)
        for run in range(args.runs):
            for name, way in WAYS.items():
                started = time.perf_counter()
                with torch.no_grad():
                    way(stream, layer)
                totals[name][run] += time.perf_counter() - started
        plain(stream, layer, keep=True)
        skeleton.drop(f"{skeleton.prefix}.{layer}")
    report(totals, args.model, tokens.numel())


def plain(stream: Any, layer: int, *, keep: bool = False) -> None:
    """A forward pass and nothing else."""
    from bitnest.calibrate.collector import reference_experts
    from bitnest.sites import is_experts

    with reference_experts(m for m in stream.skeleton.blocks[layer].modules() if is_experts(m)):
        stream.run(layer, keep=keep)


def observed(stream: Any, layer: int, *, full: bool) -> None:
    """A forward pass that is watched."""
    from bitnest.calibrate.observe import Observer

    block = stream.skeleton.blocks[layer]
    observer = Observer(block, f"{stream.skeleton.prefix}.{layer}", labels=LABELS, full=full)
    half = stream.hidden.shape[0] // 2
    with observer:
        for part in stream.batches():
            observer.before_batch(int(part.start >= half), part.start * stream.hidden.shape[1])
            stream.forward_checked(layer, part)
            observer.after_batch()


WAYS: dict[str, Callable[[Any, int], None]] = {
    "plain": plain,
    "statistics": lambda stream, layer: observed(stream, layer, full=False),
    "statistics and Hessians": lambda stream, layer: observed(stream, layer, full=True),
}


def report(totals: dict[str, list[float]], model: str, tokens: int) -> None:
    """Medians, and ratios to the plain pass of the same turn."""
    result = {}
    for name, seconds in totals.items():
        ratios = sorted(a / b for a, b in zip(seconds, totals["plain"], strict=True))
        result[name] = {"seconds": median(seconds), "ratio": median(ratios), "ratios": ratios}
        print(f"{name:24} {median(seconds):7.2f} s   {median(ratios):.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip
    print(f"{model}, {tokens:,} tokens, all blocks; {machine()}")
    print(json.dumps({"model": model, "tokens": tokens, "ways": result, "machine": machine()}))


if __name__ == "__main__":
    main()

"""What folding does to inputs, and what that is worth where activations are rounded.

    python -m benchmarks.folding MODEL --data TEXT ... --check TEXT ...

Prints, for each way of folding: the time of the pass; the crest factor max|x| / rms(x) of what
matrices read, geometric mean over sites, by place; and perplexity and KL to the unfolded 16-bit
model where every linear and expert matrix is rounded to integers per output channel and its input
per token, both symmetric and to nearest.

Simulated in float32. Left out: KV cache, static scales.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bitnest.api.texts import calibration_set, sources
from bitnest.calibrate.collector import dense_weights
from bitnest.calibrate.data import CalibrationSet
from bitnest.checkpoint import Checkpoint
from bitnest.kernels.experts import experts_forward
from bitnest.packed.loading import load_tokenizer
from bitnest.quantize.folding import fold_checkpoint, site_inputs
from bitnest.sites import find_sites, is_experts, is_linear
from bitnest.skeleton import Skeleton

WAYS = ("none", "smooth=0.5", "smooth-free=0.5", "smooth=0.8", "smooth=dgq", "smooth-all=0.5",
        "smooth-all-free=0.5", "rotate=heads", "rotate", "rotate smooth-all=0.5")  # fmt: skip
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--check", action="append", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--widths", default="8/8,4/8,6/6,4/4", help="weights/inputs, in bits")
    parser.add_argument("--ways", default=";".join(WAYS))
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    base = Checkpoint.open(args.model)
    text, held = (
        calibration_set(tokenizer, sources(t), args.samples, args.length, 0)
        for t in (args.data, args.check)
    )
    widths = [tuple(map(int, pair.split("/"))) for pair in args.widths.split(",")]
    want = logits(base, held.tokens)
    rows = []
    for way in args.ways.split(";"):
        row = measured(base, way, text, held, want, widths)
        rows.append(row)
        print(
            f"{way:24} {row['seconds']:5.1f} s  crest "
            + "  ".join(f"{k} {v:.1f}" for k, v in row["crest"].items())
        )
        for name, score in row["scores"].items():
            print(f"{'':24} {name:9} ppl {score['ppl']:.3f}  KL {score['kl']:.5f}", flush=True)
    print(json.dumps({"device": "cpu", "model": args.model.name, "rows": rows}))


def measured(
    base: Checkpoint,
    way: str,
    text: CalibrationSet,
    held: CalibrationSet,
    want: torch.Tensor,
    widths: Sequence[tuple[int, ...]],
) -> dict[str, Any]:
    """One way of folding."""
    started = time.perf_counter()
    view: Checkpoint = base
    if way != "none":
        folded = fold_checkpoint(base, way.split(), text)
        skeleton = Skeleton.build(folded)
        packed = {n for s in find_sites(skeleton) if s.kind not in {"router", "embedding", "head"}
                  for n in skeleton.sources[s.path].names}  # fmt: skip
        view = folded.keeping(packed)
    seconds = time.perf_counter() - started
    scores = {"not rounded": score(logits(view, held.tokens), want, held.tokens)}
    for w, a in widths:
        scores[f"W{w}A{a}"] = score(logits(view, held.tokens, (w, a)), want, held.tokens)
    return {"way": way, "seconds": seconds, "crest": crests(view, text), "scores": scores}


def crests(view: Checkpoint, text: CalibrationSet) -> dict[str, float]:
    """Geometric mean of max|x| / rms(x) over sites that saw text, by place."""
    skeleton = Skeleton.build(view)
    sites = find_sites(skeleton)
    logs: dict[str, list[float]] = {}
    for name, seen in site_inputs(skeleton, sites, text).items():
        if not int(seen.tokens):
            continue
        last = name.rpartition(".")[2]
        rms = float(seen.mean_square().mean().sqrt())
        logs.setdefault(last, []).append(math.log(float(seen.absmax.max()) / rms))
    return {name: math.exp(sum(own) / len(own)) for name, own in sorted(logs.items())}


def logits(
    view: Checkpoint, tokens: torch.Tensor, widths: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Of the whole model, in float32, one window at a time. widths: bits of weights and inputs."""
    skeleton = Skeleton.build(view)
    skeleton.fill("", dtype=torch.float32, device=CPU)
    skeleton.model.tie_weights()
    with torch.no_grad(), ExitStack() as stack:
        if widths is not None:
            stack.enter_context(rounded(skeleton, *widths))
        return torch.cat([
            skeleton.model(input_ids=row[None], use_cache=False).logits for row in tokens
        ])  # fmt: skip


@contextmanager
def rounded(skeleton: Skeleton, w: int, a: int) -> Iterator[None]:
    """Weights of w bits per output channel, inputs of a bits per token, inside the blocks."""
    undo = []
    for block in skeleton.blocks:
        for module in block.modules():
            if is_experts(module):
                module.forward = partial(_experts, module, a)
                for name in ("gate_up_proj", "down_proj"):
                    weight = getattr(module, name).data
                    flat = weight.mT if module.is_transposed else weight
                    flat.copy_(to_grid(flat, w))
                undo.append(partial(delattr, module, "forward"))
            elif is_linear(module):
                module.weight.data = to_grid(module.weight.data, w)
                hook = lambda _m, args: (to_grid(args[0], a), *args[1:])  # noqa: E731
                undo.append(module.register_forward_pre_hook(hook).remove)
    try:
        yield
    finally:
        for step in undo:
            step()


def _experts(
    module: Any, bits: int, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    weights = dense_weights(module)

    def product(expert: int, param: str, x: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
        return F.linear(to_grid(x, bits), weights(expert, param))

    return experts_forward(module, weights, hidden, index, gates, added=product)


def to_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x (..., n) to symmetric integers with one scale per row."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / most
    return (x / scale).round().clamp(-most, most) * scale


def score(got: torch.Tensor, want: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Perplexity, and mean KL(want || got) in nats a token."""
    nll, kl, count = 0.0, 0.0, 0
    for row, p, q in zip(tokens, want, got, strict=True):
        p, q = p[:-1].log_softmax(-1), q[:-1].log_softmax(-1)
        nll -= float(q.gather(1, row[1:, None]).double().sum())
        kl += float((p.exp() * (p - q)).double().sum())
        count += len(row) - 1
    return {"ppl": math.exp(nll / count), "kl": kl / count}


if __name__ == "__main__":
    main()

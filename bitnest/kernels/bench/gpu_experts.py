"""Cases of a whole layer of experts, for `kernels_gpu`.

A call routes every token to k experts; with few tokens successive calls choose other experts, so
that each finds its weights in memory. Bytes are those of the experts that are chosen. The peer
multiplies in bfloat16, expert by expert, with the routing known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bitnest.formats import parse_format
from bitnest.kernels.bench.gpu_cases import HALF, Case, relative
from bitnest.kernels.bench.gpu_timing import Bench, Call
from bitnest.kernels.bench.weights import random_tensors
from bitnest.kernels.gpu.experts import ExpertStack, experts, experts_reference
from bitnest.kernels.gpu.layout import GpuWeight, lay_out

MOST_CALLS = 16


@dataclass(frozen=True)
class Layer:
    """A layer's shape."""

    name: str
    count: int
    chosen: int
    hidden: int
    inner: int


LAYERS = (
    Layer("qwen3-30b-a3b", 128, 8, 2048, 768),
    Layer("mixtral-8x7b", 8, 2, 4096, 14336),
)
TINY = (Layer("tiny", 4, 2, 256, 96),)


def expert_cases(
    bench: Bench, layer: Layer, names: Sequence[str], tokens: Sequence[int]
) -> Iterator[Case]:
    """Experts in the formats of `names` in turn."""
    stack, rows = _stack(bench, layer, names)
    shapes = [(2 * layer.inner, layer.hidden), (layer.hidden, layer.inner)]
    dense = [
        torch.randn(layer.count, *shape, device=bench.device, dtype=HALF) * 0.02 for shape in shapes
    ]
    for m in tokens:
        x = torch.randn(m, layer.hidden, device=bench.device, dtype=HALF)
        gates = torch.full((m, layer.chosen), 1 / layer.chosen, device=bench.device)
        routes = _routes(bench, layer, m)
        touched = [len(set(route.flatten().tolist())) for route in routes]
        moved = sum(
            row.read_bytes() for route in routes for e in set(route.flatten().tolist())
            for row in rows[e]
        )  # fmt: skip
        yield Case(
            {
                "op": "experts", "format": "+".join(names), "shape": layer.name, "m": m,
                "experts": sum(touched) / len(touched),
            },
            [lambda r=r, x=x, g=gates: experts(x, r, g, stack) for r in routes],
            moved // len(routes) + 4 * m * layer.hidden,
            lambda x=x, r=routes[0], g=gates: relative(
                experts(x, r, g, stack), experts_reference(x.float(), r, g, stack)
            ),
            6 * m * layer.chosen * layer.hidden * layer.inner, beside="bf16",
            peer=[_loop(x, route, dense) for route in routes],
        )  # fmt: skip


def _stack(
    bench: Bench, layer: Layer, names: Sequence[str]
) -> tuple[ExpertStack, list[list[GpuWeight]]]:
    shapes = [(layer.inner, layer.hidden)] * 2 + [(layer.hidden, layer.inner)]
    rows: list[list[GpuWeight]] = []
    for expert in range(layer.count):
        fmt = parse_format(names[expert % len(names)])
        own = []
        for place, shape in enumerate(shapes):
            tensors = random_tensors(fmt, shape, bench.device, 3 * expert + place)
            weight = lay_out(tensors, fmt, shape)
            assert weight is not None, fmt.name
            own.append(weight)
        rows.append(own)
    gate, up, down = zip(*rows, strict=True)
    return ExpertStack(gate, up, down), rows


def _routes(bench: Bench, layer: Layer, m: int) -> list[torch.Tensor]:
    """Choices (m, k) of successive calls."""
    if m * layer.chosen <= layer.count:  # other experts in every call, as many as there are
        order = torch.randperm(layer.count, device=bench.device)
        size = m * layer.chosen
        found = [
            order[first : first + size].view(m, layer.chosen)
            for first in range(0, layer.count - size + 1, size)
        ]
        return found[: 2 if bench.interpreted else MOST_CALLS]
    noise = torch.rand(2, m, layer.count, device=bench.device)
    return list(noise.argsort(-1)[..., : layer.chosen].contiguous())


def _loop(x: torch.Tensor, route: torch.Tensor, dense: Sequence[torch.Tensor]) -> Call:
    own = []
    for expert in sorted(set(route.flatten().tolist())):
        own.append((expert, (route == expert).any(1).nonzero()[:, 0]))

    def call() -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert, rows in own:
            gate, up = F.linear(x[rows], dense[0][expert]).chunk(2, -1)
            out.index_add_(0, rows, F.linear(F.silu(gate) * up, dense[1][expert]))
        return out

    return call

"""What `kernels_gpu` measures: each function yields cases of one operation, weights made and laid
out, with calls, the bytes that have to move, a check and the engine's own way beside it.

A check is the relative error against the reference on the same device. A case's calls work on
different copies of one weight (`gpu_timing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from bitnest.formats import NestedFormat, parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.formats.kv import parse_kv
from bitnest.kernels import kv
from bitnest.kernels.bench.gpu_timing import Bench, Call
from bitnest.kernels.bench.weights import copies, random_tensors
from bitnest.kernels.decode import decode
from bitnest.kernels.gpu import attention, lowrank, rotate, sparse
from bitnest.kernels.gpu.layout import lay_out
from bitnest.kernels.gpu.linear import linear
from bitnest.kernels.hadamard import random_signs

HALF = torch.bfloat16


@dataclass
class Case:
    """One row to be: labels, calls, bytes a call has to move, its relative error, and the calls
    of the peer (`beside` says who). work: floating-point operations."""

    labels: dict[str, Any]
    calls: Sequence[Call]
    nbytes: int
    error: Callable[[], float]
    work: int = 0
    limit: float = 2e-2
    beside: str = ""
    peer: Sequence[Call] = field(default_factory=list)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over that of `want`; NaN never passes for small."""
    found = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
    return float("inf") if math.isnan(found) else found


class Dense:
    """bfloat16 weights for cuBLAS, one set for each shape."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.shape, self.weights = (0, 0), [torch.empty(0)]

    def calls(self, x: torch.Tensor, shape: tuple[int, int]) -> list[Call]:
        """Products with each of them."""
        if shape != self.shape:
            self.weights = []
            count = self.bench.sets(2 * shape[0] * shape[1])
            one = torch.randn(shape, device=self.bench.device, dtype=HALF)
            self.shape, self.weights = shape, copies(one, count)
        return [lambda w=w: F.linear(x, w) for w in self.weights]


def linear_cases(
    bench: Bench, dense: Dense, name: str, shape: tuple[int, int], tokens: Sequence[int]
) -> Iterator[Case]:
    """One format at one shape, at every width of a nested one."""
    fmt = parse_format(name)
    tensors = random_tensors(fmt, shape, bench.device)
    weight = lay_out(tensors, fmt, shape)
    assert weight is not None, name
    for bits in (None,) if not isinstance(fmt, NestedFormat) else (2, 3, 4, 6, 8):
        plain = fmt.at(bits) if isinstance(fmt, NestedFormat) and bits else fmt
        own = {key: tensors[key] for key in plain.parts(shape) if key in tensors}
        nbytes = weight.read_bytes(bits)
        sets = copies(weight, bench.sets(nbytes))
        for m in tokens:
            x = torch.randn(m, shape[1], device=bench.device, dtype=HALF)
            yield Case(
                {"op": "linear", "format": name, "bits": bits, "shape": shape, "m": m},
                [lambda w=w, x=x, b=bits: linear(x, w, b) for w in sets],
                nbytes + 2 * m * sum(shape),
                lambda x=x, b=bits, f=plain, t=own: relative(
                    linear(x, weight, b), x.float() @ decode(t, f, shape).T
                ),
                2 * m * shape[0] * shape[1], beside="cublas", peer=dense.calls(x, shape),
            )  # fmt: skip


def sparse_cases(
    bench: Bench, dense: Dense, name: str, shape: tuple[int, int], tokens: Sequence[int]
) -> Iterator[Case]:
    """Bitmask and 2:4 weights."""
    fmt = parse_format(name)
    weight = sparse.lay_out_sparse(random_tensors(fmt, shape, bench.device), fmt, shape)
    sets = copies(weight, bench.sets(weight.nbytes))
    for m in tokens:
        x = torch.randn(m, shape[1], device=bench.device, dtype=HALF)
        yield Case(
            {"op": "sparse", "format": name, "shape": shape, "m": m},
            [lambda w=w, x=x: sparse.sparse_linear(x, w) for w in sets],
            weight.nbytes + 2 * m * sum(shape),
            lambda x=x: relative(
                sparse.sparse_linear(x, weight), sparse.sparse_linear_reference(x.float(), weight)
            ),
            2 * m * shape[0] * shape[1], beside="cublas", peer=dense.calls(x, shape),
        )  # fmt: skip


def low_rank_cases(
    bench: Bench, dense: Dense, rank: int, shape: tuple[int, int], tokens: Sequence[int]
) -> Iterator[Case]:
    """int4-g128 and a residual; the peer is the same product without it."""
    fmt = parse_format(f"int4-g128+lorc{rank}")
    tensors = random_tensors(fmt, shape, bench.device)
    tensors["left_scales"], tensors["right_scales"] = (
        tensors[key] * 0.01 for key in ("left_scales", "right_scales")
    )
    weight = lay_out(tensors, parse_format("int4-g128"), shape)
    assert weight is not None
    factors = lowrank.lay_out_low_rank(tensors)
    nbytes = weight.nbytes + factors.left.nbytes + factors.right.nbytes
    count = bench.sets(nbytes)
    sets = list(zip(copies(weight, count), copies(factors, count), strict=True))
    for m in tokens:
        x = torch.randn(m, shape[1], device=bench.device, dtype=HALF)
        yield Case(
            {"op": "lowrank", "format": fmt.name, "shape": shape, "m": m},
            [lambda w=w, f=f, x=x: lowrank.low_rank_linear(x, w, f) for w, f in sets],
            nbytes + 2 * m * sum(shape),
            lambda x=x: relative(
                lowrank.low_rank_linear(x, weight, factors),
                x.float() @ decode(tensors, fmt, shape).T,
            ),
            2 * m * shape[0] * shape[1], beside="without",
            peer=[lambda w=w, x=x: linear(x, w) for w, _ in sets],
        )  # fmt: skip


def attention_cases(
    bench: Bench, name: str, heads: tuple[int, int, int], contexts: Sequence[tuple[int, int]]
) -> Iterator[Case]:
    """Decoding over a cache; heads: of KV, queries to each, channels. contexts: sequences and
    tokens. The peer is torch's attention over 16-bit keys."""
    fmt, (kv_heads, queries, width) = parse_kv(name), heads
    for batch, length in contexts:
        old = fmt.folded(length)
        shape = (batch, kv_heads, length, width)
        keys, values = (torch.randn(shape, device=bench.device, dtype=HALF) for _ in "kv")
        cache = _cache(fmt, keys, values, old)
        stored = sum(t.nbytes for t in vars(cache).values() if isinstance(t, torch.Tensor))
        sets = copies(cache, bench.sets(stored))
        spans = torch.tensor([[0, old, length - old, 0]], dtype=torch.int32, device=bench.device)
        spans = spans.repeat(batch, 1)
        q = torch.randn(batch, kv_heads * queries, width, device=bench.device, dtype=HALF)
        dense = copies((keys, values), bench.sets(2 * keys.nbytes))
        yield Case(
            {"op": "attention", "format": fmt.name, "heads": heads, "batch": batch, "n": length},
            [lambda c=c, q=q, s=spans: attention.decode_attention(q, c, s) for c in sets],
            stored + 2 * q.nbytes,
            lambda q=q, c=cache, s=spans: relative(
                attention.decode_attention(q, c, s), attention.attend_reference(q.float(), c, s)
            ),
            4 * batch * kv_heads * queries * length * width, beside="sdpa",
            peer=[
                lambda k=k, v=v, q=q: F.scaled_dot_product_attention(
                    q[:, :, None], k, v, enable_gqa=True
                )
                for k, v in dense
            ],
        )  # fmt: skip


def _cache(fmt: Any, keys: torch.Tensor, values: torch.Tensor, old: int) -> attention.QuantizedKV:
    recent = keys[:, :, old:].contiguous(), values[:, :, old:].contiguous()
    keys, values = keys[:, :, :old].float(), values[:, :, :old].float()
    if not fmt.integer:
        codes = [kv.quantize_fp8(x, fmt.element, 1.0) for x in (keys, values)]
        return attention.QuantizedKV(fmt.element, 1, codes[0], codes[1], *recent)
    k, v = (
        kv.quantize_keys(keys.contiguous(), fmt.bits, fmt.group),
        kv.quantize_values(values.contiguous(), fmt.bits),
    )
    half = keys.shape[3] // 2
    table = 500000.0 ** -(torch.arange(half, device=keys.device) / half)
    rotation = attention.rotary_tables(table, old + 1)
    return attention.QuantizedKV(
        fmt.element, fmt.group, k.codes, v.codes, *recent, k.scale, k.low, v.scale, v.low,
        rotation=rotation,
    )  # fmt: skip


def rounding_cases(
    bench: Bench, name: str, columns: int, tokens: Sequence[int], block: int
) -> Iterator[Case]:
    """Inputs permuted (block 0) or rotated, and rounded; the peer is the reference."""
    fmt = parse_inputs(name)
    signs = random_signs(columns, 0).to(bench.device) if block else None
    order = None if block else torch.randperm(columns, device=bench.device).int()
    for m in tokens:
        sets = [torch.randn(m, columns, device=bench.device, dtype=HALF) for _ in range(4)]
        made = rotate.quantize(sets[0], fmt, order=order, block=block, signs=signs)
        moved = sum(part.codes.nbytes + part.scales.nbytes for part in made)

        def run(x: torch.Tensor, of: Any) -> Any:
            return of(x, fmt, order=order, block=block, signs=signs)

        yield Case(
            {"op": "rounding", "format": name, "columns": columns, "block": block, "m": m},
            [lambda x=x: run(x, rotate.quantize) for x in sets],
            sets[0].nbytes + moved,
            lambda x=sets[0]: relative(
                run(x, rotate.quantize)[0].codes.float(),
                run(x, rotate.quantize_reference)[0].codes.float(),
            ),
            # the rotation's matrix comes from the CPU at each call of the reference: no graph of it
            beside="" if block else "torch",
            peer=[] if block else [lambda x=x: run(x, rotate.quantize_reference) for x in sets],
        )  # fmt: skip


def rounded_cases(
    bench: Bench, dense: Dense, name: str, shape: tuple[int, int], tokens: Sequence[int]
) -> Iterator[Case]:
    """Products of codes, integer sums; name: weights/inputs. Inputs are rounded beforehand."""
    from bitnest.kernels.gpu.rounded import rounded_linear, rounded_reference

    stored, inputs = name.split("/")
    fmt, read = parse_format(stored), parse_inputs(inputs)
    weight = lay_out(random_tensors(fmt, shape, bench.device), fmt, shape)
    assert weight is not None, name
    sets = copies(weight, bench.sets(weight.nbytes))
    for m in tokens:
        x = torch.randn(m, shape[1], device=bench.device, dtype=HALF)
        (made,) = rotate.quantize(x, read)
        own: Any = (made.codes, made.scales, made.group)
        yield Case(
            {"op": "rounded", "format": name, "shape": shape, "m": m},
            [lambda w=w, a=own: rounded_linear(a[0], a[1], a[2], w) for w in sets],
            weight.nbytes + m * (shape[1] + 4 * shape[0]) + made.scales.nbytes,
            lambda a=own: relative(
                rounded_linear(a[0], a[1], a[2], weight),
                rounded_reference(a[0], a[1], a[2], weight),
            ),
            2 * m * shape[0] * shape[1], limit=1e-5, beside="cublas", peer=dense.calls(x, shape),
        )  # fmt: skip


def gemlite_cases(
    bench: Bench, bits: int, shape: tuple[int, int], tokens: Sequence[int]
) -> Iterator[Case]:
    """gemlite's own integers in groups of 128 beside ours of as many bits.

    Raises:
        ImportError: gemlite is not there.
    """
    from gemlite import helper

    maker = {2: helper.A16W2_HQQ_INT, 4: helper.A16W4_HQQ_INT, 8: helper.A16W8_HQQ_INT}[bits]
    codes = torch.randint(0, 1 << bits, shape, device=bench.device).to(torch.uint8)
    scales = (torch.rand(shape[0] * shape[1] // 128, 1, device=bench.device) * 0.01).to(HALF)
    zeros = torch.full_like(scales, float(1 << (bits - 1)))
    plain = ((codes.view(-1, 128).float() - zeros.float()) * scales.float()).view(shape)
    nbytes = shape[0] * shape[1] * bits // 8 + scales.nbytes
    count = min(8, bench.sets(nbytes))
    theirs = [maker(device=str(bench.device), dtype=HALF).from_weights(codes.clone(), scales, zeros)
              for _ in range(count)]  # fmt: skip
    fmt = parse_format(f"int{bits}-g128")
    weight = lay_out(random_tensors(fmt, shape, bench.device), fmt, shape)
    ours = copies(weight, bench.sets(nbytes))
    for m in tokens:
        x = torch.randn(m, shape[1], device=bench.device, dtype=HALF)
        yield Case(
            {"op": "gemlite", "format": fmt.name, "shape": shape, "m": m},
            [lambda w=w, x=x: linear(x, w) for w in ours],
            nbytes + 2 * m * sum(shape),
            lambda x=x: relative(theirs[0](x), x.float() @ plain.T),  # that theirs is used rightly
            2 * m * shape[0] * shape[1], beside="gemlite",
            peer=[lambda t=t, x=x: t(x) for t in theirs],
        )  # fmt: skip

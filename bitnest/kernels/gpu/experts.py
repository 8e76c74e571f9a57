"""A layer of experts in one go: experts of any mix of widths and formats in every launch.

    y_t = sum over j of  gates[t, j] down_e( silu(gate_e x_t) * up_e x_t ),    e = index[t, j]

1. Assignments (t, j) are sorted by expert on the device; every expert's are cut into tiles of BM.
2. `gate_up_kernel` and 3. `down_kernel`: programs take pieces of work (tile, output channels, share
   of the input channels) in turn until none is left; how many there are is read on the device.
   What an expert's weight is, is a row of a table on the device: its class, an index into CLASSES,
   known when the kernel is compiled, and the addresses of its tensors.
4. `combine_kernel` adds shares, then assignments in the order of j: no atomics, the same bits every
   time, and what a token gets does not hang on which tokens are beside it.

Indices beyond the experts mean none; an expert without weights (dropped) gives zeros. Nothing is
read back to the host, and sizes depend on shapes alone, so CUDA graphs may capture it; `widths`
rewrites the table in place.

Rounded: silu(gate) * up, to x's type, as the down projection reads it. Gates may have any float
type. Left out: biases, post norms and other activations (`kernels/experts.py` has them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch.nn import functional as F

from bitnest.errors import BitnestError
from bitnest.kernels.gpu import tiles
from bitnest.kernels.gpu.experts_kernels import combine_kernel, down_kernel, gate_up_kernel, swiglu
from bitnest.kernels.gpu.layout import GpuWeight, Spec
from bitnest.kernels.gpu.linear import FLOATS, linear_reference
from bitnest.kernels.gpu.words import blocks_of

FIELDS = 6  # of a row: class, words, scales, shared, zeros, table
NONE = -1  # class of a dropped expert
TYPES = {
    torch.int32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.uint8: 4,
    torch.int8: 5,
}  # fmt: skip
Class = tuple[Spec, int, int, int]  # and the types of scales, shared and table
Classes = tuple[Class, ...]

Weights = Sequence[GpuWeight | None]


@dataclass(frozen=True)
class Routing:
    """Where assignments go. order: (T k,) by expert. starts: (E + 1,) first of each expert's.
    ends: (E,) tiles of the experts up to each. owners: (tiles,) expert of a tile, E beyond."""

    order: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    owners: torch.Tensor


class ExpertStack:
    """The weights of a layer's experts.

    gate, up: (I, H) of every expert; down: (H, I). None: a dropped expert's. bits: the width at
    which every expert is read; None: its widest.

    Raises:
        BitnestError: other numbers of experts, shapes that differ, or nothing there.
    """

    def __init__(
        self, gate: Weights, up: Weights, down: Weights, bits: Sequence[int | None] | None = None
    ) -> None:
        self.weights = tuple(zip(gate, up, down, strict=False))
        if not len(gate) == len(up) == len(down):
            raise BitnestError(f"{len(gate)} gate, {len(up)} up, {len(down)} down projections")
        kept = [row for row in self.weights if None not in row]
        if not kept:
            raise BitnestError("a layer of which every expert is dropped")
        first = kept[0]
        assert first[0] is not None
        self.inner, self.hidden = first[0].shape
        for row in kept:
            shapes = [weight.shape for weight in row if weight is not None]
            if shapes != [(self.inner, self.hidden)] * 2 + [(self.hidden, self.inner)]:
                raise BitnestError(f"experts of shapes {shapes} beside {first[0].shape}")
        self.device = first[0].words.device
        self.count = len(self.weights)
        self.table = torch.zeros(self.count, 3, FIELDS, dtype=torch.int64, device=self.device)
        self.bits: tuple[int | None, ...] = ()
        self._classes: dict[torch.dtype, tuple[Classes, Classes]] = {}
        self._filled: torch.dtype | None = None
        self.widths(bits or [None] * self.count)

    def widths(self, bits: Sequence[int | None]) -> None:
        """Read every expert at another width from now on.

        Raises:
            BitnestError: a width that a weight does not have.
        """
        for row, width in zip(self.weights, bits, strict=True):
            for weight in row:
                if weight is not None and width is not None and width not in weight.segs:
                    raise BitnestError(
                        f"{weight.fmt.name} has no width {width}", hint=f"one of {weight.widths}"
                    )
        self.bits, self._classes, self._filled = tuple(bits), {}, None

    def classes(self, dtype: torch.dtype) -> tuple[Classes, Classes]:
        """What kernels are compiled for: classes of gate and up, and of down. Fills the table for
        products in `dtype`."""
        if dtype not in self._classes:
            first: set[Class] = set()
            second: set[Class] = set()
            for row, bits in zip(self.weights, self.bits, strict=True):
                for weight, found in zip(row, (first, first, second), strict=True):
                    if weight is not None:
                        found.add(self._class(weight, bits, dtype))
            self._classes[dtype] = tuple(sorted(first)), tuple(sorted(second))
        if self._filled != dtype:
            self._fill(dtype)
        return self._classes[dtype]

    def _class(self, weight: GpuWeight, bits: int | None, dtype: torch.dtype) -> Class:
        return (weight.spec(bits, dtype), *(TYPES[p.dtype] for p in self._tensors(weight, bits)))  # type: ignore[return-value]

    def _tensors(self, weight: GpuWeight, bits: int | None) -> list[torch.Tensor]:
        table = weight.tables.get(weight.widths[-1] if bits is None else bits)
        return [weight.words if p is None else p for p in (weight.scales, weight.shared, table)]

    def _fill(self, dtype: torch.dtype) -> None:
        first, second = self._classes[dtype]
        rows = []
        for row, bits in zip(self.weights, self.bits, strict=True):
            for weight, classes in zip(row, (first, first, second), strict=True):
                if weight is None:
                    rows.append([NONE] + [0] * (FIELDS - 1))
                    continue
                scales, shared, table = self._tensors(weight, bits)
                zeros = weight.words if weight.zeros is None else weight.zeros
                tensors = (weight.words, scales, shared, zeros, table)
                made = classes.index(self._class(weight, bits, dtype))
                rows.append([made, *(tensor.data_ptr() for tensor in tensors)])
        self.table.copy_(torch.tensor(rows).view_as(self.table))
        self._filled = dtype


def route(index: torch.Tensor, experts: int, bm: int) -> Routing:
    """Sort assignments (T, k) by expert, without reading anything back."""
    flat = index.flatten()
    ordered, order = flat.sort(stable=True)
    edges = torch.arange(experts + 1, device=index.device, dtype=flat.dtype)
    starts = torch.searchsorted(ordered, edges)
    ends = ((starts.diff() + bm - 1) // bm).cumsum(0)
    most = min(len(flat), len(flat) // bm + experts)
    numbers = torch.arange(most, device=index.device)
    owners = torch.searchsorted(ends, numbers, right=True)
    return Routing(
        order.to(torch.int32), starts.to(torch.int32), ends.to(torch.int32), owners.to(torch.int32)
    )


def experts(
    hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, stack: ExpertStack
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, (T, H) of hidden (T, H).

    index, gates: (T, k).

    Raises:
        BitnestError: shapes, types or devices that do not belong together.
    """
    check(hidden, index, gates, stack)
    tokens, k = index.shape
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if tokens * k == 0:
        return out.zero_()
    x = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    (first, second), device = stack.classes(x.dtype), x.device
    bits = max(sum(made[0][1]) for made in first)
    name, each = tiles.table_name(device), -(-tokens * k // stack.count)
    tile = tiles.choose("experts", bits, each, stack.inner, stack.hidden, name)
    where = route(index, stack.count, tile.bm)
    count, slots = tiles.programs(tile, device), tokens * k
    options = {"BN": tile.bn, "BM": tile.bm, "num_warps": tile.warps, "num_stages": tile.stages}
    most = len(where.owners)

    def shares_of(n: int, blocks: int) -> tuple[int, int]:
        work = most * triton.cdiv(n, tile.bn)
        share = max(1, min(blocks, count // max(1, work)))
        return share, min(count, work * share)

    blocks = blocks_of(stack.hidden)
    share, grid = shares_of(stack.inner, blocks)
    inner = torch.empty(slots, stack.inner, dtype=x.dtype, device=device)
    shape = (share, 2, slots, stack.inner) if share > 1 else (1,)
    parts = torch.empty(shape, dtype=torch.float32, device=device)
    gate_up_kernel[(grid,)](
        x, x.stride(0), where.order, where.starts, where.ends, where.owners, stack.table, inner,
        parts, slots, k, stack.count, stack.inner, stack.hidden, blocks, share, **options,
        CLASSES=first, SPREAD=share > 1,
    )  # fmt: skip
    if share > 1:
        swiglu[(triton.cdiv(slots * stack.inner, 1024),)](
            parts, inner, slots * stack.inner, share, SIZE=1024, num_warps=4
        )
    blocks = blocks_of(stack.inner)
    share, grid = shares_of(stack.hidden, blocks)
    parts = torch.empty(share, slots, stack.hidden, dtype=torch.float32, device=device)
    down_kernel[(grid,)](
        inner, where.order, where.starts, where.ends, where.owners, stack.table, parts, slots,
        stack.count, stack.hidden, stack.inner, blocks, share, **options, CLASSES=second,
    )  # fmt: skip
    combine_kernel[(tokens, triton.cdiv(stack.hidden, 512))](
        parts, index.contiguous(), gates.contiguous(), stack.table, out, slots, k, stack.count,
        stack.hidden, share, SIZE=512, num_warps=4,
    )  # fmt: skip
    return out


def experts_reference(
    hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, stack: ExpertStack
) -> torch.Tensor:
    """The same in torch, expert by expert."""
    check(hidden, index, gates, stack)
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert, (row, bits) in enumerate(zip(stack.weights, stack.bits, strict=True)):
        gate, up, down = row
        tokens, place = (index == expert).nonzero(as_tuple=True)
        if gate is None or up is None or down is None or not len(tokens):
            continue
        x = hidden[tokens].float()
        inner = F.silu(linear_reference(x, gate, bits)) * linear_reference(x, up, bits)
        y = linear_reference(inner.to(hidden.dtype).float(), down, bits)
        out.index_add_(0, tokens, y * gates[tokens, place].float()[:, None])
    return out.to(hidden.dtype)


def check(
    hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, stack: ExpertStack
) -> None:
    """Refuse what no kernel takes.

    Raises:
        BitnestError: see `experts`.
    """
    if hidden.dim() != 2 or hidden.shape[1] != stack.hidden:
        raise BitnestError(f"hidden states {tuple(hidden.shape)}, experts of {stack.hidden}")
    if hidden.dtype not in FLOATS:
        raise BitnestError(f"inputs of type {hidden.dtype}", hint="bfloat16, float16 or float32")
    if index.shape != gates.shape or index.dim() != 2 or len(index) != len(hidden):
        raise BitnestError(
            f"experts {tuple(index.shape)} and gates {tuple(gates.shape)} of {len(hidden)} tokens"
        )
    if {hidden.device, index.device, gates.device} != {stack.device}:
        raise BitnestError(f"inputs on {hidden.device}, experts on {stack.device}")

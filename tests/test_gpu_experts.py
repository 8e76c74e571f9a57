"""Grouped experts on the GPU's kernels: any mix of formats, and routings that are risky."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from bitnest.errors import BitnestError
from bitnest.kernels.decode import decode
from bitnest.kernels.gpu.experts import ExpertStack, experts, experts_reference, route
from bitnest.kernels.gpu.layout import GpuWeight, lay_out
from tests.gpu_mode import DEVICE
from tests.gpu_weights import random_stored

WIDTH, INNER = 130, 60  # no multiple of a tile or a group
MIXED = (
    "int1-g128", "int2-g32", "int3-g64-asym", "int4-g128", "int6-channel", "int8-g64", "nvfp4",
    "mxfp6", "lut3-channel", "nest2345678-g64", "ternary-g128",
)  # fmt: skip


def weight(name: str, shape: tuple[int, int], seed: int) -> GpuWeight:
    fmt, tensors = random_stored(name, shape, seed=seed)
    found = lay_out({n: t.to(DEVICE) for n, t in tensors.items()}, fmt, shape)
    assert found is not None
    return found


def stack_of(names: list[str | None], bits: list[int | None] | None = None) -> ExpertStack:
    sides = [
        [None if n is None else weight(n, shape, 10 * e + side) for e, n in enumerate(names)]
        for side, shape in enumerate([(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)])
    ]
    return ExpertStack(*sides, bits)


def error(y: torch.Tensor, y_hat: torch.Tensor) -> float:
    return float((y.double() - y_hat.double()).norm() / y.double().norm())


def inputs(tokens: int, k: int, count: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(tokens)
    x = (0.1 * torch.randn(tokens, WIDTH, generator=g)).to(dtype)
    index = torch.randint(0, count, (tokens, k), generator=g)
    gates = torch.rand(tokens, k, generator=g)
    return x.to(DEVICE), index.to(DEVICE), gates.to(DEVICE)


def test_reference_is_the_sum_over_experts_in_float64() -> None:
    stack = stack_of(["int4-g128", "int8-channel"])
    x, index, gates = inputs(5, 2, 2)
    y = torch.zeros(5, WIDTH, dtype=torch.float64)
    for t in range(5):
        for j in range(2):
            gate, up, down = (
                decode(w.restore(), w.fmt, w.shape).double().cpu()
                for w in stack.weights[int(index[t, j])]
            )
            row = x[t].double().cpu()
            y[t] += float(gates[t, j]) * down @ (F.silu(gate @ row) * (up @ row))
    assert error(y, experts_reference(x, index, gates, stack).cpu()) < 1e-6


@pytest.mark.parametrize("tokens", [1, 17])
def test_experts_of_many_formats_in_one_launch(tokens: int) -> None:
    names = [*MIXED, None]  # the last one is dropped
    stack = stack_of(list(names))
    x, index, gates = inputs(
        tokens, 3 if tokens == 1 else 1, len(names) + 1
    )  # the index beyond means no expert
    assert min(map(len, stack.classes(x.dtype))) == len(MIXED)
    y = experts(x, index, gates, stack)
    assert error(experts_reference(x, index, gates, stack), y) < 2e-6


def test_one_hot_expert_and_many_empty_ones() -> None:
    stack = stack_of(["int4-g128", "int3-g64-asym"] * 3)
    x, index, gates = inputs(20, 1, 6)
    index.fill_(3)
    assert error(experts_reference(x, index, gates, stack), experts(x, index, gates, stack)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    stack = stack_of(["int4-g128", "mxfp4"])
    x, index, gates = inputs(3, 1, 2, dtype)
    wide = torch.full((3, WIDTH + 3), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :WIDTH] = x
    tall = x.T.contiguous().T
    expected = experts_reference(x, index, gates, stack)
    for given in (wide[:, :WIDTH], tall):
        assert error(expected, experts(given, index, gates.to(dtype), stack)) < 6e-3


def test_no_tokens_and_tokens_without_experts_give_zeros() -> None:
    stack = stack_of(["int4-g128", None])
    x, index, gates = inputs(3, 2, 2)
    assert experts(x[:0], index[:0], gates[:0], stack).shape == (0, WIDTH)
    for nothing in (1, 2, 1000):  # dropped; beyond the experts
        assert not experts(x, torch.full_like(index, nothing), gates, stack).any()


def test_widths_change_in_place_and_results_do_not_hang_on_other_tokens() -> None:
    stack = stack_of(["nest248-g64", "nest248-g64"], [4, None])
    x, index, gates = inputs(5, 2, 2)
    before, table = experts(x, index, gates, stack), stack.table.data_ptr()
    assert error(experts_reference(x, index, gates, stack), before) < 2e-6
    stack.widths([8, 2])
    assert stack.table.data_ptr() == table
    y = experts(x, index, gates, stack)
    assert error(experts_reference(x, index, gates, stack), y) < 2e-6
    assert error(before, y) > 1e-2
    assert torch.equal(y, experts(x, index, gates, stack))


def test_assignments_are_sorted_and_tiles_belong_to_their_experts() -> None:
    index = torch.tensor([[3, 0], [3, 5], [3, 0], [9, 3]])
    found = route(index, 6, 2)
    assert found.order.tolist() == [1, 5, 0, 2, 4, 7, 3, 6]
    assert found.starts.tolist() == [0, 2, 2, 2, 6, 6, 7]
    assert found.ends.tolist() == [1, 1, 1, 3, 3, 4]
    assert found.owners.tolist() == [0, 3, 3, 5, 6, 6, 6, 6]


def test_what_does_not_belong_together_is_refused() -> None:
    stack = stack_of(["int4-g128", "int4-g128"])
    x, index, gates = inputs(3, 2, 2)
    with pytest.raises(BitnestError):
        experts(x[:, :-1], index, gates, stack)
    with pytest.raises(BitnestError):
        experts(x, index, gates[:, :1], stack)
    with pytest.raises(BitnestError):
        experts(x.long(), index, gates, stack)
    with pytest.raises(BitnestError):
        stack.widths([3, 4])
    with pytest.raises(BitnestError):
        stack_of([None, None])

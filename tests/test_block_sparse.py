"""Block sparsity: names and sizes, layout, the sweep against brute force, artifacts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitnest
from bitnest import api
from bitnest.artifact import Artifact, site_tensors
from bitnest.errors import FormatError, TargetError
from bitnest.formats import (
    BlockSparseFormat,
    DenseFormat,
    code_bits,
    kept_weights,
    parse_format,
)
from bitnest.kernels.block_sparse import block_mask, cut_blocks, join_blocks, spread_mask
from bitnest.kernels.decode import decode
from bitnest.kernels.rows import decode_rows
from bitnest.prune.block_sweep import BlockSweep
from bitnest.prune.masks import METHODS
from bitnest.prune.solution import Pruned
from bitnest.prune.sparsegpt import sparse_gptq
from bitnest.quantize.allocation.budget import Budget
from bitnest.quantize.allocation.planner import Planner
from bitnest.quantize.allocation.policies.lpvit import equal_slope, lpvit
from bitnest.quantize.allocation.problem import BudgetError
from bitnest.quantize.solve import Options, solve
from tests.test_sparse import least, problem
from tests.tiny import Builder

NAMES = (
    "int4-g32%b16x16-50", "int3-g48-asym%b32x32-25", "int2-channel%b64x32-75", "nvfp4%b16x64-30",
    "mxfp6%b16x16-50", "nf4-g64-dq%b32x16-40", "ternary-g32%b16x16-60", "dgq4-g32%b16x32-50",
    "int5-g128%b128x128-99", "dense%b16x16-50", "dense%b64x32-1",
)  # fmt: skip
SHAPES = ((48, 70), (64, 96), (3, 7), (130, 129))


def pruned(name: str, w: torch.Tensor, h: torch.Tensor | None, **options: Any) -> Pruned:
    fmt = parse_format(name)
    found = solve(w[None], None if h is None else h[None], fmt, Options(**options))  # type: ignore[arg-type]
    assert isinstance(found, Pruned)
    return found


def blockwise(name: str) -> BlockSparseFormat:
    fmt = parse_format(name)
    assert isinstance(fmt, BlockSparseFormat)
    return fmt


# ---------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("name", [*NAMES, "int4-g32%b16x16-50@had16", "dense%b16x16-50@perm+lorc4"])
def test_names_are_read_back(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize(
    "name",
    ["int4-g32%b16x16", "int4-g32%b16x16-0", "int4-g32%b16x16-100", "int4-g32%b8x16-50",
     "int4-g32%b16x256-50", "int4-g32%b24x16-50", "int4-g32%b16-50", "int4-g32%b016x16-50",
     "int8-b128x128%b16x16-50", "lut3-g64%b16x16-50", "nest24-g32%b16x16-50", "zero%b16x16-50",
     "ternary-g32-dict%b16x16-50", "int1-g32%b16x16-50"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(FormatError):
        parse_format(name)


def test_sizes_of_a_matrix_by_hand() -> None:
    scales = 2 * 4096 * 32
    half = 4096 * 2048
    fmt = parse_format("int4-g128%b16x16-50")
    assert fmt.nbytes((4096, 4096)) == 256 * 256 // 8 + scales + half // 2
    assert parse_format("dense%b64x32-25").nbytes((4096, 4096)) == 64 * 128 // 8 + half
    # 3 by 5 blocks of 16 x 16: 8 stay, whole even at the edges
    assert parse_format("int3-g32%b16x16-50").nbytes((40, 70)) == 4 + 8 * 96 + 2 * 40 * 3
    # blocks are no larger than the matrix
    assert parse_format("dense%b64x32-50").nbytes((10, 20)) == 4 + 10 * 20 * 2


# ---------------------------------------------------------------- what is stored


def numpy_weight(
    tensors: dict[str, torch.Tensor], fmt: BlockSparseFormat, shape: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """Integers and 16-bit values of the layout of docs/format.md, block by block, in float64."""
    (rows, columns), (r, c) = shape, fmt.block(shape)
    p, q = fmt.grid(shape)
    words = tensors["mask"].numpy().view(np.uint32)
    out = np.zeros(shape)
    n = 0
    for k in range(p * q):
        if not words[k // 32] >> (k % 32) & 1:
            continue
        for i in range(r * c):
            o, j = k // q * r + i // c, k % q * c + i % c
            if o >= rows or j >= columns:
                continue
            if isinstance(fmt.base, DenseFormat):
                out[o, j] = float(tensors["values"][n, i])
                continue
            bits, g = int(fmt.base.bits), fmt.base.group_size(columns)
            stream = tensors["codes"][n].numpy().view(np.uint32)
            code = sum(
                (int(stream[b // 32]) >> (b % 32) & 1) << (b - i * bits)
                for b in range(i * bits, (i + 1) * bits)
            )
            zero = 1 << (bits - 1)
            out[o, j] = (code - zero) * float(tensors["scales"][o, j // g])
        n += 1
    return out


@pytest.mark.parametrize(
    "name", ["int4-g32%b16x16-50", "int2-channel%b32x16-40", "dense%b16x32-70"]
)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_layout_is_the_documented_one(name: str, shape: tuple[int, int]) -> None:
    w, h = problem(*shape)
    found = pruned(name, w, h)
    stored = found.store(0, slice(None))
    fmt = blockwise(name)
    assert {k: tuple(t.shape) for k, t in stored.items()} == {
        k: part.shape for k, part in fmt.parts(shape).items()
    }
    assert np.allclose(numpy_weight(stored, fmt, shape), found.weight[0].double(), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_what_was_solved(name: str, shape: tuple[int, int]) -> None:
    w, h = problem(*shape)
    for prune in METHODS:
        found = pruned(name, w, h, prune=prune)
        stored = found.store(0, slice(None))
        fmt = blockwise(name)
        assert sum(t.numel() * t.element_size() for t in stored.values()) == fmt.nbytes(shape)
        assert torch.allclose(decode(stored, fmt, shape), found.weight[0], rtol=1e-6, atol=1e-8)
        keep = block_mask(stored["mask"], fmt, shape)
        assert torch.equal(spread_mask(keep, fmt, shape), found.keep[0])
        assert (found.weight[0][~found.keep[0]] == 0).all()
        rows = torch.randint(shape[0], (9,), generator=torch.Generator().manual_seed(1))
        some = decode_rows(stored, fmt, shape, rows)
        assert torch.equal(some, decode(stored, fmt, shape)[rows])


def test_a_damaged_mask_is_refused() -> None:
    w, h = problem(48, 70)
    stored = pruned("int4-g32%b16x16-50", w, h).store(0, slice(None))
    stored["mask"][0] ^= 1
    with pytest.raises(FormatError, match="blocks"):
        decode(stored, parse_format("int4-g32%b16x16-50"), (48, 70))


def test_blocks_are_cut_and_joined() -> None:
    matrix = torch.arange(40 * 70).view(40, 70).float()
    fmt = blockwise("dense%b16x32-50")
    blocks = cut_blocks(matrix, fmt)
    assert blocks.shape == (3, 3, 16, 32)
    assert torch.equal(blocks[1, 2, 3, :6], matrix[19, 64:70]) and blocks[2, 2, 15, 31] == 0
    assert torch.equal(join_blocks(blocks, (40, 70)), matrix)


# ---------------------------------------------------------------- choosing


def test_the_score_is_the_error_that_dropping_the_block_adds() -> None:
    """Against the best weights left, in closed form, of every block of the first columns."""
    w, h = (t.double() for t in problem(32, 48, seed=2))
    fmt = blockwise("dense%b16x16-50")
    sweep = BlockSweep(w[None], h[None], fmt, None, 0.0, None)
    costs = sweep._costs(0)[0]
    for p in range(2):
        error = 0.0
        for o in range(16 * p, 16 * p + 16):
            keep = torch.ones(48, dtype=torch.bool)
            keep[:16] = False
            error += least(w[o], h, keep)[1]
        assert error == pytest.approx(float(costs[p, 0]), rel=1e-9)


def test_the_sweep_drops_what_adds_least_and_lets_the_rest_make_up_for_it() -> None:
    """Two blocks of columns: the choice and the weights left, by hand from H's inverses."""
    w, h = (t.double() for t in problem(64, 32, seed=4))
    fmt = blockwise("dense%b16x16-50")
    left, mask = sparse_gptq(w[None], h[None], fmt, None, damp=0.0, kind=BlockSweep)
    assert isinstance(left, torch.Tensor)
    first = (w[:, :16] @ torch.linalg.inv(torch.linalg.inv(h)[:16, :16]) * w[:, :16]).sum(1)
    later = (w[:, 16:] @ h[16:, 16:] * w[:, 16:]).sum(1)  # nothing is left to make up for it
    costs = torch.stack([first, later], 1).view(4, 16, 2).sum(1)
    drop = torch.zeros(8, dtype=torch.bool)
    drop[costs.flatten().argsort()[:4]] = True
    x = w.clone()
    for p in range(4):
        rows = slice(16 * p, 16 * p + 16)
        if drop.view(4, 2)[p, 0]:
            x[rows, 16:] += w[rows, :16] @ h[:16, 16:] @ torch.linalg.inv(h[16:, 16:])
            x[rows, :16] = 0
    cost = (x[:, 16:] @ h[16:, 16:] * x[:, 16:]).sum(1).view(4, 16).sum(1)
    few = 4 - int(drop.view(4, 2)[:, 0].sum())
    for p in cost.argsort()[:few].tolist():
        x[16 * p : 16 * p + 16, 16:] = 0
    assert torch.allclose(left[0], x, atol=1e-8)
    assert torch.equal(mask[0], x != 0)


@pytest.mark.parametrize("name", ["dense%b16x16-50", "int4-g32%b16x16-50", "int4-g48%b32x32-50"])
def test_sparsegpt_beats_wanda_beats_magnitude(name: str) -> None:
    totals = dict.fromkeys(METHODS, 0.0)
    for seed in range(4):
        w, h = problem(64, 96, seed)
        size = torch.exp(torch.randn(96, generator=torch.Generator().manual_seed(seed)))
        h = h * size[:, None] * size
        errors = {m: float(pruned(name, w, h, prune=m).error.sum()) for m in METHODS}
        totals = {m: totals[m] + errors[m] for m in METHODS}
    assert totals["sparsegpt"] < 0.9 * totals["wanda"] < 0.9 * totals["magnitude"]


def test_which_blocks_stay_is_free_within_the_matrix() -> None:
    """Rows that weigh nothing lose all their blocks; a row's share would keep half of them."""
    w, h = problem(64, 64)
    w[:32] *= 1e-3
    for prune in METHODS:
        keep = pruned("dense%b16x16-50", w, h, prune=prune).keep[0]
        assert not keep[:32].any() and keep[32:].all()


# ---------------------------------------------------------------- artifacts


def test_an_artifact_holds_what_it_says_and_runs(tiny: Builder, text: Path, tmp_path: Path) -> None:
    import transformers

    tokens = torch.arange(60)[None] % 50 * 6
    api.compress(
        tiny("qwen3_moe"), tmp_path / "out", format="int4-g32%b16x16-50",
        rules=["*.o_proj=dense%b32x16-75", "*.embed_tokens=int8-g32%b16x16-75",
               "lm_head=int4-g32%b64x32-75@had16"],
        data=[str(text)], samples=4, length=32,
    )  # fmt: skip
    found = Artifact.open(tmp_path / "out")
    headers = found.headers({r.site.name: parse_format(r.format) for r in found.packed()})
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).float()
    for record in found.packed():
        fmt = parse_format(record.format)
        tensors = site_tensors(record, headers, fmt)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size == record.nbytes == fmt.nbytes(record.site.shape)
        record.site.view(plain.get_parameter(record.site.path)).data.copy_(
            decode(tensors, fmt, record.site.shape)
        )
    assert len({r.format for r in found.packed()}) == 4
    with torch.no_grad():
        logits = bitnest.load(tmp_path / "out", dtype=torch.float32)(tokens).logits
        assert torch.allclose(logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(TargetError, match="bitmask"):
        api.export(tmp_path / "out", tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()


def test_rounding_to_nearest_needs_no_text(tiny: Builder, tmp_path: Path) -> None:
    done = api.compress(tiny("llama"), tmp_path / "out", format="nvfp4%b16x16-50", method="rtn")
    assert not done.calibrated and done.nbytes < done.source_bytes


# ---------------------------------------------------------------- plans


def test_bits_count_what_is_kept_and_the_mask() -> None:
    shape = (64, 96)
    bits = {
        "int4-g32": 4 * 6144, "int4-g32%50": 2 * 6144 + 6144, "dense%2:4": 8 * 6144 + 6144,
        "int4-g32%b16x16-50": 2 * 6144 + 24, "int3-g32%b16x16-25@had16+lorc4": 6 * 256 * 3 + 24,
        "zero": 0, "dense": 16 * 6144,
    }  # fmt: skip
    assert {name: code_bits(parse_format(name), shape) for name in bits} == bits
    assert kept_weights(parse_format("int4-g32%b16x16-50"), shape) == 12 * 256
    assert kept_weights(parse_format("dense%b64x32-99"), (3, 7)) == 21


def test_one_slope_for_all_is_least_loss_at_its_cost() -> None:
    """Against every plan there is: none that costs as little loses less."""
    g = np.random.default_rng(3)
    for _ in range(20):
        cost = np.sort(g.integers(1, 50, (4, 4)), axis=1)
        loss = -np.sort(-g.random((4, 4)), axis=1)
        loss[0, 2] = np.inf
        budget = int(g.integers(cost[:, 0].sum(), cost[:, 3].sum() + 10))
        found = equal_slope(loss, cost, budget)
        rows = np.arange(4)
        spent, lost = cost[rows, found].sum(), loss[rows, found].sum()
        assert spent <= budget
        plans = [list(p) for p in itertools.product(range(4), repeat=4)]
        step = int((cost[:, 3] - cost[:, 0]).max())  # the budget cuts one item's step at most
        within = [loss[rows, p].sum() for p in plans if cost[rows, p].sum() <= budget - step]
        assert lost <= min(within, default=np.inf) + 1e-12


BLOCKS = ("int4-g32", "int4-g32%b16x16-75", "int4-g32%b16x16-50", "int4-g32%b16x16-25")


def test_plans_choose_among_shares_of_blocks(tiny: Builder, text: Path, tmp_path: Path) -> None:
    """By both policies; a price on arithmetic leaves less of it, at some loss."""
    model = tiny("qwen3_moe")
    found = api.analyze(
        model, tmp_path / "s", data=[str(text)], formats=BLOCKS, probes=0, fisher_windows=2,
        samples=8, length=24,
    )  # fmt: skip
    assert found.formats == list(BLOCKS)
    plans = {
        policy: api.plan(model, statistics=tmp_path / "s", bits=2.6, policy=policy)
        for policy in ("bitnest", "lpvit")
    }
    for planned in plans.values():
        assert 2.5 < planned.menu.average_bits(planned.choice) <= 2.6
        assert len({int(c) for c in planned.choice}) > 1
    assert plans["bitnest"].mean <= plans["lpvit"].mean
    even = api.plan(model, statistics=tmp_path / "s", bits=4, policy="uniform")
    assert set(even.menu.formats[int(c)] for c in even.choice) == {"int4-g32"}
    evidence = opened(model, tmp_path / "s").evidence(Budget(size=1 << 30))
    cost, rows = evidence.menu.nbytes, np.arange(len(evidence.menu.items))
    budget = int(cost[:, 0].sum())  # all in int4, nothing dropped
    work = [evidence.macs[rows, lpvit(evidence, cost, budget, p)].sum() for p in (0.0, 20.0, 1e4)]
    assert work[0] > work[1] > work[2]
    done = api.compress(model, tmp_path / "out", plan=plans["lpvit"].plan, data=[str(text)],
                        samples=4, length=32)  # fmt: skip
    assert {g.format for g in done.groups} <= {*BLOCKS, "dense"}
    with pytest.raises(BudgetError):
        lpvit(evidence, cost, int(cost.min(axis=1).sum()) - 1)


def opened(model: Path, statistics: Path) -> Planner:
    from bitnest.api.planning import open_planner

    return open_planner(model, statistics)

"""Sparse formats: names and sizes, masks, SparseGPT against brute force, artifacts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnest
from bitnest import api
from bitnest.artifact import Artifact, site_tensors
from bitnest.errors import FormatError, RecipeError, TargetError
from bitnest.formats import DenseFormat, SparseFormat, parse_format
from bitnest.formats.names import ALIASES
from bitnest.kernels.decode import decode
from bitnest.kernels.packing import unpack_bits
from bitnest.kernels.rows import decode_rows
from bitnest.kernels.sparse import pack_mask, pairs, positions
from bitnest.prune.masks import METHODS, keep_mask
from bitnest.prune.solution import Pruned, solve_sparse
from bitnest.prune.sparsegpt import cell_order, sparse_gptq
from bitnest.quantize.solve import Options, solve
from bitnest.statistics import Statistics
from tests.tiny import Builder

NAMES = (
    "int4-g32%2:4", "int4-g32%50", "int3-g48-asym%4:8", "int2-channel%30", "nvfp4%2:4", "mxfp6%50",
    "nf4-g64-dq%7:16", "ternary-g32%25", "dgq4-g32%1:2", "int4-g32-m2%99", "dense%2:4", "dense%1",
)  # fmt: skip
SHAPES = ((24, 70), (64, 96), (3, 7))
TOKENS = torch.arange(60)[None] % 50 * 6


def problem(rows: int = 24, columns: int = 70, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (O, I) and a second moment (I, I) of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / math.sqrt(columns) + torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=g) @ mix
    return torch.randn(rows, columns, generator=g), x.T @ x / len(x)


def pruned(name: str, w: torch.Tensor, h: torch.Tensor | None, **options: Any) -> Pruned:
    fmt = parse_format(name)
    found = solve(w[None], None if h is None else h[None], fmt, Options(**options))  # type: ignore[arg-type]
    assert isinstance(found, Pruned)
    return found


# ---------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("name", [*NAMES, "int4-g32%2:4@had16", "dense%50@perm+lorc4"])
def test_names_are_read_back(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize(
    "name",
    ["int4-g32%", "int4-g32%0", "int4-g32%100", "int4-g32%4:4", "int4-g32%5:4", "int4-g32%0:4",
     "int4-g32%2:3", "int4-g32%2:32", "int4-g32%50%2:4", "int4-g32@had16%50", "int4-g32%02",
     "%50", "zero%50", "nest24-g32%50", "int8-b128x128%50", "int8-tensor%50", "lut3-g64%50",
     "ternary-g32-dict%50", "int1-g32%50", "int4-g32%50b16x16"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(FormatError):
        parse_format(name)


def test_sizes_of_a_matrix_by_hand() -> None:
    mask, scales = 4096 * 4096 // 8, 2 * 4096 * 32
    for name in ("int4-g128%2:4", "int4-g128%50", "int4-g128%4:8"):
        assert parse_format(name).nbytes((4096, 4096)) == mask + scales + 4096 * 2048 // 2
    assert parse_format("dense%2:4").nbytes((4096, 4096)) == mask + 4096 * 2048 * 2
    # 70 channels: 17 cells keep 2 each, the last 2 channels both; 3 words of mask, 5 of codes
    assert parse_format("int4-g32%2:4").nbytes((1, 70)) == 3 * 4 + 5 * 4 + 2 * 3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 99), st.integers(1, 300))
def test_a_share_is_kept_to_the_nearest_weight(drop: int, columns: int) -> None:
    kept = SparseFormat(DenseFormat(), drop).kept(columns)
    assert 1 <= kept <= columns
    assert kept == 1 or abs(columns - kept - columns * drop / 100) <= 0.5


# ---------------------------------------------------------------- what is stored


def numpy_weight(
    tensors: dict[str, torch.Tensor], fmt: SparseFormat, shape: tuple[int, int]
) -> Any:
    """Integers and 16-bit values of the layout of docs/format.md, bit by bit, in float64."""
    rows, columns = shape

    def bits(words: torch.Tensor, width: int) -> Any:
        raw = np.frombuffer(words.contiguous().numpy().tobytes(), dtype=np.uint8)
        stream = np.unpackbits(raw, bitorder="little")
        stream = stream[: len(stream) // width * width].reshape(-1, width)
        return (stream.astype(np.int64) << np.arange(width)).sum(1)

    out = np.zeros(shape)
    for o in range(rows):
        place = [i for i, bit in enumerate(bits(tensors["mask"][o], 1)[:columns]) if bit]
        for k, i in enumerate(place):
            if isinstance(fmt.base, DenseFormat):
                out[o, i] = float(tensors["values"][o, k])
                continue
            b, q = int(fmt.bits), i // fmt.base.group_size(columns)
            zero = 1 << (b - 1)
            if "zeros" in tensors:
                zero = bits(tensors["zeros"][:, q], b)[o]
            code = bits(tensors["codes"][o], b)[k]
            out[o, i] = (int(code) - int(zero)) * float(tensors["scales"][o, q])
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hessian", [True, False])
def test_what_is_stored_is_what_was_solved(
    name: str, shape: tuple[int, int], hessian: bool
) -> None:
    w, h = problem(*shape)
    fmt = parse_format(name)
    assert isinstance(fmt, SparseFormat)
    found = pruned(name, w, h if hessian else None)
    tensors = found.store(0, slice(None))
    parts = fmt.parts(shape)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {k: p.shape for k, p in parts.items()}
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == fmt.nbytes(shape)
    decoded = decode(tensors, fmt, shape)
    assert torch.allclose(decoded, found.weight[0], rtol=1e-6, atol=0)
    miss = (w - decoded).double()
    error = ((miss @ h.double()) * miss if hessian else miss.square()).sum(1)
    assert torch.allclose(found.error[0].double(), error, rtol=1e-3, atol=1e-5)
    rows = torch.tensor([2, 0, 2])
    assert torch.equal(decode_rows(tensors, fmt, shape, rows), decoded[rows])
    if name.startswith(("int4-g32%2", "int4-g32%5", "int3", "int2", "dense")):
        assert np.allclose(numpy_weight(tensors, fmt, shape), decoded.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int4-g32%2:4", "int4-g32-asym%60", "dense%4:8", "nvfp4%50"])
def test_rows_of_a_stack_store_what_they_store_alone(name: str) -> None:
    w, h = problem(64, 96)
    found = pruned(name, w, h)
    fmt = parse_format(name)
    whole = decode(found.store(0, slice(None)), fmt, (64, 96))
    part = decode(found.store(0, slice(32, 64)), fmt, (32, 96))
    assert torch.equal(part, whole[32:])


@pytest.mark.parametrize("prune", METHODS)
@pytest.mark.parametrize("name", ["int4-g32%2:4", "dense%4:8", "int4-g48%7:16", "dense%1:2"])
def test_every_cell_keeps_its_n(name: str, prune: str) -> None:
    w, h = problem(12, 90)
    found = pruned(name, w, h, prune=prune)
    n, m = found.fmt.keep, found.fmt.cell
    whole = 90 // m * m
    assert (found.keep[0, :, :whole].unflatten(1, (-1, m)).sum(2) == n).all()
    assert (found.keep[0, :, whole:].sum(1) == min(n, 90 - whole)).all()
    assert (found.weight[0][~found.keep[0]] == 0).all()


@pytest.mark.parametrize("prune", METHODS)
def test_counts_are_exact_where_all_scores_are_equal(prune: str) -> None:
    h = torch.eye(70)[None]
    for w in (torch.zeros(1, 5, 70), torch.ones(1, 5, 70)):
        for drop in (1, 37, 50, 99):
            fmt = SparseFormat(DenseFormat(), drop)
            found = solve_sparse(w, h, fmt, half=torch.bfloat16, damp=0.03, prune=prune)
            assert (found.keep.sum(2) == fmt.kept(70)).all()


def test_an_unknown_method_is_refused() -> None:
    w, h = problem()
    with pytest.raises(RecipeError, match="unknown pruning method 'wands'"):
        pruned("int4-g32%50", w, h, prune="wands")


def test_a_damaged_mask_is_refused() -> None:
    w, _ = problem()
    fmt = parse_format("int4-g32%50")
    tensors = pruned(fmt.name, w, None).store(0, slice(None))
    tensors["mask"][3, 0] ^= 1
    with pytest.raises(FormatError, match="does not keep 35 of 70"):
        decode(tensors, fmt, (24, 70))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 99), st.integers(1, 80), st.integers(0, 2**31))
def test_masks_go_through_bits(drop: int, columns: int, seed: int) -> None:
    fmt = SparseFormat(DenseFormat(), drop)
    g = torch.Generator().manual_seed(seed)
    keep = keep_mask(torch.randint(0, 5, (4, columns), generator=g).float(), fmt)
    mask = pack_mask(keep)
    assert tuple(mask.shape) == fmt.parts((4, columns))["mask"].shape
    place = positions(mask, fmt, columns)
    assert torch.equal(place, torch.stack([row.nonzero()[:, 0] for row in keep]))


def test_pairs_are_the_positions_within_fours() -> None:
    w, _ = problem(6, 32)
    found = pruned("int4-g32%2:4", w, None)
    mask = found.store(0, slice(None))["mask"]
    index = pairs(mask, 32)
    place = positions(mask, found.fmt, 32).view(6, 8, 2)
    assert torch.equal(index.long() + 4 * torch.arange(8)[:, None], place)
    for nibble, two in ((0b0011, (0, 1)), (0b1010, (1, 3)), (0b1100, (2, 3))):
        assert tuple(pairs(torch.tensor([[nibble]], dtype=torch.int32), 4)[0, 0]) == two


# ---------------------------------------------------------------- choosing


def least(w: torch.Tensor, h: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The best weights of one row under a mask, and their error, float64."""
    drop = ~keep
    inverse = torch.linalg.inv(h)
    pull = torch.linalg.solve(inverse[drop][:, drop], w[drop])
    best = w - inverse[:, drop] @ pull
    best[drop] = 0
    return best, float((w - best) @ h @ (w - best))


def test_one_drop_is_the_optimal_brain_surgeon_s() -> None:
    """The first column dropped: the others move as OBS says, at the cost w^2 / [H^-1]_jj."""
    w, h = (t.double() for t in problem(1, 6, seed=3))
    keep = torch.ones(1, 1, 6, dtype=torch.bool)
    keep[0, 0, 0] = False
    fmt = SparseFormat(DenseFormat(), 17)
    left, _ = sparse_gptq(w[None], h[None], fmt, None, damp=0.0, keep=keep)
    best, error = least(w[0], h, keep[0, 0])
    assert isinstance(left, torch.Tensor)
    assert torch.allclose(left[0, 0], best, atol=1e-10)
    assert error == pytest.approx(float(w[0, 0] ** 2 / torch.linalg.inv(h)[0, 0]), rel=1e-9)


def test_the_sweep_is_obs_on_the_columns_not_yet_settled() -> None:
    """Column by column, against inverses of what is left of H, formed anew for each."""
    w, h = (t.double() for t in problem(5, 12, seed=1))
    fmt = parse_format("dense%2:4")
    assert isinstance(fmt, SparseFormat)
    left, mask = sparse_gptq(w[None], h[None], fmt, None, damp=0.0)
    order = cell_order(h.diagonal()[None], 12, 4)[0].tolist()
    x = w.clone()
    for at in range(0, 12, 4):
        cell = order[at : at + 4]
        cost = torch.stack(
            [x[:, j] ** 2 / torch.linalg.inv(h[order[k:]][:, order[k:]])[0, 0]
             for k, j in enumerate(cell, at)]
        )  # fmt: skip
        for o in range(5):
            for place in sorted(range(4), key=lambda p: float(cost[p, o]))[:2]:
                assert not mask[0, o, cell[place]]
        for k, j in enumerate(cell, at):
            inverse = torch.linalg.inv(h[order[k:]][:, order[k:]])
            drop = ~mask[0, :, j]
            err = torch.where(drop, x[:, j], 0.0) / inverse[0, 0]
            x[:, order[k:]] -= err[:, None] * inverse[0]
    assert isinstance(left, torch.Tensor)
    assert torch.allclose(left[0], x, atol=1e-9)


def test_sparsegpt_is_near_the_best_of_all_masks() -> None:
    ours, best, worst = 0.0, 0.0, 0.0
    for seed in range(8):
        w, h = (t.double() for t in problem(1, 8, seed))
        errors = []
        for kept in itertools.combinations(range(8), 4):
            keep = torch.zeros(8, dtype=torch.bool)
            keep[list(kept)] = True
            errors.append(least(w[0], h, keep)[1])
        left, _ = sparse_gptq(w[None], h[None], SparseFormat(DenseFormat(), 50), None, damp=0.0)
        assert isinstance(left, torch.Tensor)
        miss = w[0] - left[0, 0]
        error = float(miss @ h @ miss)
        assert error >= min(errors) * (1 - 1e-9)
        ours, best, worst = ours + error, best + min(errors), worst + sum(errors) / len(errors)
    assert best <= ours < (best + worst) / 2


@pytest.mark.parametrize("name", ["dense%50", "dense%2:4", "int4-g32%50", "int4-g32%4:8"])
def test_sparsegpt_beats_wanda_beats_magnitude(name: str) -> None:
    totals = dict.fromkeys(METHODS, 0.0)
    for seed in range(5):
        w, h = problem(32, 96, seed)
        size = torch.exp(torch.randn(96, generator=torch.Generator().manual_seed(seed)))
        h = h * size[:, None] * size
        errors = {m: float(pruned(name, w, h, prune=m).error.sum()) for m in METHODS}
        assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
        totals = {m: totals[m] + errors[m] for m in METHODS}
    assert totals["sparsegpt"] < 0.9 * totals["wanda"]


@pytest.mark.parametrize("name", ["int4-g32%50", "dense%2:4"])
def test_without_inputs_the_largest_stay(name: str) -> None:
    w, _ = problem()
    for prune in METHODS:
        found = pruned(name, w, None, prune=prune)
        assert torch.equal(found.keep[0], keep_mask(w.abs(), found.fmt))


def test_wanda_masks_by_input_and_leaves_survivors_alone() -> None:
    w, h = problem()
    found = pruned("dense%50", w, h, prune="wanda")
    score = w.abs() * h.diagonal().sqrt()
    for o in range(len(w)):
        assert score[o][found.keep[0, o]].min() >= score[o][~found.keep[0, o]].max()
    assert torch.equal(found.weight[0][found.keep[0]], w[found.keep[0]].bfloat16().float())


@pytest.mark.parametrize("m", [2, 4, 8, 16])
@pytest.mark.parametrize("width, g", [(96, 32), (70, 32), (70, 70), (50, 48), (7, 7)])
def test_orders_keep_groups_and_cells_whole(width: int, g: int, m: int) -> None:
    diagonal = torch.rand(3, width, generator=torch.Generator().manual_seed(m))
    diagonal[1] = 1.0
    for order in cell_order(diagonal, g, m):
        assert sorted(order.tolist()) == list(range(width))
        for at in range(0, width, g):
            group = order[at : at + g]
            assert len({int(i) // g for i in group}) == 1
            for a in range(0, len(group), m):
                assert len({int(i) // m for i in group[a : a + m]}) == 1


# ---------------------------------------------------------------- artifacts


@pytest.fixture(scope="module")
def artifact(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "out"
    api.compress(
        tiny("qwen3_moe"), out, format="int4-g32%2:4",
        rules=["*.o_proj=dense%50", "*.embed_tokens=int8-g32%25", "lm_head=int4-g32%50@had16"],
        data=[str(text)], samples=4, length=32,
    )  # fmt: skip
    return out


def test_an_artifact_holds_what_it_says_and_runs(artifact: Path, tiny: Builder) -> None:
    import transformers

    found = Artifact.open(artifact)
    headers = found.headers({r.site.name: parse_format(r.format) for r in found.packed()})
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).float()
    with torch.no_grad():
        unpruned = plain(TOKENS).logits
    names = set()
    for record in found.packed():
        fmt = parse_format(record.format)
        names.add(fmt.name)
        tensors = site_tensors(record, headers, fmt)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == fmt.nbytes(
            record.site.shape
        )
        record.site.view(plain.get_parameter(record.site.path)).data.copy_(
            decode(tensors, fmt, record.site.shape)
        )
        if fmt.name == "int4-g32%2:4":
            keep = unpack_bits(tensors["mask"], 1, record.site.shape[1])
            whole = record.site.shape[1] // 4 * 4
            assert (keep[:, :whole].unflatten(1, (-1, 4)).sum(2) == 2).all()
    assert len(names) == 4
    with torch.no_grad():
        logits = bitnest.load(artifact, dtype=torch.float32)(TOKENS).logits
        assert torch.allclose(logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, unpruned, rtol=0.1, atol=0.1)


def test_it_is_evaluated_and_not_exported(
    artifact: Path, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    found = api.evaluate(
        [artifact], against=tiny("qwen3_moe"), data=[str(text)], window=16, windows=4
    )
    assert found.rows[1].nbytes < found.rows[0].nbytes / 2
    with pytest.raises(TargetError, match="bitmask"):
        api.export(artifact, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_candidate_of_plans(tiny: Builder, text: Path, tmp_path: Path) -> None:
    api.analyze(
        tiny("mixtral"), tmp_path / "an", data=[str(text)],
        formats=["int4-g32%2:4", "int3-g32", "int4-g32"],
        samples=8, length=24, probes=4, probe_windows=2, fisher_windows=2,
    )  # fmt: skip
    found = Statistics.open(tmp_path / "an")
    assert found.formats == ["int4-g32%2:4", "int3-g32", "int4-g32"]
    error = found.read(0, "sites.error")
    assert (error[:, 0] > error[:, 2]).all()


def test_every_alias_takes_a_sparsity() -> None:
    for alias in ALIASES:
        assert parse_format(f"{alias}%2:4").name == f"{alias}%2:4"

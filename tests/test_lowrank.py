"""Low-rank residuals against float64 SVDs, and the promises made about them."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.errors import FormatError
from bitnest.formats import LowRankFormat, parse_format
from bitnest.kernels.decode import decode, low_rank
from bitnest.quantize import lowrank
from bitnest.quantize import solve as solver
from bitnest.quantize.lowrank import (
    DAMP,
    Root,
    best_factors,
    fit_low_rank,
    norm_root,
    top_singular,
)
from bitnest.quantize.solve import Options, solve
from tests.tiny import Builder

KINDS = ("lorc", "lqer", "hlr")
HALF = torch.bfloat16


def problem(rows: int, width: int, batch: int = 1, seed: int = 0):
    """W and H of inputs whose channels differ in size by 30 and are mixed: anisotropic."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, width)[torch.randperm(width, generator=g)]
    mix = torch.randn(width, width, generator=g) / width**0.5 + torch.eye(width)
    x = torch.randn(batch, 4 * width, width, generator=g) @ mix * spread
    return torch.randn(batch, rows, width, generator=g), x.transpose(1, 2) @ x / (4 * width)


def loss(miss: torch.Tensor, h: torch.Tensor) -> float:
    return float(((miss.double() @ h.double()) * miss.double()).sum())


def dense_root(kind: str, h: torch.Tensor) -> np.ndarray:
    """R of the docstring in float64, up to a factor."""
    wide = h.double().numpy()
    if kind == "lorc":
        return np.eye(len(wide))
    if kind == "lqer":
        return np.diag(np.sqrt(np.diag(wide)))
    return np.linalg.cholesky(wide + DAMP * np.diag(wide).mean() * np.eye(len(wide)))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_unrounded_factors_are_the_best_of_their_rank(kind: str, shape: tuple[int, int]) -> None:
    w, h = problem(*shape)
    miss, r = w[0], dense_root(kind, h[0])
    left, right = best_factors(miss, norm_root(kind, h[0]), 7)
    assert left.shape == (shape[0], 7) and right.shape == (7, shape[1])
    rest = np.linalg.norm((miss.double() - left.double() @ right.double()).numpy() @ r)
    s = np.linalg.svd(miss.double().numpy() @ r, compute_uv=False)
    assert rest == pytest.approx(np.linalg.norm(s[7:]), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_int8_costs_little_of_what_the_best_factors_recover(kind: str, half: torch.dtype) -> None:
    w, h = problem(48, 64)
    for size in (1.0, 1e-3):  # errors of real models are of the second size
        miss, r = size * w[0], dense_root(kind, h[0])
        stored = low_rank(fit_low_rank(miss, norm_root(kind, h[0]), 16, half))
        energy = np.linalg.norm((miss - stored).double().numpy() @ r) ** 2
        s = np.linalg.svd(miss.double().numpy() @ r, compute_uv=False) ** 2
        assert energy <= s[16:].sum() + 1e-3 * s[:16].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_low_rank_is_recovered_to_int8_precision(kind: str) -> None:
    w, h = problem(48, 64)
    miss = w[0, :, :5] @ problem(5, 64, seed=1)[0][0]
    left, right = best_factors(miss, norm_root(kind, h[0]), 8)
    assert (miss - left @ right).norm() < 1e-4 * miss.norm()
    stored = low_rank(fit_low_rank(miss, norm_root(kind, h[0]), 8, HALF))
    assert (miss - stored).norm() < 0.02 * miss.norm()


def test_refitting_the_second_factor_beats_rounding_both_alone() -> None:
    refitted = alone = 0.0
    for seed in range(10):
        w, h = problem(32, 64, seed=seed)
        miss = w[0, :, :6] @ problem(6, 64, seed=seed + 50)[0][0]
        root = norm_root("hlr", h[0])
        refitted += loss(miss - low_rank(fit_low_rank(miss, root, 6, HALF)), h[0])
        left, right = best_factors(miss, root, 6)
        scales = (left.abs().amax(0) / 127).to(HALF).float(), right.abs().amax(1) / 127
        b = (left / scales[0]).round().clamp(-127, 127) * scales[0]
        a_scale = scales[1].to(HALF).float()[:, None]
        a = (right / a_scale).round().clamp(-127, 127) * a_scale
        alone += loss(miss - b @ a, h[0])
    assert refitted < 0.9 * alone


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_knows_more_of_the_inputs_leaves_less_error(method: str) -> None:
    w, h = problem(64, 128, batch=3)
    errors = {"base": float(solve(w, h, parse_format("int3-g64"), Options(method)).error.sum())}
    for kind in KINDS:
        found = solve(w, h, parse_format(f"int3-g64+{kind}8"), Options(method))
        assert float(found.error.sum()) == pytest.approx(loss(w - found.weight, h), rel=1e-3)
        errors[kind] = float(found.error.sum())
    assert errors["hlr"] < errors["lqer"] < errors["base"]
    assert errors["lorc"] < errors["base"]
    if method == "rtn":  # what gptq leaves is no longer anisotropic in lqer's sense
        assert errors["lqer"] < 0.9 * errors["lorc"]


def test_one_fit_in_the_full_norm_is_at_least_as_good_as_by_channel() -> None:
    for seed in range(5):
        w, h = problem(32, 64, seed=seed)
        full, channel = (
            loss(w[0] - low_rank(fit_low_rank(w[0], norm_root(kind, h[0]), 8, HALF)), h[0])
            for kind in ("hlr", "lqer")
        )
        assert full <= channel


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_taking_turns_never_loses_what_the_first_turn_had(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, h = problem(64, 128, batch=3)
    fmt, errors = parse_format("int3-g64+hlr8"), []
    for turns in (1, 2, 4):
        monkeypatch.setitem(lowrank.TURNS, "hlr", turns)
        errors.append(solve(w, h, fmt, Options(method)).error.sum(1))
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
    assert errors[2].sum() < 0.95 * errors[0].sum()


class Given:
    """A codec that decodes to given matrices."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.error = weight, weight.square().sum(2)

    def store(self, b: int, rows: slice) -> dict[str, torch.Tensor]:
        return {"codes": self.weight[b, rows]}


def test_a_residual_that_rounding_makes_harmful_is_stored_as_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Channel 0 sees no input and takes all of int8's range; the others cancel until rounded.
    row = torch.tensor([127.0, 0.6, -0.3, -0.3])
    miss = row.repeat(1, 2, 1)
    h = torch.zeros(1, 4, 4)
    h[:, 1:, 1:] = 1
    monkeypatch.setattr(solver, "solve", lambda w, *_: Given(torch.zeros_like(w)))
    fmt = LowRankFormat(parse_format("int3-g16"), "lorc", 1)
    harmful = low_rank(fit_low_rank(miss[0], Root(None), 1, HALF))
    assert loss(miss[0] - harmful, h[0]) > 0.5
    result = solver._solve_low_rank(miss, h, fmt, Options())
    assert not low_rank(result.store(0, slice(None))).any()
    assert not result.weight.any() and float(result.error.sum()) < 1e-6
    h[:, 0, 0] = 1  # now the channel counts and the residual pays
    assert low_rank(solver._solve_low_rank(miss, h, fmt, Options()).store(0, slice(None))).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 48), (48, 1), (5, 33)])
def test_rank_beyond_the_smaller_side_is_cut(kind: str, shape: tuple[int, int]) -> None:
    w, h = problem(*shape, batch=2)
    fmt = parse_format(f"int2-g16+{kind}64")
    found = solve(w, h, fmt, Options("rtn"))
    for b in range(2):
        stored = found.store(b, slice(0, shape[0]))
        assert stored["left"].shape == (shape[0], min(shape))
        assert sum(t.nbytes for t in stored.values()) == fmt.nbytes(shape)
        assert torch.equal(decode(stored, fmt, shape), found.weight[b])
    # the whole error is within reach: only int8 is left of it
    assert (w - found.weight).norm() < 0.05 * w.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_no_error_no_inputs_and_few_inputs_give_finite_factors(kind: str, method: str) -> None:
    w, h = problem(8, 32)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    fmt = parse_format(f"int3-g16+{kind}4")
    for weight, hessian in [
        (torch.zeros_like(w), h),
        (w, torch.zeros_like(h)),
        (w, (x.T @ x)[None]),  # one token
        (w, h * (torch.arange(32) > 3) * (torch.arange(32) > 3)[:, None]),  # dead channels
        (w, 1e12 * h),
        (w, 1e-12 * h),
    ]:
        found = solve(weight, hessian, fmt, Options(method))
        assert found.weight.isfinite().all()
        base = solve(weight, hessian, fmt.base, Options(method))
        assert loss(weight - found.weight, hessian) <= loss(weight - base.weight, hessian)


def test_lorc_needs_no_inputs() -> None:
    w, _ = problem(32, 64)
    found = solve(w, None, parse_format("int3-g64+lorc8"), Options())
    assert found.error.sum() < solve(w, None, parse_format("int3-g64"), Options()).error.sum()


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ArithmeticError):
        norm_root("hlr", torch.full((4, 4), torch.nan))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_batch_equals_one_at_a_time_and_any_seed(kind: str, method: str) -> None:
    w, h = problem(16, 64, batch=3)
    fmt = parse_format(f"int3-g32+{kind}4")
    together = solve(w, h, fmt, Options(method))
    for b in range(3):
        torch.manual_seed(b)
        alone = solve(w[b : b + 1], h[b : b + 1], fmt, Options(method)).store(0, slice(None))
        for name, tensor in together.store(b, slice(None)).items():
            assert torch.equal(tensor, alone[name])


def test_random_probes_find_the_top_and_the_same_one_every_time() -> None:
    g = torch.Generator().manual_seed(0)
    m = torch.randn(lowrank.EXACT + 60, lowrank.EXACT + 20, generator=g)
    m = m * torch.arange(1, m.shape[1] + 1).float().rsqrt()
    u, s, v = top_singular(m, 16)
    exact = torch.linalg.svdvals(m.double())
    assert s.double().square().sum() > (1 - 1e-3) * exact[:16].square().sum()
    rest = (m - (u * s) @ v).double().square().sum()
    assert float(rest) == pytest.approx(float(exact[16:].square().sum()), rel=1e-3)
    torch.manual_seed(7)
    again = top_singular(m, 16)
    assert all(torch.equal(x, y) for x, y in zip((u, s, v), again, strict=True))
    assert torch.initial_seed() == 7


@pytest.mark.parametrize("name", ["int3-g16+lqer4", "int3-g16-asym@rhad16+hlr4", "nvfp4+lorc4"])
def test_bytes_on_disk_are_those_the_format_states(
    name: str, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    api.compress(
        tiny("qwen3_moe"), tmp_path / "out", format=name, data=[str(text)], samples=4, length=32
    )
    artifact = Artifact.open(tmp_path / "out")
    files = {str(record.file) for record in artifact.packed()}
    sizes: dict[str, int] = defaultdict(int)
    for file in files:
        for key, tensor in load_file(tmp_path / "out" / file).items():
            sizes[key.rpartition(".")[0]] += tensor.nbytes
    for record in artifact.packed():
        assert parse_format(record.format).nbytes(record.site.shape) == record.nbytes
        assert sizes[record.site.name] == record.nbytes


@pytest.mark.parametrize(
    "name", ["int4-g32+hlr0", "int4-g32+hlr", "int4-g32+hlr999", "int4-g32+lo8"]
)
def test_residuals_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        parse_format(name)

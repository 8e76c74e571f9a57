"""BitStack's format: names, layout, the method against numpy, fitting under H, artifacts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitnest
from bitnest import api
from bitnest.artifact import Artifact
from bitnest.errors import FormatError
from bitnest.formats import (
    NestedFormat,
    TransformedFormat,
    core_format,
    cut,
    parse_format,
    widths,
)
from bitnest.formats.catalogue import describe, granularity, scale_kind
from bitnest.kernels import nested
from bitnest.kernels.decode import decode
from bitnest.kernels.rows import decode_rows
from bitnest.quantize.ends import end_tensors
from bitnest.quantize.nested.stack import _Fit, channel_scales, plain_block, solve_stack
from bitnest.quantize.solve import Options, narrower_errors, solve
from tests.tiny import Builder

TOKENS = torch.arange(60)[None] % 50 * 6
NAMES = ("stack1234-r2", "stack13-r4", "stack248-r1", "stack8-r3")


def problem(rows: int = 24, columns: int = 70, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (O, I) and a second moment (I, I) of correlated inputs of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / math.sqrt(columns) + torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=g) @ mix
    x *= torch.linspace(0.3, 3, columns)
    return torch.randn(rows, columns, generator=g), x.T @ x / len(x)


def stack_format(name: str) -> NestedFormat:
    fmt = parse_format(name)
    assert isinstance(fmt, NestedFormat)
    return fmt


def at_width(
    tensors: dict[str, torch.Tensor], fmt: NestedFormat, width: int, shape: tuple[int, int]
) -> torch.Tensor:
    part = fmt.at(width)
    return decode({k: tensors[k] for k in part.parts(shape)}, part, shape)


def loss(miss: torch.Tensor, h: torch.Tensor) -> float:
    return float(((miss.double() @ h.double()) * miss.double()).sum())


# ---------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("name", [*NAMES, "stack12345678-r16", "stack1-r64"])
def test_names_are_read_back(name: str) -> None:
    fmt = stack_format(name)
    assert fmt.name == name and widths(fmt) == fmt.widths and fmt.bits == fmt.widths[-1]
    assert fmt.row_tile is None and granularity(fmt) == name.partition("-")[2]
    assert parse_format(f"{name}@had64").nbytes((8, 64)) == fmt.nbytes((8, 64))
    assert describe(name).family == "nested" and scale_kind(fmt)


@pytest.mark.parametrize(
    "name",
    ["stack12-r0", "stack12-r65", "stack12-r016", "stack12-g128", "stack12-channel", "stack12",
     "stack21-r2", "stack9-r2", "stack-r2", "nest24-r2", "any24-r2", "int4-r2",
     "stack12-r2@awq", "stack12-r2@had16@awq", "stack12-r2+lorc4"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(FormatError):
        parse_format(name)


def test_a_block_costs_a_bit_and_two_factors() -> None:
    fmt, shape = stack_format("stack12345678-r16"), (4096, 4096)
    bits = [8 * cut(fmt, w).nbytes(shape) / (4096 * 4096) for w in fmt.widths]
    assert bits == pytest.approx([k * 1.125 + 16 / 4096 for k in range(1, 9)])
    assert stack_format("stack1-r64").parts((3, 70))["right1"].shape == (3, 70)  # rank 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(24, 70), (5, 33), (2, 130), (1, 1)])
def test_stored_is_what_the_format_says(name: str, shape: tuple[int, int]) -> None:
    weight, h = problem(*shape)
    fmt = stack_format(name)
    for hessian in (None, h, torch.zeros_like(h)):
        for matrix in (weight, torch.zeros(shape)):
            found = solve_stack(matrix, hessian, fmt)
            assert list(found.tensors) == list(fmt.parts(shape))
            for part, own in fmt.parts(shape).items():
                assert tuple(found.tensors[part].shape) == own.shape
            assert sum(t.nbytes for t in found.tensors.values()) == fmt.nbytes(shape)
            assert bool(found.weight.isfinite().all())
            assert torch.equal(found.weight, decode(found.tensors, fmt, shape))


# ---------------------------------------------------------------- layout and method


def numpy_weight(tensors: dict[str, torch.Tensor], fmt: NestedFormat, columns: int) -> Any:
    """The layout of docs/format.md read bit by bit, in float64."""
    total: Any = 0.0
    for width in fmt.widths:
        count = fmt.plane_bits(width)
        raw = np.ascontiguousarray(tensors[f"plane{width}"].numpy()).view(np.uint8)
        stream = np.unpackbits(raw, axis=1, bitorder="little")
        for n in range(count):  # the plane's first block is its codes' most significant bit
            bit = width - count + 1 + n
            sign = 2.0 * stream[:, count - 1 - n :: count][:, :columns] - 1
            left, right = (tensors[f"{side}{bit}"].double().numpy() for side in ("left", "right"))
            total = total + sign * (left @ right)
    return total / tensors["channels"].double().numpy()


@pytest.mark.parametrize("name", NAMES)
def test_every_width_decodes_as_the_layout_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = problem()
    fmt = stack_format(name)
    tensors = solve_stack(weight, h, fmt).tensors
    for width in fmt.widths:
        part = fmt.at(width)
        own = {k: tensors[k] for k in part.parts((24, 70))}
        found = decode(own, part, (24, 70))
        np.testing.assert_allclose(found.double(), numpy_weight(own, part, 70), atol=1e-5)
        rows = torch.tensor([3, 0, 23, 23])
        torch.testing.assert_close(decode_rows(own, part, (24, 70), rows), found[rows])
        monkeypatch.setattr(nested, "STEP", 5 * 70)  # decoded five rows at a time
        torch.testing.assert_close(decode(own, part, (24, 70)), found)
        assert decode(own, part, (24, 70), torch.bfloat16).dtype == torch.bfloat16
        monkeypatch.undo()


def bitstack(weight: Any, s: Any, rank: int, blocks: int) -> list[Any]:
    """The paper's decomposition in float64: W_hat after every block."""
    rest, total, found = weight * s, np.zeros_like(weight), []
    for _ in range(blocks):
        sign = np.where(rest >= 0, 1.0, -1.0)
        u, values, v = np.linalg.svd(np.abs(rest), full_matrices=False)
        block = sign * ((u[:, :rank] * values[:rank]) @ v[:rank])
        rest, total = rest - block, total + block
        found.append(total / s)
    return found


def test_the_plain_method_is_the_papers() -> None:
    weight, h = problem(20, 48)
    rms = np.sqrt(np.diag(h.double().numpy()))
    fmt = stack_format("stack1234-r3")
    for hessian, s in ((h, rms / rms.mean() + 1e-3), (None, np.ones(48))):
        tensors = solve_stack(weight, hessian, fmt, half=torch.float32, turns=0).tensors
        expected = bitstack(weight.double().numpy(), s, 3, 4)
        for width, own in zip(fmt.widths, expected, strict=True):
            found = at_width(tensors, fmt, width, (20, 48)).double().numpy()
            np.testing.assert_allclose(found, own, atol=2e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_block_continues_from_what_is_stored(half: torch.dtype) -> None:
    weight, h = problem()
    fmt = stack_format("stack12-r2")
    tensors = solve_stack(weight, h, fmt, half=half, turns=0).tensors
    s = tensors["channels"].double()
    first = decode({k: tensors[k] for k in fmt.at(1).parts((24, 70))}, fmt.at(1), (24, 70))
    rest = (weight.double() - first.double()) * s
    codes = nested.join_planes(tensors, fmt, 70)
    clear = rest.abs() > 1e-5  # float32 against float64
    assert bool(clear.float().mean() > 0.99)
    assert torch.equal((codes & 1).bool()[clear], (rest > 0)[clear])
    u, v, t = torch.linalg.svd(rest.abs())
    wanted = (u[:, :2] * v[:2]) @ t[:2]
    own = tensors["left2"].double() @ tensors["right2"].double()
    assert float((own - wanted).norm() / wanted.norm()) < 8e-3  # 16-bit factors


@pytest.mark.parametrize("hessian", [True, False])
def test_errors_fall_with_every_block(hessian: bool) -> None:
    weight, h = problem(40, 64)
    fmt = parse_format("stack12345678-r2@had16")
    assert isinstance(fmt, TransformedFormat)
    found = solve(weight[None], h[None] if hessian else None, fmt, Options())
    errors = [float(e.sum()) for e in (*narrower_errors(found), found.error)]
    assert len(errors) == 8 and all(a > 1.3 * b for a, b in itertools.pairwise(errors))
    tensors = found.store(0, slice(0, 40))
    norm = h if hessian else torch.eye(64)
    for width, error in zip(range(1, 9), errors, strict=True):
        part = cut(fmt, width)
        own = decode({k: tensors[k] for k in part.parts((40, 64))}, part, (40, 64))
        assert error == pytest.approx(loss(weight - own, norm), rel=1e-3)


# ---------------------------------------------------------------- fitting under H


def test_fitting_beats_the_plain_method_at_every_width() -> None:
    weight, h = problem(64, 96)
    for name in ("stack1234-r1", "stack1234-r4"):
        fmt = stack_format(name)
        plain, own = (solve_stack(weight, h, fmt, turns=t).tensors for t in (0, 4))
        for width in fmt.widths:
            before, after = (
                loss(weight - at_width(tensors, fmt, width, (64, 96)), h)
                for tensors in (plain, own)
            )
            assert after < 0.75 * before, (name, width)


def fit(
    rank: int, rows: int = 30, columns: int = 40
) -> tuple[_Fit, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """A fitter, what there is to fit (I, O), and BitStack's block."""
    weight, h = problem(rows, columns)
    run = _Fit(h / h.diagonal().mean(), torch.bfloat16, 1)
    rest = weight.T.contiguous()
    return run, rest, *plain_block(rest, rank, torch.bfloat16)


def test_no_step_of_a_turn_raises_the_loss() -> None:
    for rank in (1, 2, 7):
        run, rest, sign, factors = fit(rank)
        before = run._loss(rest, sign, factors)
        for _ in range(3):
            sign = run._flip(rest, sign, factors)
            flipped = run._loss(rest, sign, factors)
            factors = run._fit_right(rest, sign, factors)
            right = run._loss(rest, sign, factors)
            factors = run._fit_left(rest, sign, factors)
            left = run._loss(rest, sign, factors)
            assert before * 1.00001 > flipped > right * 0.99999 > left * 0.9999
            before = left


def test_flipping_the_sign_of_the_last_channel_cannot_help() -> None:
    run, rest, sign, factors = fit(2)
    sign = run._flip(rest, sign, factors)
    best = run._loss(rest, sign, factors)
    for o in range(rest.shape[1]):
        other = sign.clone()
        other[-1, o] *= -1
        assert run._loss(rest, other, factors) >= best * 0.999999


def test_the_left_factor_is_least_squares() -> None:
    run, rest, sign, (left, right) = fit(2)
    found, same = run._fit_left(rest, sign, (left, right), right)
    assert same is right
    root = np.linalg.cholesky(run.hessian.double().numpy())  # H = root root^T
    for o in range(rest.shape[1]):
        design = root.T @ (sign[:, o] * right).double().numpy().T
        wanted = np.linalg.lstsq(design, root.T @ rest[:, o].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[o].double(), wanted, rtol=1e-3, atol=1e-4)


def test_a_channel_that_nothing_comes_through_stays_near_its_weights() -> None:
    weight, h = problem()
    h[5], h[:, 5] = 0, 0
    fmt = stack_format("stack12345678-r2")
    found = solve_stack(weight, h, fmt)
    relative = float((found.weight - weight)[:, 5].norm() / weight[:, 5].norm())
    assert relative < 0.2
    with pytest.raises(ArithmeticError):
        channel_scales(torch.full((3, 3), torch.nan), weight)


# ---------------------------------------------------------------- artifacts


@pytest.fixture(scope="module")
def artifact(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stack") / "out"
    api.compress(
        tiny("qwen3_moe"), out, format="stack1234-r2",
        rules=["kind:embedding=stack12-r4", "kind:head=stack1234-r4@had16"],
        data=[str(text)], samples=4, length=32,
    )  # fmt: skip
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_every_number_of_blocks_loads_and_changes_in_place(artifact: Path) -> None:
    at = {b: logits(bitnest.load(artifact, bits=b, dtype=torch.float32)) for b in (1, 2, 3, 4)}
    assert all(not torch.equal(at[b], at[b + 1]) for b in (1, 2, 3))
    model: Any = bitnest.load(artifact, bits=1, dtype=torch.float32)
    for bits in (2, 4, 3, 1, 4):
        model.set_bits(bits)
        assert torch.equal(logits(model), at[bits])
    assert torch.equal(logits(bitnest.load(artifact, dtype=torch.float32)), at[4])


def test_embedding_and_head_are_packed_with_the_rest(artifact: Path) -> None:
    records = {r.site.kind: r for r in Artifact.open(artifact).packed()}
    assert records["embedding"].format == "stack12-r4"
    assert records["head"].format == "stack1234-r4@had16"
    for record in Artifact.open(artifact).packed():
        errors = (*record.narrower, record.error)
        core = core_format(parse_format(record.format))  # type: ignore[arg-type]
        assert isinstance(core, NestedFormat) and len(errors) == len(core.widths)
        assert sorted(errors, reverse=True) == list(errors) and errors[0] < 0.6
    weight = torch.randn(90, 32, generator=torch.Generator().manual_seed(1))
    fmt = stack_format("stack12-r4")
    tensors, errors_of = end_tensors(weight, None, fmt, Options(), 90)
    miss = weight - decode(tensors, fmt, (90, 32))
    assert errors_of[1] == pytest.approx(float(miss.square().sum() / weight.square().sum()))
    assert errors_of[1] < errors_of[0] < 0.4


def test_a_slice_is_the_first_blocks(artifact: Path, tmp_path: Path) -> None:
    whole: Any = bitnest.load(artifact, dtype=torch.float32)
    for bits in (1, 3):
        sliced = api.slice_artifact(artifact, tmp_path / str(bits), bits)
        sliced.verify()
        whole.set_bits(bits)
        assert torch.equal(logits(bitnest.load(sliced.path, dtype=torch.float32)), logits(whole))
        for record, own in zip(Artifact.open(artifact).records, sliced.records, strict=True):
            assert own.format == cut(parse_format(record.format), bits).name
            if own.narrower or record.narrower:
                errors = (*record.narrower, record.error)
                assert (*own.narrower, own.error) == errors[: len(own.narrower) + 1]


def test_rounding_to_nearest_needs_no_inputs(tiny: Builder, tmp_path: Path) -> None:
    done = api.compress(tiny("llama"), tmp_path / "out", format="stack123-r1", method="rtn")
    assert done.forecast is not None
    real = sum(f.stat().st_size for f in done.path.iterdir())
    sites = len(Artifact.open(done.path).records)
    assert real <= done.forecast["disk"] <= real + 16 * sites
    assert logits(bitnest.load(done.path, bits=2)).isfinite().all()

"""Rounded inputs: their names, the numbers they become, and products of codes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.errors import FormatError
from bitnest.formats import BlockFormat, SplitFormat, parse_format
from bitnest.formats.inputs import InputFormat, joined_name, parse_inputs, split_name, weights_of
from bitnest.kernels.basis import from_stored, to_stored
from bitnest.kernels.decode import decode
from bitnest.kernels.inputs import Magnitudes, code_inputs, round_inputs
from bitnest.kernels.products import (
    exact_product,
    integer_product,
    integer_weight,
    rounded_product,
)
from bitnest.quantize.solve import Options, solve

NAMES = [
    "int8-token", "int6-g128", "int4-g32", "int2-g16", "int8-static", "int4-g128-c90",
    "int8-token-t6", "fp8_e4m3-token", "fp8_e5m2-token", "fp8_e4m3-g128", "fp6_e2m3-g32",
    "fp8_e4m3-static", "mxfp8", "mxfp4", "mxfp6_e3m2", "mxint8", "mxint4-ceil", "mxfp8-ocp",
    "nvfp4", "nvint4", "128xint8-token~int4-g128", "64xmxint8~mxfp4",
]  # fmt: skip
E4M3 = torch.float8_e4m3fn


def inputs(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    x[:, ::17] *= 12
    return x


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_back(name: str) -> None:
    assert parse_inputs(name).name == name


def test_short_names() -> None:
    assert parse_inputs("fp8-token").name == "fp8_e4m3-token"
    assert split_name("int4-g128@had64/fp8-token") == ("int4-g128@had64", "fp8_e4m3-token")
    assert split_name("int4-g128") == ("int4-g128", None)
    assert split_name("int4-g128/dense") == ("int4-g128", "dense")
    assert weights_of("int4-g128/int8-token") == "int4-g128"
    assert joined_name("int4-g128", "") == joined_name("int4-g128", "dense") == "int4-g128"


@pytest.mark.parametrize(
    "name",
    [
        "int9-token", "int1-token", "int8", "int8-channel", "int8-g8", "int8-g512", "int8-g100",
        "fp8_e3m3-token", "nvfp4-ocp", "mxfp8-up", "int8-static-c90", "int8-static-t6", "fp7-token",
        "128xint8-token~128xint8-token~int4-token", "128xint8-static~int4-g128",
        "0xint8-token~mxfp4", "128xnvfp4~mxfp4", "128xint8-token~int4-token-t6", "", "dense",
        "int8-token ",
    ],
)  # fmt: skip
def test_names_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_inputs(name)
    assert caught.value.hint


def test_a_weight_format_has_no_inputs() -> None:
    with pytest.raises(FormatError, match="slash"):
        parse_format("int8-channel/int8-token")


def reference(x: np.ndarray, fmt: InputFormat) -> np.ndarray:
    """Integers of dynamic scales, number by number, in float32 as the docstring says."""
    out = np.zeros_like(x)
    g = fmt.group or x.shape[1]
    q = np.float32(fmt.largest)
    for t in range(x.shape[0]):
        for start in range(0, x.shape[1], g):
            part = x[t, start : start + g]
            peak = np.abs(part).max()
            if fmt.scale == "e8m0":
                exponent = np.floor(np.log2(peak)) - np.floor(np.log2(q)) if peak else -126
                scale = np.float32(2.0**exponent)
            else:
                peak = np.float32(peak * np.float32(fmt.clip / 100)) if fmt.clip != 100 else peak
                scale = np.float32(peak / q) if peak else np.float32(1)
            out[t, start : start + g] = np.clip(np.rint(part / scale), -q, q) * scale
    return out


@pytest.mark.parametrize("name", ["int8-token", "int6-g128", "int4-g32-c90", "mxint8", "mxint4"])
@pytest.mark.parametrize("channels", [32, 172, 256])
def test_integers_against_a_loop(name: str, channels: int) -> None:
    x = inputs(5, channels)
    x[2] = 0
    fmt = parse_inputs(name)
    assert np.array_equal(round_inputs(x, fmt).numpy(), reference(x.numpy(), fmt))


def test_floats_are_torchs() -> None:
    x = inputs(6, 96)
    scale = x.abs().amax(1, keepdim=True) / 448
    assert torch.equal(
        round_inputs(x, parse_inputs("fp8-token")), (x / scale).to(E4M3).float() * scale
    )
    blocks = x.view(6, 3, 32)
    exponent = torch.floor(torch.log2(blocks.abs().amax(2, keepdim=True))) - 8
    power = torch.exp2(exponent)
    mx = ((blocks / power).clamp(-448, 448).to(E4M3).float() * power).view(6, 96)
    assert torch.equal(round_inputs(x, parse_inputs("mxfp8")), mx)


def test_nvfp4_has_two_levels() -> None:
    x = inputs(3, 64)
    magnitudes = Magnitudes()
    magnitudes.add(x)
    fmt = parse_inputs("nvfp4")
    static = magnitudes.scale(fmt)
    assert static == pytest.approx(float(x.abs().max()) / (6 * 448), rel=1e-2)
    coded = code_inputs(x, fmt, static)[0]
    assert coded.group == 16 and coded.values.abs().max() <= 6
    stored = (coded.scales / static).to(E4M3).float()
    assert torch.allclose(stored * static, coded.scales, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [48, 172])
def test_every_format_rounds_to_what_it_says(name: str, channels: int) -> None:
    fmt, x = parse_inputs(name), inputs(7, channels)
    static = 0.05 if fmt.has_static else None
    rounded = round_inputs(x, fmt, static)
    assert rounded.shape == x.shape and bool(rounded.isfinite().all())
    parts = code_inputs(x, fmt, static)
    assert sum(p.values.shape[1] for p in parts) == channels
    for part in parts:
        assert part.values.abs().max() <= part.largest
        if part.integer:
            assert torch.equal(part.values, part.values.round())
    assert torch.equal(
        round_inputs(torch.zeros(2, channels), fmt, static), torch.zeros(2, channels)
    )


def test_more_bits_are_nearer() -> None:
    x = inputs(64, 256)
    miss = [
        float((round_inputs(x, parse_inputs(f"int{b}-g128")) - x).square().mean())
        for b in range(2, 9)
    ]
    assert all(a > 1.5 * b for a, b in pairwise(miss))
    one, wide = (
        float((round_inputs(x, parse_inputs(n)) - x).square().mean())
        for n in ("int4-g128", "128xint8-g128~int4-g128")
    )
    assert 0.3 * one < wide < 0.7 * one  # half of the channels


def test_loud_channels_stay_as_they_are() -> None:
    x = inputs(9, 64).clamp(-5, 5)
    x[3, 7], x[5, 20] = 60.0, -6.0
    fmt = parse_inputs("int8-token-t6")
    rounded = round_inputs(x, fmt)
    assert torch.equal(rounded[:, [7, 20]], x[:, [7, 20]])
    rest = x.clone()
    rest[:, [7, 20]] = 0
    quiet = round_inputs(rest, parse_inputs("int8-token"))
    others = [c for c in range(64) if c not in (7, 20)]
    assert torch.equal(rounded[:, others], quiet[:, others])


@pytest.mark.parametrize("method", ["mse", "percentile", "absmax"])
def test_static_scales(method: str) -> None:
    x = inputs(512, 64)
    x[0, 0] = 900.0  # one outlier
    magnitudes = Magnitudes()
    for part in x.split(100):
        magnitudes.add(part)
    assert int(magnitudes.counts.sum()) == x.numel()
    fmt = parse_inputs("int8-static")
    scale = magnitudes.scale(fmt, method)
    if method == "absmax":
        assert scale * 127 == pytest.approx(900, rel=1 / 128)
    elif method == "percentile":
        exact = x.abs().flatten().sort().values[int(0.9999 * x.numel())]
        assert scale * 127 == pytest.approx(float(exact), rel=0.02)
    else:
        errors = {
            s: float((round_inputs(x, fmt, s) - x).double().square().sum())
            for s in (scale * step / 64 for step in range(16, 161))
        }
        best = min(errors, key=lambda s: errors[s])
        assert errors[best] > 0.97 * float(
            (round_inputs(x, fmt, scale) - x).double().square().sum()
        )


def test_no_magnitudes_give_a_scale() -> None:
    magnitudes = Magnitudes()
    magnitudes.add(torch.zeros(3, 4))
    assert magnitudes.scale(parse_inputs("int8-static")) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(2, 8), st.integers(2, 8), st.integers(0, 99))
def test_integer_sums_are_exact(columns: int, left: int, right: int, seed: int) -> None:
    """Also those beyond 2^24, which float32 cannot hold."""
    random = np.random.default_rng(seed)
    a = random.integers(-(2 ** (left - 1)) + 1, 2 ** (left - 1), (3, columns))
    b = random.integers(-(2 ** (right - 1)), 2 ** (right - 1), (4, columns))
    if seed % 2:  # the largest sums there are
        a, b = np.full_like(a, a.max()), np.full_like(b, b.max())
    found = exact_product(
        torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32),
        2.0 ** (left - 1) * 2.0 ** (right - 1),
    )  # fmt: skip
    assert np.array_equal(found.double().numpy(), (a @ b.T).astype(np.float64))


WEIGHTS = [
    "int8-channel", "int6-g128", "int4-g128", "int4-g32-asym", "int4-b2x128", "int8-tensor",
    "dgq4-g32", "mxint8", "int4-g64-m2", "int4-g128@had32", "int4-g128@perm", "int4-g128@awq",
    "64xint8-g64~int4-g64", "32xint8-g32~int4-b2x64@perm",
]  # fmt: skip


def stored(name: str, shape: tuple[int, int] = (24, 172)):  # type: ignore[no-untyped-def]
    weight = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    x = inputs(400, shape[1], 5)
    solution = solve(weight, (x.T @ x / 400)[None], parse_format(name), Options())
    return solution.store(0, slice(0, shape[0])), solution.weight[0]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "name", ["int8-token", "int6-g128", "int4-g32", "48xint8-token~int4-g64", "int8-token-t6"]
)
def test_products_of_codes(weights: str, name: str) -> None:
    """Against integers summed as integers, cell by cell, and against the numbers they stand for."""
    fmt, given = parse_format(weights), parse_inputs(name)
    tensors, matrix = stored(weights)
    shape = (24, 172)
    codes = integer_weight(tensors, fmt, shape)
    assert codes is not None
    assert all(torch.equal(c.values, c.values.round()) for c in codes)
    assert all(float(c.values.abs().max()) <= c.largest for c in codes)
    x = inputs(11, 172, 9)
    coded = code_inputs(to_stored(x, fmt, tensors), given)
    y = integer_product(coded, codes)
    want = np.zeros((11, 24), np.float32)
    edges = sorted(
        {0, 172}
        | {p.start + k for p in coded for k in range(0, p.values.shape[1], p.group)}
        | {c.start + k for c in codes for k in range(0, c.values.shape[1], c.group)}
    )
    for start, stop in pairwise(edges):
        p = next(p for p in coded if p.start <= start < p.start + p.values.shape[1])
        c = next(c for c in codes if c.start <= start < c.start + c.values.shape[1])
        a = p.values[:, start - p.start : stop - p.start].numpy().astype(np.int64)
        b = c.values[:, start - c.start : stop - c.start].numpy().astype(np.int64)
        acc = (a @ b.T).astype(np.float32)
        s = p.scales[:, (start - p.start) // p.group].numpy()[:, None]
        want += acc * s * c.scales[:, (start - c.start) // c.group].numpy()
    assert np.array_equal(y.numpy(), want)
    whole = rounded_product(x, given, None, fmt, tensors, codes=codes, dense=None)
    rounded = from_stored(round_inputs(to_stored(x, fmt, tensors), given), fmt, tensors)
    plain = rounded.double() @ decode(tensors, fmt, shape).double().T
    assert torch.allclose(decode(tensors, fmt, shape), matrix, atol=1e-6)
    assert float((whole - plain).abs().max()) < 2e-5 * float(plain.abs().max())


@pytest.mark.parametrize(
    "weights", ["int3-g64@had16", "fp8-channel", "mxfp4", "int4-g64+lqer4", "nf4-g64"]
)
@pytest.mark.parametrize("name", ["fp8-token", "mxfp8", "int8-token"])
def test_products_of_other_codes(weights: str, name: str) -> None:
    fmt, given = parse_format(weights), parse_inputs(name)
    tensors, _ = stored(weights)
    x = inputs(5, 172, 2)
    codes = integer_weight(tensors, fmt, (24, 172))
    assert (codes is None) == (weights != "int3-g64@had16")
    dense = decode(tensors, fmt, (24, 172))
    y = rounded_product(x, given, None, fmt, tensors, codes=codes, dense=dense)
    rounded = from_stored(round_inputs(to_stored(x, fmt, tensors), given), fmt, tensors)
    plain = rounded.double() @ dense.double().T
    assert float((y - plain).abs().max()) < 2e-5 * float(plain.abs().max())


@pytest.mark.parametrize(
    "name",
    [
        "int4-g32", "int4-g32@had32", "int4-g32@rhad16", "int4-g32@perm", "int4-g32@awq",
        "int4-g32@awq@had64", "int4-g32@perm@awq+lqer4",
    ],
)  # fmt: skip
def test_a_basis_is_the_weights_own(name: str) -> None:
    """x W^T is what the transformed input and the stored matrix give."""
    fmt = parse_format(name)
    tensors, matrix = stored(name)
    x = inputs(4, 172)
    assert torch.allclose(from_stored(to_stored(x, fmt, tensors), fmt, tensors), x, atol=1e-4)
    if "+" in name:
        return
    core = fmt
    while not isinstance(core, BlockFormat):
        core = core.base  # type: ignore[union-attr]
    inside = to_stored(x, fmt, tensors) @ decode(tensors, core, (24, 172)).T
    assert torch.allclose(inside, x @ matrix.T, atol=2e-3)


def test_a_split_sweep_is_one_sweep() -> None:
    """Two parts in one format lose what one sweep over both does, and less than each by itself."""
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(1, 32, 128, generator=generator)
    mix = torch.randn(128, 128, generator=generator) / 8 + torch.eye(128)
    x = torch.randn(2000, 128, generator=generator) @ mix
    h = (x.T @ x / 2000)[None]
    options = Options(damp=1e-6)
    split = solve(weight, h, parse_format("64xint4-g64~int4-g64"), options)
    one = solve(weight, h, parse_format("int4-g64"), options)
    rounded = solve(weight, None, parse_format("64xint4-g64~int4-g64"), options)
    apart = ((weight - rounded.weight) @ h * (weight - rounded.weight)).sum()
    # not the same: scales are fitted to what other columns cannot make up for, and so lose less
    assert 0.85 < float(split.error.sum()) / float(one.error.sum()) < 1.03
    assert float(split.error.sum()) < 0.6 * float(apart)
    wider = solve(weight, h, parse_format("64xint8-g64~int4-g64"), options)
    assert float(wider.error.sum()) < float(split.error.sum())


@pytest.mark.parametrize("shape", [(24, 172), (8, 64), (3, 16), (5, 300)])
def test_split_sizes_are_exact(shape: tuple[int, int]) -> None:
    for name in ("128xint8-g128~int4-g128", "16xint8-channel~int3-g32-asym"):
        fmt = parse_format(name)
        assert isinstance(fmt, SplitFormat) and fmt.name == name
        solution = solve(torch.randn(1, *shape), None, fmt, Options())
        tensors = solution.store(0, slice(0, shape[0]))
        assert {n: tuple(t.shape) for n, t in tensors.items()} == {
            n: p.shape for n, p in fmt.parts(shape).items()
        }
        assert sum(t.nbytes for t in tensors.values()) == fmt.nbytes(shape)
        assert torch.equal(decode(tensors, fmt, shape), solution.weight[0])


@pytest.mark.parametrize(
    "name",
    [
        "12xint8-g128~int4-g128", "128xnvfp4~int4-g128", "64xint8-g64~nest24-g64",
        "64xlut4-g64~int4-g64", "64xint8-g64~int4-g64%50",
    ],
)  # fmt: skip
def test_splits_that_cannot_be(name: str) -> None:
    with pytest.raises(FormatError):
        parse_format(name)


def test_formats_need_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, bitnest.formats.inputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

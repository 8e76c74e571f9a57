"""Integer weights on the CPU kernels: every format and risky shape against the references.

Products of inputs in 8 bits are held to the reference bit for bit, of 16- and 24-bit inputs to
float64; every build that this machine can run gives the same bits.
"""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitnest.formats import BlockFormat, core_format, parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.cpu import layout, layout_integers
from bitnest.kernels.cpu.layout_integers import integer_values
from bitnest.kernels.cpu.library import NUMBERS, Inputs, declare, library, threads
from bitnest.kernels.cpu.linear import INPUT_BLOCK, CpuWeight
from bitnest.kernels.decode import decode
from bitnest.kernels.inputs import code_inputs
from bitnest.kernels.native import build_variant
from bitnest.kernels.products import integer_product, integer_weight
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.quantize.gptq import rtn

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

FORMATS = [
    *("int1-g128", "int2-g64-asym", "int3-g128", "int4-g128", "int5-g96-asym", "int6-g48"),
    *("int7-g64", "int8-g128", "int8-channel", "int4-channel-asym", "int8-tensor", "int4-g16"),
    *("int4-g112", "int8-b128x128", "int4-b32x64-asym", "int4-g64-dq", "int3-g64-asym-dq"),
    *("int4-g32-m2", "int4-g32-e8m0", "dgq4-g64", "ternary-g128", "mxint8", "nvint4", "mxfp4"),
    *("nvfp4", "mxfp6", "fp4_e2m1-channel", "fp4_e3m0-g64", "fp5_e2m2-g64", "fp3_e1m1-g64"),
    *("fp4_e2m1-b32x64-m1",),
]
SHAPES = [  # (N, K)
    (37, 100),  # neither a multiple of a block or unit, one short group
    (130, 1040),  # a short last group, blocks left over from a gang
    (5, 16),  # less than a block, half a unit
]
ERRORS = {torch.float32: 4e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
BUILDS = {
    "portable": ("-DBITNEST_PORTABLE",),
    "avx2": ("-march=x86-64-v3", "-O1"),
    "avx512bw": ("-march=x86-64-v4", "-O1"),
}
NEEDS = {"portable": "", "avx2": "avx2", "avx512bw": "avx512vl"}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(
    name: str, shape: tuple[int, int], half: torch.dtype = torch.bfloat16
) -> tuple[dict[str, torch.Tensor], BlockFormat]:
    fmt = core_format(parse_format(name))
    assert isinstance(fmt, BlockFormat)
    w = gaussian(*shape, seed=shape[0])
    return rtn(w[None], BlockCodec(fmt, half, True)).store(0, slice(None)), fmt


def laid(name: str, shape: tuple[int, int], half: torch.dtype = torch.bfloat16) -> CpuWeight:
    tensors, fmt = stored(name, shape, half)
    weight = layout.lay_out(tensors, fmt, shape)
    assert weight is not None and layout.why_not(fmt, shape) == ""
    return weight


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> ctypes.CDLL:
    if NEEDS[request.param] not in CPU:
        pytest.skip(f"this CPU has no {request.param}")
    found = build_variant("cpu", BUILDS[request.param])
    assert found is not None
    declare(found)
    assert found.isa().decode() == request.param
    found.set_threads(2)
    return found


def linear(found: ctypes.CDLL, weight: CpuWeight, x: torch.Tensor, planes: int) -> torch.Tensor:
    y = torch.full((len(x), weight.shape[0]), torch.nan, dtype=x.dtype)
    found.linear(
        weight.struct, x.data_ptr(), len(x), x.stride(0), y.data_ptr(), y.stride(0),
        NUMBERS[x.dtype], planes, INPUT_BLOCK,
    )  # fmt: skip
    return y


# ---------------------------------------------------------------- against float64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_multiplies_and_restores(name: str, shape: tuple[int, int]) -> None:
    half = torch.float16 if shape[0] % 2 else torch.bfloat16
    tensors, fmt = stored(name, shape, half)
    weight = layout.lay_out(tensors, fmt, shape)
    assert weight is not None
    exact = decode(tensors, fmt, shape).double()
    for dtype, bar in ERRORS.items():
        for tokens in (1, 2, 7, 17):
            x = gaussian(tokens, shape[1], seed=tokens).to(dtype)
            y = weight.product(x)
            assert y.dtype == dtype and y.shape == (tokens, shape[0])
            assert error(y, x.double() @ exact.T) < bar
    back = weight.restore()
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("planes", "least", "most"), [(2, 5e-6, 5e-5), (3, 1e-8, 3e-7)])
def test_coded_inputs_cost_what_is_said(
    tokens: int, planes: int, least: float, most: float
) -> None:
    """float32 through 16 bits, about 3e-5, and through 24, about 1e-7."""
    shape = (256, 2048)
    tensors, fmt = stored("int4-g128", shape)
    weight = layout.lay_out(tensors, fmt, shape)
    found = library()
    assert weight is not None and found is not None
    x = gaussian(tokens, shape[1])
    exact = x.double() @ decode(tensors, fmt, shape).double().T
    assert least < error(linear(found, weight, x, planes), exact) < most


def test_no_tokens_give_no_rows() -> None:
    weight = laid("int4-g128", (32, 128))
    assert weight.product(torch.empty(0, 128)).shape == (0, 32)
    assert weight.product(torch.empty(2, 0, 128)).shape == (2, 0, 32)


def test_inputs_need_not_be_contiguous() -> None:
    weight = laid("int3-g128", (48, 256))
    x = gaussian(256, 6).T
    rows = gaussian(6, 512)[:, :256]
    assert torch.equal(weight.product(x), weight.product(x.contiguous()))
    assert torch.equal(weight.product(rows), weight.product(rows.contiguous()))


def test_more_tokens_than_a_batch_are_all_there() -> None:
    weight = laid("int4-g64-dq", (32, 192))
    x = gaussian(1100, 192).bfloat16()
    y = weight.product(x)
    assert torch.equal(y[1024:], weight.product(x[1024:]))


def test_other_inputs_are_refused() -> None:
    weight = laid("int4-g128", (16, 128))
    with pytest.raises(TypeError, match="float64"):
        weight.product(torch.zeros(1, 128, dtype=torch.float64))
    with pytest.raises(TypeError, match="128"):
        weight.product(torch.zeros(1, 64))


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tokens", [1, 7])
def test_what_is_no_number_makes_its_row_nan(bad: float, tokens: int, dtype: torch.dtype) -> None:
    weight = laid("int4-g128", (40, 256))
    x = gaussian(tokens, 256).to(dtype)
    x[tokens // 2, 200] = bad
    y = weight.product(x)
    assert y[tokens // 2].isnan().all()
    keep = [t for t in range(tokens) if t != tokens // 2]
    assert y[keep].isfinite().all()


def test_tiny_inputs_and_zeros_give_zeros_not_nan() -> None:
    weight = laid("int4-g128", (16, 256))
    x = torch.zeros(2, 256)
    x[1] = 1e-40
    assert torch.equal(weight.product(x), torch.zeros(2, 16))


def test_dirty_padding_of_stored_codes_is_not_read() -> None:
    shape = (20, 100)
    tensors, fmt = stored("int3-g128", shape)
    dirty = dict(tensors, codes=tensors["codes"].clone())
    dirty["codes"][:, -1] |= -1 << (100 * 3 % 32)
    x = gaussian(3, 100)
    clean, other = (layout.lay_out(t, fmt, shape) for t in (tensors, dirty))
    assert clean is not None and other is not None
    assert torch.equal(clean.product(x), other.product(x))


def test_long_rows_of_large_codes_do_not_overflow() -> None:
    """8 bits, one scale a row, every product at its largest: cells must end before 2^31."""
    shape, columns = (16, 40960), 40960
    fmt = core_format(parse_format("int8-channel"))
    tensors = {
        "codes": torch.full((16, columns // 4), 0, dtype=torch.int32),  # -128 each
        "scales": torch.ones(16, 1, dtype=torch.bfloat16),
    }
    weight = layout.lay_out(tensors, fmt, shape)
    assert weight is not None
    for dtype, bar in ERRORS.items():
        for tokens in (1, 3):
            y = weight.product(torch.full((tokens, columns), 0.01, dtype=dtype)).double()
            value = float(torch.tensor(0.01, dtype=dtype))
            exact = torch.full((tokens, 16), -128.0 * columns * value, dtype=torch.float64)
            assert error(y, exact.to(dtype).double()) < max(bar, 1e-6)


# ---------------------------------------------------------------- bit for bit

CODED = ["int8-token", "int6-token", "int4-token", "int8-g64", "int8-g128", "int4-g32"]


@pytest.mark.parametrize("inputs", CODED)
@pytest.mark.parametrize(
    "name", ["int4-g128", "int3-g64-asym", "int8-channel", "int5-g48", "int2-g16"]
)
def test_integer_products_are_the_references(name: str, inputs: str) -> None:
    shape = (37, 1104)
    tensors, fmt = stored(name, shape)
    weight = layout.lay_out(tensors, fmt, shape)
    codes = integer_weight(tensors, fmt, shape)
    assert weight is not None and codes is not None
    for tokens in (1, 2, 17):
        parts = code_inputs(gaussian(tokens, shape[1]), parse_inputs(inputs))
        assert torch.equal(weight.product_coded(parts), integer_product(parts, codes))


@pytest.mark.parametrize("name", ["dgq4-g64", "dgq4-g128"])
def test_dual_grain_is_an_integer_across_the_row(name: str) -> None:
    shape = (37, 1104)
    tensors, fmt = stored(name, shape)
    weight = layout.lay_out(tensors, fmt, shape)
    codes = integer_weight(tensors, fmt, shape)
    assert weight is not None and codes is not None
    for tokens in (1, 17):
        parts = code_inputs(gaussian(tokens, shape[1]), parse_inputs("int8-token"))
        assert torch.equal(weight.product_coded(parts), integer_product(parts, codes))


def test_inputs_the_kernels_do_not_take_go_to_the_reference() -> None:
    weight = laid("int4-g128", (16, 128))
    parts = code_inputs(gaussian(2, 128), parse_inputs("int8-token"))
    assert weight.product_coded(parts) is not None
    assert weight.product_coded([replace(parts[0], integer=False)]) is None
    assert weight.product_coded([*parts, *parts]) is None


@pytest.mark.parametrize("name", [*FORMATS, "int4-g64-dq"])
def test_every_build_gives_the_same_bits(build: ctypes.CDLL, name: str) -> None:
    weight = laid(name, (53, 400))
    found = library()
    assert found is not None
    for tokens in (1, 7):
        for dtype, planes in ((torch.float32, 3), (torch.float32, 2), (torch.float16, 2)):
            x = gaussian(tokens, 400).to(dtype)
            assert torch.equal(linear(build, weight, x, planes), linear(found, weight, x, planes))


def test_8_bit_inputs_in_c_are_the_references() -> None:
    found = library()
    assert found is not None
    x = gaussian(3, 100)
    x[1] = 0
    expected = code_inputs(x, parse_inputs("int8-g32"))[0]
    codes, scales = torch.empty(3, 128, dtype=torch.int8), torch.empty(3, 4)
    sums = torch.empty(3, 8, dtype=torch.int32)
    out = Inputs(tokens=3, columns=128, planes=1, block=32, codes=codes.data_ptr(),
                 scales=scales.data_ptr(), sums=sums.data_ptr())  # fmt: skip
    found.code_inputs(x.data_ptr(), 100, 100, out, 0, 3)
    assert torch.equal(codes[:, :100].float(), expected.values)
    assert torch.equal(scales, expected.scales) and not codes[:, 100:].any()
    assert torch.equal(sums, codes.view(3, 8, 16).sum(2, dtype=torch.int32))


# ---------------------------------------------------------------- what runs, and its size


def test_formats_that_are_no_small_integers_are_said() -> None:
    for name in ("fp8-channel", "mxfp6_e3m2", "nf4-g64", "ternary-g128-dict"):
        fmt = core_format(parse_format(name))
        assert isinstance(fmt, BlockFormat)
        assert layout_integers.why_not(fmt, (16, 128)) != ""


def test_small_floats_as_integers_are_the_values() -> None:
    for name in ("mxfp4", "mxfp6", "fp4_e3m0-g64"):
        spec = core_format(parse_format(name)).element.spec
        found = integer_values(spec)
        assert found is not None
        assert [value * found[1] for value in found[0]] == list(spec.values())


def test_weights_take_hardly_more_memory_than_they_are_stored_in() -> None:
    tensors, _ = stored("int4-g128", (256, 1024))
    weight = laid("int4-g128", (256, 1024))
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_threads_follow_torch() -> None:
    assert 1 <= threads() <= torch.get_num_threads()

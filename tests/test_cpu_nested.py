"""Nested weights on the CPU kernels: every width of one set of planes, against float64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from test_cpu_tables import FLOAT32, ISAS, check

from bitnest.errors import FormatError
from bitnest.formats.nested import NestedFormat
from bitnest.kernels.cpu import layout
from bitnest.kernels.cpu.layout_nested import NestedCpuWeight
from bitnest.kernels.cpu.library import declare, library
from bitnest.kernels.native import build_variant
from bitnest.kernels.nested import decode_nested, split_planes
from bitnest.kernels.packing import pack_bits

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

ALL = (2, 3, 4, 5, 6, 7, 8)
FORMATS = [
    NestedFormat("nest", ALL, 128), NestedFormat("nest", (1, *ALL), 32),
    NestedFormat("nest", (2, 4, 8), 48), NestedFormat("nest", (3, 6), 128),
    NestedFormat("nest", (4,), 16), NestedFormat("nest", (1, 5), 64), NestedFormat("mat", ALL, 128),
    NestedFormat("mat", (1, 4, 8), 64), NestedFormat("mwq", ALL, 128),
    NestedFormat("mwq", (3, 4, 6), 32),
]  # fmt: skip
SHAPES = [(33, 200), (70, 416)]
NAMES = [f.name for f in FORMATS]


def stored(fmt: NestedFormat, shape: tuple[int, int], half: torch.dtype = torch.bfloat16) -> dict:
    """Random tensors of a nested format."""
    torch.manual_seed(len(fmt.name))
    found = split_planes(torch.randint(0, 1 << fmt.widths[-1], shape, dtype=torch.uint8), fmt)
    for name, part in fmt.parts(shape).items():
        if name.startswith("table"):
            found[name] = torch.randn(part.shape).sort().values.to(half)
        elif name == "zeros":
            found[name] = torch.randint(0, 1 << 30, part.shape, dtype=torch.int32)
        elif part.dtype == "HALF":
            found[name] = (torch.rand(part.shape) + 0.1).to(half)
    return found


def rounding(fmt: NestedFormat) -> float:
    """Of a weight: 2^-9 by table; integers of mwq lose inputs beyond 24 bits only."""
    return 1e-6 if fmt.kind == "mwq" else 2**-9


def laid_out(tensors: dict, fmt: NestedFormat, shape: tuple[int, int]) -> NestedCpuWeight:
    weight = layout.lay_out(tensors, fmt, shape)
    assert isinstance(weight, NestedCpuWeight) and layout.why_not(fmt, shape) == ""
    return weight


def bound_of(tensors: dict, fmt: NestedFormat, shape: tuple[int, int]) -> torch.Tensor:
    """(O, I) magnitudes that are added up to a weight: of mwq more than the weight."""
    dense = decode_nested(tensors, fmt, shape, torch.float32).abs()
    if fmt.kind == "mwq":
        dense += 2 ** fmt.widths[0] * tensors["scales"].float().max() + len(fmt.widths)
    return dense


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_every_width_of_one_set_of_planes(fmt: NestedFormat, shape: tuple[int, int]) -> None:
    tensors = stored(fmt, shape)
    weight = laid_out(tensors, fmt, shape)
    for width in fmt.widths:
        own = fmt.at(width)
        dense = decode_nested(tensors, own, shape, torch.float32)
        for tokens in (0, 1, 2, 3, 17, 130):
            x = torch.randn(tokens, shape[1])
            y = weight.product(x, bits=width)
            bound = x.double().abs() @ bound_of(tensors, own, shape).double().T
            error = (y.double() - x.double() @ dense.double().T).abs()
            assert (error <= bound * (rounding(fmt) + FLOAT32)).all(), width


def test_one_bit_of_a_nested_weight_by_hand() -> None:
    fmt = NestedFormat("nest", (1, 2), 32)
    codes = torch.tensor([[0, 1, 2, 3] * 8] * 16, dtype=torch.uint8)
    tensors = split_planes(codes, fmt) | {
        "table1": torch.tensor([-1.0, 2.0]).bfloat16(),
        "table2": torch.tensor([-2.0, -0.5, 1.0, 4.0]).bfloat16(),
        "scales": torch.full((16, 1), 0.5).bfloat16(),
    }
    weight = laid_out(tensors, fmt, (16, 32))
    x = torch.zeros(1, 32)
    x[0, 1], x[0, 2], x[0, 7] = 1.0, 10.0, 100.0  # codes 1, 2, 3
    assert weight.product(x, bits=1)[0, 0] == 0.5 * (-1 + 20 + 200)
    assert weight.product(x)[0, 15] == 0.5 * (-0.5 + 10 + 400)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_restored_bit_for_bit(fmt: NestedFormat, half: torch.dtype) -> None:
    shape = (37, 111)
    tensors = stored(fmt, shape, half)
    if "zeros" in tensors:  # beyond the last row a word has nothing
        zeros = torch.randint(0, 1 << fmt.widths[0], (shape[0], fmt.groups(shape[1])))
        tensors["zeros"] = pack_bits(zeros.T, fmt.widths[0]).T.contiguous()
    back = laid_out(tensors, fmt, shape).restore()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


@pytest.mark.parametrize("fmt", FORMATS, ids=NAMES)
def test_widths_come_and_go_without_moving_planes(fmt: NestedFormat) -> None:
    shape = (33, 200)
    tensors = stored(fmt, shape)
    first = fmt.at(fmt.widths[0])
    weight = laid_out({n: tensors[n] for n in first.parts(shape)}, first, shape)
    before = {name: t.data_ptr() for name, t in weight.held.items()}
    small, x = weight.nbytes, torch.randn(2, shape[1])
    narrow = weight.product(x)
    weight.change(fmt, {n: t for n, t in tensors.items() if n not in first.parts(shape)})
    assert before.items() <= {name: t.data_ptr() for name, t in weight.held.items()}.items()
    assert torch.equal(weight.product(x), laid_out(tensors, fmt, shape).product(x))
    assert torch.equal(weight.product(x, bits=first.widths[-1]), narrow)
    weight.change(first, {})
    assert weight.nbytes == small and torch.equal(weight.product(x), narrow)
    assert weight.restore().keys() == first.parts(shape).keys()


def test_a_width_that_is_not_there_is_refused() -> None:
    fmt, shape = NestedFormat("nest", (2, 4), 32), (16, 32)
    weight = laid_out(stored(fmt, shape), fmt, shape)
    with pytest.raises(FormatError, match="no width 3"):
        weight.product(torch.zeros(1, 32), bits=3)
    with pytest.raises(FormatError, match="other planes"):
        weight.change(NestedFormat("nest", (3, 4), 32), {})


def test_bytes_are_those_of_the_planes() -> None:
    fmt, shape = NestedFormat("nest", ALL, 128), (256, 1024)
    weight = laid_out(stored(fmt, shape), fmt, shape)
    planes = sum(t.nbytes for name, t in weight.held.items() if name.startswith("bit"))
    assert planes == 256 * 1024
    assert weight.nbytes - planes < 256 * 8 * 2 + 2048


@pytest.mark.parametrize("name", ["any", "stack"])
def test_kinds_without_a_kernel_say_why(name: str) -> None:
    fmt = NestedFormat(name, (2, 3), None, 4 if name == "stack" else None)
    assert layout.why_not(fmt, (16, 32)) and layout.lay_out({}, fmt, (16, 32)) is None


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_other_instruction_sets(isa: str) -> None:
    other = build_variant("cpu", ISAS[isa])
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if other is None or {"avx512": "avx512bw", "avx2": "avx2"}.get(isa, "") not in flags:
        pytest.skip("not for this machine")
    declare(other)
    shape = (40, 224)
    for fmt in FORMATS[:3]:
        tensors = stored(fmt, shape)
        weight = laid_out(tensors, fmt, shape)
        for width in fmt.widths:
            dense = decode_nested(tensors, fmt.at(width), shape, torch.float32)
            for tokens in (1, 3):
                x, y = torch.randn(tokens, shape[1]), torch.empty(tokens, shape[0])
                other.linear(
                    ctypes.byref(weight.at[width][0]), x.data_ptr(), tokens, x.stride(0),
                    y.data_ptr(), shape[0], 0, 3, 128,
                )  # fmt: skip
                check(y, x, dense, 2**-9)

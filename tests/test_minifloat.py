"""Small floats, to the bit: enumerated and hand-written tables, four other implementations."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.errors import FormatError
from bitnest.formats.minifloat import MiniFloat
from bitnest.kernels.minifloat import decode, encode, round_to

ALL = [MiniFloat(e, m) for e in range(1, 6) for m in range(4) if 1 + e + m <= 8]
ML_DTYPES = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
specs = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)


def parse(name: str) -> MiniFloat:
    return MiniFloat(int(name[1]), int(name[3]))


def by_definition(name: str, code: int) -> float:
    """The value of one code, read off its bits as a fraction."""
    e, m = int(name[1]), int(name[3])
    text = format(code, f"0{1 + e + m}b")
    sign, field, fraction = text[0], text[1 : 1 + e], text[1 + e :]
    bias = {1: 0, 2: 1, 3: 3, 4: 7, 5: 15}[e]
    significand = Fraction(int("0" + fraction, 2), 2**m) + (1 if "1" in field else 0)
    value = float(significand * Fraction(2) ** (max(int(field, 2), 1) - bias))
    if name == "e4m3" and text[1:] == "1111111":
        value = math.nan
    if name == "e5m2" and field == "11111":
        value = math.inf if fraction == "00" else math.nan
    return math.copysign(value, -1 if sign == "1" else 1)


def finite_magnitudes(spec: MiniFloat) -> np.ndarray:
    """The non-negative values in code order, as float64, which holds them and their midpoints."""
    values = np.array([by_definition(spec.name, code) for code in range(1 << (spec.bits - 1))])
    return values[np.isfinite(values)]


def nearest(x: np.ndarray, spec: MiniFloat) -> np.ndarray:
    """float32 x rounded by search in the enumerated table, ties to the even code's value."""
    table = finite_magnitudes(spec)
    middles = (table[1:] + table[:-1]) / 2
    magnitude = np.abs(x.astype(np.float64))
    below = np.searchsorted(middles, magnitude, side="left")  # the lower value on a tie
    above = np.searchsorted(middles, magnitude, side="right")
    # Without mantissa bits only zero is even: the other ties go up (IEEE 754, one-digit precision).
    even = np.where(below % 2 == 0, below, above) if spec.mantissa else np.where(below, above, 0)
    return np.copysign(table[np.where(below == above, below, even)], x).astype(np.float32)


def hard_inputs(spec: MiniFloat) -> np.ndarray:
    """Every value and tie with its neighbours, subnormal, huge and infinite, and all bfloat16."""
    table = finite_magnitudes(spec)
    past = 2 * table[-1] - table[-2]  # where the next value would be, if there were one
    ties = (table[1:] + table[:-1]) / 2
    points = np.float32([*table, *ties, past, (past + table[-1]) / 2])
    up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))
    extremes = np.float32([1e-45, 1e-40, 1.1754944e-38, 1e30, 3.4028235e38, np.inf])
    magnitudes = np.concatenate([points, up, down, extremes])
    bfloat16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    return np.concatenate([magnitudes, -magnitudes, bfloat16[~np.isnan(bfloat16)]])


def rounded(x: np.ndarray, spec: MiniFloat) -> np.ndarray:
    return round_to(torch.from_numpy(x), spec).numpy()


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.array_equal(ours.view(np.uint32), theirs.astype(np.float32).view(np.uint32))


@specs
def test_every_code_has_the_value_its_bits_define(spec: MiniFloat) -> None:
    values = np.array([by_definition(spec.name, code) for code in range(1 << spec.bits)])
    decoded = decode(torch.arange(1 << spec.bits), spec).numpy()
    for ours in (np.array(spec.values()), decoded):
        assert np.array_equal(ours, values, equal_nan=True)
        assert np.array_equal(np.signbit(ours), np.signbit(values))


def test_hand_written_tables() -> None:
    e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert parse("e2m1").values() == (*e2m1, *(-value for value in e2m1))
    subnormal = [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
    normal = [1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2.0, 2.25]
    assert parse("e2m3").values()[:18] == (*subnormal, *normal)
    assert parse("e3m2").values()[:6] == (0.0, 0.0625, 0.125, 0.1875, 0.25, 0.3125)
    assert parse("e3m2").values()[28:33] == (16.0, 20.0, 24.0, 28.0, 0.0)
    assert parse("e3m2").values()[63] == -28.0
    assert parse("e2m0").values() == (0.0, 1.0, 2.0, 4.0, 0.0, -1.0, -2.0, -4.0)
    assert parse("e1m1").values() == (0.0, 1.0, 2.0, 3.0, 0.0, -1.0, -2.0, -3.0)


def test_extremes_are_the_published_ones() -> None:
    expected = {  # bias, exponents of the smallest normal and the largest, largest, smallest two
        "e4m3": (7, -6, 8, 448.0, 2.0**-6, 2.0**-9),
        "e5m2": (15, -14, 15, 57344.0, 2.0**-14, 2.0**-16),
        "e3m2": (3, -2, 4, 28.0, 0.25, 0.0625),
        "e2m3": (1, 0, 2, 7.5, 1.0, 0.125),
        "e2m1": (1, 0, 2, 6.0, 1.0, 0.5),
        "e2m2": (1, 0, 2, 7.0, 1.0, 0.25),
        "e3m1": (3, -2, 4, 24.0, 0.25, 0.125),
        "e1m1": (0, 1, 1, 3.0, 2.0, 1.0),
        "e2m0": (1, 0, 2, 4.0, 1.0, 1.0),
    }
    for spec in map(parse, expected):
        exponents = (spec.bias, spec.min_exponent, spec.max_exponent)
        sizes = (spec.largest, spec.smallest_normal, spec.smallest_subnormal)
        assert exponents + sizes == expected[spec.name]


def test_only_e4m3_and_e5m2_have_codes_that_are_no_numbers() -> None:
    assert parse("e4m3").nan_codes == parse("e4m3").special_codes == (0x7F, 0xFF)
    assert parse("e5m2").nan_codes == (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF)
    assert parse("e5m2").special_codes == (0x7C, *range(0x7D, 0x80), 0xFC, *range(0xFD, 0x100))
    assert len(ALL) == 19, "every format of at most 8 bits"
    assert {spec.name for spec in ALL if spec.special_codes} == {"e4m3", "e5m2"}


@pytest.mark.parametrize(("e", "m"), [(0, 3), (6, 1), (2, 4), (5, 3), (2, -1)])
def test_impossible_fields_are_named(e: int, m: int) -> None:
    with pytest.raises(FormatError, match=f"{e} exponent and {m} mantissa") as error:
        MiniFloat(e, m)
    assert error.value.hint


@specs
def test_rounding_is_the_nearest_of_the_table_and_ties_go_to_even(spec: MiniFloat) -> None:
    assert_same_bits(rounded(hard_inputs(spec), spec), nearest(hard_inputs(spec), spec))


@specs
@settings(max_examples=25, deadline=None)
@given(x=st.lists(st.floats(width=32, allow_nan=False), min_size=1), seed=st.integers(0, 10**6))
def test_rounding_is_nearest_idempotent_odd_and_monotone(
    spec: MiniFloat, x: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    spread = rng.standard_normal(200) * spec.largest * 2.0 ** rng.integers(-40, 2, 200)
    values = np.sort(np.concatenate([x, spread]).astype(np.float32))
    q = rounded(values, spec)
    assert_same_bits(q, nearest(values, spec))
    assert_same_bits(rounded(q, spec), q)
    assert_same_bits(rounded(-values, spec), -q)
    assert (np.diff(q) >= 0).all()
    assert_same_bits(decode(encode(torch.from_numpy(q), spec), spec).numpy(), q)


@specs
def test_every_finite_code_survives_decode_and_encode(spec: MiniFloat) -> None:
    finite = sorted(set(range(1 << spec.bits)) - set(spec.special_codes))
    codes = torch.tensor(finite, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(encode(decode(codes, spec, dtype).float(), spec), codes)


def test_views_and_outputs_that_are_not_contiguous() -> None:
    spec, x = parse("e4m3"), torch.randn(6, 10, 8) * 100
    expected = torch.from_numpy(nearest(x.numpy(), spec))
    assert torch.equal(round_to(x.mT[1:, ::2], spec), expected.mT[1:, ::2])
    assert torch.equal(round_to(x[0, 0, 0].expand(3, 2), spec), expected[0, 0, 0].expand(3, 2))
    assert torch.equal(encode(expected.mT, spec), encode(expected, spec).mT)
    assert torch.equal(decode(encode(expected, spec).mT, spec), expected.mT)
    before = x.clone()
    assert torch.equal(round_to(x, spec), expected)
    assert torch.equal(x, before), "without out the input is left alone"
    assert round_to(x[:, ::3], spec, out=x[:, ::3]).data_ptr() == x.data_ptr()
    assert torch.equal(x[:, ::3], expected[:, ::3])
    assert torch.equal(x[:, 1::3], before[:, 1::3])


def test_nan_stays_nan_and_other_dtypes_are_refused() -> None:
    x = torch.tensor([math.nan, 1.0])
    assert all(round_to(x, spec).isnan().tolist() == [True, False] for spec in ALL)
    with pytest.raises(TypeError, match="float64"):
        round_to(x.double(), parse("e4m3"))


def assert_agrees_with(spec: MiniFloat, cast: Callable, read: Callable) -> None:
    """cast: float32 to their codes. read: codes to their float32 values."""
    codes = np.arange(1 << spec.bits, dtype=np.uint8)
    ours, theirs = decode(torch.from_numpy(codes), spec).numpy(), read(codes)
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    assert_same_bits(ours[~np.isnan(ours)], theirs[~np.isnan(theirs)])
    x = hard_inputs(spec)
    x = x[np.abs(x) <= spec.largest]  # beyond, the 8-bit casts do not all saturate
    assert_same_bits(rounded(x, spec), read(cast(x)))
    assert np.array_equal(encode(torch.from_numpy(rounded(x, spec)), spec).numpy(), cast(x))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_codes_and_rounding_are_those_of_ml_dtypes(name: str) -> None:
    suffix = "" if name == "e5m2" else "fn"
    dtype = getattr(pytest.importorskip("ml_dtypes"), f"float{parse(name).bits}_{name}{suffix}")
    assert_agrees_with(
        parse(name), lambda x: x.astype(dtype).view(np.uint8), lambda c: c.view(dtype).astype("f4")
    )


@pytest.mark.parametrize("name", TORCH)
def test_codes_and_rounding_are_those_of_torch(name: str) -> None:
    assert_agrees_with(
        parse(name),
        lambda x: torch.from_numpy(x).to(TORCH[name]).view(torch.uint8).numpy(),
        lambda codes: torch.from_numpy(codes).view(TORCH[name]).float().numpy(),
    )


def test_saturation_is_where_the_casts_of_others_leave_the_numbers() -> None:
    x = torch.tensor([464.0, 465.0, -1e9, math.inf])  # 464: halfway from 448 to what 480 would be
    assert round_to(x, parse("e4m3")).tolist() == [448.0, 448.0, -448.0, 448.0]
    y = torch.tensor([61439.0, 61440.0, -1e9, math.inf])  # 61440: halfway from 57344 to 65536
    assert round_to(y, parse("e5m2")).tolist() == [57344.0, 57344.0, -57344.0, 57344.0]
    assert y.to(torch.float8_e5m2).tolist() == [57344.0, math.inf, -math.inf, math.inf]
    ml_dtypes = pytest.importorskip("ml_dtypes")
    cast = x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(cast, [448.0, *[math.nan] * 3], equal_nan=True)


def test_fp4_is_that_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA as theirs

    spec = parse("e2m1")
    assert (theirs.bits, theirs.max, theirs.min) == (spec.bits, spec.largest, -spec.largest)
    x = torch.from_numpy(hard_inputs(spec))
    x = x[x.abs() < math.inf][None]
    q = round_to(x, spec)
    assert torch.equal(q, theirs.cast_to_fp4(x))  # equal as numbers: theirs drops -0's sign
    packed, codes = helpers.pack_fp4_to_uint8(q), encode(q, spec)
    assert torch.equal(packed, codes[:, ::2] | codes[:, 1::2] << 4)
    unpacked = helpers.unpack_fp4_from_uint8(packed, *q.shape, dtype=torch.float32)
    assert_same_bits(decode(codes, spec).numpy(), unpacked.numpy())


def test_fp4_and_scale_tables_are_those_of_gguf() -> None:
    quants = pytest.importorskip("gguf.quants")
    doubled = tuple(2 * value for value in parse("e2m1").values())
    assert quants.MXFP4.kvalues == quants.NVFP4.kvalues == doubled
    halved = quants.NVFP4.ue4m3_to_fp32(np.arange(0x7F, dtype=np.uint8))  # theirs reads NaN as 0
    assert_same_bits(np.float32(parse("e4m3").values()[:0x7F]), 2 * halved)

"""Encoding in C and in torch against the block codec, and the compiling behind it.

Without a compiler the tests that need one are skipped, by name; the others still hold.
"""

import logging
import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitnest.cli import main
from bitnest.formats import core_format, parse_format
from bitnest.formats.block import BlockFormat
from bitnest.kernels import native
from bitnest.kernels.decode import NF4, code_values, decode
from bitnest.kernels.encode import Encoded, encode, implementation, supported
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.quantize.gptq import Quantized, rtn
from bitnest.quantize.solve import Options, solve
from tests.test_formats import FAMILIES
from tests.tiny import Builder


def words(text: str) -> list[str]:
    return text.split()


NAMES = words("""
int2-g64 int3-g48 int4-g128 int5-g16 int6-channel int7-g112 int8-channel int8-g32
int4-g128-balanced int2-g16-balanced int2-g16-asym int3-g48-asym int4-g128-asym
int8-g128-asym int5-channel-asym int4-g32-m1 int4-g32-asym-m1 int4-g32-e8m0 int4-g32-asym-e8m0
int4-g32-e8m0-ocp int4-g32-e8m0-ceil fp8_e4m3-channel fp8_e5m2-g32 fp7_e3m3-g32 fp7_e5m1-g32-m1
fp6_e3m2-g64 fp6_e2m3-channel fp6_e5m0-g16 fp5_e2m2-g64 fp5_e3m1-g64 fp5_e1m3-g32 fp4_e2m1-g32
fp4_e3m0-g32 fp3_e1m1-g32 fp3_e2m0-g32 fp2_e1m0-g16 mxfp8 mxfp8-ocp mxfp8_e5m2 mxfp6 mxfp6_e3m2
mxfp4 mxfp4-ocp mxfp4-ceil mxint8 mxint8-ocp mxint6 mxint4 mxint4-ceil
nvfp4 nvint4 int2-g16-e4m3 int8-channel-e4m3 int4-g48-balanced-e4m3 fp8_e4m3-g32-e4m3
fp8_e5m2-channel-e4m3 fp6_e2m3-g16-e4m3 fp5_e3m1-g112-e4m3 fp4_e3m0-g32-e4m3
nf4-g64 nf4-g48 nf4-g16 nf4-channel nf4-g32-m1 nf4-g32-e8m0 nf4-g32-e8m0-ocp nf4-g16-e4m3
int4-g16-asym-e4m3 int3-g48-asym-e4m3
""")
# one row; a short last group; odd everything; more rows than lanes, tails; many whole groups
SHAPES = [(1, 16), (3, 40), (7, 129), (65, 272), (5, 100), (37, 1040)]
HALVES = [torch.bfloat16, torch.float16]
SLACK = 1e-5  # of a row's error, where two candidates tie

no_compiler = native.load("encode") is None
needs_compiler = pytest.mark.skipif(no_compiler, reason="no C compiler: only the reference runs")
PATHS = [False, pytest.param(True, marks=needs_compiler)]


def fmt_of(name: str) -> BlockFormat:
    return core_format(parse_format(name))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_codec(w: torch.Tensor, fmt: BlockFormat, half: torch.dtype, clip: bool) -> Quantized:
    return rtn(w.float()[None], BlockCodec(fmt, half, clip))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


def assert_close(found: Encoded, wanted: Quantized, w: torch.Tensor) -> None:
    """Rows lose no more than `wanted`, and all but one code in a thousand are the same.

    A least-squares scale that lies between two stored ones may be rounded to either, and then its
    row differs by more: the caller picks seeds where none does, or checks the total.
    """
    shape = (w.shape[0], w.shape[1])
    own = (decode(found.tensors, found.fmt, shape) - w.float()).double().square().sum(1)
    reference = (wanted.weight[0] - w.float()).double().square().sum(1)
    assert float((own / reference.clamp_min(1e-300)).nan_to_num(1).max()) <= 1 + SLACK
    stored = wanted.store(0, slice(None))
    equal = code_values(found.tensors, found.fmt, shape) == code_values(stored, found.fmt, shape)
    assert float(equal.float().mean()) >= 0.999


# ---------------------------------------------------------------- equality


def test_names_here_cover_every_supported_family_of_the_format_tests() -> None:
    blocks = [f for f in map(parse_format, FAMILIES) if isinstance(f, BlockFormat)]
    known = {(type(f.element), f.scale, f.symmetric) for f in map(fmt_of, NAMES)}
    assert {(type(f.element), f.scale, f.symmetric) for f in blocks if supported(f)} <= known
    assert all(supported(fmt_of(name)) for name in NAMES)


@pytest.mark.parametrize(
    "name",
    words("""
    int1-g32 int1-g32-e4m3 int4-g64-dq nf4-g64-dq nf4-tensor lut3-g64
    lut4-channel int4-tensor int8-b16x32 int4-g32-m2 dgq4-g32 ternary-g64
    """),
)
def test_format_with_shared_numbers_is_refused(name: str) -> None:
    assert not supported(fmt_of(name))
    with pytest.raises(ValueError, match=name):
        encode(torch.ones(2, 32), fmt_of(name))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_without_clip_every_byte_is_the_codecs(name: str, path: bool) -> None:
    fmt = fmt_of(name)
    for seed, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            w = (gaussian(*shape, seed=seed) * 10.0 ** (seed - 3)).to(dtype)
            for half in HALVES:
                wanted = by_codec(w, fmt, half, clip=False)
                found = encode(w, fmt, half, clip=False, native=path)
                assert_same(found.tensors, wanted.store(0, slice(None)))
                torch.testing.assert_close(found.error, wanted.error[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_with_clip_no_row_is_worse_than_the_codecs(name: str, path: bool) -> None:
    fmt = fmt_of(name)
    for seed, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            w = (gaussian(*shape, seed=seed) * 0.02).to(dtype)
            half = HALVES[seed % 2]
            assert_close(encode(w, fmt, half, native=path), by_codec(w, fmt, half, True), w)


@needs_compiler
@pytest.mark.parametrize(
    "name",
    words("int2-g128 int4-g128 int3-g64-asym int8-channel mxfp4 fp6_e3m2-g32 nvfp4 nf4-g64"),
)
def test_total_error_of_a_real_size_is_the_codecs(name: str) -> None:
    w = (gaussian(512, 1024) * 0.02).bfloat16()
    found, wanted = encode(w, fmt_of(name)), by_codec(w, fmt_of(name), torch.bfloat16, True)
    assert float(found.error.double().sum() / wanted.error.double().sum() - 1) < SLACK
    equal = (
        found.tensors["codes"] == wanted.store(0, slice(None))["codes"]
        if ("codes" in found.tensors)
        else found.tensors["codes4"] == wanted.store(0, slice(None))["codes4"]
    )
    assert float(equal.float().mean()) > 0.999


def special(dtype: torch.dtype) -> torch.Tensor:
    """Rows (16, 160), one kind of trouble each."""
    w = gaussian(16, 160, seed=3)
    w[0] = 0
    w[1] = -0.0
    w[2] = 0.37
    w[3] = -0.37
    w[4] *= 1e-30
    w[5] = 1e-39  # a float32 subnormal
    w[6] *= 1e37
    w[7] = w[7].sign() * 1.6e38  # the range is still finite
    w[8, 5] = 1e4  # an outlier
    w[9] = w[9].abs()
    w[10] = -w[10].abs()
    w[11, 32:] = 0
    w[12] = torch.arange(160) * 0.5 - 40  # halves: ties
    w[13] = torch.where(w[13] > 0, 0.0, -0.0)
    w[14] = 2.0 ** torch.arange(-80, 80).clamp(-126, 120)
    w[15] *= 2.0**-24  # float16's subnormals
    return w.to(dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_zeros_constants_extremes_and_ties_are_the_codecs(name: str, path: bool) -> None:
    fmt = fmt_of(name)
    for dtype in (torch.float32, torch.bfloat16):
        w = special(dtype)
        for half in HALVES:
            found = encode(w, fmt, half, clip=False, native=path)
            assert_same(found.tensors, by_codec(w, fmt, half, False).store(0, slice(None)))
            searched = encode(w, fmt, half, clip=True, native=path)
            reference = by_codec(w, fmt, half, True)
            decoded = decode(searched.tensors, fmt, (16, 160))
            own = (decoded - w.float()).double().square().sum(1)
            wanted = (reference.weight[0] - w.float()).double().square().sum(1)
            fine = torch.isfinite(wanted) & (wanted < 1e38) & (wanted > 1e-30)
            assert bool((own[fine] <= wanted[fine] * (1 + 1e-4)).all())


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_a_wider_matrix_are_encoded_where_they_lie(path: bool) -> None:
    whole = gaussian(40, 300).bfloat16()
    for w in (whole[3:30, 10:210], whole[::3], whole.T, whole[:1].expand(20, -1)):
        found = encode(w, fmt_of("int4-g32-asym"), native=path)
        assert_same(found.tensors, encode(w.clone(), fmt_of("int4-g32-asym"), native=path).tensors)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["int3-g64-asym", "mxfp6", "int4-channel"])
def test_slice_of_rows_is_what_those_rows_alone_give(name: str, path: bool) -> None:
    w = gaussian(50, 200)
    whole = encode(w, fmt_of(name), native=path)
    for rows in (slice(0, 50), slice(None), slice(7, 31), slice(48, 50)):
        alone = encode(w[rows].contiguous(), fmt_of(name), clip=True, native=path)
        assert_same(whole.rows(rows), alone.tensors)


@needs_compiler
@pytest.mark.parametrize("name", ["int4-g64-asym", "nvfp4", "nf4-g64"])
def test_threads_change_nothing(name: str) -> None:
    w, fmt = gaussian(300, 256), fmt_of(name)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = encode(w, fmt)
        torch.set_num_threads(3)
        three = encode(w, fmt)
    finally:
        torch.set_num_threads(before)
    assert_same(three.tensors, one.tensors)
    assert torch.equal(three.error, one.error)


@pytest.mark.parametrize("path", PATHS)
def test_int4_codes_and_scale_by_hand(path: bool) -> None:
    w = torch.tensor([[7.0, -7.0, 0.5, 1.5, -0.5, -1.5, 3.4, 3.6] + [0.0] * 8])
    found = encode(w, fmt_of("int4-channel"), clip=False, native=path)
    assert found.tensors["scales"].tolist() == [[1.0]]
    codes = [15, 1, 8, 10, 8, 6, 11, 12] + [8] * 8  # ties to even, plus 8
    words = [sum(c << 4 * i for i, c in enumerate(codes[k : k + 8])) for k in (0, 8)]
    assert [int(x) & 0xFFFFFFFF for x in found.tensors["codes"][0]] == words
    assert float(found.error) == pytest.approx(4 * 0.25 + 2 * 0.16, rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_mxfp4_codes_and_exponent_by_hand(path: bool) -> None:
    w = torch.tensor([[6.0, -6.0, 0.25, 0.75, -0.25, 2.5, -5.0, 0.1] + [0.0] * 24])
    found = encode(w, fmt_of("mxfp4"), clip=False, native=path)
    assert found.tensors["scales"].tolist() == [[127]]
    codes = [7, 15, 0, 2, 8, 4, 14, 0]  # 0.75 to 1, 2.5 to 2, 5 to 4; -0.25 to -0
    assert int(found.tensors["codes"][0, 0]) & 0xFFFFFFFF == sum(
        c << 4 * i for i, c in enumerate(codes)
    )


@pytest.mark.parametrize("path", PATHS)
def test_nvfp4_global_scales_and_codes_by_hand(path: bool) -> None:
    w = torch.zeros(2, 32)
    w[0, :4] = torch.tensor([12.0, -12.0, 5.0, 0.5])
    w[1, 16:18] = torch.tensor([-0.125, 0.01])
    found = encode(w, fmt_of("nvfp4"), clip=False, native=path)
    assert found.tensors["global"].tolist() == [224.0]  # 448 * 6 / 12
    # scales 2 and 1 / 48 times 224 are 448 and 4.67, of which E4M3 has 4.5; of zeros the least
    assert found.tensors["scales"].tolist() == [[0x7E, 1], [1, 0x49]]
    codes = [7, 15, 4, 0]  # 6, -6, 2.5 to 2, 0.25 to 0: ties to even
    assert int(found.tensors["codes"][0, 0]) == sum(c << 4 * i for i, c in enumerate(codes))
    assert int(found.tensors["codes"][1, 2]) == 15 + (1 << 4)  # -6.2 to -6, 0.498 to 0.5


@pytest.mark.parametrize("path", PATHS)
def test_matrix_of_zeros_has_a_finite_global_scale(path: bool) -> None:
    found = encode(torch.zeros(3, 40), fmt_of("nvfp4"), native=path)
    assert bool(torch.isfinite(found.tensors["global"]).all())
    assert found.tensors["scales"].unique().tolist() == [1]
    assert not decode(found.tensors, found.fmt, (3, 40)).any()


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_a_stack_keep_the_global_scale_of_all(path: bool) -> None:
    w = gaussian(50, 64) * torch.linspace(0.1, 2, 50)[:, None]
    whole = encode(w, fmt_of("nvfp4"), native=path)
    wanted = decode(whole.tensors, whole.fmt, (50, 64))
    for rows in (slice(0, 17), slice(30, 50), slice(None)):
        part = whole.rows(rows)
        assert torch.equal(part["global"], whole.tensors["global"])
        assert torch.equal(decode(part, whole.fmt, (len(wanted[rows]), 64)), wanted[rows])


@pytest.mark.parametrize("path", PATHS)
def test_nf4_tie_goes_to_the_lower_entry(path: bool) -> None:
    entries = torch.tensor(NF4)
    middles = (entries[1:] + entries[:-1]) / 2
    w = torch.cat([middles, entries, middles.nextafter(torch.tensor(2.0)), torch.zeros(2)])[None]
    found = encode(w, fmt_of("nf4-channel"), clip=False, native=path)
    assert found.tensors["scales"].tolist() == [[1.0]]
    codes = code_values(found.tensors, found.fmt, (1, 48))[0]
    wanted = torch.cat([entries[:-1], entries, entries[1:], torch.zeros(2)])
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("half", "least"), zip(HALVES, (2.0**-126, 2.0**-24), strict=True))
def test_scale_that_rounds_to_zero_is_lifted_no_further_than_it_must(
    half: torch.dtype, least: float, path: bool
) -> None:
    w = torch.zeros(3, 32)
    w[1] = 1e-9
    w[2] = 2.0**-20  # float16 has 2^-20 / 7 only as 2^-23
    found = encode(w, fmt_of("int4-g32"), half, clip=False, native=path)
    assert found.tensors["scales"].float()[0].tolist() == [least]
    decoded = decode(found.tensors, found.fmt, (3, 32))
    assert float((decoded - w).abs().max()) <= (2.0**-23 if half == torch.float16 else 1e-8)


@pytest.mark.parametrize("half", HALVES)
def test_one_bit_codes_of_zeros_decode_to_almost_nothing(half: torch.dtype) -> None:
    result = by_codec(torch.zeros(2, 64), fmt_of("int1-g32"), half, clip=True)
    assert float(result.weight.abs().max()) < 1e-7


@needs_compiler
@pytest.mark.parametrize("name", ["nvfp4", "nf4-g64"])
def test_solve_gives_every_matrix_of_a_batch_its_own_shared_numbers(name: str) -> None:
    w = torch.stack([gaussian(48, 160, seed=1), gaussian(48, 160, seed=2) * 5])
    fmt = fmt_of(name)
    found, wanted = solve(w, None, fmt, Options(clip=False)), rtn(w, BlockCodec(fmt, clip=False))
    assert type(found).__name__ == "Nearest"
    for b in (0, 1):
        for rows in (slice(0, 16), slice(16, 48), slice(None)):
            assert_same(found.store(b, rows), wanted.store(b, rows))


@needs_compiler
def test_solve_stores_what_it_decodes_and_slices_like_the_codec() -> None:
    w = torch.stack([gaussian(48, 160, seed=s) for s in (1, 2)])
    fmt, options = fmt_of("int4-g64-asym"), Options(method="rtn", clip=False)
    found, wanted = solve(w, None, fmt, options), rtn(w, BlockCodec(fmt, clip=False))
    assert type(found).__name__ == "Nearest"
    assert torch.equal(found.weight, wanted.weight)
    torch.testing.assert_close(found.error, wanted.error, rtol=1e-5, atol=0)
    for b in (0, 1):
        for rows in (slice(0, 16), slice(16, 48), slice(None)):
            assert_same(found.store(b, rows), wanted.store(b, rows))


def test_wrong_type_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        encode(torch.ones(2, 32, dtype=torch.float64), fmt_of("int4-g32"))
    with pytest.raises(ValueError, match="float32"):
        encode(torch.ones(2, 32), fmt_of("int4-g32"), torch.float32)


# ---------------------------------------------------------------- compiling

SMALL = "nested"  # compiled in a tenth of the time; the rules are the same for all


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache; forgets what was loaded, before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield tmp_path / "cache" / "bitnest" / "native"
    native.load.cache_clear()


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def test_without_compiler_the_reference_runs_and_says_so_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    w, fmt = gaussian(4, 64), fmt_of("int4-g32")
    with caplog.at_level(logging.INFO):
        found = encode(w, fmt)
        encode(w, fmt)
    assert implementation() == "reference"
    said = [r for r in caplog.records if "no C compiler" in r.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.INFO
    assert_same(found.tensors, encode(w, fmt, native=False).tensors)
    with pytest.raises(RuntimeError, match="native"):
        encode(w, fmt, native=True)
    assert type(solve(w[None], None, fmt, Options())).__name__ == "Quantized"


@pytest.mark.parametrize("quiet", [False, True])
def test_compress_without_compiler_says_what_it_cost_and_what_to_do(
    quiet: bool,
    fresh: Path,
    tiny: Builder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CC", "false")
    words = ["compress", str(tiny("llama")), "-o", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--method", "rtn", "--group", "16"] + ["--quiet"] * quiet
    monkeypatch.setattr(sys, "argv", ["bitnest", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert not stop.value.code, err
    said = [line for line in err.splitlines() if "no C compiler" in line]
    assert len(said) == (0 if quiet else 1)
    assert quiet or "hint: install gcc or clang, or set CC" in said[0]


@pytest.mark.parametrize("command", ["false", "'unclosed"])
def test_failing_compiler_gives_the_reference_and_its_reason(
    command: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", command)
    with caplog.at_level(logging.INFO):
        assert native.load(SMALL) is None
    assert command.strip("'") in caplog.text
    assert not list(fresh.glob("*")) if fresh.exists() else True


@needs_compiler
def test_library_is_private_and_used_again(fresh: Path) -> None:
    assert native.load(SMALL) is not None
    (file,) = libraries(fresh)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    assert not file.stat().st_mode & 0o022
    before = file.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load(SMALL) is not None
    assert file.stat().st_mtime_ns == before and len(list(fresh.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text"])
def test_damaged_library_is_built_again(how: str, fresh: Path) -> None:
    """In processes of their own: a loaded library stays mapped, and must not be cut short."""
    code = "from bitnest.kernels import native; raise SystemExit(native.load('nested') is None)"
    subprocess.run([sys.executable, "-c", code], check=True)
    (file,) = libraries(fresh)
    good = file.read_bytes()
    middle = len(good) // 2
    file.write_bytes(
        {
            "cut": good[:middle],
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "empty": b"",
            "text": b"not a library",
        }[how]
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert native._whole(file) and libraries(fresh) == [file]


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_directory_that_others_can_write_is_not_loaded_from(
    mode: int, fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert native.load(SMALL) is not None
    native.load.cache_clear()
    fresh.chmod(mode)
    with caplog.at_level(logging.INFO):
        assert native.load(SMALL) is None
    assert f"other users can write {fresh}" in caplog.text


@needs_compiler
def test_library_that_others_can_write_or_that_is_elsewhere_is_not_loaded(fresh: Path) -> None:
    assert native.load(SMALL) is not None
    (file,) = libraries(fresh)
    file.chmod(0o722)
    native.load.cache_clear()
    assert native.load(SMALL) is None
    other = fresh.parent / "other"
    fresh.rename(other)
    fresh.symlink_to(other)
    native.load.cache_clear()
    assert native.load(SMALL) is None


@needs_compiler
def test_parent_that_anyone_can_write_is_refused(
    fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.mkdir(parents=True, mode=0o700)
    fresh.parent.chmod(0o777)
    with caplog.at_level(logging.INFO):
        assert native.load(SMALL) is None
    assert f"anyone can write {fresh.parent}" in caplog.text


@needs_compiler
def test_cache_that_cannot_be_made_gives_the_reference(
    fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.parent.parent.mkdir()
    fresh.parent.write_text("a file where the directory should be")
    with caplog.at_level(logging.INFO):
        assert native.load(SMALL) is None
    assert "the reference in torch runs" in caplog.text


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_cache_gives_the_reference(fresh: Path) -> None:
    fresh.mkdir(parents=True, mode=0o700)
    fresh.chmod(0o500)
    assert native.load(SMALL) is None


def _build(start: float, out: "multiprocessing.Queue[str]") -> None:
    import time

    time.sleep(max(0.0, start - time.time()))
    native.load.cache_clear()
    w = gaussian(20, 64)
    both = [encode(w, fmt_of("int4-g32"), clip=False, native=n).tensors for n in (True, False)]
    same = torch.equal(both[0]["codes"], both[1]["codes"])
    out.put(f"{implementation()} {same}")


@needs_compiler
def test_processes_that_build_at_once_end_with_one_whole_library(fresh: Path) -> None:
    import time

    fork = multiprocessing.get_context("fork")
    out = fork.Queue()
    children = [fork.Process(target=_build, args=(time.time() + 0.3, out)) for _ in range(3)]
    for child in children:
        child.start()
    found = {out.get(timeout=120) for _ in children}
    for child in children:
        child.join()
    assert found == {f"native-{native.source_hash('encode')} True"}
    (file,) = libraries(fresh)
    assert native._whole(file) and list(fresh.iterdir()) == [file]

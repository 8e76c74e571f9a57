"""Numbers the codecs choose: scale rules, tables, searches, errors; and other engines' decoders."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from bitnest.formats import core_format, parse_format
from bitnest.formats.block import BlockFormat
from bitnest.kernels.decode import NF4, decode
from bitnest.kernels.packing import unpack_bits
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.quantize.codecs.scales import Shared
from bitnest.quantize.codecs.tables import kmeans
from bitnest.quantize.gptq import Quantized, gptq, rtn
from bitnest.quantize.solve import Options, solve
from tests.test_formats import FAMILIES, problem

BLOCK_NAMES = [name for name in FAMILIES if isinstance(parse_format(name), BlockFormat)]


def rounded(w: torch.Tensor, name: str, clip: bool = True, half=torch.bfloat16) -> Quantized:
    return rtn(w, BlockCodec(core_format(parse_format(name)), half, clip))


def stored(w: torch.Tensor, name: str, clip: bool = True) -> dict[str, torch.Tensor]:
    """Stored tensors of the matrix w (O, I), rounded to nearest."""
    return rounded(w[None], name, clip).store(0, slice(None))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qsnr(w: torch.Tensor, w_hat: torch.Tensor) -> float:
    """Signal to quantisation noise, dB."""
    return float(10 * torch.log10(w.square().sum() / (w - w_hat).square().sum()))


# ---------------------------------------------------------------- powers of two

MX = {  # largest value, exponent of its binade
    "mxfp8": (448, 8),
    "mxfp8_e5m2": (57344, 15),
    "mxfp6": (7.5, 2),
    "mxfp6_e3m2": (28, 4),
    "mxfp4": (6, 2),
    "mxint8": (127, 6),
    "mxint6": (31, 4),
    "mxint4": (7, 2),
}


def edges(largest: float) -> torch.Tensor:
    """Blocks (2 n, 32) whose absmax lies on, just above and just below each edge of the rules."""
    peaks = [
        np.nextafter(np.float32(base * 2.0**k), np.float32(to), dtype=np.float32)
        for k in range(-30, 31)
        for base in (1.0, largest)
        for to in (base * 2.0**k, 0, np.inf)
    ]
    w = torch.zeros(2 * len(peaks), 32)
    w[:, 5] = torch.tensor(np.array([*peaks, *(-np.array(peaks))]))
    w[:, 9] = w[:, 5].abs() / 3
    return w


@pytest.mark.parametrize("name", MX)
def test_mx_exponents_follow_their_rules_at_every_edge(name: str) -> None:
    largest, emax = MX[name]
    w = edges(largest)
    for clip in (True, False):
        found = stored(w, f"{name}-ocp", clip)["scales"].flatten().int() - 127
        above = stored(w, f"{name}-ceil", clip)["scales"].flatten().int() - 127
        for row, peak in enumerate(w.abs().amax(1).tolist()):
            assert int(found[row]) == math.frexp(peak)[1] - 1 - emax
            fits = Fraction(peak) <= Fraction(largest) * Fraction(2) ** int(above[row])
            tight = Fraction(peak) > Fraction(largest) * Fraction(2) ** (int(above[row]) - 1)
            assert fits and tight, f"absmax {peak!r} got exponent {int(above[row])}"


@pytest.mark.parametrize("name", ["nf4-g32", "ternary-g32", "int1-g32"])
def test_ocp_rule_of_tables_takes_the_binade_of_their_largest_value(name: str) -> None:
    emax = -1 if name == "int1-g32" else 0  # 1/2, or 1
    found = stored(edges(1.0), f"{name}-e8m0-ocp")["scales"].flatten().int() - 127
    expected = torch.frexp(edges(1.0).abs().amax(1)).exponent - 1 - emax
    assert torch.equal(found, expected.int())


def test_mx_default_takes_the_best_of_three_exponents() -> None:
    w = gaussian(50, 32) * torch.rand(50, 1)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([grid, -grid])
    found = stored(w, "mxfp4")["scales"].flatten().int() - 127
    for row in range(50):
        x = w[row].double().numpy()
        least = math.ceil(math.log2(np.abs(x).max() / 6))
        errors = {
            k: (np.abs(x[:, None] - grid * 2.0**k).min(1) ** 2).sum()
            for k in (least, least - 1, least - 2)
        }
        assert errors[int(found[row])] == pytest.approx(min(errors.values()), rel=1e-6)


def test_m1_rounds_a_scale_up_to_a_power_of_two() -> None:
    w = torch.zeros(5, 32)
    w[:, 3] = torch.tensor([7.0, 7.01, 3.5, -3.49, 0.875])  # s = absmax / 7
    scales = stored(w, "int4-g32-m1")["scales"].flatten().int() - 127
    assert scales.tolist() == [0, 1, -1, -1, -3]


def test_m2_scales_are_the_rows_scale_shifted_right() -> None:
    w = torch.zeros(2, 80)
    w[0, ::16] = torch.tensor([7.0, -3.5, 2.0, 0.875, 0.8])
    w[1, ::16] = torch.tensor([0.0, 28.0, 28 * 2.0**-15, 28 * 2.0**-17, 14.1])
    t = stored(w, "int4-g16-m2", clip=False)
    assert t["super"].flatten().tolist() == [1.0, 4.0]
    assert unpack_bits(t["scales"], 4, 5).tolist() == [[0, 1, 1, 3, 3], [15, 0, 15, 15, 0]]


# ---------------------------------------------------------------- two-level scales


def test_dgq_weights_are_int8_multiples_of_the_rows_step() -> None:
    w = gaussian(20, 300) * torch.rand(20, 1)
    for solution in (
        rounded(w[None], "dgq4-g48"),
        gptq(w[None], torch.eye(300)[None], BlockCodec(parse_format("dgq4-g48"))),
    ):
        t = solution.store(0, slice(None))
        code = unpack_bits(t["codes"], 4, 300).int()
        zero = unpack_bits(t["zeros"].T, 4, 20).T.int()
        spread = torch.arange(300) // 48
        product = (code - zero[:, spread]) * t["scales"].int()[:, spread]
        assert product.abs().max() <= 127 and int(t["scales"].min()) >= 1
        assert t["scales"].dtype == torch.uint8
        assert torch.equal(product.float() * t["super"].float(), solution.weight[0])


def test_dgq_group_by_hand() -> None:
    codec = BlockCodec(parse_format("dgq4-g16"))
    shared = Shared(scale=torch.full((1, 2), 0.5))
    ramp = torch.arange(16.0)
    # 3 * 0.5 a step, zero at code 0: exact. 9 * 0.5 a step: 15 * 9 does not fit int8, 14 * 9 does
    w = torch.stack([1.5 * ramp, 4.5 * ramp], dim=1)
    grid = codec.fit(w, None, shared)
    assert torch.equal(codec.snap(w, grid)[:, 0] * grid.scale[0, 0], w[:, 0])
    multiples = grid.scale[0] / 0.5
    assert multiples.tolist() == [3, 9] and grid.zero.tolist() == [[0, 0]]
    assert codec.snap(w, grid)[:, 1].tolist() == [*range(15), 14]


def test_dgq_loses_little_against_plain_asymmetric_groups() -> None:
    w = gaussian(1, 64, 512)
    dgq, plain = (rounded(w, name).error.sum() for name in ("dgq4-g128", "int4-g128-asym"))
    assert dgq < 1.15 * plain


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "nf4-g64", "int3-g32", "int8-g64"])
def test_doubly_quantised_scales_halve_their_bits_and_keep_the_error(
    name: str, half: torch.dtype
) -> None:
    if half == torch.float16 and name == "int8-g64":
        pytest.skip("scales of 5e-4 / 127 are below what float16 super-scales resolve")
    w = 0.02 * gaussian(1, 128, 512)  # of a real layer's size: fp16 super-scales are subnormal
    once, twice = rounded(w, name, half=half), rounded(w, f"{name}-dq", half=half)
    assert twice.error.sum() < 1.05 * once.error.sum()
    once_bytes, twice_bytes = (
        sum(t.nbytes for key, t in r.store(0, slice(None)).items() if key in {"scales", "super"})
        for r in (once, twice)
    )
    assert twice_bytes == once_bytes / 2 * (1 + 2 / 64)


# ---------------------------------------------------------------- k-means


def table_error(x: np.ndarray, h: np.ndarray, table: np.ndarray) -> float:
    return float((h * np.abs(x[:, None] - table).min(1) ** 2).sum())


def best_partition(x: np.ndarray, h: np.ndarray, count: int) -> float:
    """Least weighted error of `count` centres: dynamic programme over intervals of sorted x."""
    order = x.argsort()
    x, h = x[order], h[order]
    n = len(x)
    cost = np.full((n + 1, n + 1), 0.0)
    for a in range(n):
        for b in range(a + 1, n + 1):
            centre = (h[a:b] * x[a:b]).sum() / h[a:b].sum()
            cost[a, b] = (h[a:b] * (x[a:b] - centre) ** 2).sum()
    least = cost[0]
    for _ in range(count - 1):
        least = np.array([min(least[a] + cost[a, b] for a in range(b + 1)) for b in range(n + 1)])
    return float(least[n])


def test_kmeans_never_leaves_its_start_for_worse_and_comes_near_the_optimum() -> None:
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(40):
        n, count = int(generator.integers(20, 40)), int(generator.choice([4, 8]))
        x, h = generator.normal(size=n), generator.uniform(0.1, 2, n)
        found = kmeans(torch.tensor(x)[None], torch.tensor(h)[None], count)[0].numpy()
        order = x.argsort()
        mass = h[order].cumsum()
        places = [int(np.argmax(mass >= (k + 0.5) / count * mass[-1])) for k in range(count)]
        error = table_error(x, h, found)
        assert error <= table_error(x, h, x[order][places]) * (1 + 1e-9)
        assert (np.diff(found) >= 0).all()
        ratios.append(error / best_partition(x, h, count))
    assert min(ratios) > 1 - 1e-9
    assert np.median(ratios) < 1.02, ratios


def test_kmeans_finds_separate_clusters_exactly() -> None:
    centres = torch.tensor([-3.0, -1.0, 0.5, 4.0])
    x = (centres[:, None] + torch.tensor([-0.1, 0.0, 0.1])).flatten()[torch.randperm(12)]
    assert torch.allclose(kmeans(x[None], torch.ones(1, 12), 4)[0], centres, atol=1e-6)


@pytest.mark.parametrize("h", [0.0, 1e-12, 1e12])
def test_kmeans_does_not_depend_on_the_size_of_its_weights(h: float) -> None:
    w = gaussian(1, 8, 256)
    codec = BlockCodec(parse_format("lut3-g64"))
    plain, scaled = (rtn(w, codec, torch.full((1, 256), value)).weight for value in (1.0, h))
    assert torch.allclose(plain, scaled, atol=1e-2)


@pytest.mark.parametrize("name", ["lut3-g64", "lut3-channel"])
def test_tables_ascend_and_are_used_as_stored(name: str) -> None:
    w, h = problem(5, 200)
    solution = solve(w, h, parse_format(name), Options())
    table = solution.store(0, slice(None))["table"].float().reshape(-1, 8)
    assert (table.diff(dim=1) >= 0).all()
    if name == "lut3-channel":
        for row in range(5):
            assert set(solution.weight[0, row].tolist()) <= set(table[row].tolist())


# ---------------------------------------------------------------- error


def unit_error(miss: torch.Tensor, h: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """Weighted error, float64, of what is chosen together: rows, tiles of rows, or all."""
    error = (miss.double().square() * h.double()[:, None]).sum(2)[0]
    tile = fmt.row_tile
    if fmt.rows is None or fmt.scale == "dual":  # dgq's steps come from scales found with clips
        tile = len(error)
    tile = tile or 1
    return torch.stack([part.sum() for part in error.split(tile)])


@pytest.mark.parametrize("name", BLOCK_NAMES)
def test_searching_clips_is_never_worse_than_not(name: str) -> None:
    fmt = core_format(parse_format(name))
    for seed in range(3):
        w = gaussian(1, 130, 176, seed=seed)
        if seed == 1:
            w = w**3
        if seed == 2:
            w[:, :, ::20] *= 20
        h = torch.rand(1, 176) + 0.1
        error = {
            clip: unit_error(w - rtn(w, BlockCodec(fmt, clip=clip), h).weight, h, fmt)
            for clip in (True, False)
        }
        assert (error[True] <= error[False] * (1 + 1e-5)).all()


# a residual follows the error that it is given, and rounding's may be the easier to follow
@pytest.mark.parametrize("name", [name for name in FAMILIES if "+" not in name])
def test_gptq_is_never_worse_than_rounding(name: str) -> None:
    fmt = parse_format(name)
    for seed, (rows, width) in enumerate([(24, 160), (40, 100), (9, 256)]):
        w, h = problem(rows, width, seed=seed)
        swept, nearest = (solve(w, h, fmt, Options(method=m)).error.sum() for m in ("gptq", "rtn"))
        assert swept <= nearest


@pytest.mark.parametrize("name", FAMILIES)
def test_reported_error_is_the_quadratic_form(name: str) -> None:
    w, h = problem(10, 150, batch=2)
    for method in ("gptq", "rtn"):
        solution = solve(w, h, parse_format(name), Options(method=method))
        miss = w.double() - solution.weight.double()
        exact = ((miss @ h.double()) * miss).sum(2)
        assert torch.allclose(solution.error.double(), exact, rtol=2e-3, atol=1e-6 * exact.max())


def matrices() -> dict[str, torch.Tensor]:
    w = gaussian(1, 6, 100)
    outlier = 0.01 * w
    outlier[0, 2, 33] = 6e4
    zeros_inside = w.clone()
    zeros_inside[:, :, 32:64] = 0
    return {
        "zeros": torch.zeros(1, 6, 100),
        "constant": torch.full((1, 6, 100), -0.37),
        "equal rows": w[:, :1].expand(-1, 6, -1).contiguous(),
        "outlier": outlier,
        "tiny": 1e-30 * w,
        "zero group": zeros_inside,
        "one": torch.nn.functional.pad(torch.full((1, 1, 1), 6e4), (3, 96, 2, 3)),
    }


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_degenerate_matrices_stay_finite_and_zero_stays_zero(name: str, half: torch.dtype) -> None:
    fmt = parse_format(name)
    core = core_format(fmt)
    exact_zero = core is fmt and not core.learned and core.element.name != "int1"
    some = matrices()
    if "dict" in name:  # building trees takes the time
        some = {what: some[what] for what in ("zeros", "outlier")}
    w = torch.cat(list(some.values()))
    h = problem(1, 100)[1].expand(len(w), -1, -1).contiguous()
    for method, clip in (("gptq", True), ("rtn", True), ("rtn", False)):
        solution = solve(w, h, fmt, Options(method=method, half=half, clip=clip))
        for b, what in enumerate(some):
            assert solution.weight[b].isfinite().all(), what
            found = decode(solution.store(b, slice(0, 6)), fmt, (6, 100))
            assert torch.allclose(found, solution.weight[b], rtol=1e-5, atol=1e-6), what
            if exact_zero and method == "rtn":
                assert not solution.weight[b][w[b] == 0].any(), what


def test_a_symmetric_grid_does_not_clip_what_half_precision_can_hold() -> None:
    """int1's scale is twice the largest weight, beyond float16's range for weights within it."""
    w = torch.full((1, 4, 32), 6e4)
    for clip in (True, False):
        assert rounded(w, "int1-g32", clip, torch.float16).weight.isfinite().all()


def test_lorc_recovers_an_error_of_low_rank_to_int8() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(-6, 7, (48, 96), generator=generator).float()
    grid[:, ::32] = 7  # absmax / 7 = 1: the scale of every group
    low = gaussian(48, 3) @ gaussian(3, 96, seed=1)
    low[:, ::32] = 0
    low *= 0.45 / low.abs().max()
    w = (grid + low)[None]
    for kind in ("lorc4", "lqer4"):
        fmt = parse_format(f"int4-g32+{kind}")
        h = torch.eye(96)[None]
        solution = solve(w, h, fmt, Options(method="rtn", clip=False))
        left = (w - solution.weight)[0]
        assert left.norm() < 0.02 * low.norm()
        assert torch.equal(decode(solution.store(0, slice(None)), fmt.base, (48, 96)), grid)


# ---------------------------------------------------------------- METHODS, section 2


def test_integer_qsnr_is_the_papers_formula() -> None:
    """4.78 + 6.02 b - 20 log10 rho - 20 log10 kappa: rho what the power of two adds to the scale,
    kappa the block's crest factor; per block, for E8M0 scales that do not clip."""
    w = gaussian(2000, 32)
    for name, bits in (("mxint8-ceil", 8), ("mxint6-ceil", 6)):
        w_hat = rounded(w[None], name).weight[0]
        scale = torch.exp2(stored(w, name)["scales"].float().flatten() - 127)
        peak = w.abs().amax(1)
        rho = scale / (peak / (2 ** (bits - 1) - 1))
        kappa = peak / w.square().mean(1).sqrt()
        predicted = 4.78 + 6.02 * bits - 20 * torch.log10(rho * kappa)
        measured = 10 * torch.log10(w.square().sum(1) / (w - w_hat).square().sum(1))
        assert abs(float((measured - predicted).mean())) < 0.5
        assert float((measured - predicted).std()) < 1.0


@pytest.mark.parametrize("rule", ["", "-ocp", "-ceil"])
def test_mxint8_is_more_exact_than_mxfp8_on_gaussian_blocks(rule: str) -> None:
    w = gaussian(1, 256, 512)
    integer, floating = (qsnr(w, rounded(w, name + rule).weight) for name in ("mxint8", "mxfp8"))
    assert integer > floating + 5
    assert floating == pytest.approx(31.5, abs=1)  # the paper's mean over models


@pytest.mark.parametrize("clip", [True, False])
def test_nvint4_needs_a_hadamard_rotation_to_pass_nvfp4(clip: bool) -> None:
    generator = np.random.default_rng(0)
    heavy = torch.tensor(generator.standard_t(3, (1, 256, 512)), dtype=torch.float32)
    figure = {}
    for rotation in ("", "@had16"):
        for name in ("nvint4", "nvfp4"):
            fmt = parse_format(name + rotation)
            solution = solve(heavy, None, fmt, Options(method="rtn", clip=clip))
            figure[name + rotation] = qsnr(heavy, solution.weight)
    assert figure["nvint4"] < figure["nvfp4"] - 0.2
    assert figure["nvint4@had16"] > figure["nvfp4@had16"] + 0.2
    assert figure["nvint4@had16"] > figure["nvint4"]


# ---------------------------------------------------------------- other engines


def nibbles(t: dict[str, torch.Tensor], columns: int) -> np.ndarray:
    words = t["codes"].numpy().view(np.uint8)
    return np.stack([words & 15, words >> 4], axis=-1).reshape(len(words), -1)[:, :columns]


@pytest.mark.parametrize("rule", ["", "-ocp", "-ceil"])
def test_mxfp4_is_what_gguf_decodes(rule: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    w = gaussian(17, 128) * torch.logspace(-8, 4, 17)[:, None]
    t = stored(w, f"mxfp4{rule}")
    codes = nibbles(t, 128).reshape(-1, 2, 16)
    blocks = np.concatenate([t["scales"].reshape(-1, 1), codes[:, 0] | codes[:, 1] << 4], axis=1)
    theirs = quants.MXFP4.dequantize_blocks(blocks.astype(np.uint8)).reshape(17, 128)
    assert np.array_equal(theirs, decode(t, parse_format("mxfp4"), (17, 128)).numpy())


def test_nvfp4_is_what_gguf_decodes() -> None:
    quants = pytest.importorskip("gguf.quants")
    if not hasattr(quants, "NVFP4"):
        pytest.skip("gguf without NVFP4")
    w = gaussian(16, 128)
    w[3, 7] = 2688 * 2.0**-8  # global = 448 * 6 / absmax: a power of two, so no step rounds
    t = stored(w, "nvfp4")
    assert float(t["global"]) == 2.0**8
    codes = nibbles(t, 128).reshape(-1, 4, 2, 8)
    qs = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(-1, 32)
    blocks = np.concatenate([t["scales"].reshape(-1, 4), qs], axis=1).astype(np.uint8)
    theirs = quants.NVFP4.dequantize_blocks(blocks).reshape(16, 128) / 2.0**8
    assert np.array_equal(theirs, decode(t, parse_format("nvfp4"), (16, 128)).numpy())


def tensors_scheme(**weights: object) -> object:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(symmetric=True, **weights)
    return quantization.QuantizationScheme(targets=["Linear"], weights=args)


def test_mxfp4_is_what_compressed_tensors_decompresses() -> None:
    module = pytest.importorskip("compressed_tensors.compressors.mxfp4.base")
    t = stored(gaussian(9, 96) * torch.logspace(-8, 4, 9)[:, None], "mxfp4")
    scheme = tensors_scheme(num_bits=4, type="float", strategy="group", group_size=32)
    state = {"weight_packed": t["codes"].view(torch.uint8), "weight_scale": t["scales"]}
    theirs = module.MXFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(theirs.float(), decode(t, parse_format("mxfp4"), (9, 96)))


def test_mxfp8_is_what_compressed_tensors_decompresses() -> None:
    module = pytest.importorskip("compressed_tensors.compressors.mxfp8.base")
    t = stored(gaussian(9, 96), "mxfp8")
    scheme = tensors_scheme(
        num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    codes = t["codes"].view(torch.uint8).view(torch.float8_e4m3fn)
    state = {"weight": codes, "weight_scale": t["scales"]}
    theirs = module.MXFP8QuantizationCompressor.decompress(state, scheme)["weight"]
    ours = decode(t, parse_format("mxfp8"), (9, 96), theirs.dtype)
    assert torch.equal(theirs, ours)


def test_nvfp4_is_what_compressed_tensors_decompresses() -> None:
    module = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    t = stored(gaussian(9, 96), "nvfp4")
    scheme = tensors_scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scale = t["scales"].view(torch.float8_e4m3fn)
    packed = t["codes"].view(torch.uint8)
    # weight = code * (scale / global), in float32
    codes = module.unpack_fp4_from_uint8(packed, 9, 96, torch.float32)
    theirs = forward.dequantize(
        codes, scale.float(), args=scheme.weights, global_scale=t["global"], dtype=torch.float32
    )
    assert torch.equal(theirs, decode(t, parse_format("nvfp4"), (9, 96)))
    # their decompress() gives bfloat16
    state = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": t["global"]}
    theirs = module.NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    ours = decode(t, parse_format("nvfp4"), (9, 96), torch.bfloat16)
    assert torch.equal(theirs, ours)


def test_fp8_codes_are_torchs() -> None:
    w = gaussian(9, 64)
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        t = stored(w, f"{name}-channel", clip=False)
        ours = decode(t, parse_format(f"{name}-channel"), (9, 64))
        scale = t["scales"].float()
        codes = t["codes"].view(torch.uint8).view(dtype)
        assert torch.equal(codes.float() * scale, ours)
        limit = torch.finfo(dtype).max
        assert torch.equal((w / scale).clamp(-limit, limit).to(dtype).float(), codes.float())


def test_nf4_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = gaussian(12, 192)
    peak = w.view(12, 3, 64).abs().amax(2, keepdim=True)
    w = (w.view(12, 3, 64) / peak).clamp(-1, 1) * peak.bfloat16().float()  # absmax as stored
    w = w.reshape(12, 192)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    t = stored(w, "nf4-g64", clip=False)
    assert torch.equal(state.absmax.view(12, 3), t["scales"].float())
    high_first = packed.flatten().numpy()
    theirs = np.stack([high_first >> 4, high_first & 15], axis=1).reshape(12, 192)
    assert np.array_equal(theirs, nibbles(t, 192))
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), torch.tensor(NF4))
    ours = decode(t, parse_format("nf4-g64"), (12, 192))
    assert torch.equal(functional.dequantize_4bit(packed, state), ours)

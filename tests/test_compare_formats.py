"""The catalogue and the study of formats: figures against float64, sampling, refusals, the plot."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitnest import api, errors
from bitnest.calibrate.data import calibration_windows, parse_source
from bitnest.cli import main
from bitnest.cli.format_plot import apart, arrange
from bitnest.errors import RecipeError
from bitnest.export.support import engines_of
from bitnest.formats import FateFormat, core_format, parse_format
from bitnest.formats.catalogue import CATALOGUE, UNIFORM, bits_per_weight
from bitnest.kernels import encode
from bitnest.quantize.compare import (
    BINS,
    BLOCKS,
    Comparison,
    CrestTally,
    FormatScore,
    KindReport,
    choose_sites,
    crest_factors,
    on_the_fly,
)
from bitnest.quantize.compare.inputs import SAMPLE, RowSample, spread_rows
from bitnest.quantize.compare.measure import Measure
from bitnest.quantize.solve import Options, solve
from bitnest.sites import Site
from tests.tiny import FAMILIES, Builder

SAMPLES, LENGTH = 32, 64
CHECKED = ["int8-channel", "mxfp8-ocp", "nvint4"]


def of_kind(result: Comparison, kind: str) -> KindReport:
    return next(report for report in result.kinds if report.kind == kind)


def score(report: KindReport, name: str) -> FormatScore:
    return next(found for found in report.scores if found.format == name)


def change(model: Path, target: Path, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with every tensor passed through `edit`."""
    shutil.copytree(model, target)
    for file in target.glob("*.safetensors"):
        tensors = {name: edit(name, value) for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return target


# Figures against an independent computation


def bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.astype(np.float32)).bfloat16().double().numpy()


def e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest E4M3 value, ties to even, saturating."""
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-20))).clip(-6)
    step = 2.0 ** (exponent - 3)
    return (np.rint(x / step) * step).clip(-448, 448)


def by_hand(name: str, w: np.ndarray) -> np.ndarray:
    """W rounded as plain round-to-nearest would, (O, I) float64, from the formats' definitions."""
    if name == "int8-channel":
        scale = bf16(np.abs(w).max(1, keepdims=True) / 127)
        return np.rint(w / scale).clip(-128, 127) * scale
    block = 32 if name == "mxfp8-ocp" else 16
    top = 448 * 7 / np.abs(w).max()
    rounded = np.empty_like(w)
    for start in range(0, w.shape[1], block):
        part = w[:, start : start + block]
        peak = np.abs(part).max(1, keepdims=True)
        if name == "mxfp8-ocp":
            scale = 2.0 ** (np.floor(np.log2(peak)) - 8)
            rounded[:, start : start + block] = e4m3(part / scale) * scale
        else:
            scale = e4m3(peak / 7 * top) / top
            rounded[:, start : start + block] = np.rint(part / scale).clip(-7, 7) * scale
    return rounded


Read = dict[str, tuple[np.ndarray, np.ndarray]]


def rows_read(model: Path, tokens: torch.Tensor) -> Read:
    """What every site of a Mixtral reads, in order: rows in float64, and their weights in H: 1 / n,
    or an expert's gate weights over their sum."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: dict[str, list[torch.Tensor]] = {}
    routed: dict[str, list[tuple[torch.Tensor, ...]]] = {}

    def linear(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))

        return hook

    def experts(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            routed.setdefault(name, []).append(tuple(a.detach() for a in args))

        return hook

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and "self_attn" in name:
            module.register_forward_pre_hook(linear(name))
        if name.endswith(".experts"):
            module.register_forward_pre_hook(experts(name))
    with torch.no_grad():
        for sample in tokens:
            net(sample[None])
    found: Read = {}
    for name, parts in seen.items():
        rows = torch.cat(parts).numpy()
        found[name] = (rows, np.full(len(rows), 1 / len(rows)))
    modules = dict(net.named_modules())
    for name, calls in routed.items():
        x, index, gates = (torch.cat([call[i] for call in calls]) for i in range(3))
        up_weight = modules[name].gate_up_proj.detach().double()
        for expert in range(len(up_weight)):
            tokens_of, places = torch.nonzero(index == expert, as_tuple=True)
            g = gates[tokens_of, places].double()
            own = x[tokens_of].double()
            gate, up = (own @ up_weight[expert].T).chunk(2, dim=1)
            inner = torch.nn.functional.silu(gate) * up
            for leaf, rows_of in (("w1", own), ("w3", own), ("w2", inner)):
                found[f"{name}.{expert}.{leaf}"] = (rows_of.numpy(), (g / g.sum()).numpy())
    # transformers names the experts' block differently from the checkpoint
    return {name.replace("mlp.experts", "block_sparse_moe.experts"): v for name, v in found.items()}


def hessian(read: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    rows, weights = read
    return rows.T @ (rows * weights[:, None])


@pytest.fixture(scope="module")
def read_by(tiny: Builder, text: Path) -> Read:
    """What the sites read in `study`."""
    tokens = calibration_windows(
        api.load_tokenizer(tiny("mixtral")), [parse_source(str(text))],
        samples=SAMPLES, length=LENGTH, seed=0,
    ).tokens  # fmt: skip
    return rows_read(tiny("mixtral"), tokens)


@pytest.fixture(scope="module")
def study(tiny: Builder, text: Path) -> Comparison:
    """All sites of a Mixtral, unclipped, with GPTQ."""
    return api.compare_formats(
        tiny("mixtral"), formats=CHECKED, per_kind=10**6, data=[f"words={text}"],
        samples=SAMPLES, length=LENGTH, clip=False, gptq=True,
    )  # fmt: skip


def test_figures_match_an_independent_float64_computation(
    study: Comparison, tiny: Builder, read_by: Read
) -> None:
    model = tiny("mixtral")
    for report in study.kinds:
        assert (report.starved, report.silent) == (0, 0)
        for name in CHECKED:
            noise = loss = numel = 0.0
            for site in api.inspect(model)["sites"]:
                if site["kind"] != report.kind:
                    continue
                w = read(model, site["name"])
                h = hessian(read_by[site["name"]])
                miss = w - by_hand(name, w)
                noise += w.size * (miss**2).sum() / (w**2).sum()
                loss += w.size * np.trace(miss @ h @ miss.T) / np.trace(w @ h @ w.T)
                numel += w.size
            found = score(report, name)
            assert found.qsnr == pytest.approx(-10 * math.log10(noise / numel), abs=2e-3)
            assert found.h_error == pytest.approx(loss / numel, rel=2e-3)


def test_gptq_errors_match_a_float64_computation_and_are_never_worse(
    study: Comparison, tiny: Builder, read_by: Read
) -> None:
    model = tiny("mixtral")
    options = Options(method="gptq", clip=False)
    for report in study.kinds:
        names = [s["name"] for s in api.inspect(model)["sites"] if s["kind"] == report.kind]
        for name in CHECKED:
            loss = numel = 0.0
            for site in names:
                w, h = read(model, site), hessian(read_by[site])
                wide, full = torch.from_numpy(w).float()[None], torch.from_numpy(h).float()[None]
                swept = solve(wide, full, parse_format(name), options).weight[0].double().numpy()
                loss += w.size * np.trace((w - swept) @ h @ (w - swept).T) / np.trace(w @ h @ w.T)
                numel += w.size
            found = score(report, name)
            assert found.gptq_error == pytest.approx(loss / numel, rel=1e-2)
            assert found.gptq_worse == 0
            assert found.h_error is not None and found.gptq_error < found.h_error


def test_sites_where_gptq_is_worse_are_counted(
    tiny: Builder, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poor(w: torch.Tensor, h: Any, fmt: Any, options: Options) -> Any:
        """GPTQ as if it had two bits, on matrices of 64 channels."""
        spoilt = options.method == "gptq" and w.shape[2] == 64
        return solve(w, h, parse_format("int2-g32") if spoilt else fmt, options)

    monkeypatch.setattr("bitnest.quantize.compare.measure.solve", poor)
    result = api.compare_formats(
        tiny("mixtral"), formats=["int6-g32"], data=[str(text)], samples=4, length=32, gptq=True
    )
    worse = {report.kind: report.scores[0].gptq_worse for report in result.kinds}
    assert worse == {"attention": 8, "expert": 16}  # down projections have 40 channels


# What the sites read


def sampled(rows: np.ndarray) -> np.ndarray:
    """The rows that stand for all: those of the 256 least frac(i * golden ratio)."""
    golden = (math.sqrt(5) - 1) / 2
    return rows[np.argsort(np.arange(len(rows)) * golden % 1)[:256]]


def test_inputs_match_an_independent_float64_computation(study: Comparison, read_by: Read) -> None:
    leaves = {"attention": ("q_proj", "o_proj"), "expert": ("w1", "w2")}  # k, v and w3 share
    for report in study.kinds:
        names = [name for name in read_by if name.endswith(leaves[report.kind])]
        inputs = report.inputs
        assert inputs is not None and inputs.inputs == len(names)
        samples = [sampled(read_by[name][0]) for name in names]
        assert inputs.tokens == sum(map(len, samples))
        numel = sum(x.size for x in samples)
        for found in inputs.scores:
            noise = sum(
                x.size * ((x - by_hand(found.format, x)) ** 2).sum() / (x**2).sum() for x in samples
            )
            assert found.qsnr == pytest.approx(-10 * math.log10(noise / numel), abs=5e-3)
        crest = next(c for c in inputs.crests if c.block == 16 and not c.rotated)
        squares = 0.0
        for x in samples:
            blocks = np.split(x, range(16, x.shape[1], 16), axis=1)
            peaks = sum(b.shape[1] * (np.abs(b).max(1) ** 2).sum() for b in blocks)
            squares += x.size * peaks / (x**2).sum()
        assert crest.effective == pytest.approx(math.sqrt(squares / numel), rel=1e-4)


def test_sample_of_rows_is_even_and_the_same_however_they_arrive() -> None:
    x = torch.arange(5000.0)[:, None].expand(-1, 3)
    sample, start = RowSample(), 0
    for count in (0, 1, 300, 700, 0, 2048, 1951):
        sample.add(x[start : start + count])
        start += count
    assert torch.equal(sample.rows, x[spread_rows(5000)])
    assert spread_rows(7).tolist() == list(range(7))
    assert spread_rows(0).tolist() == []
    for window in (64, 100, 256):  # first tokens of windows are unlike others
        rows = spread_rows(32 * window)
        assert len(rows) == SAMPLE
        assert rows.diff().max() <= 3 * 32 * window / SAMPLE
        first = int((rows % window == 0).sum())
        assert abs(first - SAMPLE / window) <= 3


@pytest.mark.parametrize("outlier", [1.0, 8.0], ids=["plain", "outliers"])
def test_outlier_channels_of_inputs_cost_nvint4_its_lead_and_rotation_gives_it_back(
    outlier: float, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    def edit(name: str, value: torch.Tensor) -> torch.Tensor:
        if "layernorm" in name:  # what attention and experts read
            value[5::16] *= outlier
        return value

    model = change(tiny("mixtral"), tmp_path / "model", edit)
    result = api.compare_formats(
        model, sites="re:.*(q_proj|w1)", data=[str(text)], samples=8, length=32, clip=False,
        formats=["nvint4", "nvfp4", "nvint4@had16", "nvfp4@had16", "mxint8", "mxfp8"],
    )  # fmt: skip
    assert [report.kind for report in result.kinds] == ["attention", "expert"]
    for report in result.kinds:
        assert report.inputs is not None
        found = {v.integer: v for v in report.inputs.verdicts}
        assert set(found) == {"nvint4", "nvint4@had16", "mxint8"}
        assert all(verdict.says == verdict.measured for verdict in found.values())
        assert found["mxint8"].measured == found["nvint4@had16"].measured == "int"
        assert found["nvint4"].measured == ("fp" if outlier > 1 else "int")
        assert found["nvint4"].h_gain is None


def test_heavy_tails_cost_nvint4_its_lead_and_rotation_gives_it_back() -> None:
    names = ["nvint4", "nvfp4", "nvint4@had16", "nvfp4@had16"]
    measure = Measure(
        [parse_format(name) for name in names], ["mlp"],
        half=torch.bfloat16, clip=True, gptq=False,
    )  # fmt: skip
    rows = np.random.default_rng(0).standard_t(4, (256, 512))
    measure.inputs("mlp", torch.from_numpy(rows))
    plain, rotated = measure.tallies["mlp"].inputs.report().verdicts
    assert (plain.says, plain.measured) == ("fp", "fp")
    assert (rotated.says, rotated.measured) == ("int", "int")


@pytest.mark.parametrize(
    "name, expected",
    [
        *((name, True) for name in ("int4-g128", "int8-channel", "int4-g32-asym", "fp6_e3m2-g64")),
        *((name, True) for name in ("mxfp4-ocp", "mxint8@had32", "nvfp4@rhad16", "nvint4")),
        *((name, False) for name in ("int8-tensor", "int8-b128x128", "nf4-g64", "lut4-channel")),
        *((name, False) for name in ("dgq4-g128", "ternary-g128", "int4-g32-dq", "int4-g128@awq")),
        *((name, False) for name in ("int4-g128@perm", "int3-g128+lorc16", "nf4-g64@had32")),
    ],
)
def test_formats_that_need_more_than_one_token_are_left_out_of_inputs(
    name: str, expected: bool
) -> None:
    fmt = parse_format(name)
    assert on_the_fly(fmt) is expected
    if expected:  # a token is rounded the same whatever stands beside it, but for nv's global scale
        x = torch.randn(1, 40, 96, generator=torch.Generator().manual_seed(0))
        x[0, 0, 0] = 9.0
        live = Options(method="rtn", clip=False)
        whole = solve(x, None, fmt, live).weight
        assert torch.equal(whole[:, :7], solve(x[:, :7], None, fmt, live).weight)


def read(model: Path, site: str) -> np.ndarray:
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{site}.weight" in tensors:
            return tensors[f"{site}.weight"].double().numpy()
    raise AssertionError(site)


def test_kinds_sites_and_bits_are_all_there(study: Comparison) -> None:
    assert {report.kind: report.sites for report in study.kinds} == {"attention": 8, "expert": 24}
    assert all(report.sites == report.total for report in study.kinds)
    expert = of_kind(study, "expert")  # matrices of 40 x 64 and 64 x 40
    assert expert.parameters == 24 * 40 * 64
    channel = (16 * 2 * 40 + 8 * 2 * 64) * 8 / expert.parameters  # a 16-bit scale for each row
    assert score(expert, "int8-channel").bits_per_weight == pytest.approx(8 + channel)
    assert study.calibration == {"words": SAMPLES}


def test_searching_the_clipping_only_helps(study: Comparison, tiny: Builder, text: Path) -> None:
    clipped = api.compare_formats(
        tiny("mixtral"), formats=CHECKED, per_kind=10**6, data=[str(text)], samples=1, length=16
    )
    for report in clipped.kinds:
        for name in ("int8-channel", "nvint4"):
            plain = score(of_kind(study, report.kind), name).qsnr
            found = score(report, name).qsnr
            assert found is not None and plain is not None and found >= plain


# Crest factors and the verdict


def test_crest_factors_of_known_blocks() -> None:
    w = torch.zeros(4, 40)
    w[0, 3] = -2.0  # one value in a block of 32
    w[1, :32] = 0.5  # all alike
    w[2, 32:] = torch.tensor([1.0, -1, 1, 1, -1, 1, 1, 3])  # a short last block
    rms = math.sqrt((7 + 9) / 8)
    kappa, energy = crest_factors(w, 32)
    assert kappa.tolist() == pytest.approx([math.sqrt(32), 1.0, 3 / rms])
    assert (9 * energy).tolist() == pytest.approx([4.0, 8.0, 16.0])


@pytest.mark.parametrize("block", BLOCKS)
def test_crest_statistics_match_sorted_values(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tally = CrestTally(block, rotated=False)
    parts = [torch.randn(64, 200, generator=generator) for _ in range(3)]
    for part in parts:
        tally.add(part)
    kappa = torch.cat([crest_factors(part, block)[0] for part in parts]).double().numpy()
    found = tally.result()
    assert found is not None and found.blocks == len(kappa)
    assert found.mean == pytest.approx(kappa.mean())
    padded = torch.nn.functional.pad(torch.cat(parts), (0, -200 % block)).unflatten(1, (-1, block))
    lengths = torch.tensor([block] * (200 // block) + [200 % block]).double()
    share = torch.stack([(lengths * p.abs().amax(2).square()).sum() for p in padded.split(64)])
    share /= torch.stack([p.double().square().sum() for p in padded.split(64)])
    assert found.effective == pytest.approx(float(share.mean().sqrt()))
    median, p99 = np.quantile(kappa, [0.5, 0.99], method="inverted_cdf")
    width = (block**0.5 - 1) / BINS
    assert found.median == pytest.approx(median, abs=width)
    assert found.p99 == pytest.approx(p99, abs=width)


def test_extreme_crest_factors_stay_within_the_histogram() -> None:
    tally = CrestTally(16, rotated=False)
    assert tally.result() is None
    tally.add(torch.eye(16) * 1e-30)
    tally.add(torch.ones(16, 16))
    found = tally.result()
    assert found is not None and found.median == pytest.approx(1.0, abs=0.01)
    assert found.p99 == pytest.approx(4.0, abs=0.01) and found.mean == pytest.approx(2.5)


@pytest.mark.parametrize("outlier", [0.0, 6.0], ids=["plain", "outliers"])
def test_outliers_cost_nvint4_its_lead_and_rotation_gives_it_back(
    outlier: float, tiny: Builder, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)

    def edit(name: str, value: torch.Tensor) -> torch.Tensor:
        if "self_attn" not in name:
            return value
        w = torch.randn(value.shape, generator=generator)
        w[:, 5::16] += outlier * w[:, 5::16].sign()
        return w.to(value.dtype)

    model = change(tiny("llama"), tmp_path / "model", edit)
    result = api.compare_formats(
        model, calibrate=False, clip=False, sites="kind:attention",
        formats=["nvint4", "nvfp4", "nvint4@had16", "nvfp4@had16", "mxint8", "mxfp8"],
    )  # fmt: skip
    found = {v.integer: v for v in result.kinds[0].verdicts}
    assert set(found) == {"nvint4", "nvint4@had16", "mxint8"}
    assert all(verdict.says == verdict.measured for verdict in found.values())
    assert found["mxint8"].measured == "int"
    assert found["nvint4"].measured == ("fp" if outlier else "int")
    assert found["nvint4"].qsnr_gain * (-1 if outlier else 1) > 0
    assert found["nvint4@had16"].measured == "int"
    assert found["nvint4"].h_gain is None


# What is hard to measure


def test_experts_with_hardly_a_token_lean_on_their_layer_and_give_no_nan(
    tiny: Builder, text: Path
) -> None:
    result = api.compare_formats(
        tiny("qwen2_moe"), formats=["int4-g32", "int3-g32@awq", "int3-g32+lqer4", "nvfp4@perm"],
        data=[str(text)], samples=1, length=2,
    )  # fmt: skip
    expert = of_kind(result, "expert")
    assert expert.starved == expert.sites == 24
    for report in result.kinds:
        for found in report.scores:
            assert found.h_error is not None and 0 < found.h_error < 1
            assert found.qsnr is not None and math.isfinite(found.qsnr)
    json.dumps(result.to_json(), allow_nan=False)


def test_matrix_of_zeros_is_left_out_of_the_h_error_and_counted(
    tiny: Builder, text: Path, tmp_path: Path
) -> None:
    def edit(name: str, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(value) if "layers.0.self_attn.q_proj" in name else value

    model = change(tiny("llama"), tmp_path / "model", edit)
    options: dict[str, Any] = {"data": [str(text)], "samples": 2, "length": 16}
    result = api.compare_formats(model, formats=["int4-g32"], sites="*.q_proj", **options)
    report = result.kinds[0]
    assert (report.sites, report.silent) == (2, 1)
    alone = api.compare_formats(model, formats=["int4-g32"], sites="*1.self_attn.q_proj", **options)
    assert report.scores[0].qsnr == alone.kinds[0].scores[0].qsnr
    assert report.scores[0].h_error == alone.kinds[0].scores[0].h_error
    nothing = api.compare_formats(
        model, formats=["nvint4", "nvfp4"], sites="*0.self_attn.q_proj", **options
    ).kinds[0]
    assert nothing.scores[0].qsnr is None and nothing.scores[0].h_error is None
    assert nothing.crests == () and nothing.verdicts == ()


def test_entropy_coded_bytes_are_those_stored(tiny: Builder) -> None:
    result = api.compare_formats(
        tiny("llama"), formats=["ternary-g32", "ternary-g32-dict"], calibrate=False
    )
    for report in result.kinds:
        plain, coded = report.scores
        shape = (64, 64)
        assert coded.qsnr == plain.qsnr
        assert coded.bits_per_weight < bits_per_weight(parse_format("ternary-g32-dict"), shape)


def test_without_data_nothing_is_run(tiny: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnest.quantize.compare.study.Stream", None)
    result = api.compare_formats(tiny("gpt_oss"), formats=["mxfp4"], calibrate=False)
    assert result.calibration is None
    assert of_kind(result, "expert").sites == 16
    assert all(found.h_error is None for report in result.kinds for found in report.scores)
    assert all(report.inputs is None for report in result.kinds)


def test_weights_that_are_not_numbers_are_refused_without_data_too(
    tiny: Builder, tmp_path: Path
) -> None:
    def edit(name: str, value: torch.Tensor) -> torch.Tensor:
        if "layers.1.mlp.up_proj" in name:
            value[0, 0] = math.nan
        return value

    model = change(tiny("llama"), tmp_path / "model", edit)
    with pytest.raises(errors.CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        api.compare_formats(model, formats=["int4-g32"], calibrate=False)


# Which sites


def large_moe(layers: int = 48, experts: int = 128) -> list[Site]:
    sites = []
    for layer in range(layers):
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"model.layers.{layer}.self_attn.{leaf}"
            sites.append(Site(name, "attention", layer, None, (64, 64), name, "weight"))
        for expert in range(experts):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                sites.append(Site(name, "expert", layer, expert, (64, 64), name, "weight"))
        gate = f"model.layers.{layer}.mlp.gate"
        sites.append(Site(gate, "router", layer, None, (128, 64), gate, "weight"))
    return sites


@pytest.mark.parametrize("per_kind", [64, 24, 72])
def test_sampled_sites_lie_evenly_over_layers_projections_and_experts(per_kind: int) -> None:
    chosen = choose_sites(large_moe(), None, per_kind)
    experts = [site for site in chosen if site.kind == "expert"]
    assert per_kind - 2 <= len(experts) <= per_kind
    leaves = Counter(site.name.rpartition(".")[2] for site in experts)
    assert len(leaves) == 3 and max(leaves.values()) == min(leaves.values())
    each = len(experts) // 3
    down = [site for site in experts if site.name.endswith("down_proj")]
    assert len({site.layer for site in down}) == each
    numbers = sorted(site.expert or 0 for site in down)
    gaps = np.diff([numbers[-1] - 128, *numbers])
    assert gaps.max() <= 3 * 128 / each, "a stretch of experts is never looked at"
    assert not any(site.kind == "router" for site in chosen)


def test_everything_is_chosen_when_there_is_little() -> None:
    sites = large_moe(2, 4)
    assert choose_sites(sites, None, 64) == [s for s in sites if s.kind != "router"]
    assert len(choose_sites(sites, None, 23)) == 8 + 21
    assert len(choose_sites(sites, None, 1)) == 4 + 3  # one of each projection
    assert [s.kind for s in choose_sites(sites, "kind:router", 64)] == ["router", "router"]
    with pytest.raises(RecipeError, match="matches"):
        choose_sites(sites, "*.nothing", 64)


# The command


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitnest", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return command


Run = Callable[..., tuple[int, str, str]]


def test_json_of_every_kind(run: Run, tiny: Builder, text: Path) -> None:
    code, out, err = run(
        "compare-formats", tiny("deepseek_v2"), "--format", "mxint8", "--format", "mxfp8",
        "--data", f"text={text}", "--samples", "4", "--length", "32", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    kinds = {kind["kind"]: kind for kind in found["kinds"]}
    assert set(kinds) == {"attention", "mlp", "expert", "shared_expert"}
    for kind in kinds.values():
        assert [s["format"] for s in kind["scores"]] == ["mxint8", "mxfp8"]
        assert {c["block"] for c in kind["crests"]} == set(BLOCKS)
        (verdict,) = kind["verdicts"]
        assert verdict["says"] == verdict["measured"] == "int"
        assert kind["scores"][0]["gptq_error"] is kind["scores"][0]["gptq_worse"] is None
        inputs = kind["inputs"]
        assert [s["format"] for s in inputs["scores"]] == ["mxint8", "mxfp8"]
        assert inputs["scores"][0]["bits_per_value"] >= 8.25
        assert len(inputs["verdicts"]) == 1 and inputs["inputs"] > 0
    assert found["calibration"] == {"text": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_whole(family: str, tiny: Builder, text: Path) -> None:
    """Fused and transposed experts, biases, tied heads, sliding windows, odd widths."""
    result = api.compare_formats(
        tiny(family), formats=["int8-channel", "mxfp4@had32"], per_kind=10**6,
        data=[str(text)], samples=4, length=32,
    )  # fmt: skip
    expected = {k: n for k, n in FAMILIES[family].sites.items() if k != "router"}
    assert {report.kind: report.sites for report in result.kinds} == expected
    for report in result.kinds:
        assert report.silent == 0
        fine, coarse = report.scores
        assert fine.qsnr is not None and coarse.qsnr is not None and fine.qsnr > coarse.qsnr > 10
        assert fine.h_error is not None and coarse.h_error is not None
        assert 0 < fine.h_error < coarse.h_error < 0.1
        assert report.inputs is not None
        first, second = report.inputs.scores
        assert first.qsnr is not None and second.qsnr is not None
        assert first.qsnr > second.qsnr > 10


def test_tables_and_plot_name_what_was_measured(run: Run, tiny: Builder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.svg"
    code, out, err = run(
        "compare-formats", tiny("qwen3_moe"), "--no-data", "--per-kind", "6", "--plot", file
    )
    assert code == 0, err
    assert all(name in out for name in UNIFORM)
    assert "expert: 6 of 24 sites" in out and "attention: 4 of 8 sites" in out
    assert not any(word in out.lower() for word in ("h error", "inputs", "gptq", "nan"))
    assert "comparing formats: done" in err
    ElementTree.parse(file)
    written = file.read_text("utf-8")
    assert all(written.count(f"<!-- {name} -->") == 2 for name in UNIFORM)


def test_tables_and_plot_of_inputs_and_gptq(
    run: Run, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    image = pytest.importorskip("matplotlib.image")
    formats, file = ["mxint8", "mxfp8", "nf4-g64"], tmp_path / "plot.png"
    code, out, err = run(
        "compare-formats", tiny("qwen3_moe"), "--gptq", "--data", text, "--samples", "4",
        "--length", "32", "--plot", file, *(w for name in formats for w in ("--format", name)),
    )  # fmt: skip
    assert code == 0, err
    weights, inputs = out.split("\n\n")[:2]
    assert weights.splitlines()[1].split().count("worse") == 2
    rows = {line.split()[0]: line.split()[1:] for line in inputs.splitlines()[1:]}
    assert set(rows) == {"inputs", *formats}
    assert rows["nf4-g64"] == ["-"] * 4 and "-" not in rows["mxint8"]
    assert "expert inputs" in out and "nan" not in out.lower()
    pixels = image.imread(file)
    assert pixels.shape[0] > 1500 and pixels.shape[1] > 1500, "inputs have a row of their own"
    assert pixels.min() < 0.5 < pixels.max()


def test_inputs_are_drawn_under_their_weights(study: Comparison) -> None:
    one, two = study.kinds
    bare = replace(two, inputs=None)
    columns, places = arrange([one, two, one])
    assert columns == 2
    assert [(row, column) for row, column, _, _ in places] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)
    ]  # fmt: skip
    assert [inputs is None for _, _, _, inputs in places] == [True, True, False, False, True, False]
    assert [place[:2] for place in arrange([bare, bare, bare])[1]] == [(0, 0), (0, 1), (1, 0)]
    assert [place[:2] for place in arrange([bare, one])[1]] == [(0, 0), (0, 1), (1, 1)]


def test_labels_keep_their_distance_and_their_order() -> None:
    assert apart([1.0, 5.0], 1.0) == [1.0, 5.0]
    assert apart([2.0, 2.0, 2.0], 1.0) == pytest.approx([1.0, 2.0, 3.0])
    places = apart([0.0, 0.1, 0.2, 3.0, 3.05], 0.5)
    assert all(b - a >= 0.5 - 1e-12 for a, b in pairwise(places))


@pytest.mark.parametrize(
    "options",
    [
        ["--format", "int9-g128"],
        ["--format", "dense"],
        ["--format", "int4-g128@awq", "--no-data"],
        ["--no-data", "--data", "words.txt"],
        ["--gptq", "--no-data"],
        ["--data", "no-such-file.txt"],
        ["--sites", "*.nothing"],
        ["--sites", "kind:eggs"],
        ["--length", "100000"],
        ["--memory", "lots"],
        ["--memory", "1MiB"],
        ["--plot", "plot.jpeg"],
        ["--plot", "no/such/folder/plot.png"],
        ["--plot", "folder.png"],
    ],
    ids=" ".join,
)
def test_impossible_requests_end_with_two_before_any_work(
    options: list[str], run: Run, tiny: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("work began")

    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bitnest.quantize.compare.measure.solve", forbidden)
    model = tiny("llama")
    code, out, err = run("compare-formats", model, *options)
    assert (code, out) == (2, "")
    assert "error: " in err and ("hint: " in err or "where: " in err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png"]


def test_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    code, out, err = run("compare-formats", tmp_path / "nothing")
    assert (code, out) == (2, "") and "nothing" in err


def test_plot_without_matplotlib_is_refused_before_the_model_is_opened(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    code, _, err = run("compare-formats", tmp_path / "nothing", "--plot", tmp_path / "plot.png")
    assert code == 2 and "pip install 'bitnest[plots]'" in err


# The catalogue


def test_every_name_of_the_catalogue_is_spelt_as_it_is_read_back() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert [parse_format(name).name for name in names] == names
    assert len(set(names)) == len(names)
    assert [parse_format(name).name for name in UNIFORM] == list(UNIFORM)
    assert all(entry.description for entry in CATALOGUE)


@pytest.mark.parametrize("name", [entry.name for entry in CATALOGUE if entry.name != "dense"])
def test_stated_bits_are_the_bytes_really_stored(name: str) -> None:
    fmt = parse_format(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 128, 256, generator=generator)
    x = torch.randn(512, 256, generator=generator)
    hessian = (x.T @ x / 512)[None]
    stored = solve(weight, hessian, fmt, Options(method="rtn")).store(0, slice(0, 128))
    nbytes = sum(t.numel() * t.element_size() for t in stored.values())
    stated = bits_per_weight(fmt, (128, 256)) * 128 * 256 / 8
    assert nbytes == stated if fmt.fixed_size else nbytes <= stated


def test_formats_lists_the_catalogue_without_loading_torch() -> None:
    code = (
        "import sys\n"
        "from bitnest.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "formats"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(entry.name) for line in lines) for entry in CATALOGUE)
    assert "…" not in done.stdout, "a cell was cut"


def test_formats_name_the_encoder_of_every_format(run: Run) -> None:
    _, out, _ = run("formats", "--json")
    encoder = {facts["name"]: facts["encoder"] for facts in json.loads(out)["formats"]}
    for name in ("int4-g128", "int4-g128-asym", "mxfp4", "nvfp4", "nvint4@had16", "nf4-g64"):
        assert encoder[name] == "C", name
    for name in ("int1-g128", "int8-tensor", "lut3-g64", "int4-g32-dq", "ternary-g128", "dense"):
        assert encoder[name] == "torch", name
    for name, found in encoder.items():
        fmt = parse_format(name)
        if name not in {"dense", "zero"} and not isinstance(fmt, FateFormat):
            assert (found == "C") == encode.supported(core_format(fmt)), name


def test_formats_details_count_every_byte(run: Run) -> None:
    name = "int3-g64-asym@rhad64+lqer16"
    code, out, _ = run("formats", name, "fp8-channel", "--shape", "512,768", "--json")
    found = json.loads(out)
    assert code == 0 and found["shape"] == [512, 768]
    first, second = found["formats"]
    assert (first["name"], second["name"]) == (name, "fp8_e4m3-channel")
    for facts in (first, second):
        assert sum(part["bytes"] for part in facts["parts"]) == facts["bytes"]
        assert facts["bits_per_weight"] == pytest.approx(8 * facts["bytes"] / (512 * 768))
        assert facts["kernel"] == "reference" and facts["engines"][0] == "bitnest"
        assert facts["encoder"] == "C"
    assert [part["name"] for part in first["parts"]][:3] == ["codes", "scales", "zeros"]
    code, out, _ = run("formats", name, "--shape", "512,768")
    assert code == 0 and "right_scales" in out and f"{first['bytes']:,}" in out


@pytest.mark.parametrize(
    "arguments",
    [["int9-g128"], ["int4-g128", "nonsense"], ["--shape", "4096"], ["--shape", "0,4096"]],
    ids=" ".join,
)
def test_formats_refuses_what_does_not_exist(arguments: list[str], run: Run) -> None:
    code, out, err = run("formats", *arguments)
    assert (code, out) == (2, "") and "hint: " in err


def test_engines_follow_the_export_rules() -> None:
    def engines(name: str) -> list[str]:
        return engines_of(parse_format(name))

    assert engines("int4-g128") == ["bitnest", "vllm-cuda", "vllm-cpu", "transformers"]
    assert "vllm-cuda with humming" in engines("int3-g128")
    assert "vllm-cuda" not in engines("int4-g16")
    assert "transformers" not in engines("int4-g128-asym")
    for name in ("int4-g128@had64", "int4-g128+lorc16", "nf4-g64", "int4-g32-dq", "int8-tensor"):
        assert engines(name) == ["bitnest"]
    assert "vllm-cpu with fp8_e4m3-token" in engines("fp8-channel")
    assert "vllm-cuda" in engines("nvfp4") and engines("nvint4") == ["bitnest"]

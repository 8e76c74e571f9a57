"""Predicted losses against naive formulas, probes against transformers with replaced weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from bitnest.calibrate import stream as streaming
from bitnest.calibrate.collector import reference_experts
from bitnest.calibrate.observe import Observer
from bitnest.calibrate.probes import Measured, Probes, draw_plans, group_plans, mean_kl
from bitnest.calibrate.sensitivity import LayerInputs, Scored, Sensitivity, sample_rows
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.tail import open_tail
from bitnest.checkpoint import Checkpoint
from bitnest.formats import parse_format
from bitnest.quantize.solve import Options, solve
from bitnest.sites import ENDS, Site
from bitnest.sites import find_sites as every_site
from bitnest.skeleton import Skeleton
from tests import brute
from tests.brute import LABELS, LENGTH, NAMES, close, kl, numpy

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
PLAIN = ("int2-g16", "int4-g128", "int3-g32-asym")
LONE = ("int3-g16+lorc4", "int4-g32")  # a residual belongs to one matrix: no stacking
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama", "gpt2"]
SAMPLES = [1, 4, 7, 8, 9]  # that probes are measured on: three of books, one each of the others


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("brute")


@cache
def skeleton(path: Path) -> Skeleton:
    return Skeleton.build(Checkpoint.open(path))


def find_sites(own: Skeleton) -> list[Site]:
    """Sites of the blocks."""
    return [site for site in every_site(own) if site.kind not in ENDS]


@cache
def recorded(path: Path) -> brute.Recorded:
    return brute.record(brute.load(path), brute.text())


@dataclass
class Run:
    """scored: by site name. weights: (site name, format number) -> decoded. given: how often."""

    sites: list[Site]
    scored: dict[str, Scored] = field(default_factory=dict)
    weights: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    given: Counter[tuple[str, int]] = field(default_factory=Counter)
    measured: list[list[Measured]] = field(default_factory=list)


def made_up_fisher(site: Site) -> torch.Tensor:
    """Positive numbers (L, O) that differ from row to row and site to site."""
    generator = torch.Generator().manual_seed(sum(site.name.encode()))
    return torch.rand(len(NAMES), site.shape[0], generator=generator, dtype=torch.float64)


class MadeUp:
    """A Fisher of given rows; per_token: what is added for
    every expert (L,), None for nothing."""

    def __init__(
        self, of: Callable[[Site], torch.Tensor | None], per_token: torch.Tensor | None = None
    ) -> None:
        self.of, self._per_token = of, per_token

    def experience(
        self, _path: str, tokens: torch.Tensor, _seen: torch.Tensor, _prior: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self._per_token is None:
            return None
        return torch.ones(tokens.shape), self._per_token[:, None].expand(tokens.shape)


def run(
    path: Path,
    formats: Sequence[str],
    options: Options | None = None,
    *,
    full: bool = True,
    lean: bool = True,
    chunk: int = 3,
    fisher: Callable[[Site], torch.Tensor | None] = made_up_fisher,
    prior: torch.Tensor | None = None,
    plans: Sequence[dict[str, int]] = (),
    replace: Callable[[Site, int, torch.Tensor], torch.Tensor] = lambda _s, _n, w: w,
) -> Run:
    """All stages as an analysis runs them. lean: keep a sample of experts' inputs. replace: what
    the probes are offered instead of the decoded weight."""
    own, options = skeleton(path), options or Options()
    with mock.patch.object(streaming, "BATCH_TOKENS", 2 * LENGTH):
        names = [NAMES[d] for d in LABELS]
        stream = Stream(own, brute.text(), labels=names, singles=True, **CPU)
    result = Run([site for site in find_sites(own) if site.kind != "router"])

    def parameter(site: Site) -> torch.Tensor:
        return own.model.get_parameter(site.path).data

    probes = Probes(stream, plans, SAMPLES, parameter)

    def sink(site: Site, number: int, weight: torch.Tensor) -> None:
        assert weight.shape == site.shape
        result.given[site.name, number] += 1
        result.weights[site.name, number] = weight.clone()
        probes.offer(site, number, replace(site, number, weight))

    candidates = [parse_format(name) for name in formats]
    sensitivity = Sensitivity(candidates, options, MadeUp(fisher, prior), parameter, sink)
    widths = [site.shape[1] for site in result.sites if site.expert is not None]
    sample = sample_rows(stream.tokens, widths, options.min_tokens) if lean else None
    for layer, block in enumerate(own.blocks):
        prefix = f"{own.prefix}.{layer}"
        own.fill(prefix, **CPU)
        sites = [site for site in result.sites if site.layer == layer]
        observer = Observer(
            block, prefix, labels=3, full=full, weighting=options.weighting, sample=sample
        )
        with torch.no_grad(), observer:
            for part in stream.batches():
                observer.before_batch(LABELS[part.start], part.start * LENGTH)
                stream.forward(layer, stream.hidden[part])
                observer.after_batch()
        scored = list(sensitivity.linears([s for s in sites if s.expert is None], observer))
        for name, sums in observer.fused.items():
            module = own.model.get_submodule(name)
            routed = [site for site in sites if site.module == name]
            rows = torch.cat(observer.rows[name]) if lean else None
            for first in range(0, module.num_experts, chunk):
                numbers = range(first, min(first + chunk, module.num_experts))
                scored += sensitivity.experts(routed, module, sums, rows, numbers)
        result.scored.update({item.site.name: item for item in scored})
        before = {name: p.data.clone() for name, p in block.named_parameters()}
        probes.advance(layer)
        for name, p in block.named_parameters():
            assert torch.equal(p.data, before[name]), name
        with reference_experts(m for m in block.modules() if brute.is_experts(m)):
            stream.run(layer, keep=True)
        own.drop(prefix)
    if plans:
        with open_tail(stream) as tail:
            result.measured = probes.measure(tail, brute.text(), LABELS)
    return result


@cache
def brute_layer(path: Path, module: str, weighting: str) -> brute.ExpertLayer:
    return brute.expert_layer(recorded(path), module, LABELS, weighting)


@cache
def brute_linear(path: Path, module: str) -> brute.Rows:
    return brute.linear_rows(recorded(path), module, LABELS)


def means(path: Path, site: Site, options: Options, lean: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean of x x^T over everything, (I, I), with what a starved expert leans on; per label."""
    if site.expert is None:
        rows = brute_linear(path, site.module)
    else:
        layer = brute_layer(path, site.module, options.weighting)
        rows = (layer.down if site.param == "down_proj" else layer.up)[site.expert]
    weight = np.maximum(rows.weight, 1e-30)
    pooled = rows.hessian.sum(0) / max(rows.weight.sum(), 1e-30)
    minimum = options.min_tokens or site.shape[1]
    share = 1 - rows.tokens.sum() / minimum
    if site.expert is not None and share > 0 and lean:
        pooled = (1 - share) * pooled + share * layer_moment(path, site, minimum)
    return pooled, rows.hessian / weight[:, None, None]


def layer_moment(path: Path, site: Site, minimum: int) -> np.ndarray:
    """Mean of x x^T over the layer's tokens, all of them here, as if the expert had been chosen."""
    seen = recorded(path)
    rows = np.concatenate([call.hidden for call in seen.routed[site.module]])
    assert minimum <= 256 and len(rows) <= 256  # so the sample is everything
    if site.param == "down_proj":
        module = seen.model.get_submodule(site.module)
        up, _, bias, _ = brute.expert_parts(module, site.expert)
        rows = brute.gated(module, rows @ up.T + bias)
    return sum(np.outer(x, x) for x in rows) / len(rows)


def original(path: Path, site: Site) -> np.ndarray:
    return numpy(site.view(recorded(path).model.get_parameter(site.path)))


def row_errors(miss: np.ndarray, h: np.ndarray) -> np.ndarray:
    """(dW H dW^T)_rr, a row at a time."""
    return np.array([row @ h @ row for row in miss])


def check(path: Path, result: Run, formats: Sequence[str], options: Options, lean: bool) -> None:
    assert set(result.scored) == {site.name for site in result.sites}
    for site in result.sites:
        scored, w = result.scored[site.name], original(path, site)
        pooled, labels = means(path, site, options, lean)
        base = row_errors(w, pooled).sum()
        assert scored.output == pytest.approx(base, rel=1e-3)
        f = numpy(made_up_fisher(site))
        assert scored.loss is not None and scored.loss.shape == (len(formats), len(NAMES))
        for i in range(len(formats)):
            miss = w - numpy(result.weights[site.name, i])
            error = row_errors(miss, pooled).sum() / base if base else 0.0
            assert float(scored.error[i]) == pytest.approx(error, rel=2e-3, abs=1e-9), site.name
            for d in range(len(NAMES)):
                loss = 0.5 * (f[d] * row_errors(miss, labels[d])).sum()
                assert float(scored.loss[i, d]) == pytest.approx(loss, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("formats", [PLAIN, LONE], ids=["stacked", "alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_error_are_those_of_the_decoded_weights(
    family: str, formats: tuple[str, ...], root: Path
) -> None:
    path = brute.checkpoint(root, family)
    check(path, run(path, formats), formats, Options(), True)


@pytest.mark.parametrize("weighting", ["none", "gate2"])
def test_an_experts_loss_weighs_tokens_as_asked(weighting: str, root: Path) -> None:
    path, options = brute.checkpoint(root, "qwen3_moe"), Options(weighting=weighting)
    check(path, run(path, PLAIN, options), PLAIN, options, True)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_starved_expert_leans_on_its_layer_for_fitting_but_not_for_its_loss(
    family: str, root: Path
) -> None:
    path, options = brute.checkpoint(root, family), Options(min_tokens=150)
    tokens = [item.tokens for item in run(path, PLAIN[:1], options).scored.values()]
    assert min(tokens) < 150  # else nothing leans
    check(path, run(path, PLAIN, options), PLAIN, options, True)


@pytest.mark.parametrize("full", [True, False])
def test_every_expert_loses_what_it_is_taken_to_have_seen(full: bool, root: Path) -> None:
    path, prior = brute.checkpoint(root, "qwen3_moe"), torch.tensor([0.5, 2.0, 0.0])
    without, with_ = (run(path, PLAIN, full=full, prior=p) for p in (None, prior))
    for site in with_.sites:
        a, b = without.scored[site.name], with_.scored[site.name]
        more = 0.5 * prior * (a.error * a.output)[:, None] if site.expert is not None else 0.0
        assert torch.allclose(b.loss, a.loss + more, rtol=1e-5)  # type: ignore[operator,arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_solved_once_in_every_format(family: str, root: Path) -> None:
    result = run(brute.checkpoint(root, family), PLAIN + LONE)
    wanted = {(site.name, i) for site in result.sites for i in range(len(PLAIN + LONE))}
    assert set(result.given) == wanted and set(result.given.values()) == {1}


@pytest.mark.parametrize("family", ["qwen3_moe", "llama", "gpt_oss"])
def test_what_is_scored_is_what_compress_would_store(family: str, root: Path) -> None:
    """A format that no two matrices can share is solved for each matrix alone."""
    path, options = brute.checkpoint(root, family), Options(method="rtn")
    result = run(path, LONE, options)
    for site in result.sites:
        w = torch.from_numpy(original(path, site)).float()
        pooled = torch.from_numpy(means(path, site, options, True)[0]).float()
        for i, name in enumerate(LONE):
            alone = solve(w[None], pooled[None], parse_format(name), options).weight[0]
            found = result.weights[site.name, i]
            assert torch.linalg.norm(found - alone) <= 0.01 * torch.linalg.norm(w - alone), (
                site.name, name
            )  # fmt: skip


def test_experts_in_chunks_are_scored_as_all_at_once(root: Path) -> None:
    path = brute.checkpoint(root, "qwen3_moe")
    one, other = run(path, PLAIN, chunk=1), run(path, PLAIN, chunk=100)
    for name, item in one.scored.items():
        assert torch.allclose(item.error, other.scored[name].error, rtol=1e-3)
        assert torch.allclose(item.loss, other.scored[name].loss, rtol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("formats", [PLAIN, (*LONE, "int3-g32@awq")], ids=["plain", "awq"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama"])
def test_diagonal_mode_is_the_same_sum_over_the_diagonal(
    family: str, formats: tuple[str, ...], root: Path
) -> None:
    path = brute.checkpoint(root, family)
    result = run(path, formats, full=False, lean=False)
    for site in result.sites:
        w, scored = original(path, site), result.scored[site.name]
        pooled, labels = means(path, site, Options(weighting="none"), False)
        energy = (w**2 @ np.diag(pooled)).sum()
        f = numpy(made_up_fisher(site))
        for i in range(len(formats)):
            miss = w - numpy(result.weights[site.name, i])
            error = (miss**2 @ np.diag(pooled)).sum() / energy
            assert float(scored.error[i]) == pytest.approx(error, rel=1e-3)
            assert scored.loss is not None
            for d in range(len(NAMES)):
                loss = 0.5 * (f[d] * (miss**2 @ np.diag(labels[d]))).sum()
                assert float(scored.loss[i, d]) == pytest.approx(loss, rel=1e-3, abs=1e-12)


def test_without_a_full_hessian_weights_are_rounded_to_nearest(root: Path) -> None:
    path = brute.checkpoint(root, "llama")
    result = run(path, ["int4-g32"], full=False, lean=False)
    for site in result.sites:
        w = torch.from_numpy(original(path, site)).float()
        nearest = solve(w[None], None, parse_format("int4-g32"), Options()).weight[0]
        assert torch.equal(result.weights[site.name, 0], nearest)


def starve(model: Any) -> None:
    for block in model.model.layers:
        block.mlp.router.bias.data[1] = -1e4


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("lean", [True, False])
def test_an_expert_that_no_token_chose_is_never_nan(lean: bool, full: bool, root: Path) -> None:
    path = brute.checkpoint(root, "gpt_oss", "starved", tweak=starve)
    formats = (*PLAIN, *LONE, "int3-g32@awq")
    result = run(path, formats, full=full, lean=lean)
    starved = [item for item in result.scored.values() if item.tokens == 0]
    assert {item.site.expert for item in starved} == {1} and len(starved) == 4
    for item in result.scored.values():
        assert item.error.isfinite().all() and item.loss is not None
        assert item.loss.isfinite().all() and (item.loss >= 0).all()
    for (name, _), weight in result.weights.items():
        assert weight.isfinite().all(), name
    for item in starved:
        assert item.loss is not None and item.loss.eq(0).all()  # nobody minds
        if full and lean:  # known by the layer's inputs
            assert (item.error > 0).all()


def test_a_label_that_never_reached_an_expert_has_no_loss_there(root: Path) -> None:
    path = brute.checkpoint(root, "qwen3_moe", "many", num_experts=32)
    result = run(path, PLAIN[:1])
    found = 0
    for site in result.sites:
        if site.expert is not None:
            reached = brute_layer(path, site.module, "gate").up[site.expert].tokens > 0
            loss = result.scored[site.name].loss
            assert loss is not None and loss.isfinite().all()
            assert ((loss[0] > 0).numpy() == reached).all()
            found += int((~reached).sum())
    assert found > 0


def test_a_site_without_fisher_has_an_error_and_no_loss(root: Path) -> None:
    path = brute.checkpoint(root, "qwen3_moe")
    result = run(path, PLAIN, fisher=lambda _: None)
    for item in result.scored.values():
        assert item.loss is None and (item.error > 0).all()


def test_a_layer_that_no_sample_reached_is_scored_with_all_channels_alike(root: Path) -> None:
    own = skeleton(brute.checkpoint(root, "llama"))
    site = next(site for site in find_sites(own) if site.name.endswith("0.mlp.down_proj"))
    own.fill(f"{own.prefix}.0", **CPU)
    w = own.model.get_parameter(site.path).data.clone()
    observer = Observer(own.blocks[0], f"{own.prefix}.0", labels=3, full=True)
    weights: list[torch.Tensor] = []
    sensitivity = Sensitivity(
        [parse_format(name) for name in PLAIN], Options(), None, lambda _: w,
        lambda _s, _n, decoded: weights.append(decoded),
    )  # fmt: skip
    (item,) = sensitivity.linears([site], observer)
    own.drop(f"{own.prefix}.0")
    assert item.tokens == 0 and item.loss is None
    for error, decoded in zip(item.error, weights, strict=True):
        expected = float((w - decoded).double().square().sum() / w.double().square().sum())
        assert float(error) == pytest.approx(expected, rel=1e-4)


def test_a_layers_inputs_in_slices_are_those_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = skeleton(brute.checkpoint(root, "qwen3_moe"))
    own.fill(f"{own.prefix}.0", **CPU)
    module, rows = own.blocks[0].mlp.experts, torch.randn(100, 64)
    found = []
    for size in (2048, 33):
        monkeypatch.setattr("bitnest.calibrate.sensitivity.SLICE", size)
        for down, width in ((False, 64), (True, 40)):
            h = torch.zeros(width, width)
            LayerInputs(module, rows, Options()).lean(h, 0, 2, down)
            found.append(h)
    own.drop(f"{own.prefix}.0")
    assert close(found[0], numpy(rows).T @ numpy(rows) / 100)
    assert close(found[2], found[0]) and close(found[3], found[1])


# Probes.


def replaced_kl(path: Path, plan: dict[str, int], result: Run) -> list[list[float]]:
    """KL per measured sample and label, from a transformers model with the plan's weights."""
    base, other = (brute.load(path, dtype=torch.float32) for _ in range(2))
    for site in result.sites:
        if site.name in plan:
            view = site.view(other.get_parameter(site.path).data)
            view.copy_(result.weights[site.name, plan[site.name]])
    values: list[list[float]] = [[] for _ in NAMES]
    with torch.no_grad():
        for sample in SAMPLES:
            window = brute.text()[sample : sample + 1]
            p, q = (model(window, use_cache=False).logits[0, :-1] for model in (base, other))
            values[LABELS[sample]].append(kl(p, q))
    return values


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "gpt2", "gemma2"])
def test_a_probe_is_the_model_with_its_weights_replaced(family: str, root: Path) -> None:
    path, formats = brute.checkpoint(root, family), [parse_format(name) for name in PLAIN]
    sites = [site for site in find_sites(skeleton(path)) if site.kind != "router"]
    plans = draw_plans(sites, formats, 3, 0)
    plans += [group_plans(sites, 0)[-1], {sites[0].name: 0}]  # only the last group; one matrix
    result = run(path, PLAIN, plans=plans)
    for plan, found in zip(plans, result.measured, strict=True):
        expected = replaced_kl(path, plan, result)
        assert [item.label for item in found] == [0, 1, 2]
        for item, values in zip(found, expected, strict=True):
            assert item.kl == pytest.approx(np.mean(values), rel=2e-3, abs=1e-8)
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            assert item.error == pytest.approx(error, rel=5e-3, abs=1e-8)
        assert max(item.kl for item in found) > 1e-6


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_probe_of_the_models_own_weights_measures_nothing(family: str, root: Path) -> None:
    path = brute.checkpoint(root, family)

    def own(site: Site, _number: int, _weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(original(path, site)).float()

    sites = find_sites(skeleton(path))
    plans = [{site.name: 0 for site in sites}, {}]
    for found in run(path, PLAIN[:1], plans=plans, replace=own).measured:
        assert all(0 <= item.kl < 1e-10 for item in found)


def test_more_bits_measure_less_and_eight_almost_nothing(root: Path) -> None:
    path, formats = brute.checkpoint(root, "qwen3_moe"), ("int2-g16", "int4-g16", "int8-g16")
    sites = find_sites(skeleton(path))
    plans = [{site.name: i for site in sites} for i in range(3)]
    two, four, eight = (
        np.array([item.kl for item in found]) for found in run(path, formats, plans=plans).measured
    )
    assert (eight < 1e-2 * four).all() and (four < 0.2 * two).all() and (eight > 0).all()


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
def test_kl_of_near_and_far_distributions_equals_the_definition(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(600, 50, generator=generator) * 3  # more rows than are compared at once
    other = base + size * torch.randn(600, 50, generator=generator)
    found = mean_kl(base.log_softmax(1), other)
    assert found == pytest.approx(kl(base, other), rel=1e-3, abs=1e-12) and found >= 0


def test_plans_are_the_same_for_the_same_seed_and_cover_all_sites_and_formats(root: Path) -> None:
    sites = find_sites(skeleton(brute.checkpoint(root, "qwen3_moe")))
    formats = [parse_format(f"int{b}-g32") for b in (8, 2, 4, 3)]
    plans = draw_plans(sites, formats, 40, 7)
    assert plans == draw_plans(sites, formats, 40, 7) != draw_plans(sites, formats, 40, 8)
    assert all(set(plan) == {site.name for site in sites} for plan in plans)
    used = Counter(number for plan in plans for number in plan.values())
    assert set(used) == {0, 1, 2, 3}
    mean = [np.mean([formats[i].bits for i in plan.values()]) for plan in plans]
    assert min(mean) < 4 and max(mean) > 7  # plans differ in size


def test_groups_change_every_site_in_one_plan_only(root: Path) -> None:
    sites = find_sites(skeleton(brute.checkpoint(root, "deepseek_v3")))
    plans = group_plans(sites, 2)
    names = [name for plan in plans for name in plan]
    assert sorted(names) == sorted(site.name for site in sites)
    of = {site.name: (site.layer, site.kind) for site in sites}
    assert all(len({of[name] for name in plan}) == 1 for plan in plans)
    assert all(set(plan.values()) == {2} for plan in plans)

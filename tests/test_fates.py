"""Fates: experts that are dropped, replaced or merged by rules and by the allocator."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitnest import api
from bitnest.api.planning import open_planner
from bitnest.artifact import Artifact
from bitnest.calibrate.predict import Predictor
from bitnest.cli import app
from bitnest.errors import FormatError, RecipeError, StatisticsError, TargetError
from bitnest.formats import FateFormat, fates_apart, parse_format
from bitnest.packed.decoded import open_checkpoint
from bitnest.plan import Plan
from bitnest.quantize.allocation.budget import Budget
from bitnest.quantize.allocation.exact import solve_exact
from bitnest.quantize.allocation.problem import Bundle, Problem
from bitnest.quantize.allocation.solver import solve
from bitnest.quantize.compress import Job, prepare
from bitnest.quantize.fates import check_engine_fates, read_fates, read_means
from bitnest.quantize.sizing import artifact_sizes
from bitnest.recipe import Recipe, Rule
from bitnest.statistics import Statistics
from tests.tiny import Builder

FORMATS = ["int2-g32", "int4-g32"]
KINDS = ["drop", "constant", "copy", "merge"]
MEASURE: dict[str, Any] = {
    "samples": 8, "length": 32, "probes": 4, "probe_windows": 2, "fisher_windows": 4,
}  # fmt: skip
MAKE: dict[str, Any] = {"samples": 4, "length": 32}
TOKENS = torch.arange(60)[None] % 50 * 6
EXPERT = "model.layers.{}.mlp.experts.{}.*={}"


@pytest.fixture(scope="module")
def statistics(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fates") / "statistics"
    api.analyze(tiny("qwen3_moe"), out, data=[str(text)], formats=[*FORMATS, *KINDS], **MEASURE)
    return out


def job_of(model: Path, *rules: str) -> Job:
    recipe = Recipe(format="int4-g32", rules=tuple(Rule.parse(rule) for rule in rules))
    return prepare(open_checkpoint(model), recipe)


def test_names_are_read_and_written_alike() -> None:
    for name in ("drop", "constant", "copy", "merge", "merge0", "merge12"):
        fmt = parse_format(name)
        assert isinstance(fmt, FateFormat) and fmt.name == name
        assert fmt.nbytes((64, 32)) == 0 and fmt.parts((64, 32)) == {} and fmt.bits == 0
    assert fates_apart(["merge3", "int4-g32", "drop", "merge1"]) == (
        ("int4-g32",), ("merge", "drop"),
    )  # fmt: skip
    for name in ("drop3", "copy0", "merge01", "merge-1", "drop@had"):
        with pytest.raises(FormatError):
            parse_format(name)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (["model.layers.1.mlp.experts.2.down_proj=drop"], "parts of expert 2"),
        ([EXPERT.format(1, 2, "drop"), "*.experts.2.up_proj=copy"], "parts of expert 2"),
        (["model.layers.0.self_attn.q_proj=drop"], "no expert's"),
        (["kind:head=drop"], "no expert's"),
        (["model.layers.1.*=copy"], "no expert's"),
        ([EXPERT.format(1, 2, "merge")], "with whom"),
        ([EXPERT.format(1, 2, "merge2")], "no expert 2"),
        ([EXPERT.format(1, 2, "merge9")], "no expert 9"),
        ([EXPERT.format(1, 2, "merge3"), EXPERT.format(1, 3, "copy")], "gone itself"),
        ([EXPERT.format(1, "{0,1,2}", "drop")], "1 router rows"),
        ([EXPERT.format(1, "*", "copy")], "0 experts"),
    ],
)
def test_fates_that_cannot_be_are_refused_before_work(
    rules: list[str], said: str, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        api.compress(
            tiny("qwen3_moe"), tmp_path / "a", format="int4-g32", rules=rules, data=[str(text)],
            **MAKE,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_constants_without_statistics_are_refused(tiny: Builder, tmp_path: Path) -> None:
    for fate in ("constant", "merge0"):
        with pytest.raises(RecipeError, match="statistics measured"):
            api.compress(
                tiny("qwen3_moe"), tmp_path / "a", format="int4-g32",
                rules=[EXPERT.format(1, 2, fate)], **MAKE,
            )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_keeps_its_formats_and_constants_are_means(
    tiny: Builder, statistics: Path, tmp_path: Path
) -> None:
    model = tiny("qwen3_moe")
    rules = [
        EXPERT.format(0, 0, "drop"), EXPERT.format(0, 3, "dense"), EXPERT.format(1, 1, "constant"),
        EXPERT.format(1, 0, "merge3"), EXPERT.format(1, 2, "int2-g32"),
        EXPERT.format(1, 3, "dense"),
    ]  # fmt: skip
    result = api.compress(
        model, tmp_path / "a", format="int4-g32", rules=rules, statistics=statistics, **MAKE
    )
    artifact = Artifact.open(tmp_path / "a")
    entries = json.loads((tmp_path / "a" / "config.json").read_text())["bitnest_experts"]
    assert entries == {
        "0": {"count": 3, "rows": [0, 1, 2]},
        "1": {"count": 2, "rows": [1, "constant:0", 0, 1]},
    }
    found = {(r.site.layer, r.site.expert): r.format for r in artifact.records if r.site.expert
             is not None}  # fmt: skip
    assert found == {(0, 0): "int4-g32", (0, 1): "int4-g32", (0, 2): "dense",
                     (1, 0): "int2-g32", (1, 1): "dense"}  # fmt: skip
    assert artifact.manifest["source"]["reduced"]["experts"]["1"]["slots"] == [[2], [3, 0]]
    assert artifact.manifest["recipe"]["rules"][0]["format"] == "drop"  # in the source's names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    means = read_means(Statistics.open(statistics))[1]
    constants = loaded.model.layers[1].mlp.experts.constants
    assert torch.allclose(constants[0], means.output[1], atol=1e-2, rtol=1e-2)
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    share = means.tokens[3] / (means.tokens[3] + means.tokens[0])
    down = source.model.layers[1].mlp.experts.down_proj
    merged = share * down[3] + (1 - share) * down[0]
    record = next(r for r in artifact.records if r.site.name.endswith("1.mlp.experts.1.down_proj"))
    from bitnest.artifact import site_tensors

    own = site_tensors(record, artifact.headers())["weight"]
    assert torch.allclose(own.float(), merged, atol=2e-3, rtol=1e-2)
    with torch.no_grad():
        assert loaded(TOKENS).logits.isfinite().all()
    assert result.predicted is not None and result.predicted["mean"] > 0
    assert api.inspect(tmp_path / "a", verify=True)["verified"] > 0
    said = CliRunner().invoke(app, ["inspect", str(tmp_path / "a")]).stdout
    assert "block 0 of the source: 3 experts\n" in said
    assert "block 1 of the source: 2 experts, 1 of them merged, 1 replaced by constant" in said


def test_a_block_that_is_dropped_is_gone(tiny: Builder, tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    result = api.compress(model, tmp_path / "a", format="int4-g32", method="rtn",
                          rules=["model.layers.0.*=drop"])  # fmt: skip
    assert result.source_bytes == open_checkpoint(model).nbytes  # the block's too
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert len(loaded.model.layers) == 1
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    norm = source.model.layers[1].input_layernorm.weight
    assert torch.equal(loaded.model.layers[0].input_layernorm.weight, norm)


def test_engines_take_as_many_from_every_layer(tiny: Builder) -> None:
    model = tiny("qwen3_moe")
    even = job_of(model, EXPERT.format(0, 1, "drop"), EXPERT.format(1, 3, "drop"))
    check_engine_fates(even, "vllm-cpu")
    for rules in ([EXPERT.format(0, 1, "drop")],
                  [EXPERT.format(0, 1, "copy"), EXPERT.format(1, 1, "copy")]):  # fmt: skip
        with pytest.raises(TargetError, match="cannot load"):
            check_engine_fates(job_of(model, *rules), "vllm-cpu")
        check_engine_fates(job_of(model, *rules), "native")


def test_analysis_tells_what_fates_lose(statistics: Path) -> None:
    found = Statistics.open(statistics)
    assert found.formats == FORMATS and found.fates == KINDS
    for layer in found.header["fates"]["layers"]:
        assert sum(error is None for error in layer["drop"]) == 2  # top-k experts must stay
        assert all(error >= 0 for kind in ("zero", "constant", "copy") for error in layer[kind])
        assert sum(layer["constant"]) < sum(layer["zero"])  # a mean is nearer than nothing
        for expert, partner in enumerate(layer["partner"]):
            assert (layer["merge"][expert] is None) == (partner == -1) and partner != expert
    fates = Predictor(found).fates
    for place in fates.zero:
        offers = fates.offers(place, KINDS)
        assert [o.loss.sum() for o in offers] == sorted(o.loss.sum() for o in offers)
        assert all((o.loss > 0).all() for o in offers)
    partners = found.header["fates"]["layers"][0]["partner"]
    expert = next(e for e, p in enumerate(partners) if p != -1)
    other = next(e for e in range(4) if e not in (expert, partners[expert]))
    unknown = fates.loss((0, expert), FateFormat("merge", other))
    assert (unknown >= fates.loss((0, expert), FateFormat("merge", partners[expert]))).all()


def test_experts_of_a_router_of_groups_are_not_dropped(
    tiny: Builder, text: Path, tmp_path: Path
) -> None:
    """No group may lose more rows than another, so no plan could drop one: it would be refused."""
    out = tmp_path / "statistics"
    model = tiny("deepseek_v3")
    kinds = ["drop", "constant", "copy"]
    api.analyze(model, out, data=[str(text)], formats=[*FORMATS, *kinds], **MEASURE)
    (layer,) = Statistics.open(out).header["fates"]["layers"]
    assert layer["drop"] == [None] * 4 and None not in layer["constant"]
    made = api.plan(model, statistics=out, bits=1.55).plan
    fates = {fmt for fmt in made.formats(job_of(model).sites).values() if fmt in KINDS}
    assert fates and "drop" not in fates


def test_candidates_that_say_nothing_are_refused_before_measuring(
    tiny: Builder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured first")

    monkeypatch.setattr(api, "analyze", measured)
    for options, said in (
        ({"candidates": ["int4-g32", "merge2"]}, "names no expert"),
        ({"candidates": ["int4-g32", "drop"], "policy": "uniform"}, "policy uniform"),
        ({"candidates": ["int4-g32", "drop"], "target": "vllm-cpu"}, "vllm-cpu cannot load"),
    ):
        with pytest.raises(RecipeError, match=said):
            api.plan(tiny("qwen3_moe"), bits=15, data=[str(text)], **options, **MAKE)
        with pytest.raises(RecipeError, match=said):
            api.compress(
                tiny("qwen3_moe"), tmp_path / "a", bits=15, data=[str(text)], **options, **MAKE
            )
    assert list(tmp_path.iterdir()) == []


def test_a_prediction_counts_an_expert_once(statistics: Path) -> None:
    predictor = Predictor(Statistics.open(statistics))
    names = {s.name: s for s in predictor.sites if (s.layer, s.expert) == (1, 2)}
    whole = predictor.predict(dict.fromkeys(names, "constant"))
    single = predictor.fates.loss((1, 2), FateFormat("constant"))
    assert whole.raw == pytest.approx(dict(zip(predictor.labels, single, strict=True)), rel=0.05)


def test_what_cannot_be_measured_is_refused(
    tiny: Builder, text: Path, statistics: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="no experts"):
        api.analyze(tiny("llama"), tmp_path / "a", data=[str(text)], formats=["copy"], **MEASURE)
    with pytest.raises(RecipeError, match="no block between"):
        api.analyze(tiny("llama"), tmp_path / "a", data=[str(text)], formats=["drop"], **MEASURE)
    with pytest.raises(RecipeError, match="--reuse"):
        api.analyze(tiny("qwen3_moe"), tmp_path / "a", formats=["drop"], reuse=statistics)
    assert list(tmp_path.iterdir()) == []


def test_damaged_fates_are_refused(statistics: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(statistics, copy)
    header = json.loads((copy / "statistics.json").read_text())
    for damage in ({"zero": [0.1]}, {"drop": ["a", 0.1, 0.1, 0.1]}, {"partner": [0.5] * 4}):
        layers = [{**layer, **damage} for layer in header["fates"]["layers"]]
        damaged = {**header, "fates": {**header["fates"], "layers": layers}}
        (copy / "statistics.json").write_text(json.dumps(damaged))
        with pytest.raises(StatisticsError, match="header is damaged"):
            Statistics.open(copy)


def test_a_killed_analysis_keeps_what_it_measured_of_fates(
    tiny: Builder, text: Path, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop:
        on = False

        def phase(self, name: str, total: int) -> None:
            self.on = name == "analyzing"

        def step(self, amount: int = 1, note: str = "") -> None:
            if self.on:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"data": [str(text)], "formats": [*FORMATS, *KINDS], **MEASURE}
    with pytest.raises(KeyboardInterrupt):
        api.analyze(tiny("qwen3_moe"), tmp_path / "an", progress=Stop(), **options)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured twice")

    monkeypatch.setattr("bitnest.prune.experts.fates.measure_fates", again)
    done = api.analyze(tiny("qwen3_moe"), tmp_path / "an", **options)
    assert done.header["fates"] == Statistics.open(statistics).header["fates"]


def test_a_plan_with_fates_is_no_worse_and_comes_as_large_as_said(
    tiny: Builder, statistics: Path, tmp_path: Path
) -> None:
    model = tiny("qwen3_moe")
    options: dict[str, Any] = {"statistics": statistics, "ends": False}
    plain = api.plan(model, candidates=FORMATS, bits=2.0, **options)
    size = plain.sizes.total - 2000  # no plan without fates is as small
    with pytest.raises(RecipeError, match="no plan fits"):
        api.plan(model, candidates=FORMATS, size=size, **options)
    for budget in (size, plain.sizes.total + 3000):
        found = api.plan(model, candidates=[*FORMATS, *KINDS], size=budget, **options)
        assert found.sizes.total <= budget
        if budget != size:
            without = api.plan(model, candidates=FORMATS, size=budget, **options)
            assert found.mean <= without.mean
            continue
        fates = read_fates(job_of(model).sites, {
            name: parse_format(fmt) for name, fmt in found.plan.formats(job_of(model).sites).items()
        })  # fmt: skip
        assert fates.experts
        result = api.compress(model, tmp_path / "a", plan=found.plan, statistics=statistics, **MAKE)
        assert result.artifact_bytes <= found.sizes.artifact
        assert result.artifact_bytes >= 0.98 * found.sizes.artifact  # some digits per site
        assert result.predicted is not None
        assert result.predicted["mean"] == pytest.approx(found.mean, rel=1e-4)
        found.plan.write(tmp_path / "plan.yaml")
        checked = api.check_plan(model, Plan.read(tmp_path / "plan.yaml"), statistics=statistics)
        assert checked.mean == pytest.approx(found.mean, rel=1e-6)
        assert checked.sizes.packed == found.sizes.packed
        before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "a").iterdir()}
        api.compress(model, tmp_path / "a", plan=tmp_path / "plan.yaml", statistics=statistics,
                     **MAKE)  # fmt: skip
        assert before == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "a").iterdir()}


def test_no_plan_is_over_a_budget_below_the_coarsest_formats(
    tiny: Builder, statistics: Path
) -> None:
    planner = open_planner(
        tiny("qwen3_moe"), statistics, candidates=["int4-g32", "drop", "constant"], ends=False
    )
    menu = planner.evidence(Budget(size=1), kinds=planner.kinds).menu
    assert len(menu.gone) == 6  # one of four stays in each layer
    rows = np.arange(len(menu.items))
    floor = int(np.where(menu.allowed, menu.nbytes, 1 << 40).min(axis=1).sum())
    low = menu.least(menu.nbytes)
    assert low < floor
    objective = planner.evidence(Budget(size=1), kinds=planner.kinds).objective
    for budget in range(low, floor + 1, max(1, (floor - low) // 12)):
        choice = objective.minimise(menu.nbytes, budget).choice
        assert int(menu.nbytes[rows, choice].sum()) <= budget
        assert np.isfinite(objective.mean(choice))


def test_rules_with_fates_are_kept_by_plans(tiny: Builder, statistics: Path) -> None:
    model, rules = tiny("qwen3_moe"), [EXPERT.format(1, 2, "drop")]
    options: dict[str, Any] = {"statistics": statistics, "bits": 3.0}
    free = api.plan(model, candidates=FORMATS, **options)
    ruled = api.plan(model, candidates=FORMATS, rules=rules, **options)
    sites = job_of(model).sites
    chosen = ruled.plan.formats(sites)
    assert {chosen[s.name] for s in sites if (s.layer, s.expert) == (1, 2)} == {"drop"}
    assert ruled.mean > free.mean / 2 and ruled.sizes.packed < free.sizes.packed
    loss = Predictor(Statistics.open(statistics)).fates.loss((1, 2), FateFormat("drop"))
    assert ruled.evidence.objective.background.losses.sum() == pytest.approx(loss.sum())


def test_nested_weights_of_what_is_left(tiny: Builder, text: Path, tmp_path: Path) -> None:
    api.compress(
        tiny("qwen3_moe"), tmp_path / "a", format="nest24-g32", data=[str(text)],
        rules=[EXPERT.format(1, 2, "drop")], **MAKE,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert loaded.model.layers[1].mlp.experts.num_experts == 3


def test_a_killed_run_of_a_reduced_model_resumes_to_the_same_bytes(
    tiny: Builder, statistics: Path, tmp_path: Path
) -> None:
    class Stop:
        on = 0

        def phase(self, name: str, total: int) -> None:
            self.on = int(name == "compressing")

        def step(self, amount: int = 1, note: str = "") -> None:
            if self.on:
                raise KeyboardInterrupt

    model = tiny("qwen3_moe")
    rules = [EXPERT.format(0, 1, "constant"), EXPERT.format(1, 2, "drop")]
    options: dict[str, Any] = {"format": "int4-g32", "rules": rules, "statistics": statistics}
    with pytest.raises(KeyboardInterrupt):
        api.compress(model, tmp_path / "a", progress=Stop(), **options, **MAKE)
    assert not (tmp_path / "a").exists()
    api.compress(model, tmp_path / "a", **options, **MAKE)
    api.compress(model, tmp_path / "b", **options, **MAKE)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_sizes_of_rules_with_fates(tiny: Builder, tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    rules = [EXPERT.format(0, "{0,2}", "drop"), EXPERT.format(1, 1, "copy")]
    job = job_of(model, *rules)
    said = artifact_sizes(job, job.formats)
    done = api.compress(model, tmp_path / "a", format="int4-g32", method="rtn", rules=rules)
    assert done.nbytes == said.packed + said.dense + said.headers
    assert done.artifact_bytes <= said.artifact


@pytest.mark.parametrize("solver", [solve, solve_exact])
def test_bundles_of_choices_nobody_has_alone_are_solved(solver: Any) -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        cost = np.concatenate([random.integers(1, 9, (6, 3)), np.zeros((6, 1), int)], axis=1)
        loss = np.concatenate([random.random((6, 3)), np.full((6, 1), np.inf)], axis=1)
        bundles = (
            Bundle((0, 1), (3, 3), 0.9),
            Bundle((3, 4, 5), (3, 3, 3), float(random.random())),
        )
        problem = Problem(cost, loss, int(random.integers(8, 30)), bundles)
        best = np.inf
        for taken in itertools.product([False, True], repeat=2):
            away = {i for b, t in zip(bundles, taken, strict=True) if t for i in b.items}
            for own in itertools.product(range(3), repeat=6):
                choice = np.array([3 if i in away else c for i, c in enumerate(own)])
                if problem.cost_of(choice) <= problem.budget:
                    best = min(best, problem.loss_of(choice))
        if not np.isfinite(best):
            continue
        assert solver(problem).loss == pytest.approx(best)

"""From budget to artifact: exact bytes, targets that engines accept, limits met by measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnest import api
from bitnest.api.compressing import plan_statistics
from bitnest.api.planning import default_statistics
from bitnest.artifact import Artifact
from bitnest.calibrate.expect import expect
from bitnest.calibrate.predict import Predictor
from bitnest.checkpoint import Checkpoint
from bitnest.errors import BitnestError, PlanError, RecipeError, StatisticsError, TargetError
from bitnest.export.plan_targets import TARGETS, open_target
from bitnest.export.targets import check_engine
from bitnest.formats import parse_format
from bitnest.plan import Plan
from bitnest.quantize.allocation.budget import Budget
from bitnest.quantize.allocation.explain import explain
from bitnest.quantize.allocation.planner import Planner
from bitnest.quantize.allocation.policies import POLICIES
from bitnest.quantize.allocation.problem import BudgetError
from bitnest.quantize.compress import prepare
from bitnest.quantize.sizing import artifact_sizes, cache_bytes
from bitnest.recipe import Recipe, Rule
from bitnest.recipe_file import parse_recipe
from bitnest.statistics import Statistics
from tests.tiny import Builder

FORMATS = ("int2-g32", "int3-g32", "int4-g32", "int5-g32", "int6-g32", "int8-g32", "int4-g16")
SMALL: dict[str, Any] = {"samples": 8, "length": 32}


@pytest.fixture(scope="module")
def moe(tiny: Builder) -> Path:
    return tiny("qwen3_moe", "even", moe_intermediate_size=64)  # divides as engines want it


@pytest.fixture(scope="module")
def found(moe: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return api.analyze(
        moe, tmp_path_factory.mktemp("s") / "statistics", data=[f"text={text}"], formats=FORMATS,
        probes=6, probe_windows=2, fisher_windows=2, **SMALL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def droppable(moe: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """With `zero` among the candidates: experts can be dropped."""
    return api.analyze(
        moe, tmp_path_factory.mktemp("z") / "statistics", data=[f"text={text}"],
        formats=("zero", "int2-g32", "int4-g32"), probes=6, probe_windows=2, fisher_windows=2,
        **SMALL,
    )  # fmt: skip


def planner(model: Path, found: Statistics, target: str = "native", **options: Any) -> Planner:
    rules = tuple(Rule.parse(rule) for rule in options.pop("rules", ()))
    job = prepare(Checkpoint.open(model), Recipe(format="dense", rules=rules))
    goal = open_target(target, job.checkpoint.config)
    return Planner(job, Predictor(found), goal, **options)


def files(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


# sizes


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("rules", [(), ("kind:attention=int8-g32-asym", "*.0.*=dense")])
def test_every_byte_is_known_beforehand(
    family: str, rules: tuple[str, ...], tiny: Builder, tmp_path: Path
) -> None:
    recipe = Recipe("int3-g32", tuple(Rule.parse(rule) for rule in rules), method="rtn")
    job = prepare(Checkpoint.open(tiny(family)), recipe)
    sizes = artifact_sizes(job, job.formats)
    done = api.compress(tiny(family), tmp_path / "a", format="int3-g32", rules=rules, method="rtn")
    real = files(done.path)
    assert real <= sizes.artifact <= real + 4 * len(job.sites)
    tensors = {f: f.stat().st_size for f in done.path.glob("*.safetensors")}
    assert sizes.packed + sizes.dense + sizes.headers == sum(tensors.values())


@pytest.mark.parametrize(
    "family, width",
    [("llama", 2 * 2 * 16), ("gpt2", 2 * 4 * 16), ("deepseek_v3", 4 * (16 + 16 + 16))],
)
def test_cache_bytes_by_hand(family: str, width: int, tiny: Builder) -> None:
    config = prepare(Checkpoint.open(tiny(family)), Recipe()).skeleton.model.config
    assert cache_bytes(config, 100) == 2 * width * 100 * 2  # layers, values a layer, tokens, bytes


def test_sliding_layers_keep_their_window_only(tiny: Builder) -> None:
    config = prepare(Checkpoint.open(tiny("gemma3")), Recipe()).skeleton.model.config
    assert cache_bytes(config, 100) == 2 * 2 * 16 * 2 * (16 + 100)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_an_artifact_is_as_large_as_was_asked_and_not_larger(
    share: float, moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    plans = planner(moe, found)
    least = plans.plan(Budget(bits=2.0)).sizes.artifact
    most = plans.plan(Budget(bits=8.0)).sizes.artifact
    size = round(least + share * (most - least))
    done = api.compress(
        moe, tmp_path / "a", size=size, statistics=found.path, ends=False,
        data=[f"text={text}"], **SMALL,
    )  # fmt: skip
    step = 2 * 64 * 64 // 8  # of one bit on the largest matrix, and of two
    assert size - max(size // 1000, step) - 1500 <= done.artifact_bytes <= size
    assert done.forecast is not None and done.artifact_bytes <= done.forecast["disk"]


def test_a_cache_takes_its_share_of_the_size(moe: Path, found: Statistics) -> None:
    plans = planner(moe, found)
    size = plans.plan(Budget(bits=5.0)).sizes.total
    alone, beside = (plans.plan(Budget(size=size, context=c)) for c in (0, 64))
    cache = cache_bytes(plans.job.skeleton.model.config, 64)
    assert beside.sizes.cache == cache > 0
    assert beside.sizes.total <= size and beside.sizes.artifact < alone.sizes.artifact


# budgets


def test_bits_are_the_average_code_width(moe: Path, found: Statistics) -> None:
    for bits in (2.5, 3.0, 4.7):
        planned = planner(moe, found).plan(Budget(bits=bits))
        assert planned.bits == pytest.approx(bits, abs=0.03) and planned.bits <= bits + 1e-9
        widths = [parse_format(f).bits for f in planned.menu.plan(planned.choice).values()]
        assert planned.bits == pytest.approx(
            np.average(widths, weights=[s.numel for item in planned.menu.items for s in item])
        )


def test_small_groups_are_no_loophole_in_a_budget_of_bits(moe: Path, found: Statistics) -> None:
    plans = planner(moe, found)
    planned = plans.plan(Budget(bits=4.0))
    assert "int4-g16" not in planned.menu.formats
    assert "int4-g16" not in {r.format for r in planned.plan.rules}
    assert "int4-g16" in plans.evidence(Budget(size=1)).menu.formats


def test_a_width_keeps_the_smallest_format_that_is_allowed(moe: Path, found: Statistics) -> None:
    """A format that the target or a rule excludes is no reason to leave out a larger one."""
    plans = replace_formats(planner(moe, found), ("int2-g32", "int4-g16"), FORMATS)
    planned = plans.plan(Budget(bits=3.0))
    assert planned.bits == pytest.approx(3.0, abs=0.03)
    used = set(planned.menu.plan(planned.choice).values())
    assert used == {"int2-g32", "int4-g16"}
    ruled = planner(moe, found, rules=("kind:attention=int4-g16",)).plan(Budget(bits=3.0))
    formats = ruled.menu.plan(ruled.choice)
    for item in ruled.menu.items:
        for site in item:
            assert (formats[site.name] == "int4-g16") is (site.kind == "attention")


def test_a_budget_of_bits_says_what_it_counts(moe: Path, found: Statistics) -> None:
    with pytest.raises(BudgetError, match="code bits"):
        planner(moe, found).plan(Budget(bits=1.9))


def test_more_budget_never_loses_more(moe: Path, found: Statistics) -> None:
    plans = planner(moe, found, exact=True)
    means = [plans.plan(Budget(bits=b)).mean for b in np.linspace(2, 8, 25)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(means))


@pytest.mark.parametrize("target", ["transformers", "gguf", "vllm-cuda"])
def test_more_budget_never_loses_more_where_layers_go_together(
    target: str, moe: Path, found: Statistics
) -> None:
    plans = planner(moe, found, target)
    bits = [plans.plan(Budget(bits=b)).mean for b in np.arange(4, 6.01, 0.1)]
    assert all(a >= b * (1 - 1e-9) for a, b in pairwise(bits))


def test_an_end_that_a_rule_names_is_part_of_the_prediction(moe: Path, found: Statistics) -> None:
    plain = planner(moe, found).plan(Budget(bits=4))
    ruled = planner(moe, found, rules=["kind:embedding=int2-g32"])
    plan = ruled.plan(Budget(bits=4))
    assert plan.mean > 1.05 * plain.mean
    assert plan.bits <= 4  # the embedding is outside the budget all the same
    for ends in (None, False):
        again = planner(moe, found, ends=ends).evaluate(plan.plan)
        assert again.mean == pytest.approx(plan.mean)
        assert again.sizes.artifact == pytest.approx(plan.sizes.artifact, abs=100)
        assert again.plan.formats(ruled.job.sites) == plan.plan.formats(ruled.job.sites)
    with pytest.raises(StatisticsError, match="int7-g32"):
        planner(moe, found, rules=["kind:embedding=int7-g32"]).plan(Budget(bits=4))


def test_planning_is_pure(moe: Path, found: Statistics) -> None:
    one, two = (planner(moe, found).plan(Budget(bits=3.3)).plan.to_text() for _ in range(2))
    assert one == two


def test_the_smallest_plan_that_keeps_a_predicted_kl(moe: Path, found: Statistics) -> None:
    plans = planner(moe, found)
    limit = plans.plan(Budget(bits=4.0)).mean
    planned = plans.plan(Budget(kl=limit))
    assert planned.mean <= limit
    smaller = plans.plan(Budget(size=planned.sizes.artifact - planned.sizes.packed // 50))
    assert smaller.mean > limit * 0.98


def test_ours_is_predicted_to_lose_least(moe: Path, found: Statistics) -> None:
    plans = planner(moe, found)
    for bits in (2.25, 3.0, 4.0, 5.0):
        by = {name: plans.plan(Budget(bits=bits), name) for name in POLICIES}
        assert min(by, key=lambda name: by[name].mean) == "bitnest", bits
        for name, planned in by.items():
            spent = planned.menu.average_bits(planned.choice)
            assert bits - 0.06 <= spent <= bits + 1e-9, (name, bits)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_fill_every_budget_on_a_dense_model(
    name: str, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    found = api.analyze(
        tiny("llama"), tmp_path / "s", data=[f"text={text}"], formats=("int2-g32", "int4-g32",
        "int6-g32"), probes=0, fisher_windows=2, **SMALL,
    )  # fmt: skip
    plans = planner(tiny("llama"), found)
    for bits in (2.0, 3.1, 6.0):
        planned = plans.plan(Budget(bits=bits), name)
        assert planned.menu.average_bits(planned.choice) <= bits + 1e-9


def test_rules_by_hand_are_kept_by_every_plan(moe: Path, found: Statistics) -> None:
    rules = ("kind:attention=int8-g32", "*.1.mlp.*=dense")
    plans = planner(moe, found, rules=rules)
    planned = plans.plan(Budget(bits=12.0))
    formats = planned.plan.formats(plans.job.sites)
    for item in planned.menu.items:
        for site in item:
            if site.kind == "attention":
                assert formats[site.name] == "int8-g32"
            elif site.layer == 1:
                assert formats[site.name] == "dense"
    with pytest.raises(StatisticsError, match="was not measured"):
        planner(moe, found, rules=("kind:attention=mxfp4",)).plan(Budget(bits=12.0))


def test_a_rule_may_ask_for_a_format_that_is_no_candidate(moe: Path, found: Statistics) -> None:
    """It is then that site's alone: to the others the candidates are what was said."""
    options: dict[str, Any] = {
        "statistics": found.path, "candidates": ("int2-g32", "int8-g32"),
        "rules": ("kind:attention=int4-g32",),
    }  # fmt: skip
    for budget in ({"bits": 4.0}, {"size": 300_000}):
        planned = api.plan(moe, **options, **budget)
        formats = planned.menu.plan(planned.choice)
        kinds = {s.name: s.kind for item in planned.menu.items for s in item}
        for name, fmt in formats.items():
            assert (fmt == "int4-g32") is (kinds[name] == "attention")


def test_a_rule_below_all_candidates_is_no_budget_too_small(moe: Path, found: Statistics) -> None:
    planned = api.plan(moe, statistics=found.path, bits=4.0, candidates=("int5-g32",),
                       rules=("kind:expert=int3-g32",))  # fmt: skip
    assert planned.bits <= 4.0


@pytest.mark.parametrize("kept", [False, True])
def test_formats_that_were_not_measured_come_with_a_way_on(
    kept: bool, moe: Path, found: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    place = tmp_path / f"{moe.name}-statistics"
    shutil.copytree(found.path, place)
    header = json.loads((place / "statistics.json").read_text("utf-8"))
    header["options"]["keep_hessians"] = kept
    (place / "statistics.json").write_text(json.dumps(header), "utf-8")
    asked: list[dict[str, Any]] = [
        {"candidates": ("int2-g32", "mxfp4")},
        {"candidates": ("int2-g32",), "rules": ("kind:attention=mxfp4",)},
    ]
    for options in asked:
        for statistics in (None, place):
            with pytest.raises(StatisticsError, match="'mxfp4' is no candidate") as caught:
                api.plan(moe, bits=4.0, statistics=statistics, **options)
            hint = caught.value.hint
            assert "--format mxfp4" in hint
            assert ("rename" in hint) is (statistics is None)
            # of formats that are there already nothing is said where others can be added
            assert ("--format int2-g32" in hint) is not kept
            assert ("--keep-hessians" in hint) is not kept


@pytest.mark.parametrize(
    "budget",
    [Budget(bits=1.9), Budget(size=1000), Budget(kl=1e-12)],
    ids=["bits", "size", "kl"],
)
def test_budgets_that_cannot_be_met(budget: Budget, moe: Path, found: Statistics) -> None:
    limited = planner(moe, found)
    if budget.kl is not None:
        limited = replace_formats(limited, ("int2-g32", "int3-g32"))
    with pytest.raises(RecipeError) as caught:
        limited.plan(budget)
    assert caught.value.hint


def replace_formats(
    plans: Planner, formats: tuple[str, ...], candidates: tuple[str, ...] = ()
) -> Planner:
    """For a target that takes `formats` alone."""
    goal = replace(plans.target, allows=lambda _s, f: "" if f.name in formats else "no")
    return Planner(plans.job, plans.predictor, goal, formats=candidates or formats)


def test_statistics_of_another_model_are_refused(tiny: Builder, found: Statistics) -> None:
    with pytest.raises(StatisticsError, match="was not measured"):
        planner(tiny("mixtral"), found)


# targets


@pytest.mark.parametrize("target", ["vllm-cuda", "vllm-cpu", "transformers"])
def test_a_plan_for_an_engine_is_one_that_its_export_accepts(
    target: str, moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    plans = planner(moe, found, target)
    budget = Budget(bits=8.0 if target == "vllm-cpu" else 5.0)
    planned = plans.plan(budget)
    free = planner(moe, found).plan(budget)
    assert planned.mean >= free.mean * (1 - 1e-9)
    done = api.compress(moe, tmp_path / "a", plan=planned.plan, data=[f"text={text}"], **SMALL)
    check_engine(target, Artifact.open(done.path).records, plans.job.checkpoint.config)
    api.export(done.path, tmp_path / "e", engine=target)


def test_llama_cpp_gets_one_type_for_a_layer_s_stacked_experts(
    moe: Path, found: Statistics
) -> None:
    planned = planner(moe, found, "gguf").plan(Budget(bits=5.0))
    formats = planned.menu.plan(planned.choice)
    assert set(formats.values()) <= {"int4-g32", "int5-g32", "int8-g32", "dense"}
    stacks: dict[str, set[str]] = {}
    for name, fmt in formats.items():
        if ".experts." in name:
            layer, _, leaf = name.partition(".experts.")
            stacks.setdefault(f"{layer}.{leaf.rpartition('.')[2]}", set()).add(fmt)
    assert len(stacks) == 6 and all(len(used) == 1 for used in stacks.values())


@pytest.mark.parametrize("way", ["plan", "frontier", "compare_policies"])
def test_candidates_of_which_a_target_takes_none_are_refused(
    way: str, moe: Path, found: Statistics
) -> None:
    budget: dict[str, Any] = {} if way == "frontier" else {"bits": 5.5}
    with pytest.raises(RecipeError, match="gguf takes none of the candidates") as caught:
        getattr(api, way)(moe, statistics=found.path, target="gguf",
                          candidates=("int2-g32", "int4-g16"), **budget)  # fmt: skip
    assert "--format int4-g32" in caught.value.hint
    dense = Plan.of({s.name: "dense" for s in found.sites}, target="gguf")
    assert api.check_plan(moe, dense, statistics=found.path, candidates=("int2-g32",)).mean == 0


def test_a_budget_too_small_names_what_the_target_takes(moe: Path, found: Statistics) -> None:
    with pytest.raises(RecipeError, match="less than the smallest") as caught:
        api.plan(moe, statistics=found.path, target="gguf", bits=3.5)
    assert caught.value.hint == "candidates: int4-g32, int5-g32, int8-g32, dense"


def test_what_a_target_s_rules_cost_is_said(moe: Path, found: Statistics) -> None:
    planned = api.plan(moe, statistics=found.path, bits=5.0, target="vllm-cuda")
    cost = api.constraint_cost(moe, planned, target="vllm-cuda", statistics=found.path)
    assert cost["kl"] >= 0 and cost["free"] + cost["kl"] == pytest.approx(planned.mean, rel=0.05)
    assert "alike" in cost["rules"]


def test_unknown_targets() -> None:
    with pytest.raises(TargetError) as caught:
        open_target("abacus", {})
    assert all(name in caught.value.hint for name in TARGETS)


# plans as files


def test_a_plan_file_edited_by_hand_is_measured_again_and_carried_out(
    moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    planned = api.plan(moe, statistics=found.path, size=300_000)
    planned.plan.write(tmp_path / "p.yaml")
    content = (tmp_path / "p.yaml").read_text("utf-8") + "- '*.0.self_attn.*': int8-g32\n"
    (tmp_path / "p.yaml").write_text(content, "utf-8")
    edited = Plan.read(tmp_path / "p.yaml")
    assert edited.edited
    again = api.check_plan(moe, edited, statistics=found.path)
    assert again.mean != planned.mean
    done = api.compress(
        moe, tmp_path / "a", plan=tmp_path / "p.yaml", data=[f"text={text}"], **SMALL
    )
    records = {r.site.name: r.format for r in Artifact.open(done.path).records}
    assert records["model.layers.0.self_attn.q_proj"] == "int8-g32"
    assert done.plan is not None and done.plan["edited"] and done.plan["asked"]["size"] == 300_000
    wanted = edited.formats([r.site for r in Artifact.open(done.path).records])
    assert wanted == records


def test_a_plan_of_other_weights_is_refused_before_work(
    tiny: Builder, moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    plan = api.plan(moe, statistics=found.path, bits=4.0).plan
    other = tiny("qwen3_moe", "other", rms_norm_eps=1e-3, initializer_range=0.5)
    with pytest.raises((PlanError, BitnestError)):
        api.compress(other, tmp_path / "a", plan=replace(plan, source="0" * 64),
                     data=[f"text={text}"], **SMALL)  # fmt: skip
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dial", [{"min_agreement": 0.9}, {"max_kl": 0.02}, {"bits": 3.5}])
def test_a_plan_keeps_the_dial_that_was_asked(
    dial: dict[str, Any], moe: Path, found: Statistics
) -> None:
    plan = api.plan(moe, statistics=found.path, **dial).plan
    assert plan.asked == dial and Plan.from_text(plan.to_text()).asked == dial


def test_why_a_site_got_its_format(moe: Path, found: Statistics) -> None:
    planned = planner(moe, found).plan(Budget(bits=4.0))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.3.down_proj"):
        (item,) = explain(planned, name)
        chosen = [line for line in item.lines if line.mark == "chosen"]
        assert [line.format for line in chosen] == [planned.menu.plan(planned.choice)[name]]
        assert item.price > 0
        best = min(item.lines, key=lambda line: line.value)
        assert best.value == 0
        # but for the step the budget cuts, the choice is the best at the price
        assert chosen[0].value <= 2 * item.price * max(line.nbytes for line in item.lines) * 8
    assert len(explain(planned, "kind:attention")) == 8 and explain(planned, "nothing") == []


@pytest.mark.parametrize("bits", [1.0, 1.6, 2.5])
def test_what_is_explained_is_what_was_chosen_also_of_dropped_experts(
    bits: float, moe: Path, droppable: Statistics
) -> None:
    planned = planner(moe, droppable).plan(Budget(bits=bits))
    found = explain(planned, "*")
    chosen = [line for item in found for line in item.lines if line.mark == "chosen"]
    assert len(chosen) == len(planned.menu.items)
    assert sum(line.value > 0 for line in chosen) <= 3  # of a class that the budget cut
    whole = [line for line in chosen if line.whole]
    experts = [g for g in planned.menu.experts if all(
        planned.menu.formats[planned.choice[i]] == "zero" for i in g)]  # fmt: skip
    assert len(whole) == sum(map(len, experts)) and (bits > 2 or whole)
    assert all(line.format == "zero" and line.loss > 0 for line in whole)


def test_a_dropped_expert_is_predicted_alike_by_the_plan_and_by_what_carries_it_out(
    moe: Path, droppable: Statistics
) -> None:
    plans = planner(moe, droppable)
    planned = plans.plan(Budget(bits=1.0))
    formats = planned.plan.formats(plans.job.sites)
    dropped = [e for e in planned.menu.experts if all(
        formats[planned.menu.items[i][0].name] == "zero" for i in e)]  # fmt: skip
    assert dropped
    chosen = {name: fmt for name, fmt in formats.items() if fmt != "dense"}
    found = plans.predictor.predict(chosen)
    assert found.kl == pytest.approx(planned.kl) and found.mean == pytest.approx(planned.mean)
    done = expect(droppable.path, {n: parse_format(f) for n, f in formats.items()}, "gptq")
    assert done.mean == pytest.approx(planned.mean)


def test_the_resolved_recipe_is_kept_whole(
    moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    """What is kept can be read as a recipe again, and asks for the same."""
    import yaml

    options: dict[str, Any] = {
        "data": [f"text={text}"], "candidates": ["int2-g32", "int4-g32"], "exact": True,
        "rules": ["kind:attention=int4-g32"], "damp": 0.05, "seed": 3, **SMALL,
    }  # fmt: skip
    done = api.compress(moe, tmp_path / "a", statistics=found.path, bits=3.0, **options)
    kept = Artifact.open(done.path).manifest["resolved"]
    assert parse_recipe(yaml.safe_dump(kept)) == {
        "bits": 3.0, "target": "native", "policy": "bitnest", "ends": False, "method": "gptq",
        "weighting": "gate", "clip": True, **options,
    }  # fmt: skip
    other = api.compress(moe, tmp_path / "b", format="int4-g32", data=[f"text={text}"], **SMALL)
    kept = Artifact.open(other.path).manifest["resolved"]
    assert kept["format"] == "int4-g32" and kept["data"]["texts"] == [f"text={text}"]
    assert "budget" not in kept and "candidates" not in kept


def test_a_plan_overruled_by_a_rule_is_an_edited_one(
    moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    plan = api.plan(moe, statistics=found.path, bits=4.0).plan
    for name, rule, edited in (
        ("a", "kind:expert=int2-g32", True),
        ("b", "kind:embedding=dense", False),
    ):
        done = api.compress(
            moe, tmp_path / name, plan=plan, rules=[rule], data=[f"text={text}"], **SMALL
        )
        assert done.plan is not None and done.plan["edited"] is edited
        kept = Artifact.open(done.path).manifest["resolved"]
        assert kept["plan"] == plan.digest and len(kept["rules"]) == 1


# the closed loop


@pytest.mark.parametrize("limit", [{"max_kl": 0.02}, {"min_agreement": 0.9}])
def test_a_limit_is_met_by_measurement_with_little_to_spare(
    limit: dict[str, float], moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    done = api.compress(
        moe, tmp_path / "a", statistics=found.path, data=[f"text={text}"], **SMALL, **limit
    )
    assert done.measured is not None and 1 <= done.rounds <= 6
    report = api.evaluate([done.path], against=moe, data=[f"text={text}"], window=128, windows=32)
    divergence = report.rows[1].scores[0].kl
    assert divergence is not None
    if "max_kl" in limit:
        assert 0.5 * limit["max_kl"] <= divergence.mean <= limit["max_kl"]
    else:
        assert divergence.same_top >= limit["min_agreement"]
    assert not list(tmp_path.glob(".*")), "nothing of the tries is left"
    kept = Artifact.open(done.path)
    kept.verify()
    assert json.loads((done.path / "bitnest.json").read_text())["plan"]["policy"] == "bitnest"


def test_a_finished_limit_is_known_as_the_same_command_s(
    moe: Path, found: Statistics, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"statistics": found.path, "data": [f"text={text}"], **SMALL}
    done = api.compress(moe, tmp_path / "a", max_kl=0.05, **options)
    before = {file.name: file.stat().st_mtime_ns for file in done.path.iterdir()}
    monkeypatch.setattr("bitnest.quantize.compress._Run", lambda *_: pytest.fail("made again"))
    again = api.compress(moe, tmp_path / "a", max_kl=0.05, **options)
    assert again.plan == done.plan and again.artifact_bytes == done.artifact_bytes
    assert {file.name: file.stat().st_mtime_ns for file in done.path.iterdir()} == before
    for other in ({"max_kl": 0.06}, {"max_kl": 0.05, "check": [str(text)]},
                  {"max_kl": 0.05, "damp": 0.1}):  # fmt: skip
        with pytest.raises(BitnestError, match="in the way"):
            api.compress(moe, tmp_path / "a", **options, **other)


def test_a_limit_that_no_plan_keeps_leaves_nothing(
    moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="no plan"):
        api.compress(
            moe, tmp_path / "a", statistics=found.path, data=[f"text={text}"], max_kl=1e-9,
            candidates=("int2-g32",), rules=("kind:attention=int2-g32", "kind:expert=int2-g32"),
            **SMALL,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_the_frontier_falls(moe: Path, found: Statistics) -> None:
    curve = api.frontier(moe, points=6, statistics=found.path)
    points = curve.points["bitnest"]
    assert len(points) >= 4
    for a, b in pairwise(points):
        assert a.sizes.total < b.sizes.total and a.mean >= b.mean
    assert json.loads(json.dumps(curve.to_json()))["points"][0]["policy"] == "bitnest"


RECIPES = Path(__file__).parent.parent / "recipes"
OVERRIDES = {
    "fit-in-memory": ["--size", "330KB", "--context", "64"],
    "near-lossless": ["--max-kl", "0.05"],
}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_are_carried_out(
    name: str, moe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from bitnest.cli import app

    monkeypatch.chdir(tmp_path)
    options = [
        "compress", str(moe), "--recipe", str(RECIPES / f"{name}.yaml"), "-o", "a", "--data",
        f"text={text}", "--samples", "8", "--length", "32", *OVERRIDES.get(name, []),
    ]  # fmt: skip
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, (done.output, done.exception)
    artifact = Artifact.open(tmp_path / "a")
    formats = {r.site.kind: r.format for r in artifact.records}
    plan = artifact.manifest.get("plan")
    if name == "mxfp4":
        assert plan is None and formats["attention"] == "mxfp8"
        assert formats["expert"] == "mxfp4@had32"
    elif name == "fit-in-memory":
        assert files(artifact.path) <= 330_000 and plan is not None
        assert plan["asked"] == {"size": 330_000, "context": 64}
    elif name == "near-lossless":
        assert formats["attention"] == "int6-g128@had64"
    elif name == "vllm-w4a16":
        assert plan is not None and plan["target"] == "vllm-cpu"
        assert {r.format for r in artifact.records} <= {"int4-g32", "dense"}
    else:
        assert plan is not None and plan["asked"] == {"bits": 3.0}


@pytest.mark.parametrize("flips", [0.0, 0.02])
def test_the_tangent_is_the_gradient_of_the_prediction(
    flips: float, moe: Path, found: Statistics
) -> None:
    from bitnest.quantize.allocation.objective import Background, Objective

    base = planner(moe, found).evidence(Budget(bits=3.0)).objective
    for scale in (1.0, 1e3):  # small and large losses: growth is strong in the second
        menu = replace(base.menu, losses=base.menu.losses * scale)
        fit = replace(base.fit, flips=flips, scales=(1.3, 0.8)[: len(base.fit.scales)])
        own = menu.losses[:2, 0]  # as if two more sites, not planned, lost as much
        beside = Background(own, (menu.kinds[0],) * 2, np.array([0.0, 0.7]))
        objective = Objective(menu, fit, base.weights, beside)
        choice = np.arange(len(menu.items)) % 4
        slope = objective.linear(choice)
        for item in (0, len(choice) // 2, len(choice) - 1):
            step = 1e-4
            for f in (0, 1, 2):
                bumped = menu.losses.copy()
                bumped[item, choice[item]] += step * menu.losses[item, f]
                other = Objective(replace(menu, losses=bumped), fit, base.weights, beside)
                rise = (other.mean(choice) - objective.mean(choice)) / step
                assert rise == pytest.approx(slope[item, f], rel=2e-3)


@pytest.mark.parametrize("policy", ["bitnest", "uniform", "mxmoe"])
def test_no_size_falls_back_to_the_coarsest_plan(policy: str, moe: Path, found: Statistics) -> None:
    """A solve that ends a few bytes over once gave int2 everywhere."""
    plans = planner(moe, found, ends=False)
    low, high = (plans.plan(Budget(bits=b)).sizes.total for b in (2.0, 8.0))
    step = 64 * 64 // 8  # of one bit on the largest matrix
    for size in range(low + 3 * step, high, (high - low) // 41):
        planned = plans.plan(Budget(size=size), policy)
        assert size - 4 * step <= planned.sizes.total <= size


def test_a_cache_is_part_of_the_size_that_targets_are_compared_at(
    moe: Path, found: Statistics
) -> None:
    plain = api.plan(moe, statistics=found.path, size=300_000, target="vllm-cuda")
    cache = cache_bytes(planner(moe, found).job.skeleton.model.config, 64)
    beside = api.plan(
        moe, statistics=found.path, size=300_000 + cache, context=64, target="vllm-cuda"
    )
    assert plain.plan.rules == beside.plan.rules
    one, two = (
        api.constraint_cost(moe, p, target="vllm-cuda", statistics=found.path)
        for p in (plain, beside)
    )
    assert one["kl"] == pytest.approx(two["kl"], rel=0.2)


def test_dense_weights_count_in_the_average(moe: Path, found: Statistics) -> None:
    planned = planner(moe, found, "vllm-cpu").plan(Budget(bits=12.0))
    assert 10 < planned.bits <= 12 and 0.3 < planned.dense < 1


CONTRADICTIONS: list[dict[str, Any]] = [
    {"format": "int4-g32", "target": "vllm-cpu"},
    {"format": "int4-g32", "policy": "mcmoe"},
    {"format": "int4-g32", "bits": 3},
    {"group": 32, "candidates": ("int4-g32",)},
    {"bits": 3, "check": ("text.txt",)},
    {"max_kl": 0.1, "policy": "mcmoe"},
    {"max_kl": 0.1, "bits": 3},
    {"size": 100_000, "context": -5},
    {"plan": Plan(()), "exact": True},
    {"plan": Plan(()), "bits": 3},
]


@pytest.mark.parametrize("options", CONTRADICTIONS, ids="+".join)
def test_options_that_would_say_nothing_are_refused(
    options: dict[str, Any], moe: Path, found: Statistics, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        api.compress(moe, tmp_path / "a", statistics=found.path, **options)
    assert caught.value.hint and not list(tmp_path.iterdir())


def test_an_output_in_the_way_is_seen_before_anything_is_measured(
    moe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    for dial in ({"bits": 3}, {"max_kl": 0.1}):
        with pytest.raises(BitnestError, match="in the way"):
            api.compress(moe, tmp_path / "a", data=[f"text={text}"], **SMALL, **dial)
    with pytest.raises(BitnestError):
        api.compress(moe, tmp_path / "b", data=[f"text={text}"], max_kl=0.1,
                     check=["nowhere.txt"], **SMALL)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tries_of_a_killed_run_with_other_inputs_are_no_hindrance(
    moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"statistics": found.path, "data": [f"text={text}"], "max_kl": 0.05}
    first = planner(moe, found).plan(Budget(kl=0.05))
    asked = replace(first.plan, asked={"max_kl": 0.05})
    stale = tmp_path / ".a.tries" / asked.digest
    api.compress(moe, stale, format="int4-g32", data=[f"text={text}"], **SMALL)
    done = api.compress(moe, tmp_path / "a", **options, **SMALL)
    assert done.plan is not None and done.plan["asked"] == {"max_kl": 0.05}
    assert not list(tmp_path.glob(".a*"))


def test_a_plan_is_held_against_its_own_target(
    moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    plan = api.plan(moe, statistics=found.path, bits=5.0, target="vllm-cuda").plan
    edited = Plan.from_text(
        plan.to_text() + "- model.layers.0.self_attn.q_proj: int2-g32\n", "p.yaml"
    )
    with pytest.raises(TargetError, match="one format"):
        api.compress(moe, tmp_path / "a", plan=edited, data=[f"text={text}"], **SMALL)
    with pytest.raises(PlanError, match="abacus"):
        api.compress(moe, tmp_path / "a", plan=replace(edited, target="abacus"),
                     data=[f"text={text}"], **SMALL)  # fmt: skip
    nothing = Plan.from_text(plan.to_text() + "- nothing.here: int2-g32\n", "p.yaml")
    with pytest.raises(RecipeError) as caught:
        api.compress(moe, tmp_path / "a", plan=nothing, data=[f"text={text}"], **SMALL)
    assert caught.value.where.startswith("p.yaml:")
    assert not list(tmp_path.iterdir())


def test_statistics_of_another_method_are_refused_before_work(
    moe: Path, found: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were found, not named: nothing but another method or other statistics helps."""
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(found.path, tmp_path / f"{moe.name}-statistics")
    monkeypatch.setattr(Checkpoint, "scan", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(StatisticsError, match="--method gptq, not rtn") as caught:
        api.compress(moe, tmp_path / "a", size=300_000, method="rtn")
    assert "--method rtn -o DIR" in caught.value.hint and "leave out" not in caught.value.hint


def test_statistics_that_are_found_name_the_text_to_calibrate_on(
    moe: Path, found: Statistics, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned on one text and fitted to the embedded one is what no one asked for."""
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(found.path, tmp_path / f"{moe.name}-statistics")
    done = api.compress(moe, tmp_path / "a", bits=4, **SMALL)
    calibration = Artifact.open(done.path).manifest["calibration"]
    assert set(calibration["sources"]) == {"text"}
    assert calibration["sha256"] == found.header["fingerprint"]["calibration"]


def test_a_plan_is_calibrated_on_the_text_it_was_made_with(
    moe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = default_statistics(moe)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    api.analyze(
        moe, place, data=[f"other={other}"], formats=FORMATS, probes=2, probe_windows=1,
        fisher_windows=1, **SMALL,
    )  # fmt: skip
    plan = api.plan(moe, bits=3.0).plan
    budget = api.compress(moe, tmp_path / "a", bits=3.0, **SMALL)
    carried = api.compress(moe, tmp_path / "b", plan=plan, **SMALL)
    for key in ("sources", "sha256"):
        one, two = (Artifact.open(d.path).manifest["calibration"][key] for d in (budget, carried))
        assert one == two
    assert carried.predicted == budget.predicted is not None
    edited = replace(plan, rules=(*plan.rules, Rule.parse("*.q_proj=int7-g32")))
    free = api.compress(moe, tmp_path / "c", plan=edited, **SMALL)  # not measured: no prediction
    assert free.predicted is None
    with pytest.raises(PlanError, match="int7-g32"):
        api.compress(moe, tmp_path / "d", plan=edited, statistics=place, **SMALL)
    strange = replace(plan, source="0" * 64)
    assert plan_statistics(strange, moe) is None and plan_statistics(plan, moe) is not None


@pytest.mark.parametrize("way", ["plan", "format", "rtn"])
def test_what_it_takes_is_said_before_work_whatever_the_way(
    way: str, moe: Path, found: Statistics, text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": [str(text)], **SMALL}
    if way == "plan":
        options["plan"] = planner(moe, found).plan(Budget(bits=3)).plan
    else:
        options["format"] = "int3-g32"
        options["method"] = "rtn" if way == "rtn" else "gptq"
    said: list[Any] = []

    def announce(planned: Any, before: Any) -> None:
        said.append((planned, before, (tmp_path / "a").exists()))

    done = api.compress(moe, tmp_path / "a", announce=announce, **options)
    ((planned, before, existed),) = said
    assert planned is None and not existed
    assert done.forecast == before.to_json()
    assert 0 <= before.disk - done.artifact_bytes <= 0.01 * before.disk
    with pytest.raises(RecipeError, match="memory"):
        api.compress(moe, tmp_path / "b", memory=50 << 20, **options)
    assert not (tmp_path / "b").exists()


def test_a_target_is_asked_about_inputs(moe: Path) -> None:
    from bitnest.formats.inputs import parse_inputs

    checkpoint = Checkpoint.open(moe)
    config, site = checkpoint.config, prepare(checkpoint, Recipe()).sites[0]
    for inputs, said in (("int6-g128", "int6-g128"), ("int8-token", "")):
        goal = open_target("vllm-cuda", config, {site.name: parse_inputs(inputs)})
        assert said in goal.allows(site, parse_format("int8-channel"))
        assert bool(said) == bool(goal.allows(site, parse_format("int8-channel")))
    with pytest.raises(TargetError, match=r"llama.cpp"):
        open_target("gguf", config, {site.name: parse_inputs("int8-token")})

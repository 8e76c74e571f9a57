"""Plan files: folded so that they can be read, exactly what went in, and precise about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.errors import BitnestError, PlanError, RecipeError
from bitnest.patterns import Names, fold, matcher, number_set
from bitnest.plan import POLICIES, Plan
from bitnest.recipe_file import own_recipes, parse_recipe, read_recipe
from bitnest.sites import Site
from bitnest.targets import TARGETS

FORMATS = ("int2-g128", "int3-g128", "int4-g128@had64", "dense")


def site(name: str, kind: str = "expert") -> Site:
    return Site(name, kind, 0, None, (64, 64), name, "weight")


def names(layers: int, experts: int) -> list[str]:
    found = ["model.embed_tokens", "lm_head"]
    for layer in range(layers):
        found += [f"model.layers.{layer}.self_attn.{p}_proj" for p in "qkvo"]
        for expert in range(experts):
            parent = f"model.layers.{layer}.mlp.experts.{expert}"
            found += [f"{parent}.{p}_proj" for p in ("gate", "up", "down")]
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layers=st.integers(1, 4), experts=st.integers(0, 5))
def test_what_is_folded_expands_to_the_same_sites(
    data: st.DataObject, layers: int, experts: int
) -> None:
    wanted = {name: data.draw(st.sampled_from(FORMATS)) for name in names(layers, experts)}
    plan = Plan.of(wanted, model="m", asked={"bits": 3.0})
    again = Plan.from_text(plan.to_text())
    assert again == plan and not again.edited
    assert again.formats([site(name) for name in wanted]) == wanted


def test_a_uniform_plan_is_one_rule() -> None:
    assert fold(dict.fromkeys(names(3, 4), "int4-g128")) == [("*", "int4-g128")]


def test_exceptions_are_named_by_sets_of_layers_and_experts() -> None:
    wanted = dict.fromkeys(names(6, 8), "int3-g128")
    for layer in (1, 2, 3):
        for expert in (0, 4, 5, 6):
            wanted[f"model.layers.{layer}.mlp.experts.{expert}.down_proj"] = "int5-g128"
    rules = fold(wanted)
    assert ("model.layers.{1-3}.mlp.experts.{0,4-6}.down_proj", "int5-g128") in rules
    assert len(rules) < 12


def test_projections_of_one_kind_share_a_rule() -> None:
    wanted = {name: "int4-g128" if "attn" in name else "int2-g128" for name in names(4, 3)}
    rules = dict(fold(wanted))
    assert rules["model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}"] == "int4-g128"


@pytest.mark.parametrize(
    "numbers, everything, spelt",
    [
        ([3], range(9), "3"),
        ([0, 1], range(9), "{0,1}"),
        ([0, 1, 2, 7], range(9), "{0-2,7}"),
        (range(9), range(9), "*"),
        ([4], [4], "4"),
    ],
)
def test_sets_of_numbers(numbers: list[int], everything: list[int], spelt: str) -> None:
    assert number_set(numbers, list(everything)) == spelt


def test_the_last_rule_that_matches_decides_and_the_rest_stays_dense() -> None:
    plan = Plan.from_text(
        "plan: 1\nrules:\n- '*': int2-g128\n- a.*.x: int4-g128\n- a.{1,3-4}.x: dense\n"
    )
    sites = [site(name) for name in ("a.0.x", "a.1.x", "a.2.x", "a.4.x", "b")]
    found = plan.formats(sites)
    assert found == {"a.0.x": "int4-g128", "a.1.x": "dense", "a.2.x": "int4-g128",
                     "a.4.x": "dense", "b": "int2-g128"}  # fmt: skip
    only = Plan.from_text("plan: 1\nrules:\n- a.0.x: int4-g128\n")
    assert only.formats(sites)["b"] == "dense"


def test_sets_match_whole_numbers_only() -> None:
    matches = matcher("a.{1,10-12}.x")
    assert [n for n in range(130) if matches(site(f"a.{n}.x"))] == [1, 10, 11, 12]


def test_matching_many_patterns_gives_what_one_by_one_does() -> None:
    sites = [site(name, "attention" if "attn" in name else "expert") for name in names(12, 3)]
    table = Names(sites)
    patterns = (
        "*", "model.layers.1*", "model.layers.1.*", "*.{q,k}_proj", "re:_proj$", "kind:attention",
        "model.layers.3.self_attn.q_proj", "nothing", "lm_?ead",
    )  # fmt: skip
    for pattern in patterns:
        slow = {s.name for s in sites if matcher(pattern)(s)}
        assert set(table.matching(pattern)) == slow, pattern


ODD = (
    "up-proj", "gate_proj", "a[0].b", "a0.b", "lm*head", "lm_head", "x{1}.y", "x{.y", "x}.y",
    "kind:eggs", "re:(", "q?.r", "a: b", "#c", "é.ü", "1.2.3", "null", "*", "-y", " z",
    "layers.00.up", "layers.0.up", "{a,b}", "a", "b", "a\nb", "!t",
)  # fmt: skip


def test_sibling_modules_whose_names_are_no_words_are_written_out() -> None:
    wanted = {f"m.{i}.{w}": "int2-g128" for i in range(3) for w in ("gate_proj", "up-proj")}
    wanted["lm_head"] = "dense"
    plan = Plan.of(wanted)
    assert Plan.from_text(plan.to_text()).formats([site(name) for name in wanted]) == wanted


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_names_that_read_as_patterns_fold_exactly_too(data: st.DataObject) -> None:
    parents = data.draw(st.lists(st.sampled_from(["", "m.0.", "m.1.", "é-.3."]), min_size=1))
    every = dict.fromkeys(parent + name for parent in parents for name in ODD)
    wanted = {name: data.draw(st.sampled_from(FORMATS)) for name in every}
    plan = Plan.of(wanted)
    again = Plan.from_text(plan.to_text())
    assert again == plan
    assert again.formats([site(name) for name in wanted]) == wanted


def test_an_edited_plan_is_known_as_such() -> None:
    text = Plan.of(dict.fromkeys(names(2, 2), "int4-g128")).to_text()
    assert Plan.from_text(text.replace("int4-g128", "int5-g128")).edited


def test_a_plan_of_another_model_is_refused_by_its_rule() -> None:
    plan = Plan.from_text("plan: 1\nrules:\n- '*': int2-g128\n- model.layers.9.x: int4-g128\n")
    with pytest.raises(RecipeError, match=r"model\.layers\.9\.x"):
        plan.formats([site("a")])


@pytest.mark.parametrize(
    "text, line, word",
    [
        ("plan: 1\nrules:\n- a: int4-g128\n- b: int99-g128\n", 4, "99"),
        ("plan: 1\nrules:\n- a: int4-g128\n- just words\n", 4, "rule"),
        ("plan: 1\nrules:\n- {a: int4-g128, b: int4-g128}\n", 3, "rule"),
        ("plan: 1\nrules:\n- 're:(': int4-g128\n", 3, "re:("),
        ("plan: 1\nrules:\n- kind:eggs: int4-g128\n", 3, "eggs"),
        ("plan: 1\nrules:\n- 'a.{1,x y}.b': int4-g128\n", 3, "x y"),
        ("plan: 1\nrules:\n- 'a.{5-2}.b': int4-g128\n", 3, "5-2"),
        ("plan: 1\nrules:\n- 'a.{1': int4-g128\n", 3, "brace"),
        ("plan: 1\nrules:\n- *: int4-g128\n", 3, "YAML"),
        ("plan: 1\n\nmodel: [a]\nrules: []\n", 3, "model"),
        ("plan: 1\nbudget: 3\nrules: []\n", 2, "budget"),
        ("plan: 1\nplan: 1\nrules: []\n", 2, "twice"),
        ("plan: 1\nrules: none\n", 2, "list"),
        ("plan: 1\nmodel: !!python/object:os.system {}\nrules: []\n", 2, "plain"),
        ("plan: 1\nrules:\n- a: int4-g128\n  b: [\n", 5, "YAML"),
        ("plan: 1\nmodel: 2024-02-30\nrules: []\n", 2, "plain"),
        ("plan: 1\nasked: {when: !!int abc}\nrules: []\n", 2, "plain"),
        ("plan: 1\nasked: {bits: abc}\nrules: []\n", 2, "asked.bits"),
        ("plan: 1\nasked: {width: 3}\nrules: []\n", 2, "width"),
        ("plan: 1\n\npolicy: foo\nrules: []\n", 3, "foo"),
        ("plan: 1\ntarget: abacus\nrules: []\n", 2, "abacus"),
    ],
)
def test_mistakes_are_found_with_their_line(text: str, line: int, word: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_text(text, "p.yaml")
    assert caught.value.where == f"p.yaml:{line}", caught.value.where
    assert word in caught.value.what


@pytest.mark.parametrize("text", ["", "- a\n", "plan: 2\nrules: []\n", "rules: []\n", "plan: 1\n"])
def test_files_that_are_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_text(text)


def test_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        Plan.read(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(PlanError):
        Plan.read(tmp_path / "binary.yaml")


RECIPES = sorted(own_recipes().values())


def test_there_are_recipes() -> None:
    assert {p.stem for p in RECIPES} >= {"w8a8-int8", "w4a4-atom", "mxfp4", "three-bits"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_can_be_read(path: Path) -> None:
    assert read_recipe(path)


def test_a_recipe_s_values_and_what_the_command_line_overrides(tmp_path: Path) -> None:
    text = (
        "budget: {size: 12MiB, context: 100}\ntarget: vllm-cpu\ncandidates: [int4-g128]\n"
        "rules:\n- kind:attention: int8-g128\nfit: {damp: 0.1, clip: false}\n"
        "data: {texts: [a=b.txt], samples: 8}\nends: true\n"
    )
    values = parse_recipe(text)
    assert values == {
        "size": 12 << 20, "context": 100, "target": "vllm-cpu", "candidates": ["int4-g128"],
        "rules": ["kind:attention=int8-g128"], "damp": 0.1, "clip": False, "data": ["a=b.txt"],
        "samples": 8, "ends": True,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(text)
    kept = read_recipe(tmp_path / "r.yaml", skip={"bits", "damp"})
    assert "size" not in kept and "damp" not in kept and kept["samples"] == 8


@pytest.mark.parametrize(
    "given, kept",
    [
        ({"bits"}, {"target", "policy", "candidates", "ends", "exact", "rules", "damp"}),
        ({"size"}, {"context", "target", "policy", "candidates", "ends", "exact", "rules", "damp"}),
        ({"max_kl"}, {"check", "target", "policy", "candidates", "ends", "exact", "rules", "damp"}),
        ({"format"}, {"rules", "damp"}),
        ({"group"}, {"rules", "damp"}),
        ({"plan"}, {"rules", "damp"}),
        ({"damp", "ends"}, {"context", "check", "target", "policy", "candidates", "exact", "rules",
                            "size"}),
    ],
)  # fmt: skip
def test_what_belongs_to_a_dial_goes_with_it(
    given: set[str], kept: set[str], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "budget: {size: 12MiB, context: 100}\ntarget: vllm-cpu\ncandidates: [int4-g128]\n"
        "policy: bitnest\nends: true\nexact: true\ncheck: [a.txt]\nfit: {damp: 0.1}\n"
        "rules:\n- kind:attention: int8-g128\n"
    )
    assert set(read_recipe(path, skip=given)) == kept


@pytest.mark.parametrize(
    "text, line",
    [
        ("budget: {bits: three}\n", 1),
        ("budget:\n  bits: 3\n  bytes: 4\n", 3),
        ("target: vllm-cpu\ndata:\n  samples: 1.5\n", 3),
        ("ends: perhaps\n", 1),
        ("rules:\n- a: int99-g1\n", 2),
        ("merge: everything\n", 1),
        ("budget: {size: large}\n", 1),
        ("fit: gptq\n", 1),
        ("candidates: int4-g128\n", 1),
        ("budget: {min_agreement: most}\n", 1),
        ("budget: {bits: 2024-02-30}\n", 1),
        ("fit:\n  damp: 0.01\n  damp: 0.5\n", 3),
        ("fit: {[a]: 0.01}\n", 1),
        ("budget:\n  context: -500\n", 2),
        ("budget:\n  bits: 17\n", 2),
        ("budget:\n  size: 0\n", 2),
        ("budget:\n  max_kl: -1\n", 2),
        ("budget:\n  min_agreement: 95\n", 2),
        ("budget:\n  bits: 3\n  size: 12MiB\n", 3),
        ("budget: {bits: 3}\nformat: int4-g128\n", 2),
        ("ends: true\nformat: int99-g128\n", 2),
        ("ends: true\ntarget: foo\n", 2),
        ("ends: true\npolicy: foo\n", 2),
        ("candidates:\n- int4-g128\n- foo\n", 3),
        ("check:\n- a.txt\n- 3\n", 3),
        ("rules:\n- '*': int4-g128\n- kind:attn: int4-g128\n", 3),
        ("fit:\n  clip: true\n  damp: 2\n", 3),
        ("fit:\n  method: awq\n", 2),
        ("fit:\n  weighting: heavy\n", 2),
        ("fit:\n  min_tokens: 0\n", 2),
        ("data:\n  samples: 0\n", 2),
        ("data:\n  length: 1\n", 2),
        ("data:\n  texts:\n  - a.txt\n  - [b]\n", 4),
    ],
)
def test_mistakes_in_recipes_are_found_with_their_line(text: str, line: int) -> None:
    with pytest.raises(BitnestError) as caught:
        parse_recipe(text, "r.yaml")
    assert caught.value.where == f"r.yaml:{line}"


def test_names_that_files_may_give_are_those_there_are() -> None:
    from bitnest.export.plan_targets import open_target
    from bitnest.quantize.allocation import policies

    assert set(POLICIES) == set(policies.POLICIES)
    assert [open_target(name, {}).name for name in TARGETS] == list(TARGETS)


def test_numbers_that_yaml_takes_for_words() -> None:
    assert parse_recipe("budget: {max_kl: 1e-2}\n") == {"max_kl": 0.01}


@pytest.mark.parametrize("text", ["plan: 1\nrules: " + "[" * 3000, "asked: " + "[" * 3000])
def test_files_nested_too_deep(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_text(text)


def test_a_plan_is_not_written_over_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(PlanError):
        Plan.of({"a": "int4-g128"}).write(tmp_path / "d")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]

"""Widths of inputs: what rounding them loses against loops in float64, the choice against all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import Result
from scipy.linalg import hadamard
from typer.testing import CliRunner

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.calibrate import stream as streaming
from bitnest.calibrate.input_errors import InputErrors, InputScored, bases_of, energy_orders
from bitnest.calibrate.observe import Observer
from bitnest.calibrate.predict import Predictor, token_shares
from bitnest.calibrate.stream import Stream
from bitnest.checkpoint import Checkpoint
from bitnest.cli import app
from bitnest.errors import BitnestError, RecipeError, StatisticsError
from bitnest.export.plan_targets import open_target
from bitnest.formats import parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.inputs import Magnitudes
from bitnest.packed.rounding import each_input
from bitnest.plan import Plan
from bitnest.quantize.allocation.budget import Budget
from bitnest.quantize.allocation.explain_inputs import explain_inputs
from bitnest.quantize.allocation.inputs import InputDials
from bitnest.quantize.allocation.planner import Planner
from bitnest.quantize.compress import prepare
from bitnest.recipe import Recipe, Rule
from bitnest.recipe_file import parse_recipe, read_recipe
from bitnest.sites import ENDS, Site, find_sites
from bitnest.skeleton import Skeleton
from bitnest.statistics import Statistics
from tests import brute
from tests.brute import LABELS, LENGTH, NAMES, numpy
from tests.test_sensitivity import MadeUp, made_up_fisher
from tests.tiny import Builder

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
INPUTS = ("int4-g16", "int8-token", "16xint8-g16~int4-g16")
WEIGHTS = ("int4-g32", "int4-g32@perm", "int4-g32@had16")
SMALL: dict[str, Any] = {
    "samples": 8, "length": 32, "probes": 4, "probe_windows": 2, "fisher_windows": 2,
}  # fmt: skip


# what rounding loses


def measure(
    path: Path, inputs: tuple[str, ...], prior: torch.Tensor | None = None
) -> dict[str, InputScored]:
    """All sites of all blocks, as an analysis measures them."""
    own = Skeleton.build(Checkpoint.open(path))
    with mock.patch.object(streaming, "BATCH_TOKENS", 2 * LENGTH):
        names = [NAMES[d] for d in LABELS]
        stream = Stream(own, brute.text(), labels=names, singles=True, **CPU)
    found: dict[str, InputScored] = {}
    every = [s for s in find_sites(own) if s.kind not in {*ENDS, "router"}]
    for layer, block in enumerate(own.blocks):
        prefix = f"{own.prefix}.{layer}"
        own.fill(prefix, **CPU)
        sites = [site for site in every if site.layer == layer]

        def passing(look: Callable[[slice], object], layer: int = layer) -> None:
            with torch.no_grad():
                for part in stream.batches():
                    look(part)
                    stream.forward(layer, stream.hidden[part])

        observer = Observer(block, prefix, labels=3, full=False)
        with observer:
            passing(lambda p, o=observer: o.before_batch(LABELS[p.start], p.start * LENGTH))
        errors = InputErrors(
            [parse_inputs(name) for name in inputs], bases_of([parse_format(f) for f in WEIGHTS]),
            3, sites, energy_orders(sites, observer),
            lambda site: own.model.get_parameter(site.path).data, "mse",
        )  # fmt: skip
        modules = dict(block.named_modules(prefix=prefix))
        looks = [errors.weigh, errors.look] if errors.has_static else [errors.look]
        for look in looks:
            with each_input(modules, sites, look):
                passing(lambda p, e=errors: setattr(e, "label", LABELS[p.start]))
            if look == errors.weigh:
                errors.settle()
        found |= errors.scored(sites, MadeUp(made_up_fisher, prior), observer)  # type: ignore[arg-type]
        with torch.no_grad():
            stream.run(layer, keep=True)
        own.drop(prefix)
    return found


def reads(seen: brute.Recorded, site: Site) -> Iterator[tuple[int, np.ndarray]]:
    """(label, x (I,)) of every token that reaches a site."""
    if site.expert is None:
        for label, sample in zip(LABELS, seen.inputs[site.module], strict=True):
            for x in sample:
                yield label, x
        return
    for p in brute.passes(seen, site.module):
        if p.expert == site.expert:
            yield LABELS[p.sample], p.inner if site.param == "down_proj" else p.x


def basis(name: str, rows: np.ndarray) -> np.ndarray:
    """T (I, I), x T in the basis, from all rows x that were read."""
    width = rows.shape[1]
    if name == "@perm":
        return np.eye(width)[:, np.argsort(-(rows**2).sum(0), kind="stable")]
    t = np.eye(width)
    if name == "@had16":
        for start in range(0, width - 15, 16):
            t[start : start + 16, start : start + 16] = hadamard(16) / 4
    return t


def rounded(x: np.ndarray, bits: int, group: int) -> np.ndarray:
    parts = []
    for start in range(0, len(x), group):
        part, largest = x[start : start + group], 2 ** (bits - 1) - 1
        scale = np.abs(part).max() / largest or 1.0
        parts.append(np.clip(np.rint(part / scale), -largest, largest) * scale)
    return np.concatenate(parts)


def by_hand(name: str, x: np.ndarray) -> np.ndarray:
    if name == "int8-token":
        return rounded(x, 8, len(x))
    wide = 16 if name.startswith("16x") else 0
    first = rounded(x[:wide], 8, 16) if wide else x[:0]
    return np.concatenate([first, rounded(x[wide:], 4, 16)])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("brute")


def finer(model: Any) -> None:
    """Quotients of bfloat16 numbers often lie in the middle of two codes and fall either way."""
    model.float()
    table = model.get_input_embeddings().weight.data
    table += 0.01 * torch.randn(table.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gpt2"])
def test_losses_are_those_of_rounding_token_by_token(family: str, root: Path) -> None:
    path = brute.checkpoint(root, family, "finer", tweak=finer)
    seen = brute.record(brute.load(path), brute.text())
    found = measure(path, INPUTS)
    sites = [s for s in find_sites(Skeleton.build(Checkpoint.open(path)))
             if s.kind not in {*ENDS, "router"}]  # fmt: skip
    assert set(found) == {site.name for site in sites}
    for site in sites:
        if site.layer == 0 and site.expert not in {None, 1}:
            continue  # enough
        w = numpy(site.view(seen.model.get_parameter(site.path)))
        f, scored = numpy(made_up_fisher(site)), found[site.name]
        read = list(reads(seen, site))
        rows = np.array([x for _, x in read])
        assert scored.loss is not None
        for b, name in enumerate(("", "@perm", "@had16")):
            t = basis(name, rows)
            for p, inputs in enumerate(INPUTS):
                sums, counts = np.zeros((3, len(w))), np.zeros(3)
                for label, x in read:
                    e = (x @ t - by_hand(inputs, x @ t)) @ t.T
                    sums[label] += (w @ e) ** 2
                    counts[label] += 1
                loss = 0.5 * (f * sums / np.maximum(counts, 1)[:, None]).sum(1)
                assert brute.close(scored.loss[b, p], loss, 2e-3), (site.name, name, inputs)
                whole = sums.sum() / counts.sum()
                assert float(scored.error[b, p]) == pytest.approx(whole, rel=2e-3)


def test_an_expert_that_no_token_chose_is_not_free(root: Path) -> None:
    def shy(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[2] = 0.0
            layer.mlp.gate.weight.data[3] = layer.mlp.gate.weight.data[1]  # before it by its number

    path = brute.checkpoint(root, "qwen3_moe", "shy", tweak=shy)
    prior = torch.tensor([1.0, 2.0, 0.0])
    plain, other = measure(path, ("int4-g16",)), measure(path, ("int4-g16",), prior)
    sites = [s for s in find_sites(Skeleton.build(Checkpoint.open(path))) if s.expert is not None]
    for layer, param in {(s.layer, s.name.rpartition(".")[2]) for s in sites}:
        own = [s for s in sites if s.layer == layer and s.name.endswith(param)]
        alone = {s.expert for s in own if float(plain[s.name].error.sum()) == 0}
        for site in own:
            before, after = plain[site.name].loss, other[site.name].loss
            assert before is not None and after is not None
            more = after - before
            assert (more[..., :2] > 0).all() and (more[..., 2] == 0).all()
            assert (before == 0).all() == (site.expert in alone)
            assert torch.allclose(2 * more[..., 0], more[..., 1])


def test_a_static_scale_is_that_of_all_that_was_read(root: Path) -> None:
    path = brute.checkpoint(root, "llama")
    seen = brute.record(brute.load(path), brute.text())
    site = next(s for s in find_sites(Skeleton.build(Checkpoint.open(path))) if s.kind == "mlp")
    x = torch.from_numpy(np.concatenate(seen.inputs[site.module])).float()
    counts = Magnitudes()
    counts.add(x)
    scale = counts.scale(parse_inputs("int8-static"), "mse")
    e = numpy(x) - np.clip(np.rint(numpy(x) / scale), -127, 127) * scale
    w = numpy(site.view(seen.model.get_parameter(site.path)))
    whole = ((e @ w.T) ** 2).sum() / len(x)
    found = measure(path, ("int8-static",))[site.name]
    assert float(found.error[0, 0]) == pytest.approx(whole, rel=5e-3)


def test_bases_that_are_known_before_weights_are() -> None:
    names = ["int4-g32", "int3-g32@had+lorc4", "int4-g32@awq", "int4-g32@had16@perm",
             "int4-g32@perm@had", "int8-g32"]  # fmt: skip
    assert bases_of([parse_format(name) for name in names]) == ("", "@had", "@had16@perm")


# statistics


@pytest.fixture(scope="module")
def moe(tiny: Builder) -> Path:
    return tiny("qwen3_moe")


@pytest.fixture(scope="module")
def dense(tiny: Builder) -> Path:
    return tiny("llama")


def analyzed(model: Path, text: Path, out: Path, **options: Any) -> Statistics:
    return api.analyze(
        model, out / "s", data=[f"text={text}"],
        **{**SMALL, "formats": ("int4-g32", "int8-g32"), **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(moe: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return analyzed(moe, text, tmp_path_factory.mktemp("moe"), inputs=INPUTS)


@pytest.fixture(scope="module")
def plain(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return analyzed(dense, text, tmp_path_factory.mktemp("dense"), inputs=INPUTS)


def test_statistics_keep_what_inputs_lose(found: Statistics) -> None:
    assert found.inputs == list(INPUTS) and found.bases == [""]
    losses = Predictor(found).inputs
    sites = [s for s in found.sites if s.kind not in ENDS]
    for site in sites:
        narrow, wide, mixed = (losses.loss(site.name, "int4-g32", name) for name in INPUTS)
        assert (narrow > mixed).all() and (mixed > 0).all() and (narrow > wide).all()
        assert not losses.loss(site.name, "int4-g32", "dense").any()
    with pytest.raises(StatisticsError, match="no candidate is stored in @had"):
        losses.loss(sites[0].name, "int4-g32@had", INPUTS[0])


def test_what_inputs_lose_is_part_of_the_prediction(found: Statistics) -> None:
    predictor = Predictor(found)
    plan = {s.name: "int4-g32" for s in found.sites if s.kind not in ENDS}
    alone = predictor.predict(plan)
    both = predictor.predict(plan, dict.fromkeys(plan, "int4-g16"))
    finer = predictor.predict(plan, dict.fromkeys(plan, "int8-token"))
    assert alone.mean < finer.mean < both.mean


def test_a_header_of_more_formats_than_the_file_is_damaged(
    found: Statistics, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(found.path, copy)
    header = json.loads((copy / "statistics.json").read_text())
    header["inputs"]["formats"].append("int6-g16")
    (copy / "statistics.json").write_text(json.dumps(header))
    with pytest.raises(StatisticsError, match="input_error"):
        Statistics.open(copy)


def test_merged_parts_add_up(moe: Path, text: Path, tmp_path: Path) -> None:
    words = text.read_text().split()
    parts = []
    for number in range(2):
        half = tmp_path / f"{number}.txt"
        half.write_text(" ".join(words[number * 1500 : number * 1500 + 1500]))
        parts.append(analyzed(moe, half, tmp_path / str(number), inputs=INPUTS[:1]).path)
    merged = api.merge_statistics(parts, tmp_path / "both")
    losses = [torch.cat([Statistics.open(p).read(0, "sites.input_loss")]) for p in parts]
    assert torch.allclose(merged.read(0, "sites.input_loss"), sum(losses) / 2, rtol=1e-6)
    assert merged.inputs == ["int4-g16"]


# the choice


def planner(model: Path, statistics: Statistics, dials: InputDials | None, *rules: str) -> Planner:
    recipe = Recipe(format="int4-g32", rules=tuple(Rule.parse(rule) for rule in rules))
    job = prepare(Checkpoint.open(model), recipe)
    goal = open_target("native", job.checkpoint.config)
    return Planner(job, Predictor(statistics), goal, formats=("int4-g32",), inputs=dials)


@pytest.mark.parametrize("bits", [4.3, 5.0, 5.9, 7.0])
def test_the_choice_is_the_best_of_all(bits: float, dense: Path, plain: Statistics) -> None:
    planned = planner(dense, plain, InputDials(INPUTS, bits)).fixed()
    assert planned.inputs is not None
    grounds = planned.inputs.grounds
    assert len(grounds.menu.items) == 8  # q/k/v, o, gate/up, down of two blocks
    least, rows = np.inf, np.arange(8)
    for choice in itertools.product(range(3), repeat=8):
        number = np.array(choice)
        if grounds.cost[rows, number].sum() <= bits * grounds.menu.numel.sum():
            least = min(least, grounds.objective.mean(number))
    assert planned.mean == pytest.approx(least, rel=1e-9)
    assert planned.inputs.bits <= bits and planned.inputs.alone > 0


def test_the_budget_counts_multiply_accumulates(moe: Path, found: Statistics) -> None:
    planned = planner(moe, found, InputDials(INPUTS, 5.0)).fixed()
    assert planned.inputs is not None
    shares = dict(zip((s.name for s in found.sites), token_shares(found), strict=True))
    sites = {site.name: site for site in found.sites}
    chosen = planned.inputs.formats
    work = {name: shares[name] * sites[name].numel for name in chosen}
    width = {n: parse_inputs(f).mean_bits(sites[n].shape[1]) for n, f in chosen.items()}
    mean = sum(work[n] * width[n] for n in chosen) / sum(work.values())
    assert planned.inputs.bits == pytest.approx(mean, rel=1e-4) and 4.8 < mean <= 5.0


def test_a_plan_predicts_what_its_rules_do(moe: Path, found: Statistics) -> None:
    planned = planner(moe, found, InputDials(INPUTS, 5.0)).fixed()
    sites = found.sites
    weights = {n: f for n, f in planned.plan.formats(sites).items() if f != "dense"}
    inputs = planned.plan.inputs(sites)
    assert planned.mean == pytest.approx(Predictor(found).predict(weights, inputs).mean, rel=1e-9)
    again = planner(moe, found, None).evaluate(planned.plan)
    assert again.mean == pytest.approx(planned.mean) and again.inputs is not None
    assert again.inputs.bits == pytest.approx(planned.inputs.bits)  # type: ignore[union-attr]


def test_matrices_that_read_one_tensor_have_one_format(moe: Path, found: Statistics) -> None:
    chosen = planner(moe, found, InputDials(INPUTS, 5.0)).fixed().inputs.formats  # type: ignore[union-attr]
    assert len(set(chosen.values())) > 1
    for name, fmt in chosen.items():
        if name.endswith("q_proj"):
            assert chosen[name.replace("q_proj", "k_proj")] == fmt
            assert chosen[name.replace("q_proj", "v_proj")] == fmt
        if name.endswith("gate_proj"):
            assert chosen[name.replace("gate_proj", "up_proj")] == fmt


def test_rules_decide_before_the_plan(moe: Path, found: Statistics) -> None:
    rules = ("*.q_proj=int4-g32/int4-g16", "*.down_proj=int4-g32/dense")
    planned = planner(moe, found, InputDials(INPUTS[1:], 10.0), *rules).fixed()
    chosen = planned.inputs.formats  # type: ignore[union-attr]
    for name, fmt in chosen.items():
        wanted = "int4-g16" if name.endswith("q_proj") else "dense"
        assert (fmt == wanted) == name.endswith(("q_proj", "down_proj"))


def test_weights_and_inputs_have_a_budget_each(moe: Path, found: Statistics) -> None:
    own = replace(planner(moe, found, None).job, recipe=Recipe(format="dense"))
    own = prepare(own.checkpoint, own.recipe)
    dials = InputDials(INPUTS, 6.0)
    goal = open_target("native", own.checkpoint.config)
    both = Planner(own, Predictor(found), goal, inputs=dials)
    alone = Planner(own, Predictor(found), goal)
    bits = both.plan(Budget(bits=6.0))
    assert bits.plan.formats(own.sites) == alone.plan(Budget(bits=6.0)).plan.formats(own.sites)
    assert bits.inputs is not None and bits.inputs.bits <= 6.0
    size = bits.sizes.total - 1000
    sized = both.plan(Budget(size=size))
    assert sized.sizes.total <= size and sized.inputs is not None


def test_measured_time_is_a_budget_too(dense: Path, plain: Statistics) -> None:
    table = {"int4-g32/int4-g16": 4e-12, "int4-g32/int8-token": 1e-12,
             "int4-g32/16xint8-g16~int4-g16": 3e-12}  # fmt: skip
    dials = InputDials(INPUTS, time=1.0, latency=table)
    planned = planner(dense, plain, dials).fixed()
    assert set(planned.inputs.formats.values()) == {"int8-token"}  # type: ignore[union-attr]
    slower = {**table, "int4-g32/int8-token": 5e-12}
    planned = planner(dense, plain, InputDials(INPUTS, time=0.8, latency=slower)).fixed()
    assert planned.inputs is not None and planned.inputs.time is not None
    assert 0.7 < planned.inputs.time <= 0.8
    with pytest.raises(RecipeError, match="more than was asked"):
        planner(dense, plain, InputDials(INPUTS, time=0.5, latency=slower)).fixed()
    with pytest.raises(RecipeError, match="no 'int4-g32/int8-token'") as refused:
        short = {"int4-g32/int4-g16": 1e-12}
        planner(dense, plain, InputDials(INPUTS, time=0.5, latency=short)).fixed()
    assert "benchmarks.input_latency" in str(refused.value.hint)


def test_explained_choices_are_the_least_at_their_price(moe: Path, found: Statistics) -> None:
    planned = planner(moe, found, InputDials(INPUTS, 5.0)).fixed()
    items = explain_inputs(planned, "*")
    assert len(items) == len(planned.inputs.grounds.menu.items)  # type: ignore[union-attr]
    assert sum(item.work for item in items) == pytest.approx(1.0)
    right = [line.value == 0 for item in items for line in item.lines if line.chosen]
    assert len(right) == len(items) and sum(right) >= len(right) - 3  # the step the budget cut


@pytest.mark.parametrize(
    "options, word",
    [
        ((INPUTS, None, None, None), "no budget"),
        ((INPUTS[:1], 5.0, None, None), "nothing to choose"),
        (((), 5.0, None, None), "nothing to choose"),
        ((INPUTS, 5.0, 0.5, {"a/b": 1.0}), "at once"),
        ((INPUTS, 17.0, None, None), "16 at most"),
        ((INPUTS, None, 1.5, {"a/b": 1.0}), "share"),
        ((INPUTS, None, 0.5, None), "without measured latencies"),
        ((("int9-token",), None, None, None), "unknown format of inputs"),
    ],
)
def test_budgets_that_say_nothing_are_refused(options: Any, word: str) -> None:
    with pytest.raises(BitnestError) as refused:
        InputDials.of(*options)
    assert word in refused.value.what and refused.value.hint


def test_inputs_below_the_narrowest_are_refused(moe: Path, found: Statistics) -> None:
    with pytest.raises(RecipeError, match="4 bits on average, more than was asked"):
        planner(moe, found, InputDials(INPUTS, 3.0)).fixed()


# as it is typed


@pytest.fixture
def place(moe: Path, found: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "m").symlink_to(moe)
    (tmp_path / "s").symlink_to(found.path)
    (tmp_path / "by-hand.yaml").write_text("plan: 1\nrules:\n- '*_proj': int4-g32\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, [*words])


TWO = ["--inputs", "int4-g16", "--inputs", "int8-token"]


def test_a_plan_is_made_checked_and_carried_out(place: Path, text: Path) -> None:
    own = ["plan", "m", "--statistics", "s"]
    done = typed(*own, "--format", "int4-g32", *TWO, "--input-bits", "5", "-o", "p.yaml")
    assert done.exit_code == 0, done.output
    assert "bits on average over multiply-accumulates" in done.stderr
    plan = Plan.read(place / "p.yaml")
    assert plan.asked == {"inputs": ["int4-g16", "int8-token"], "input_bits": 5.0}
    assert {rule.inputs for rule in plan.rules} >= {"int4-g16", "int8-token"}
    checked = json.loads(typed(*own, "--check", "p.yaml", "--json").stdout)
    assert checked["state"] == "solved" and checked["kl"] == pytest.approx(
        plan.expected["kl"], rel=1e-3
    )
    assert checked["input_bits"] == plan.expected["input_bits"]
    explained = json.loads(
        typed(*own, "--check", "p.yaml", "--explain", "*.0.*.q_proj", "--json").stdout
    )
    assert explained["explain_inputs"][0]["lines"]
    done = typed(
        "compress", "m", "--plan", "p.yaml", "--statistics", "s", "--data", f"text={text}",
        "--samples", "4", "--length", "32", "-o", "a",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    artifact = Artifact.open(place / "a")
    said = plan.inputs([record.site for record in artifact.records])
    assert {r.site.name: r.inputs for r in artifact.records if r.inputs} == {
        name: fmt for name, fmt in said.items() if fmt != "dense"
    }
    assert artifact.manifest["predicted"]["mean"] == pytest.approx(plan.expected["kl"], rel=1e-3)
    assert "inputs: " in typed("inspect", "a").stdout


@pytest.mark.parametrize("weights", [["--format", "int4-g32"], ["--bits", "5"]])
def test_compress_plans_inputs_itself(weights: list[str], place: Path, text: Path) -> None:
    done = typed(
        "compress", "m", *weights, *TWO, "--input-bits", "6", "--statistics", "s", "--data",
        f"text={text}", "--samples", "4", "--length", "32", "-o", "a",
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    artifact = Artifact.open(place / "a")
    assert {r.inputs for r in artifact.records if r.inputs} == {"int4-g16", "int8-token"}
    resolved = artifact.manifest["resolved"]
    assert resolved["inputs"] == ["int4-g16", "int8-token"]
    assert resolved["budget"]["input_bits"] == 6.0
    assert artifact.manifest["plan"]["expected"]["input_bits"] <= 6.0
    if weights[0] == "--format":
        assert {r.format for r in artifact.records} == {"int4-g32", "dense"}
        assert resolved["format"] == "int4-g32"


def test_rules_of_inputs_hold_beside_a_budget_of_weights(place: Path, text: Path) -> None:
    rules = ["--rule", "*.down_proj=int4-g32/int4-g16", "--rule", "*.0.down_proj=int4-g32/dense"]
    size = 190_000
    for number, (inputs, others) in enumerate([([], None), (["int8-token"], "int8-token")]):
        done = typed(
            "compress", "m", "--size", str(size), *rules, *(f"--inputs={n}" for n in inputs),
            "--statistics", "s", "--data", f"text={text}", "--samples", "4", "--length", "32",
            "-o", f"a{number}",
        )  # fmt: skip
        assert done.exit_code == 0, (done.output, done.exception)
        artifact = Artifact.open(place / f"a{number}")
        for record in artifact.packed():
            name = record.site.name
            own = "int4-g16" if name.endswith("down_proj") else others
            own = None if record.site.kind in ENDS or record.format == "dense" else own
            assert (record.inputs or None) == (None if name.endswith(".0.down_proj") else own)
        assert sum(f.stat().st_size for f in artifact.path.iterdir()) <= size
    plan = api.plan(place / "m", statistics=place / "s", bits=6, rules=[rules[1]])
    assert plan.inputs is not None and plan.inputs.alone > 0
    assert "int4-g16" in {rule.inputs for rule in plan.plan.rules}


@pytest.mark.parametrize(
    "words, what",
    [
        (["compress", "m", *TWO], "no budget"),
        (["compress", "m", *TWO, "--input-bits", "5", "--max-kl", "0.1"], "--max-kl"),
        (["compress", "m", *TWO, "--input-bits", "5", "--plan", "by-hand.yaml"], "--plan"),
        (["compress", "m", *TWO, "--input-bits", "5", "--nested", "2-8"], "--nested"),
        (["plan", "m", *TWO, "--input-bits", "5", "--target", "vllm-cuda"], "--target"),
        (["plan", "m", "--format", "int4-g32"], "nothing to plan"),
        (["plan", "m", "--format", "int4-g32", *TWO, "--input-bits", "5", "--bits", "4"],
         "every weight"),
        (["plan", "m", "--frontier", "--inputs", "int8-token"], "--inputs"),
        (["plan", "m", "--statistics", "s", "--inputs", "int6-g16"], "was not measured"),
        (["analyze", "m", "--importance", "none", "--inputs", "int6-g16"], "importance"),
        (["analyze", "m", "--format", "int4-g32@awq", "--inputs", "int6-g16"], "awq"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_before_work(words: list[str], what: str, place: Path) -> None:
    before = sorted(place.iterdir())
    done = typed(*words)
    assert isinstance(done.exception, BitnestError), done.output
    assert what in done.exception.what and done.exception.hint
    assert sorted(place.iterdir()) == before


def test_statistics_without_inputs_name_the_command(moe: Path, text: Path, tmp_path: Path) -> None:
    old = analyzed(moe, text, tmp_path)
    assert old.inputs == [] and "inputs" not in old.header["options"]
    with pytest.raises(StatisticsError) as refused:
        api.plan(moe, statistics=old.path, bits=6, inputs=INPUTS, input_bits=6)
    hint = str(refused.value.hint)
    assert "bitnest analyze" in hint and all(f"--inputs {name}" in hint for name in INPUTS)
    assert "--format int4-g32 --format int8-g32" in hint


def test_a_recipe_may_plan_inputs(tmp_path: Path) -> None:
    text = "format: int6-g128\ninputs: [int6-g128, int8-g128]\nbudget: {input_bits: 6.4}\n"
    assert parse_recipe(text) == {
        "format": "int6-g128", "inputs": ["int6-g128", "int8-g128"], "input_bits": 6.4,
    }  # fmt: skip
    file = tmp_path / "r.yaml"
    file.write_text(text)
    assert read_recipe(file, skip={"inputs"}) == {"format": "int6-g128"}
    for broken in ("inputs: [int6-g128, int99]", "inputs: []", "budget: {input_bits: 17}"):
        with pytest.raises(BitnestError):
            parse_recipe(broken)

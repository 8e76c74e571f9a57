"""Widths chosen for a size: at load time from the manifest, and base and top before compressing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitnest
from bitnest import api, safetensors_io
from bitnest.artifact import Artifact, site_tensors
from bitnest.calibrate.predict import Predictor
from bitnest.calibrate.slopes import read_fit, sensitivity
from bitnest.checkpoint import Checkpoint
from bitnest.errors import (
    ArtifactError,
    BitnestError,
    FormatError,
    PlanError,
    RecipeError,
    StatisticsError,
)
from bitnest.formats import cut, parse_format, widths
from bitnest.formats.names import brief_name
from bitnest.kernels.decode import decode
from bitnest.manifest import MANIFEST, SiteRecord
from bitnest.quantize.allocation.fitting import Fitting, dense_bytes, fit_widths
from bitnest.quantize.allocation.nesting import Nesting
from bitnest.recipe_file import left_behind, parse_recipe
from bitnest.statistics import Statistics
from tests.tiny import Builder

SMALL: dict[str, Any] = {"samples": 8, "length": 32}
TOKENS = torch.arange(60)[None] % 50 * 6
FORMATS = ("int2-g32", "int3-g32", "int4-g32", "int6-g32", "int8-g32")


@pytest.fixture(scope="module")
def moe(tiny: Builder) -> Path:
    return tiny("qwen3_moe")


@pytest.fixture(scope="module")
def found(moe: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return api.analyze(
        moe, tmp_path_factory.mktemp("s") / "statistics", data=[f"text={text}"], formats=FORMATS,
        probes=6, probe_windows=2, fisher_windows=2, **SMALL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def options(found: Statistics, text: Path) -> dict[str, Any]:
    return {"statistics": found.path, "data": [f"text={text}"], **SMALL}


@pytest.fixture(scope="module")
def artifact(moe: Path, options: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nested") / "out"
    api.compress(moe, out, nested="2,3,4,6,8", rules=["*.o_proj=int8-g32"], **options)
    return out


@pytest.fixture(scope="module")
def budgeted(moe: Path, options: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("budgeted") / "out"
    api.compress(moe, out, nested="2,3,4,6,8", size=SIZE, base_size=BASE, group=32, **options)
    return out


SIZE, BASE = 100_000, 48_000


def held(model: Any) -> int:
    """Bytes of tensors in a model, packed ones as they are stored."""
    for _, weight in model.bitnest_source.weights:
        weight.restore()
    tensors = {t.data_ptr(): t.nbytes for t in model.parameters()}
    own = {
        t.data_ptr(): t.nbytes for _, w in model.bitnest_source.weights for t in w.tensors.values()
    }
    return sum({**tensors, **own}.values())


def sizes(artifact: Path, points: int = 7) -> list[int]:
    fitting = Fitting(Artifact.open(artifact))
    low, high = fitting.smallest, fitting.largest
    return [low + (high - low) * i // (points - 1) for i in range(points)]


# ---------------------------------------------------------------- what is kept


def test_losses_follow_errors_so_one_slope_is_enough(found: Statistics) -> None:
    predictor = Predictor(found)
    slopes = np.array(list(sensitivity(predictor).slopes.values()))
    assert slopes.shape == (len(predictor.sites), 1) and (slopes >= 0).all()
    from bitnest.calibrate.predict import relative_errors

    errors = relative_errors(found)
    predicted = errors * slopes
    known = predictor.losses[:, :, 0] > 0
    ratio = np.log(predicted[known] / predictor.losses[:, :, 0][known])
    assert np.abs(ratio).mean() < 0.1


def test_the_artifact_keeps_the_slopes_and_the_fit(artifact: Path, found: Statistics) -> None:
    opened, known = Artifact.open(artifact), sensitivity(Predictor(found))
    fit = read_fit(opened.manifest["sensitivity"])
    assert fit.kinds == known.fit.kinds
    assert np.allclose(fit.scales, known.fit.scales, rtol=1e-5)
    for record in opened.packed():
        assert np.allclose(record.sensitivity, known.slopes[record.site.name], rtol=1e-5)
        assert record == SiteRecord.from_json(record.to_json()) or record.sensitivity
    assert all(not r.sensitivity for r in opened.records if r.format == "dense")


def test_artifacts_of_one_width_keep_neither(moe: Path, options: Any, tmp_path: Path) -> None:
    api.compress(moe, tmp_path / "a", format="int4-g32", **options)
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text(encoding="utf-8"))
    assert "sensitivity" not in manifest and "predicted" in manifest
    assert {len(row) for group in manifest["sites"] for row in group["sites"]} == {5}


def test_nested_formats_count_as_integers_of_their_width(found: Statistics) -> None:
    predictor = Predictor(found)
    for top in (2, 3, 4, 6, 8):
        name = Nesting((2, 3, 4, 6, 8)).format(2, top)
        assert predictor.formats[predictor.column(name)] == f"int{top}-g32"
    with pytest.raises(StatisticsError, match="integers of 5 bits"):
        predictor.column("nest25-g128")
    with pytest.raises(StatisticsError, match="int5-g128"):
        predictor.column("int5-g128")


# ---------------------------------------------------------------- a size at load time


def test_every_size_is_met_and_the_prediction_falls(artifact: Path) -> None:
    fitting = Fitting(Artifact.open(artifact))
    before = float("inf")
    for size in sizes(artifact):
        fitted = fitting.fit(size)
        assert fitted.nbytes <= size and fitted.nbytes > 0.97 * size  # of few and small matrices
        assert fitted.mean is not None and fitted.mean < before
        before = fitted.mean
    assert fitting.fit(1 << 40).nbytes == fitting.largest
    assert set(fitting.fit(fitting.smallest).widths.values()) == {2}


def test_no_single_change_is_better(artifact: Path) -> None:
    fitting = Fitting(Artifact.open(artifact))
    objective, menu = fitting.objective, fitting.menu
    for size in sizes(artifact)[1:-1]:
        fitted = fitting.fit(size)
        choice = np.array([fitting.steps.index(fitted.widths[i[0].name]) for i in menu.items])
        least, spare = objective.mean(choice), size - fitted.nbytes
        for i in range(len(choice)):
            for step in range(len(fitting.steps)):
                other = choice.copy()
                other[i] = step
                if menu.nbytes[i, step] - menu.nbytes[i, choice[i]] <= spare:
                    assert objective.mean(other) >= least * (1 - 1e-6)


def test_better_than_one_width_at_its_bytes(artifact: Path) -> None:
    fitting = Fitting(Artifact.open(artifact))
    menu = fitting.menu
    for step in range(1, len(fitting.steps) - 1):
        uniform = np.full(len(menu.items), step)
        nbytes = fitting.resident + int(menu.nbytes[:, step].sum())
        fitted = fitting.fit(nbytes)
        assert fitted.mean is not None
        assert fitted.mean <= fitting.objective.mean(uniform) * (1 + 1e-9)


def test_what_is_loaded_is_what_was_chosen(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Artifact.open(artifact)
    read = 0
    real = safetensors_io.read_tensor

    def counting(info: Any) -> torch.Tensor:
        nonlocal read
        tensor = real(info)
        read += tensor.nbytes
        return tensor

    monkeypatch.setattr("bitnest.artifact.read_tensor", counting)
    size = sizes(artifact)[2]
    fitted = bitnest.fit_widths(artifact, size)
    assert fitted == fit_widths(opened, size)
    model = bitnest.load(artifact, size=size)
    assert read == fitted.nbytes - dense_bytes(opened)
    assert held(model) == fitted.nbytes <= size
    by_name = {record.site.name: weight for record, weight in model.bitnest_source.weights}
    for name, width in fitted.widths.items():
        assert widths(by_name[name].fmt)[-1] == width
    again = bitnest.load(artifact, bits=fitted.widths)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
        model.set_bits(None)
        assert torch.equal(model(TOKENS).logits, bitnest.load(artifact)(TOKENS).logits)


def test_without_statistics_errors_decide(moe: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    api.compress(moe, out, format="nest248-g32", data=[str(text)], **SMALL)
    fitting = Fitting(Artifact.open(out))
    middle = (fitting.smallest + fitting.largest) // 2
    fitted = fitting.fit(middle)
    assert fitted.kl is None and fitted.mean is None and fitted.nbytes <= middle
    assert {2, 8} & set(fitted.widths.values()) and len(set(fitted.widths.values())) > 1
    assert fitted.to_json()["kl_mean"] is None


def test_planes_that_are_not_there_are_not_chosen(artifact: Path, tmp_path: Path) -> None:
    import shutil

    part = tmp_path / "part"
    shutil.copytree(artifact, part)
    for file in part.glob("packed-00001-*.w6.safetensors"):
        file.unlink()
    fitted = bitnest.fit_widths(part, 1 << 40)
    first = {n: w for n, w in fitted.widths.items() if n.startswith("model.layers.0.")}
    assert set(first.values()) == {4}  # 8 needs the planes of 6
    assert set(fitted.widths.values()) == {4, 8}
    bitnest.load(part, size=1 << 40)


def test_sizes_that_cannot_be(artifact: Path, moe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="narrowest widths") as caught:
        bitnest.load(artifact, size="1KB")
    smallest = Fitting(Artifact.open(artifact)).smallest
    assert str(smallest) in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="both"):
        bitnest.load(artifact, size="1GB", bits=4)
    with pytest.raises(RecipeError, match="one width"):
        bitnest.load(moe, size="1GB")
    with pytest.raises(RecipeError, match="not a size"):
        bitnest.load(artifact, size="much")


def test_a_row_for_every_size(artifact: Path, moe: Path, text: Path) -> None:
    asked = [sizes(artifact)[1], sizes(artifact)[4]]
    found = api.evaluate(
        [artifact], against=moe, data=[f"t={text}"], sizes=asked, window=32, windows=4
    )
    assert len(found.rows) == 3
    for size, row in zip(asked, found.rows[1:], strict=True):
        fitted = bitnest.fit_widths(artifact, size)
        assert row.nbytes == fitted.nbytes and f"{fitted.nbytes:,}" in row.model
    kl = [row.scores[0].kl for row in found.rows[1:]]
    assert kl[0] is not None and kl[1] is not None and kl[1].mean < kl[0].mean
    with pytest.raises(BitnestError, match=r"leave out one|both"):
        api.evaluate([artifact], data=[f"t={text}"], sizes=asked, bits=(2,), window=32, windows=4)
    with pytest.raises(RecipeError, match="nested"):
        api.evaluate([moe], data=[f"t={text}"], sizes=asked, window=32, windows=4)


# ---------------------------------------------------------------- base and top


def test_base_and_top_fit_their_budgets(budgeted: Path) -> None:
    opened, fitting = Artifact.open(budgeted), Fitting(Artifact.open(budgeted))
    files = sum(file.stat().st_size for file in budgeted.iterdir())
    assert 0.98 * SIZE < files <= SIZE
    assert 0.95 * BASE < fitting.smallest <= BASE
    formats = [parse_format(record.format) for record in opened.packed()]
    bases = {widths(fmt)[0] for fmt in formats}
    tops = {widths(fmt)[-1] for fmt in formats}
    assert len(bases) > 1 and len(tops) > 1
    for fmt in formats:
        assert widths(fmt) == tuple(
            w for w in (2, 3, 4, 6, 8) if widths(fmt)[0] <= w <= widths(fmt)[-1]
        )
    assert opened.manifest["plan"]["asked"]["base_size"] == BASE
    assert opened.manifest["resolved"]["nested"] == "2,3,4,6,8"


@pytest.fixture(scope="module")
def mixed(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases that differ within a block, later and earlier ones in turn."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    rules = ["*.experts.*=nest48-g32", "*.experts.1.*=nest2348-g32", "*.k_proj=nest348-g32"]
    api.compress(moe, out, format="nest2348-g32", method="rtn", rules=rules)
    return out


@pytest.mark.parametrize("which", ["budgeted", "artifact", "mixed"])
def test_every_weight_comes_nearer_with_every_width(
    which: str, moe: Path, request: pytest.FixtureRequest
) -> None:
    """Sites that begin at different widths lie in different files of planes."""
    opened, checkpoint = Artifact.open(request.getfixturevalue(which)), Checkpoint.open(moe)
    headers, compared = opened.headers(), 0
    for record in opened.packed():
        weight = checkpoint.tensors.get(f"{record.site.name}.weight") and checkpoint.read(
            f"{record.site.name}.weight"
        )
        fmt = parse_format(record.format)
        if weight is None or not widths(fmt):
            continue
        errors = []
        for width in widths(fmt):
            own = cut(fmt, width)
            tensors = site_tensors(record, headers, fmt=own)
            miss = decode(tensors, own, record.site.shape) - weight.float()  # type: ignore[arg-type]
            errors.append(float(miss.square().sum() / weight.float().square().sum()))
        assert all(b < 0.7 * a for a, b in pairwise(errors))
        compared += len(errors) > 1
    assert compared > 10


def test_it_loads_from_its_base_to_its_top(budgeted: Path) -> None:
    fitting = Fitting(Artifact.open(budgeted))
    model = bitnest.load(budgeted, size=fitting.smallest)
    assert held(model) == fitting.smallest
    with torch.no_grad():
        low = model(TOKENS).logits
        model.set_bits(None)
        assert held(model) == fitting.largest
        assert not torch.equal(low, model(TOKENS).logits)
    narrow = bitnest.load(budgeted, bits=2)  # what begins later is read from its beginning on
    assert held(narrow) == fitting.smallest
    with pytest.raises(FormatError, match="nested from 2"):
        bitnest.load(budgeted, bits=1)
    late = next(
        r for r in Artifact.open(budgeted).packed() if widths(parse_format(r.format))[0] > 2
    )
    with pytest.raises(FormatError, match="begins at"):
        bitnest.load(budgeted, bits={late.site.name: 2})


def test_the_recipe_of_a_budgeted_artifact_makes_it_again(
    budgeted: Path, moe: Path, options: Any, tmp_path: Path
) -> None:
    resolved = Artifact.open(budgeted).manifest["resolved"]
    values = parse_recipe(json.dumps(resolved))
    values["data"] = options["data"]
    api.compress(moe, tmp_path / "again", **values, group=32, statistics=options["statistics"])
    for file in budgeted.glob("packed-*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_plan_of_nested_weights_is_carried_out(
    moe: Path, found: Statistics, options: Any, tmp_path: Path
) -> None:
    planned = api.plan(
        moe, statistics=found.path, nested="2,3,4,6,8", size=SIZE, base_size=BASE, group=32
    )
    assert planned.sizes.artifact <= SIZE and planned.mean > 0
    planned.plan.write(tmp_path / "p.yaml")
    checked = api.check_plan(
        moe, type(planned.plan).read(tmp_path / "p.yaml"), statistics=found.path
    )
    assert checked.mean == pytest.approx(planned.mean, rel=1e-6)
    done = api.compress(moe, tmp_path / "a", plan=tmp_path / "p.yaml", **options)
    chosen = planned.menu.plan(planned.choice)
    packed = {record.site.name: record.format for record in Artifact.open(done.path).packed()}
    assert packed == chosen
    labels = {group.format for group in done.groups}
    assert labels and all(label == brief_name(label) for label in labels)


def test_without_a_base_size_all_begin_at_the_narrowest(moe: Path, found: Statistics) -> None:
    planned = api.plan(moe, statistics=found.path, nested="2,3,4,6,8", bits=4.0)
    formats = {rule.format for rule in planned.plan.rules if rule.format != "dense"}
    assert {widths(parse_format(name))[0] for name in formats} == {2}
    assert planned.bits == pytest.approx(4.0, abs=0.1) and planned.bits <= 4.0


def test_rules_stand_beside_nested_weights(moe: Path, found: Statistics) -> None:
    planned = api.plan(
        moe, statistics=found.path, nested="2-4", bits=5.0,
        rules=["*.o_proj=int8-g32", "*.q_proj=dense"],
    )  # fmt: skip
    formats = planned.menu.plan(planned.choice)
    assert {n for s, n in formats.items() if s.endswith("o_proj")} == {"int8-g32"}
    assert {n for s, n in formats.items() if s.endswith("q_proj")} <= {"dense"}
    assert all(n.startswith("nest") for s, n in formats.items() if "experts" in s)


@pytest.mark.parametrize("base", [1000, 0])
def test_bases_that_cannot_be(moe: Path, found: Statistics, base: int) -> None:
    with pytest.raises(RecipeError, match="base size"):
        api.plan(moe, statistics=found.path, nested="2-4", bits=3.0, base_size=base)


def test_recipes_know_nested() -> None:
    values = parse_recipe("budget: {size: 12GiB}\nnested: 2-8\nbase_size: 6GiB\n")
    assert values == {"size": 12 << 30, "nested": "2-8", "base_size": 6 << 30}
    assert parse_recipe("nested: 4\n") == {"nested": "4"}
    assert parse_recipe("nested: [2, 3, 8]\n") == {"nested": "2,3,8"}
    with pytest.raises(PlanError, match="list of widths"):
        parse_recipe("nested: 2-9\n")
    assert {"nested", "base_size"} <= left_behind({"format"})
    assert "format" in left_behind({"nested"}) and "size" not in left_behind({"nested"})


def test_names_for_tables() -> None:
    assert brief_name("nest2345-g128@had64") == "nest..5-g128@had64"
    assert brief_name("stack12-r1") == "stack..2-r1"
    for name in ("int4-g128", "nest4-g128", "dense"):
        assert brief_name(name) == name


def test_cut_of_a_planned_format_is_a_prefix() -> None:
    fmt = parse_format(Nesting((2, 3, 4, 8)).format(3, 8))
    assert widths(fmt) == (3, 4, 8) and cut(fmt, 5).name == Nesting((2, 3, 4, 8)).format(3, 4)


# ---------------------------------------------------------------- how much a width counts


def test_a_width_that_counts_more_is_better(moe: Path, options: Any, tmp_path: Path) -> None:
    def mean_errors(name: str, **more: Any) -> np.ndarray:
        api.compress(moe, tmp_path / name, format="nest248-g32", **options, **more)
        records = Artifact.open(tmp_path / name).packed()
        return np.log([record.errors for record in records]).mean(axis=0)

    even, narrow = mean_errors("even"), mean_errors("narrow", width_weights=["2=200"])
    assert narrow[0] < even[0] and narrow[2] > even[2]
    resolved = Artifact.open(tmp_path / "narrow").manifest["resolved"]
    assert parse_recipe(json.dumps(resolved))["width_weights"] == ["2=200"]
    assert "width_weights" not in Artifact.open(tmp_path / "even").manifest["recipe"]


@pytest.mark.parametrize("weight", ["3", "x=2", "9=1", "3=0", "3=-1", "3=nan", "3=inf"])
def test_weights_that_are_none(moe: Path, tmp_path: Path, weight: str) -> None:
    with pytest.raises(RecipeError):
        api.compress(moe, tmp_path / "a", nested="2-4", width_weights=[weight])
    with pytest.raises(PlanError):
        parse_recipe(f'fit: {{width_weights: ["{weight}"]}}')
    assert not list(tmp_path.iterdir())


def test_weights_are_for_nested_formats(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing is nested"):
        api.compress(moe, tmp_path / "a", format="int4-g32", width_weights=["3=2"])
    with pytest.raises(RecipeError, match="two weights"):
        api.compress(moe, tmp_path / "a", nested="2-4", width_weights=["3=2", "3=4"])


# ---------------------------------------------------------------- what a stranger tried


def test_nested_is_not_forgotten_where_text_is_not_read(
    moe: Path, text: Path, tmp_path: Path
) -> None:
    """Rounding has no statistics of its own to plan by here: it measures them first."""
    done = api.compress(
        moe, tmp_path / "a", nested="2-4", bits=3.0, method="rtn", data=[str(text)], **SMALL
    )
    formats = {r.format for r in Artifact.open(done.path).packed()}
    assert formats and all(widths(parse_format(name)) for name in formats)


def test_a_budgeted_artifact_without_wide_planes(budgeted: Path, moe: Path, tmp_path: Path) -> None:
    """A weight's base is in the first file, however many bits it has."""
    import shutil

    part = tmp_path / "part"
    shutil.copytree(budgeted, part)
    for file in part.glob("packed-*.w[468].safetensors"):
        file.unlink()
    opened = Artifact.open(part)
    fitted = bitnest.fit_widths(part, 1 << 40)
    for record in opened.packed():
        own = widths(parse_format(record.format))
        assert fitted.widths[record.site.name] == (3 if own[0] == 2 and 3 in own else own[0])
    bitnest.load(part, size=1 << 40)


def test_rows_of_an_artifact_without_wide_planes(
    artifact: Path, moe: Path, text: Path, tmp_path: Path
) -> None:
    import shutil

    part = tmp_path / "part"
    shutil.copytree(artifact, part)
    for file in part.glob("packed-*.w6.safetensors"):
        file.unlink()
    options: dict[str, Any] = {"data": [f"t={text}"], "window": 32, "windows": 2}
    found = api.evaluate([part], against=moe, bits=(2, 4, 6, 8), **options)
    assert [row.model.rpartition(" at ")[2] for row in found.rows[1:]] == ["2 bits", "4 bits"]
    with pytest.raises(RecipeError, match="no width 6"):
        api.evaluate([part], bits=(6,), **options)
    with pytest.raises(ArtifactError, match="w6"):
        api.evaluate([part], **options)
    sized = api.evaluate([part], sizes=(1 << 30,), **options)
    assert "planes missing" in sized.rows[0].model
    next(part.glob("packed-00002-*.w4.safetensors")).unlink()
    with pytest.raises(ArtifactError, match="w4") as caught:  # the narrowest of those missing
        api.inspect(part, verify=True)
    assert "below 4 bits" in (caught.value.hint or "")


def test_the_base_of_a_comparison_is_whole(artifact: Path, text: Path) -> None:
    found = api.evaluate(
        [artifact], against=artifact, data=[f"t={text}"], bits=(2, 8), window=32, windows=2
    )
    kl = [row.scores[0].kl for row in found.rows[1:]]
    assert kl[0] is not None and kl[1] is not None
    assert kl[1].mean == pytest.approx(0, abs=1e-9) and kl[0].mean > 1e-4


def test_planes_that_changed_are_found_when_they_are_read(artifact: Path, tmp_path: Path) -> None:
    import shutil

    part = tmp_path / "part"
    shutil.copytree(artifact, part)
    name = next(part.glob("packed-00002-*.w4.safetensors")).name
    data = bytearray((part / name).read_bytes())
    data[-1] ^= 1
    (part / name).write_bytes(bytes(data))
    model = bitnest.load(part, bits=3)
    with torch.no_grad():
        before = model(TOKENS).logits
        assert torch.equal(before, bitnest.load(artifact, bits=3)(TOKENS).logits)
        for raising in (lambda: model.set_bits(4), lambda: bitnest.load(part, bits=4)):
            with pytest.raises(ArtifactError, match=name) as caught:
                raising()
            assert "below 4 bits" in (caught.value.hint or "")
            assert "bitnest pull" in (caught.value.hint or "")
        assert torch.equal(before, model(TOKENS).logits)


def test_swapped_planes_are_found(artifact: Path, tmp_path: Path) -> None:
    import shutil

    part = tmp_path / "part"
    shutil.copytree(artifact, part)
    one, two = sorted(part.glob("packed-*.w3.safetensors"))
    if one.stat().st_size != two.stat().st_size:
        pytest.skip("blocks differ")
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    bitnest.load(part, bits=2)
    with pytest.raises(ArtifactError, match="checksum"):
        bitnest.load(part, bits=3)


def test_sites_that_are_not_named_stay_as_they_are(artifact: Path) -> None:
    model: Any = bitnest.load(artifact, bits=4)
    model.set_bits({"*.q_proj": 8})
    by_name = {r.site.name: widths(w.fmt) for r, w in model.bitnest_source.weights}
    for name, own in by_name.items():
        if own:
            assert own[-1] == (8 if name.endswith("q_proj") else 4)
    assert model.set_bits({}) == 0


@pytest.mark.parametrize("bits", [3.0, "3", True, 0, 9, {"*": "3"}, {"*": 9}, {"*": 2.5}])
def test_bits_that_are_none(artifact: Path, bits: Any) -> None:
    with pytest.raises(RecipeError, match="no width"):
        bitnest.load(artifact, bits=bits)


@pytest.mark.parametrize("size", [float("nan"), 2.5, True, None])
def test_sizes_that_are_none(artifact: Path, size: Any) -> None:
    with pytest.raises(RecipeError, match="no size"):
        bitnest.fit_widths(artifact, size)


def test_widths_beyond_the_artifact_are_refused(
    budgeted: Path, artifact: Path, tmp_path: Path
) -> None:
    api.slice_artifact(artifact, tmp_path / "four", 4)
    with pytest.raises(FormatError, match="from 2 to 4 bits") as caught:
        api.slice_artifact(tmp_path / "four", tmp_path / "six", 6)
    assert caught.value.hint == "--bits 4"
    for _ in range(3):
        with pytest.raises(FormatError, match="nested from 2 to") as caught:
            bitnest.load(budgeted, bits=1)
        assert caught.value.hint == "--bits 2"


def test_a_base_size_beyond_the_budget_is_no_obstacle(moe: Path, found: Statistics) -> None:
    for asked in ({"size": SIZE}, {"bits": 3.0}):
        planned = api.plan(
            moe, statistics=found.path, nested="2,3,4,6,8", base_size=10**9, group=32, **asked
        )  # fmt: skip
        assert planned.sizes.artifact <= SIZE or planned.bits <= 3.0


def test_nested_rules_beside_a_budget(moe: Path, found: Statistics) -> None:
    planned = api.plan(
        moe, statistics=found.path, nested="2-4", bits=4.0, rules=["kind:attention=nest48-g32"]
    )
    chosen = planned.menu.plan(planned.choice)
    assert {n for s, n in chosen.items() if "self_attn" in s} == {"nest48-g32"}


def test_the_summary_predicts_from_measured_errors(artifact: Path) -> None:
    from bitnest.api.result import summarise

    said = summarise(Artifact.open(artifact)).predicted
    fitted = bitnest.fit_widths(artifact, 1 << 40)
    assert said is not None and said["mean"] == fitted.mean and said["kl"] == fitted.kl


def test_a_weight_for_a_width_that_nothing_has(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no weight is nested at 3"):
        api.compress(moe, tmp_path / "a", nested="4-8", width_weights=["3=2"])


def test_planes_that_come_later_are_read_by_a_model_that_runs(
    artifact: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    api.pull(artifact, part, bits=3)
    model: Any = bitnest.load(part, bits=3)
    with pytest.raises(ArtifactError, match="missing"):
        model.set_bits(4)
    api.pull(artifact, part, bits=4)
    model.set_bits(4)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, bitnest.load(artifact, bits=4)(TOKENS).logits)


def test_what_is_decoded_of_a_partial_artifact_is_said(artifact: Path, tmp_path: Path) -> None:
    from bitnest.packed.decoded import decoding_note

    part = tmp_path / "part"
    api.pull(artifact, part, bits=3)
    assert "at 3 bits (wider planes are not there" in decoding_note(part)
    assert "at 8 bits:" in decoding_note(artifact)


@pytest.mark.parametrize("damage", ["{}", '{"texts": 3}', '{"texts": ["t", "u"]}'])
def test_a_manifest_that_does_not_say_what_widths_cost(
    artifact: Path, tmp_path: Path, damage: str
) -> None:
    import shutil

    part = tmp_path / "part"
    shutil.copytree(artifact, part)
    manifest = json.loads((part / MANIFEST).read_text(encoding="utf-8"))
    manifest["sensitivity"] = json.loads(damage)
    (part / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtifactError, match="what widths cost"):
        bitnest.load(part, size="1GB")

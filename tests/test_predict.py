"""Predicted KL: the fit on data of its own formula, plans on made-up and on measured statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnest import api
from bitnest.calibrate.predict import (
    LEAST,
    Predictor,
    candidate_bits,
    fit_points,
    left_out,
    site_losses,
    token_shares,
)
from bitnest.calibrate.probes import draw_plans
from bitnest.errors import StatisticsError
from bitnest.formats import parse_format
from bitnest.sites import Site
from bitnest.statistics import Statistics, StatisticsWriter
from tests.tiny import Builder, words

KINDS = ("attention", "expert")
FORMATS = ("int2-g32", "int4-g32", "int8-g32")
SHAPES = {"attention": (64, 64), "expert": (32, 64)}
SMALL: dict[str, Any] = {
    "samples": 8, "length": 32, "formats": FORMATS, "probes": 6, "probe_windows": 2,
    "fisher_windows": 2,
}  # fmt: skip


def raw_sums(count: int, seed: int = 0) -> np.ndarray:
    """Losses per kind (count, 2) over four orders of magnitude."""
    return np.asarray(10 ** np.random.default_rng(seed).uniform(-5, -1, (count, len(KINDS))))


def formula(raw: np.ndarray, scales: Sequence[float], flips: float) -> np.ndarray:
    moved = raw @ np.array([5.0, 1.0])  # attention counts five times where routers choose
    return np.asarray(raw @ np.array(scales) + flips * np.sqrt(moved))


# the fit


@pytest.mark.parametrize(("scale", "flips"), [(1.0, 0.0), (0.2, 0.0), (3.0, 0.01), (0.5, 0.1)])
def test_data_of_the_formula_gives_its_constants_back(scale: float, flips: float) -> None:
    raw = raw_sums(40)
    measured = formula(raw, (scale, scale), flips)
    fit = fit_points(KINDS, raw, measured, list(range(40)), moe=flips > 0)
    np.testing.assert_allclose(fit.scales, scale, rtol=1e-4)
    assert fit.flips == pytest.approx(flips, rel=1e-4)
    assert fit.error < 1e-3 and fit.probes == 40
    np.testing.assert_allclose(fit.kl(raw), measured, rtol=1e-4)


def test_kinds_that_differ_are_told_apart_by_enough_probes() -> None:
    raw = raw_sums(200)
    fit = fit_points(KINDS, raw, formula(raw, (0.3, 2.5), 0.02), list(range(200)), moe=True)
    np.testing.assert_allclose([*fit.scales, fit.flips], [0.3, 2.5, 0.02], rtol=0.03)
    assert fit.error < 0.03


def test_a_few_probes_pull_kinds_together_and_still_predict() -> None:
    raw = raw_sums(4, seed=1)
    fit = fit_points(KINDS, raw, formula(raw, (0.5, 0.9), 0), [0, 1, 2, 3], moe=False)
    assert max(fit.scales) / min(fit.scales) < 0.9 / 0.5
    assert fit.error < 0.5


def test_dense_models_have_no_term_for_changed_experts() -> None:
    raw = raw_sums(20)
    assert fit_points(KINDS, raw, formula(raw, (1, 1), 0.1), range(20), moe=False).flips == 0


def test_a_larger_loss_is_never_predicted_to_cost_less() -> None:
    raw = raw_sums(30)
    noise = np.exp(np.random.default_rng(2).normal(0, 0.5, 30))
    fit = fit_points(KINDS, raw, formula(raw, (1, 0.5), 0.05) * noise, range(30), moe=True)
    assert min(fit.scales) > 0 and fit.flips > 0
    more = raw * (1 + np.random.default_rng(3).random(raw.shape))
    assert (fit.kl(more) > fit.kl(raw)).all()
    assert fit.kl(np.zeros((1, 2))) == 0


def test_the_error_bar_is_the_spread_of_the_noise() -> None:
    raw = raw_sums(400)
    noise = np.exp(np.random.default_rng(4).normal(0, 0.3, 400))
    fit = fit_points(KINDS, raw, formula(raw, (1, 1), 0.02) * noise, range(400), moe=True)
    assert fit.error == pytest.approx(0.3, rel=0.15)


def test_a_probe_does_not_predict_itself() -> None:
    raw = raw_sums(10)
    measured = formula(raw, (1, 1), 0)
    measured[0] *= 100
    numbers = [0, 1, *range(1, 9)]  # rows 1 and 2 are of one probe
    predicted = left_out(KINDS, raw, measured, numbers, moe=False)
    assert predicted[0] < measured[0] / 50
    lone = left_out(KINDS, raw[:1], measured[:1], [0], moe=True)
    np.testing.assert_allclose(lone, raw[:1].sum(1))  # nothing to fit to: uncalibrated


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(
    ("raw", "kl"), [(0.0, 1e-3), (1e-30, 5.0), (1e6, 2 * LEAST), (1e-12, 1e-12)]
)
def test_losses_far_from_what_was_measured_give_finite_figures(
    raw: float, kl: float, moe: bool
) -> None:
    sums, measured = np.full((3, 2), raw), np.full(3, kl)
    fit = fit_points(KINDS, sums, measured, [0, 1, 2], moe=moe)
    assert all(map(math.isfinite, (*fit.scales, fit.flips, fit.error)))
    assert np.isfinite(fit.kl(sums)).all()


def test_without_probes_the_error_is_unknown_and_said_so() -> None:
    fit = fit_points(KINDS, np.zeros((0, 2)), np.zeros(0), [], moe=True)
    assert (fit.scales, fit.flips, fit.error, fit.probes) == ((1.0, 1.0), 0.0, math.inf, 0)
    assert fit.kl(np.array([[0.25, 0.5]])) == 0.75


# made-up statistics


def made_up_sites() -> list[Site]:
    """Two blocks, each with an attention matrix and two experts' matrices."""
    sites = []
    for layer in range(2):
        root = f"model.layers.{layer}"
        sites.append(Site(f"{root}.o_proj", "attention", layer, None, SHAPES["attention"],
                          f"{root}.o_proj", "weight"))  # fmt: skip
        sites.extend(
            Site(f"{root}.experts.{expert}.down_proj", "expert", layer, expert, SHAPES["expert"],
                 f"{root}.experts", "down_proj")
            for expert in range(2)
        )  # fmt: skip
    return sites


def made_up(
    path: Path,
    *,
    probes: Sequence[dict[str, Any]] = (),
    importance: dict[str, Any] | None = None,
    labels: Sequence[str] = ("books", "code"),
) -> Statistics:
    """Statistics whose losses are 4^-bits times a number of the site and of the label."""
    sites, random = made_up_sites(), np.random.default_rng(5)
    writer = StatisticsWriter(path, {}, 2)
    writer.begin(fresh=True)
    for layer in range(2):
        own = [site for site in sites if site.layer == layer]
        scale = torch.from_numpy(random.uniform(0.01, 0.1, (len(own), 1, len(labels))))
        step = torch.tensor([4.0**-2, 4.0**-4, 4.0**-8], dtype=torch.float64)
        tokens = torch.tensor([[30, 10], [15, 45], [0, 0]][: len(labels)])
        record = {
            "layer": layer, "inputs": [], "sites": [asdict(site) for site in own],
            "experts": [{"name": f"model.layers.{layer}.experts", "experts": 2, "top_k": 1}],
        }  # fmt: skip
        writer.write_block(layer, record, {
            "sites.loss": scale * step[:, None],
            "sites.error": (scale.mean(2) * step).float(),
            "sites.output": torch.full((len(own),), 2.0 + layer, dtype=torch.float64),
            **{f"columns.{site.name}": torch.ones(site.shape[1]) for site in own},
            "experts.0.up.tokens": tokens,
            "experts.0.trace": torch.zeros(100, 1, dtype=torch.int32),
        })  # fmt: skip
    importance = importance or {"kind": "kl", "predictions": [10] * len(labels)}
    lengths = [100 - len(labels[1:]), *[1] * len(labels[1:])]
    found = writer.finish({
        "bitnest": "", "model": "", "architecture": "", "labels": list(labels), "tokens": 100,
        "source": {"sha256": "", "bytes": 0, "parameters": 0}, "data": [], "length": None,
        "samples": [{"label": label, "length": length, "fitted": True, "sha256": label}
                    for label, length in zip(labels, lengths, strict=True)],
        "formats": list(FORMATS), "hessian": "full", "method": "gptq", "min_tokens": None,
        "options": {"formats": list(FORMATS), "importance": importance["kind"],
                    "keep_hessians": False, "method": "gptq", "damp": 0.03, "weighting": "gate",
                    "min_tokens": None, "clip": True},
        "compute": "float32", "importance": importance, "probes": list(probes), "drawn": None,
        "seed": 0, "seconds": 0.0, "fingerprint": {},
    })  # fmt: skip
    writer.close()
    return found


def random_plans(count: int) -> list[list[int]]:
    return np.random.default_rng(6).integers(0, len(FORMATS), (count, 6)).tolist()


def probe(plan: Sequence[int | None], *kls: float, group: bool = False) -> dict[str, Any]:
    measured = [{"label": d, "kl": kl, "error": 0.0} for d, kl in enumerate(kls)]
    return {"plan": list(plan), "measured": measured, "group": group}


def test_a_plan_costs_what_the_formula_says(tmp_path: Path) -> None:
    """Losses are summed by kind and label, scaled, and the experts' term added."""
    plain = Predictor(made_up(tmp_path / "plain"))
    plans = random_plans(12)
    kls = [formula(plain.sums(np.array(plan)), (1.5, 1.5), 0.03) for plan in plans]
    fitted = Predictor(
        made_up(tmp_path / "fitted", probes=[probe(p, *k) for p, k in zip(plans, kls, strict=True)])
    )
    losses = site_losses(fitted.statistics)
    for plan in random_plans(20)[12:]:
        named = {s.name: FORMATS[f] for s, f in zip(fitted.sites, plan, strict=True)}
        found = fitted.predict(named)
        for d, label in enumerate(("books", "code")):
            total = sum(losses[i, f, d] for i, f in enumerate(plan))
            early = (1 + 13.0 * total) ** 0.87  # of block 0 of two; the last does not grow
            grown = [
                losses[i, f, d] * (early if fitted.sites[i].layer == 0 else 1.0)
                for i, f in enumerate(plan)
            ]
            kinds = [5.0 if site.kind == "attention" else 1.0 for site in fitted.sites]
            raw, moved = sum(grown), float(np.dot(grown, kinds))
            assert found.raw[label] == pytest.approx(raw)
            assert found.kl[label] == pytest.approx(1.5 * raw + 0.03 * moved**0.5, rel=1e-3)
        assert found.mean == pytest.approx(sum(found.kl.values()) / 2)
        low, high = found.interval
        assert low <= found.mean <= high and high / low < 1.01
    assert len(fitted.points) == 24 and fitted.fit.probes == 12
    for point in fitted.points:
        assert point.predicted == pytest.approx(point.measured, rel=1e-2)
        plan = plans[point.probe]
        size = [site.numel for site in fitted.sites]
        bits = np.average(candidate_bits(fitted.statistics)[plan], weights=size)
        assert point.bits == pytest.approx(bits)


def test_sites_left_out_of_a_plan_cost_nothing(tmp_path: Path) -> None:
    predictor = Predictor(made_up(tmp_path / "s"))
    assert predictor.predict({}).mean == 0
    one = predictor.sites[1].name
    alone = predictor.predict({one: "int2-g32"})
    own = predictor.losses[1, 0]
    np.testing.assert_allclose(list(alone.kl.values()), own * (1 + 13.0 * own) ** 0.87)
    last = predictor.sites[-1].name
    alone = predictor.predict({last: "int2-g32"})
    np.testing.assert_allclose(list(alone.kl.values()), predictor.losses[-1, 0])


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ({"model.layers.9.o_proj": "int2-g32"}, "layers.9"),
        ({"model.layers.0.o_proj": "int3-g32"}, "int3-g32"),
    ],
)
def test_what_was_not_measured_is_refused_by_name(
    plan: dict[str, str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(StatisticsError, match=named) as caught:
        Predictor(made_up(tmp_path / "s")).predict(plan)
    assert caught.value.hint


def test_a_label_without_importance_takes_no_part(tmp_path: Path) -> None:
    importance = {"kind": "kl", "predictions": [10, 0]}
    predictor = Predictor(made_up(tmp_path / "s", importance=importance))
    assert set(predictor.predict({predictor.sites[0].name: "int2-g32"}).kl) == {"books"}


def test_probes_of_no_measurable_cost_are_left_out(tmp_path: Path) -> None:
    plans = random_plans(3)
    probes = [probe(plans[0], 0.0, 1e-3), probe(plans[1], 1e-3, 2e-3), probe(plans[2], 0.0, 0.0)]
    predictor = Predictor(made_up(tmp_path / "s", probes=probes))
    assert len(predictor.points) == 3 and math.isfinite(predictor.fit.error)


def test_the_error_bar_knows_how_few_windows_were_measured(tmp_path: Path) -> None:
    """Probes that all follow the formula, on windows that differ by a fifth or two."""
    plain = Predictor(made_up(tmp_path / "plain"))
    probes = []
    for plan in random_plans(8):
        kls = formula(plain.sums(np.array(plan)), (1, 1), 0.01)
        item = probe(plan, *kls)
        for m, relative in zip(item["measured"], (0.2, 0.4), strict=True):
            m["error"] = relative * m["kl"]
        probes.append(item)
    predictor = Predictor(made_up(tmp_path / "s", probes=probes))
    assert predictor.sampling == pytest.approx(math.sqrt((0.04 + 0.16) / 2))
    assert predictor.fit.error == pytest.approx(predictor.sampling, rel=0.01)


def test_equal_plans_are_one_probe(tmp_path: Path) -> None:
    """Merged parts of one seed hold the same plans: a twin would give away what is predicted."""
    plan, other = random_plans(2)
    probes = [probe(plan, 5.0, 6.0), probe(other, 1e-3, 1e-3), probe(plan, 5.5, 6.5)]
    predictor = Predictor(made_up(tmp_path / "s", probes=probes))
    assert predictor.fit.probes == 2
    assert all(p.predicted < 1 for p in predictor.points if p.measured > 1)


def test_group_probes_give_their_sites_what_was_measured(tmp_path: Path) -> None:
    """Split by noise that reaches the layer's output; other formats in proportion to theirs."""
    groups = [[1, None, None] + [None] * 3, [None, 1, 1] + [None] * 3,
              [None] * 3 + [1, None, None], [None] * 3 + [None, 1, 1]]  # fmt: skip
    kls = [(1e-3, 2e-3), (3e-3, 4e-3), (5e-3, 6e-3), (7e-3, 8e-3)]
    probes = [probe(g, *k, group=True) for g, k in zip(groups, kls, strict=True)]
    found = made_up(
        tmp_path / "s", probes=probes, importance={"kind": "probes", "predictions": [9, 9]}
    )
    losses = site_losses(found)
    for group, measured in zip(groups, kls, strict=True):
        own = [i for i, f in enumerate(group) if f is not None]
        np.testing.assert_allclose(losses[own, 1].sum(0), measured)
    errors = torch.cat([found.read(layer, "sites.error") for layer in range(2)]).double().numpy()
    np.testing.assert_allclose(losses[0, 0] / losses[0, 1], errors[0, 0] / errors[0, 1])
    shares = token_shares(found)
    np.testing.assert_allclose(shares, [1, 0.45, 0.55] * 2)
    noise = errors[1:3, 1] * shares[1:3]
    np.testing.assert_allclose(losses[1, 1] / losses[2, 1], noise[0] / noise[1])


def test_group_probes_of_merged_parts_find_their_own_labels(tmp_path: Path) -> None:
    """Books were measured on one machine, code on another, wiki on both."""
    plan = [1, None, None, None, None, None]
    books = {**probe(plan, 1e-3, 5e-3, group=True), "labels": ["books", "wiki"]}
    code = {**probe(plan, 2e-3, 7e-3, group=True), "labels": ["code", "wiki"]}
    found = made_up(tmp_path / "s", probes=[books, code], labels=("books", "wiki", "code"),
                    importance={"kind": "probes", "predictions": [9, 9, 9]})  # fmt: skip
    np.testing.assert_allclose(site_losses(found)[0, 1], [1e-3, 6e-3, 2e-3])


# measured statistics


@pytest.fixture(scope="module")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    other = tmp_path_factory.mktemp("other") / "other.txt"
    other.write_text(words(2000, seed=9), encoding="utf-8")
    return [f"books={text}", f"code={other}"]


@pytest.fixture(scope="module")
def measured(
    tiny: Builder, data: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Statistics]:
    root = tmp_path_factory.mktemp("measured")
    return {
        kind: api.analyze(tiny("qwen3_moe"), root / kind, data=data, importance=kind, **SMALL)
        for kind in ("kl", "loss", "probes")
    }


@pytest.mark.parametrize("kind", ["kl", "loss", "probes"])
def test_more_bits_are_predicted_to_cost_less(kind: str, measured: dict[str, Statistics]) -> None:
    predictor = Predictor(measured[kind])
    costs = [predictor.predict({s.name: f for s in predictor.sites}).mean for f in FORMATS]
    assert costs[0] > 4 * costs[1] > 16 * costs[2] > 0


@pytest.mark.parametrize("kind", ["kl", "loss", "probes"])
def test_a_real_plan_is_predicted_within_a_few_error_bars(
    kind: str, measured: dict[str, Statistics]
) -> None:
    predictor = Predictor(measured[kind])
    plans = {tuple(p["plan"]) for p in measured[kind].header["probes"] if not p["group"]}
    assert predictor.fit.probes == len(plans) > 3
    ratios = [math.log(p.predicted / p.measured) for p in predictor.points]
    assert np.median(np.abs(ratios)) < 1 and predictor.fit.error < 1.5


def test_importance_by_probes_adds_up_to_the_measured_groups(
    measured: dict[str, Statistics],
) -> None:
    found = measured["probes"]
    losses, groups = site_losses(found), [p for p in found.header["probes"] if p["group"]]
    kinds = {(site.layer, site.kind) for site in found.sites}
    assert len(groups) == len(kinds) == 4 + 2  # embedding and head have a group each
    for item in groups:
        own = [(i, f) for i, f in enumerate(item["plan"]) if f is not None]
        assert {FORMATS[f] for _, f in own} == {"int4-g32"}  # the second coarsest
        assert [m["label"] for m in item["measured"]] == [0, 1]
        for m in item["measured"]:
            total = sum(losses[i, f, m["label"]] for i, f in own)
            assert total == pytest.approx(m["kl"], rel=1e-6)


def test_compress_takes_the_texts_of_the_statistics(
    tiny: Builder, data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What they predict is the KL of calibrating on them: other texts are remarked on."""
    texts = [tmp_path / f"{i}.v2.txt" for i in range(2)]  # unnamed, its label has a dot
    for copy, spec in zip(texts, data, strict=True):
        copy.write_text(Path(spec.partition("=")[2]).read_text("utf-8"), encoding="utf-8")
    model, size = tiny("qwen3_moe"), {"samples": 8, "length": 32}
    found = api.analyze(
        model, tmp_path / "s", data=[f"books:3={texts[0]}", str(texts[1])],
        formats=("int4-g32",), importance="loss", probes=0, fisher_windows=2, **size,
    )  # fmt: skip
    options = {"format": "int4-g32", "statistics": found.path, **size}
    api.compress(model, tmp_path / "same", **options)
    assert not caplog.records
    manifest = json.loads((tmp_path / "same" / "bitnest.json").read_text("utf-8"))
    assert manifest["fingerprint"]["calibration"] == found.header["fingerprint"]["calibration"]
    api.compress(model, tmp_path / "other", data=[str(texts[1])], **options)
    assert "of the statistics" in caplog.text
    texts[0].unlink()
    with pytest.raises(StatisticsError, match="not there") as caught:
        api.compress(model, tmp_path / "none", **options)
    assert "--data" in caught.value.hint and not (tmp_path / "none").exists()
    api.compress(model, tmp_path / "named", data=[str(texts[1])], **options)


@pytest.mark.parametrize("count", [1, 2, 12, 40])
def test_probes_spread_over_every_budget(count: int) -> None:
    sites = [s for layer in range(50) for s in made_up_sites() if s.layer == layer % 2]
    sites = [replace(s, name=f"{i}.{s.name}") for i, s in enumerate(sites)]
    formats = [parse_format(f"int{bits}-g32") for bits in (8, 2, 3, 4, 5, 6, 7)]
    plans = draw_plans(sites, formats, count, 0)
    assert plans == draw_plans(sites, formats, count, 0) != draw_plans(sites, formats, count, 1)
    bits = {
        kind: np.array([
            np.mean([formats[plan[s.name]].bits for s in sites if s.kind == kind])
            for plan in plans
        ])
        for kind in KINDS
    }  # fmt: skip
    for own in bits.values():
        assert len(own) == count and own.min() >= 2 and own.max() <= 8
        if count >= 12:
            assert own.min() < 3 and own.max() > 6.8
            assert np.histogram(own, bins=4, range=(2, 8))[0].min() >= 1
    if count >= 12:
        assert 0.2 < np.corrcoef(*bits.values())[0, 1] < 0.98


def test_without_probes_everything_is_written_and_nothing_infinite(
    tiny: Builder, data: list[str], tmp_path: Path
) -> None:
    found = api.analyze(tiny("mixtral"), tmp_path / "s", data=data, **{**SMALL, "probes": 0})
    predictor = Predictor(found)
    prediction = predictor.predict({s.name: "int4-g32" for s in predictor.sites})
    assert prediction.error == math.inf and prediction.interval == (0.0, math.inf)
    assert 0 < prediction.mean < math.inf and not predictor.points
    content = (found.path / "report.json").read_text("utf-8")
    assert json.loads(content, parse_constant=pytest.fail)["prediction"] is None


@pytest.mark.parametrize(
    "options", [{"importance": "none", "probes": 0, "formats": ()}, {"importance": "none"}]
)
def test_statistics_of_usage_only_cannot_predict_and_say_how_to(
    options: dict[str, Any], tiny: Builder, data: list[str], tmp_path: Path
) -> None:
    found = api.analyze(tiny("mixtral"), tmp_path / "s", data=data, **{**SMALL, **options})
    with pytest.raises(StatisticsError, match="usage only") as caught:
        Predictor(found)
    assert "--importance" in caught.value.hint

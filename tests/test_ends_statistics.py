"""Statistics of embedding and head: losses by hand, probes against the real model, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitnest import api
from bitnest.calibrate.ends import PRIOR
from bitnest.calibrate.predict import Predictor, fit_points
from bitnest.calibrate.probes import draw_plans, mean_kl
from bitnest.calibrate.report import render
from bitnest.calibrate.summary import summarise
from bitnest.formats import parse_format
from bitnest.quantize.solve import Options, solve
from bitnest.sites import Site
from bitnest.statistics import Statistics
from bitnest.statistics.merging import merge
from tests.tiny import FAMILIES, VOCAB, Builder, words

FORMATS = ("int3-g32", "int6-g32")
SIZES = {"samples": 8, "length": 24, "fisher_windows": 8, "probe_windows": 2}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("texts"), {}
    for seed, name in enumerate(("books", "code")):
        found[name] = root / f"{name}.txt"
        found[name].write_text(words(1500, seed=seed), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def analyse(tiny: Builder, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Statistics] = {}

    def run(family: str, *names: str, **options: Any) -> Statistics:
        key = repr((family, names, options))
        if key not in made:
            data = [f"{n}={texts[n]}" for n in names or ("books",)]
            out = tmp_path_factory.mktemp("statistics") / "out"
            settings = {**SIZES, "formats": FORMATS, "probes": 0, "method": "rtn", **options}
            made[key] = api.analyze(tiny(family), out, data=data, **settings)
        return made[key]

    return run


def windows(statistics: Statistics, texts: dict[str, Path], source: Path) -> torch.Tensor:
    """The tokens that were analysed, all windows of one text."""
    from bitnest.calibrate.data import calibration_windows, parse_source
    from bitnest.packed.loading import load_tokenizer

    sources = [parse_source(f"{n}={texts[n]}") for n in statistics.labels]
    found = calibration_windows(
        load_tokenizer(source), sources, samples=SIZES["samples"], length=SIZES["length"], seed=0
    )
    assert [item["sha256"] for item in statistics.header["samples"]] == found.hashes()
    return found.tokens


def missed(family: str, weight: torch.Tensor, name: str) -> torch.Tensor:
    half = torch.float16 if FAMILIES[family].dtype == "float16" else torch.bfloat16
    options = Options("rtn", half=half)
    return weight - solve(weight[None], None, parse_format(name), options).weight[0]


def seen(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the head reads (T, hidden), its own outputs (1, T, V) and the logits (T, V)."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _m, a, y: kept.append((a[0][0], y))
    )
    logits = model(tokens).logits[0]
    hook.remove()
    return *kept[0], logits


def head_loss(model: Any, tokens: torch.Tensor, miss: torch.Tensor, kind: str) -> float:
    """1/2 sum_v f_v (dE H dE^T)_vv, written out token by token; soft caps by autograd."""
    fisher, moment, predictions, count = 0.0, 0.0, 0, 0
    for row in tokens:
        h, z, logits = seen(model, row[None])
        p = logits[:-1].detach().softmax(1)
        slope = torch.autograd.grad(logits[:-1].sum(), z)[0][0, :-1]
        if kind == "kl":
            spread = p * (1 - p)
        else:
            spread = (p - torch.nn.functional.one_hot(row[1:], VOCAB)).square()
        fisher = fisher + (spread * slope.square()).sum(0)
        moment = moment + h.detach().T @ h.detach()
        predictions += len(p)
        count += len(h)
    h = moment / count
    return 0.5 * float((fisher / predictions * ((miss @ h) * miss).sum(1)).sum())


def embedding_loss(model: Any, tokens: torch.Tensor, miss: torch.Tensor, f: torch.Tensor) -> float:
    """1/2 sum_v q_v sum_c f_c dE_vc^2 with the f that was measured."""
    q = torch.bincount(tokens.flatten(), minlength=VOCAB).double() / tokens.numel()
    q = (1 - PRIOR) * q + PRIOR / VOCAB
    return 0.5 * float((q * (miss.double().square() @ f)).sum())


@pytest.mark.parametrize("kind", ["kl", "loss"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2", "gemma2", "gptj"])
def test_losses_are_those_worked_out_by_hand(
    family: str, kind: str, analyse: Any, texts: dict[str, Path], tiny: Builder
) -> None:
    found = analyse(family, importance=kind)
    tokens = windows(found, texts, tiny(family))
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    last = len(found.layers) - 1
    loss = found.read(last, "sites.loss")
    f = found.read(last, f"fisher.{found.sites_of(last)[0].module}")[0]
    for i, site in enumerate(found.sites_of(last)):
        for j, name in enumerate(FORMATS):
            weight = model.get_parameter(site.path).detach()
            miss, expected = missed(family, weight, name), 0.0
            if site.kind == "head" or family in {"qwen2", "gemma2"}:
                expected += head_loss(model, tokens, miss, kind)
            if site.kind == "embedding":
                expected += embedding_loss(model, tokens, miss, f)
            assert float(loss[i, j, 0]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3", "gpt2"])
def test_the_embedding_minds_what_moves_the_distribution(
    family: str, analyse: Any, texts: dict[str, Path], tiny: Builder
) -> None:
    """f_c from one draw per token against many draws on the real model."""
    found = analyse(family)
    last = len(found.layers) - 1
    table = next(s for s in found.sites_of(last) if s.kind == "embedding")
    f = found.read(last, f"fisher.{table.module}")[0]
    tokens = windows(found, texts, tiny(family))
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    rows = model.get_input_embeddings()
    exact, predictions = 0.0, 0
    for row in tokens[:2]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            kept: list[torch.Tensor] = []
            hook = rows.register_forward_hook(lambda _m, _a, y, k=kept: k.append(y) or y)
            logits = model(row[None]).logits[0, :-1]
            hook.remove()
            p = logits.detach().softmax(1)
            e = torch.randn(p.shape, generator=generator)
            v = p.sqrt() * e - p * (p.sqrt() * e).sum(1, keepdim=True)
            (g,) = torch.autograd.grad((logits * v).sum(), kept[0])
            exact = exact + g[0].double().square().sum(0) / 40
        predictions += len(row) - 1
    scale = float(getattr(rows, "embed_scale", torch.ones(())))
    ratio = float(f.sum() / ((exact / predictions).sum() * scale**2))
    assert 0.6 < ratio < 1.6


def test_tensors_of_the_ends_have_the_shapes_documented(analyse: Any) -> None:
    found = analyse("mixtral", "books", "code", keep_hessians=True, method="gptq")
    last = len(found.layers) - 1
    assert found.blocks == last == 2 and len(found.sites_of(last)) == 2
    shapes = {name: tuple(found.read(last, name).shape) for name in found.names(last)}
    assert shapes["lookups"] == (2, VOCAB) and shapes["sites.error"] == (2, 2)
    assert shapes["sites.loss"] == (2, 2, 2) and shapes["inputs.0.hessian"] == (2, 64, 64)
    assert shapes["fisher.lm_head"] == (2, VOCAB)
    assert shapes["fisher.model.embed_tokens"] == (2, 64)
    assert found.layers[last]["inputs"] == [
        {"name": "lm_head", "readers": ["lm_head"], "width": 64}
    ]
    assert int(found.read(last, "lookups").sum()) == found.header["tokens"]
    predictor = Predictor(found)
    assert predictor.kinds == ("attention", "expert", "embedding", "head")
    plan = {site.name: "int6-g32" for site in found.sites if site.kind == "head"}
    row = predictor.sites.index(found.sites_of(last)[1])
    expected = predictor.losses[row, 1]
    assert list(predictor.predict(plan).raw.values()) == pytest.approx(list(expected))


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "gemma3"])
def test_probes_of_an_end_measure_the_model_with_that_end(
    family: str, analyse: Any, texts: dict[str, Path], tiny: Builder
) -> None:
    found = analyse(family, importance="probes")
    tokens = windows(found, texts, tiny(family))[-2:]  # that probes are measured on
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    dtype = AutoModelForCausalLM.from_pretrained(tiny(family)).dtype
    groups = [p for p in found.header["probes"] if p["group"]]
    sites = found.sites
    ends = [(i, s) for i, s in enumerate(sites) if s.layer == 2]
    assert len(groups) >= len(ends) and len(ends) == (2 if family == "mixtral" else 1)
    with torch.no_grad():
        base = [model(row[None]).logits[0, :-1].log_softmax(1) for row in tokens]
        for i, site in ends:
            (probe,) = [p for p in groups if p["plan"][i] is not None]
            assert sum(x is not None for x in probe["plan"]) == 1
            parameter = model.get_parameter(site.path)
            own, name = parameter.data.clone(), FORMATS[probe["plan"][i]]
            changed = own - missed(family, own, name)
            if site.kind == "embedding":  # looked up in the checkpoint's type
                parameter.copy_(changed.to(dtype).float())
            else:
                parameter.copy_(changed)
            kl = [
                mean_kl(b, model(row[None]).logits[0, :-1])
                for b, row in zip(base, tokens, strict=True)
            ]
            parameter.copy_(own)
            assert probe["measured"][0]["kl"] == pytest.approx(float(np.mean(kl)), rel=0.02)


def test_random_plans_have_the_widths_they_promise() -> None:
    def site(name: str, kind: str, size: int) -> Site:
        return Site(name, kind, 0, None, (size, 64), name, "weight")

    names = ("zero", "int8-g128", "int2-g128", "int4-g128", "int3-g128", "int6-g128")
    formats = [parse_format(name) for name in names]
    sites = [
        site("embed", "embedding", 50_000), site("head", "head", 50_000),
        *(site(f"a{i}", "attention", 64) for i in range(40)),
        *(site(f"e{i}", "expert", 64) for i in range(80)),
    ]  # fmt: skip
    plans = draw_plans(sites, formats, 32, seed=0)
    order = [2, 4, 3, 5, 1]
    assert all(number != 0 for plan in plans for number in plan.values())
    for end in ("embed", "head"):
        drawn = [order.index(plan[end]) for plan in plans if end in plan]
        assert len(drawn) == 16 and set(drawn) == set(range(5))
    for kind in "ae":
        means = sorted(
            np.mean([order.index(n) for name, n in plan.items() if name[:-1].rstrip("0123456789")
                     == kind]) for plan in plans
        )  # fmt: skip
        even = np.linspace(0, 4, 34)[1:-1]
        assert np.abs(np.array(means) - even).max() < 0.8
    blocks = [plan for plan in plans if "embed" not in plan]
    assert len(blocks) == 16 and all("head" not in plan for plan in blocks)
    assert draw_plans(sites, [parse_format("zero")], 4, seed=0) == []


def test_a_head_of_its_own_turns_no_router() -> None:
    rng = np.random.default_rng(0)
    raw = np.exp(rng.normal(-4, 1.5, (40, 2)))
    measured = 1.2 * raw[:, 0] + 0.8 * raw[:, 1] + 0.02 * np.sqrt(raw[:, 0])
    fit = fit_points(("expert", "head"), raw, measured, list(range(40)), moe=True)
    assert fit.error < 0.05
    assert fit.kl(np.array([0.0, 1e-6])) < 1e-5  # no root of the head's loss


def test_ends_of_two_parts_add_up(analyse: Any, tmp_path: Path) -> None:
    a, b = analyse("qwen2", "books"), analyse("qwen2", "code")
    merged = merge([a, b], tmp_path / "merged")
    both = merged.read(2, "lookups")
    assert torch.equal(both, torch.cat([a.read(2, "lookups"), b.read(2, "lookups")]))
    loss = torch.cat([a.read(2, "sites.loss"), b.read(2, "sites.loss")], dim=2)
    assert torch.allclose(merged.read(2, "sites.loss"), loss)


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
@pytest.mark.parametrize("hessian", ["full", "diagonal"])
def test_formats_added_later_score_the_ends_as_at_once(
    family: str, hessian: str, analyse: Any, tiny: Builder, texts: dict[str, Path], tmp_path: Path
) -> None:
    options = {"hessian": hessian, "keep_hessians": hessian == "full", "method": "gptq"}
    whole = analyse(family, **options)
    part = analyse(family, **options, formats=FORMATS[:1])
    added = api.analyze(
        tiny(family), tmp_path / "more", reuse=part.path, formats=FORMATS[1:], method="gptq",
        hessian=hessian,
    )  # fmt: skip
    for name in whole.names(2):
        assert torch.equal(whole.read(2, name), added.read(2, name)), name


def test_reports_call_them_the_ends(analyse: Any) -> None:
    analysis = summarise(analyse("mixtral", probes=4))
    assert analysis["blocks"] == 2
    page = render(analysis)
    assert "layer 2" not in page and "ends" in page


@pytest.mark.parametrize("units", [1, 2, 3])
def test_a_killed_analysis_resumes_with_its_ends(
    units: int, analyse: Any, tiny: Builder, texts: dict[str, Path], tmp_path: Path
) -> None:
    whole = analyse("qwen2", probes=4)

    class Stop:
        left, on = units, False

        def phase(self, name: str, total: int) -> None:
            self.on = name == "analyzing" or (self.on and name.startswith("measuring"))

        def step(self, amount: int = 1, note: str = "") -> None:
            self.left -= self.on
            if not self.left:
                raise KeyboardInterrupt

    options: dict[str, Any] = {
        **SIZES, "formats": FORMATS, "probes": 4, "method": "rtn",
        "data": [f"books={texts['books']}"],
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        api.analyze(tiny("qwen2"), tmp_path / "out", progress=Stop(), **options)
    again = api.analyze(tiny("qwen2"), tmp_path / "out", **options)
    assert again.header["probes"] == whole.header["probes"]
    for layer in range(3):
        name = whole.layers[layer]["file"]
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()

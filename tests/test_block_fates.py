"""Whole blocks that the allocator may leave out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitnest import api
from bitnest.api.planning import open_planner
from bitnest.api.texts import calibration_set, sources
from bitnest.calibrate.block_losses import loss_of, measured_blocks
from bitnest.calibrate.predict import Predictor
from bitnest.errors import RecipeError, StatisticsError
from bitnest.formats import parse_format
from bitnest.packed.decoded import open_checkpoint
from bitnest.plan import Plan
from bitnest.prune.block_fates import least
from bitnest.quantize.allocation.budget import Budget
from bitnest.quantize.compress import Job, prepare
from bitnest.quantize.fates import read_fates
from bitnest.recipe import Recipe
from bitnest.statistics import Statistics
from tests.tiny import FAMILIES, Builder, build

FORMATS = ["int2-g32", "int4-g32"]
BLOCKS, SILENT = 4, 2
MEASURE: dict[str, Any] = {
    "samples": 8, "length": 32, "probes": 4, "probe_windows": 2, "fisher_windows": 4,
}  # fmt: skip
MAKE: dict[str, Any] = {"samples": 4, "length": 32}


@pytest.fixture(scope="module")
def model(tiny: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, one of which adds nothing to what it reads."""
    out = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny("llama"), out)
    made = build(FAMILIES["llama"], num_hidden_layers=BLOCKS)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value.mul_(0.0 if f"layers.{SILENT}." in name else 1.0)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    made.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def statistics(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "statistics"
    api.analyze(model, out, data=[str(text)], formats=[*FORMATS, "drop"], **MEASURE)
    return out


def job_of(model: Path) -> Job:
    return prepare(open_checkpoint(model), Recipe(format="dense"))


def dropped(model: Path, plan: Plan) -> tuple[int, ...]:
    sites = job_of(model).sites
    formats = {name: parse_format(fmt) for name, fmt in plan.formats(sites).items()}
    return read_fates(sites, formats).dropped


def test_the_least_are_tried_but_never_an_end() -> None:
    assert least({0: 0.0, 1: 0.5, 2: 0.1, 3: 0.3, 4: 0.2, 5: 0.0}) == [2, 3, 4]
    assert least({0: 0.1, 1: 0.2}) == []


def test_analysis_measures_the_model_without_blocks(model: Path, statistics: Path) -> None:
    found = Statistics.open(statistics).header["fates"]
    assert found["kinds"] == ["drop"] and found["layers"] == []
    blocks = {item["layer"]: item for item in found["blocks"]}
    assert sorted(blocks) == list(range(BLOCKS))
    assert blocks[0]["kl"] is None and blocks[BLOCKS - 1]["kl"] is None
    assert blocks[SILENT]["influence"] == pytest.approx(0, abs=1e-4)
    assert blocks[SILENT]["kl"] == [0.0]
    assert blocks[1]["influence"] > 1e-3 and blocks[1]["kl"][0] > 1e-4


def test_the_measured_kl_is_that_of_the_model_without_the_block(
    model: Path, statistics: Path, text: Path, tmp_path: Path
) -> None:
    api.compress(model, tmp_path / "a", format="dense", method="rtn",
                 rules=["model.layers.1.*=drop"])  # fmt: skip
    source, made = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (model, tmp_path / "a")
    )
    tokens = calibration_set(api.load_tokenizer(model), sources([str(text)]), 8, 32, 0).tokens[-16:]
    with torch.no_grad():
        p, q = (m(tokens).logits[:, :-1].log_softmax(-1) for m in (source, made))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    found = measured_blocks(Statistics.open(statistics))[1]
    assert found[0] == pytest.approx(kl, rel=0.05)


def test_a_plan_that_drops_a_block_alone_is_predicted_to_lose_what_was_measured(
    statistics: Path,
) -> None:
    opened = Statistics.open(statistics)
    predictor, measured = Predictor(opened), measured_blocks(opened)
    for block, kl in measured.items():
        plan = dict.fromkeys(predictor.block_sites(block), "drop")
        found = predictor.predict(plan).kl
        assert list(found.values()) == pytest.approx(kl.tolist(), rel=1e-6, abs=1e-12)
    part = dict.fromkeys(predictor.block_sites(1)[1:], "drop")
    assert predictor.predict(part).mean > 0  # by its matrices, as before


def test_losses_are_found_for_any_kl() -> None:
    kl = np.array([0.0, 1e-6, 0.3, 9.0])
    losses = loss_of(kl, lambda s: 1.3 * s + 0.2 * np.sqrt(s))
    assert losses[0] == 0
    assert 1.3 * losses + 0.2 * np.sqrt(losses) == pytest.approx(kl, rel=1e-9)


def test_a_silent_block_is_dropped_and_nothing_is_lost(
    model: Path, statistics: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"statistics": statistics, "ends": False}
    plain = api.plan(model, candidates=FORMATS, bits=2.5, **options)
    assert dropped(model, plain.plan) == ()
    found = api.plan(model, candidates=[*FORMATS, "drop"], bits=2.5, **options)
    assert dropped(model, found.plan) == (SILENT,)
    assert found.mean < plain.mean and found.bits <= 2.5
    tight = plain.sizes.total - 12000  # no plan with all blocks is as small
    with pytest.raises(RecipeError, match="no plan fits"):
        api.plan(model, candidates=FORMATS[:1], size=tight, **options)
    for dial in ({"size": tight}, {"kl": 1.5 * found.mean}):
        other = api.plan(model, candidates=[*FORMATS, "drop"], **dial, **options)
        assert dropped(model, other.plan) == (SILENT,)
    result = api.compress(model, tmp_path / "a", plan=found.plan, statistics=statistics, **MAKE)
    assert result.predicted is not None
    assert result.predicted["mean"] == pytest.approx(found.mean, rel=1e-4)
    assert result.artifact_bytes <= found.sizes.artifact
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert len(loaded.model.layers) == BLOCKS - 1
    found.plan.write(tmp_path / "plan.yaml")
    checked = api.check_plan(model, Plan.read(tmp_path / "plan.yaml"), statistics=statistics)
    assert checked.mean == pytest.approx(found.mean, rel=1e-6)
    assert checked.sizes.packed == found.sizes.packed


def test_all_weights_as_they_are_without_the_silent_block_lose_nothing(
    model: Path, tmp_path: Path
) -> None:
    api.compress(model, tmp_path / "a", format="dense", method="rtn",
                 rules=[f"model.layers.{SILENT}.*=drop"])  # fmt: skip
    tokens = torch.arange(60)[None] % 50 * 6
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (model, tmp_path / "a")
        )
    assert torch.equal(one, other)


def test_blocks_that_cost_more_than_a_plan_stay(model: Path, statistics: Path) -> None:
    options: dict[str, Any] = {"statistics": statistics, "ends": False, "bits": 4.0}
    rule = [f"model.layers.{SILENT}.mlp.*=int4-g32"]  # speaks of the silent block, which stays
    plain = api.plan(model, candidates=FORMATS, rules=rule, **options)
    found = api.plan(model, candidates=[*FORMATS, "drop"], rules=rule, **options)
    assert dropped(model, found.plan) == () and found.mean == plain.mean
    for policy in ("uniform", "handmade"):
        other = api.plan(model, policy=policy, **options)
        assert dropped(model, other.plan) == ()


def test_engines_load_a_model_of_fewer_blocks(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "statistics"
    api.analyze(model, out, data=[str(text)], formats=["int4-g32", "int8-g32", "drop"], **MEASURE)
    options: dict[str, Any] = {"statistics": out, "bits": 13.0, "target": "vllm-cpu"}
    found = api.plan(model, candidates=["int4-g32", "int8-g32", "drop"], **options)
    assert dropped(model, found.plan) == (SILENT,)
    plain = api.plan(model, candidates=["int4-g32", "int8-g32"], **options)
    assert dropped(model, plain.plan) == () and found.mean < plain.mean


def test_explanations_name_the_block_s_fate(model: Path, statistics: Path) -> None:
    from bitnest.quantize.allocation.explain import explain

    planner = open_planner(model, statistics, candidates=[*FORMATS, "drop"], ends=False)
    found = planner.plan(Budget(bits=2.5))
    shown = explain(found, f"model.layers.{SILENT}.*")
    assert len(shown) == 7
    for item in shown:
        assert [(line.format, line.mark, line.nbytes) for line in item.lines] == [
            ("drop", "chosen", 0)
        ]


def test_damaged_figures_of_blocks_are_refused(statistics: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(statistics, copy)
    header = json.loads((copy / "statistics.json").read_text())
    whole = header["fates"]["blocks"]
    for damage in ({"kl": [0.1, 0.2]}, {"kl": [None]}, {"layer": 9}, {"influence": "a"}):
        blocks = [*whole[:1], {**whole[1], **damage}]
        damaged = {**header, "fates": {**header["fates"], "blocks": blocks}}
        (copy / "statistics.json").write_text(json.dumps(damaged))
        with pytest.raises(StatisticsError, match="header is damaged"):
            Statistics.open(copy)
    earlier = {k: v for k, v in header["fates"].items() if k != "blocks"}
    (copy / "statistics.json").write_text(json.dumps({**header, "fates": earlier}))
    assert measured_blocks(Statistics.open(copy)) == {}


def test_a_killed_analysis_keeps_what_it_measured_of_blocks(
    model: Path, text: Path, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop:
        on = False

        def phase(self, name: str, total: int) -> None:
            self.on = name == "analyzing"

        def step(self, amount: int = 1, note: str = "") -> None:
            if self.on:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"data": [str(text)], "formats": [*FORMATS, "drop"], **MEASURE}
    with pytest.raises(KeyboardInterrupt):
        api.analyze(model, tmp_path / "an", progress=Stop(), **options)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured twice")

    monkeypatch.setattr("bitnest.prune.block_fates.measure_blocks", again)
    done = api.analyze(model, tmp_path / "an", **options)
    assert done.header["fates"] == Statistics.open(statistics).header["fates"]

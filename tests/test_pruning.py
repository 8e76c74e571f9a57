"""Asking for sparsity: recipe, command line, manifest, statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bitnest import api
from bitnest.artifact import Artifact, site_tensors
from bitnest.cli import app
from bitnest.errors import ArtifactError, FormatError, PlanError, RecipeError, StatisticsError
from bitnest.formats import SparseFormat, parse_format
from bitnest.formats.names import sparse_name
from bitnest.plan import Plan
from bitnest.quantize import advice
from bitnest.quantize.advice import MATRICES, ROWS, Witness
from bitnest.quantize.solve import Options, solve
from bitnest.recipe import Recipe, default_format
from bitnest.recipe_file import parse_recipe
from bitnest.sites import Site
from tests.tiny import Builder

SMALL: dict[str, Any] = {"samples": 4, "length": 32}


@pytest.mark.parametrize(
    "name, sparsity, found",
    [("int4-g128", "50%", "int4-g128%50"), ("int4-g128", "50", "int4-g128%50"),
     ("dense", "2:4", "dense%2:4"), ("int4-g32@had16+lorc4", " 4:8", "int4-g32%4:8@had16+lorc4")],
)  # fmt: skip
def test_a_sparsity_goes_behind_the_codes(name: str, sparsity: str, found: str) -> None:
    assert sparse_name(name, sparsity) == found


@pytest.mark.parametrize(
    "name, sparsity",
    [("int4-g128%50", "50%"), ("int4-g128", "0%"), ("int4-g128", "0.5"), ("int4-g128", "%50"),
     ("int4-g128", "50%@had16"), ("int4-g128", ""), ("zero", "50%"), ("nest24-g32", "2:4")],
)  # fmt: skip
def test_no_sparsity_is_guessed(name: str, sparsity: str) -> None:
    with pytest.raises(FormatError):
        sparse_name(name, sparsity)


def test_sparsity_alone_is_of_16_bit_weights() -> None:
    assert default_format(None, None, None, "50%") == "dense%50"
    assert default_format(None, None, 64, "2:4") == "int4-g64%2:4"


def test_the_recipe_names_the_method_only_where_it_is_another() -> None:
    assert "prune" not in Recipe().to_json()  # runs of earlier versions resume
    assert Recipe(prune="wanda").to_json()["prune"] == "wanda"
    with pytest.raises(RecipeError, match="pruning"):
        Recipe(prune="obs")


def test_a_recipe_file_says_how_to_prune() -> None:
    found = parse_recipe("format: int4-g128%2:4\nfit: {prune: wanda}\n")
    assert (found["format"], found["prune"]) == ("int4-g128%2:4", "wanda")
    with pytest.raises(PlanError, match="recipe:1"):
        parse_recipe("fit: {prune: obs}\n")


def codes(path: Path) -> torch.Tensor:
    found = Artifact.open(path)
    headers = found.headers({r.site.name: parse_format(r.format) for r in found.packed()})
    record = found.packed()[0]
    return site_tensors(record, headers, parse_format(record.format))["mask"]


def test_the_command_line_prunes_as_it_is_told(tiny: Builder, text: Path, tmp_path: Path) -> None:
    masks = []
    for prune in ("sparsegpt", "magnitude"):
        done = CliRunner().invoke(
            app,
            ["compress", str(tiny("llama")), "-o", str(tmp_path / prune), "--format", "int4-g32",
             "--sparsity", "50%", "--prune", prune, "--data", str(text), "--samples", "4",
             "--length", "32", "-q"],
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        manifest = Artifact.open(tmp_path / prune).manifest
        assert manifest["resolved"]["format"] == "int4-g32%50"
        assert manifest["resolved"]["fit"]["prune"] == prune
        masks.append(codes(tmp_path / prune))
    assert not torch.equal(*masks)


def test_a_plan_says_how_its_losses_were_measured(
    tiny: Builder, text: Path, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"data": [str(text)], **SMALL}
    statistics = api.analyze(
        tiny("llama"), tmp_path / "st", formats=["int4-g32%2:4"], prune="wanda", probes=0,
        fisher_windows=2, **small,
    ).path  # fmt: skip
    found = api.plan(tiny("llama"), statistics=statistics, size=10**7).plan
    tight = api.plan(tiny("llama"), statistics=statistics, bits=3.0).plan
    assert found.prune == "" and tight.prune == "wanda"
    tight.write(tmp_path / "plan.yaml")
    assert Plan.read(tmp_path / "plan.yaml") == tight
    with pytest.raises(RecipeError, match="wanda"):
        api.compress(tiny("llama"), tmp_path / "out", plan=tmp_path / "plan.yaml", **small)
    assert not (tmp_path / "out").exists()
    api.compress(
        tiny("llama"), tmp_path / "out", plan=tmp_path / "plan.yaml", prune="wanda", **small
    )


def test_another_method_is_another_artifact(tiny: Builder, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "dense%2:4", "data": [str(text)], **SMALL}
    api.compress(tiny("llama"), tmp_path / "out", prune="wanda", **options)
    api.compress(tiny("llama"), tmp_path / "out", prune="wanda", **options)
    with pytest.raises(ArtifactError):
        api.compress(tiny("llama"), tmp_path / "out", **options)


@pytest.mark.parametrize(
    "options",
    [["--bits", "3", "--sparsity", "50%"], ["--size", "1MiB", "--sparsity", "2:4"],
     ["--format", "int4-g32%50", "--sparsity", "50%"], ["--nested", "2-4", "--sparsity", "2:4"],
     ["--format", "int4-g32", "--prune", "wanda"], ["--format", "int4-g32%50", "--prune", "obs"]],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    options: list[str], tiny: Builder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compress", str(tiny("llama")), "-o", str(out), *options])
    assert isinstance(done.exception, RecipeError | FormatError)
    assert done.exception.hint and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_losses_of_another_method_predict_nothing(
    tiny: Builder, text: Path, tmp_path: Path
) -> None:
    api.analyze(
        tiny("llama"), tmp_path / "an", data=[str(text)], formats=["int4-g32%2:4", "int4-g32"],
        prune="wanda", probes=0, fisher_windows=2, samples=4, length=24,
    )  # fmt: skip
    options: dict[str, Any] = {"statistics": tmp_path / "an", "data": [str(text)], **SMALL}
    with pytest.raises(StatisticsError, match="--prune wanda"):
        api.compress(tiny("llama"), tmp_path / "a", bits=4, **options)
    with pytest.raises(StatisticsError, match="--prune wanda"):
        api.compress(tiny("llama"), tmp_path / "a", format="int4-g32%2:4", **options)
    api.compress(tiny("llama"), tmp_path / "b", format="int4-g32", **options)
    api.compress(tiny("llama"), tmp_path / "d", bits=4, candidates=["int4-g32"], **options)
    done = api.compress(tiny("llama"), tmp_path / "c", bits=4, prune="wanda", **options)
    assert done.predicted is not None
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["an", "b", "c", "d"]


# ---------------------------------------------------------------- advice


def test_integers_that_do_better_are_named_with_what_was_measured(
    tiny: Builder, text: Path, tmp_path: Path
) -> None:
    """The figures are those of an artifact made in that format; block 0's inputs are the same."""
    options: dict[str, Any] = {"data": [str(text)], **SMALL}
    done = api.compress(tiny("llama"), tmp_path / "a", format="int4-g32%2:4", **options)
    (said,) = done.advice
    assert (said["asked"], said["other"], said["layer"]) == ("int4-g32%2:4", "int3-g32", 0)
    api.compress(tiny("llama"), tmp_path / "b", format="int3-g32", **options)
    for name, key in (("a", "error"), ("b", "other_error")):
        first = [r for r in Artifact.open(tmp_path / name).packed() if r.site.layer == 0]
        errors = [r.error for r in first if r.site.shape[0] <= ROWS][:MATRICES]
        assert len(errors) == said["matrices"] == MATRICES
        assert said[key] == pytest.approx(sum(errors) / MATRICES, rel=1e-3)
    assert said["other_nbytes"] == sum(r.nbytes for r in Artifact.open(tmp_path / "b").packed())
    assert said["nbytes"] >= said["other_nbytes"] and said["error"] > 1.05 * said["other_error"]


def test_advice_changes_no_byte(
    tiny: Builder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"format": "int4-g32%50", "data": [str(text)], **SMALL}
    made = [api.compress(tiny("mixtral"), tmp_path / "a", **options)]
    monkeypatch.setattr(advice, "MATRICES", 0)
    made.append(api.compress(tiny("mixtral"), tmp_path / "b", **options))
    assert made[0].advice and not made[1].advice
    one, two = (Artifact.open(m.path).manifest["files"] for m in made)
    assert one == two


def site(name: str, shape: tuple[int, int]) -> Site:
    return Site(name, "mlp", 0, None, shape, name, "weight")


@pytest.mark.parametrize("zeros, wins", [(True, True), (False, False)])
def test_nothing_is_said_where_sparsity_wins(zeros: bool, wins: bool) -> None:
    """Half of the weights are zero already: dropping them costs nothing, eight bits cost more."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 128, generator=g).bfloat16().float()
    if zeros:
        w[:, ::2] = 0
    h = torch.eye(128)
    fmt = parse_format("dense%50")
    assert isinstance(fmt, SparseFormat)
    places = [site(f"model.layers.0.mlp.{n}", (64, 128)) for n in ("up", "down")]
    witness = Witness(places, dict.fromkeys([p.name for p in places], fmt), Options())
    for place in places:
        found = solve(w[None], h[None], fmt, Options())
        energy = (w @ h * w).sum(1)
        witness.see(place, fmt, w, h, found.error[0], energy)
    said = witness.found()
    assert bool(said) is not wins
    if said:
        assert said[0].other == "int8-g128" and "--format int8-g128" in said[0].text


def test_formats_that_are_told_nothing_of() -> None:
    """No integers are as small as a quarter of the blocks of two bits; a residual's rows hang
    together."""
    for name in ("int2-g128%b16x16-25", "int4-g128%50+lorc4", "int4-g128", "zero"):
        place = site("model.layers.0.mlp.up", (256, 256))
        assert Witness([place], {place.name: parse_format(name)}, Options()).layer == -1


def test_the_command_line_says_it_once(tiny: Builder, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["compress", str(tiny("llama")), "-o", str(tmp_path / "a"), "--method", "rtn",
              "--format", "int4-g32", "--sparsity", "50%", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0
    assert done.stderr.count("note: int3-g32 takes") == 1
    assert len(json.loads(done.stdout)["advice"]) == 1


class Broken(Exception):
    """The run was cut."""


class Cut:
    """A progress that ends the run after its first block."""

    def __init__(self) -> None:
        self.compressing = False

    def phase(self, name: str, total: int) -> None:
        self.compressing = name == "compressing"

    def step(self, amount: int = 1, note: str = "") -> None:
        if self.compressing:
            raise Broken

    def pause(self) -> None:
        """Nothing is shown."""


@pytest.mark.parametrize("name", ["int4-g32%b16x16-50", "dense%2:4"])
def test_a_cut_run_resumes_to_the_same_bytes_and_says_nothing_twice(
    name: str, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"format": name, "data": [str(text)], "prune": "wanda", **SMALL}
    whole = api.compress(tiny("mixtral"), tmp_path / "a", **options)
    said: list[advice.Advice] = []
    with pytest.raises(Broken):
        api.compress(tiny("mixtral"), tmp_path / "b", progress=Cut(), advise=said.append, **options)
    assert not (tmp_path / "b").exists()
    again = api.compress(tiny("mixtral"), tmp_path / "b", advise=said.append, **options)
    one, two = (Artifact.open(m.path).manifest["files"] for m in (whole, again))
    assert one == two
    assert [a.to_json() for a in said] == list(whole.advice) and len(said) == 1

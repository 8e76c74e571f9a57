"""bitnest analyze from end to end: kills and resumption, families, bad input, and what reads it.

Kills are real: a child made by forking dies by SIGKILL at a chosen call, so that nothing is tidied.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.calibrate import analyze as engine
from bitnest.calibrate.predict import Predictor
from bitnest.calibrate.probes import Probes
from bitnest.cli import main
from bitnest.errors import ArtifactError, BitnestError, StatisticsError
from bitnest.quantize.memory import resident_bytes
from bitnest.statistics import Statistics, StatisticsWriter
from bitnest.workdir import partial_directory
from tests.tiny import FAMILIES, Builder, words

FORMATS = ("int2-g32", "int4-g32")
OPTIONS: dict[str, Any] = {
    "samples": 8, "length": 32, "formats": FORMATS, "probes": 2, "probe_windows": 1,
    "fisher_windows": 2,
}  # fmt: skip
SHORT = [
    *("--samples", "8", "--length", "32", "--probes", "2", "--probe-windows", "1"),
    *("--fisher-windows", "2", "--format", "int2-g32", "--format", "int4-g32"),
]
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3")
fork = multiprocessing.get_context("fork")

Command = Callable[..., tuple[int, str, str]]


class Watch:
    """A progress that remembers stages and resumed blocks."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.resumed = 0

    def phase(self, name: str, total: int) -> None:
        self.phases.append(name)

    def step(self, amount: int = 1, note: str = "") -> None:
        self.resumed += note == "resumed"


class Kit:
    """Models, texts, and statistics made once for the same options."""

    def __init__(self, tiny: Builder, text: Path, root: Path) -> None:
        self.tiny, self.text, self.root = tiny, text, root
        (root / "code.txt").write_text(words(1500, seed=5), encoding="utf-8")
        self.data = [f"books={text}", f"code={root / 'code.txt'}"]
        self.three = tiny("mixtral", "three", num_hidden_layers=3)
        self.made: dict[str, Statistics] = {}

    def __call__(self, family: str = "mixtral", **options: Any) -> Statistics:
        key = "-".join([family, *(f"{k}={v}" for k, v in options.items())])
        if key not in self.made:
            self.made[key] = self.run(self.root / key, self.tiny(family), **options)
        return self.made[key]

    def run(self, out: Path, model: Path | None = None, **options: Any) -> Statistics:
        """Of the model of three blocks, not remembered."""
        return api.analyze(model or self.three, out, **{**OPTIONS, "data": self.data, **options})


@pytest.fixture(scope="module")
def kit(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tiny, text, tmp_path_factory.mktemp("kit"))


def tensors(statistics: Statistics) -> dict[str, torch.Tensor]:
    return {
        f"{layer}/{name}": statistics.read(layer, name)
        for layer in range(len(statistics.layers))
        for name in statistics.names(layer)
    }


def differing(a: Statistics, b: Statistics) -> set[str]:
    """Names of tensors that are not the same to the bit."""
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    return {k.partition("/")[2] for k in ours if not torch.equal(ours[k], theirs[k])}


def load(statistics: Statistics) -> dict[str, Any]:
    """report.json, which holds neither NaN nor infinity."""
    content = (statistics.path / "report.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(content, parse_constant=pytest.fail)
    return found


def listing(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns if p.is_file() else 0 for p in root.rglob("*")
            if p.name != "lock"}  # fmt: skip


def flip(file: Path) -> None:
    """Change one bit near the end."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def changed(model: Path, copy: Path) -> Path:
    """A copy with another weight in it."""
    shutil.copytree(model, copy)
    flip(sorted(copy.glob("*.safetensors"))[-1])
    return copy


@pytest.fixture(scope="module")
def whole(kit: Kit) -> Statistics:
    """Of a run that nothing disturbed."""
    return kit.run(kit.root / "whole")


def killed(work: Callable[[], object], holder: Any, name: str, calls: int) -> None:
    """Do `work` in a child that dies at the call of holder.name that follows `calls` others."""

    def child() -> None:
        original, left = getattr(holder, name), iter(range(calls))

        def deadly(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(holder, name, deadly)
        work()

    process = fork.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def same_run(found: Statistics, whole: Statistics) -> None:
    """The same header, with checksums of all blocks, and report, but for times."""
    assert sorted(os.listdir(found.path)) == sorted(os.listdir(whole.path))
    assert found.header | {"seconds": 0} == whole.header | {"seconds": 0}
    assert load(found) | {"seconds": 0} == load(whole) | {"seconds": 0}
    found.verify()


@pytest.mark.parametrize(
    ("holder", "name", "calls", "gradients", "blocks"),
    [
        pytest.param(engine, "measure_fisher", 0, False, 0, id="before gradients"),
        pytest.param(engine, "block_tensors", 0, True, 0, id="gradients only"),
        pytest.param(os, "replace", 2, True, 0, id="ends half written"),
        pytest.param(os, "replace", 3, True, 0, id="ends without their record"),
        pytest.param(os, "replace", 4, True, 0, id="ends without what probes need"),
        pytest.param(os, "replace", 6, True, 0, id="first block half written"),
        pytest.param(os, "replace", 7, True, 0, id="first block without its record"),
        pytest.param(StatisticsWriter, "write_block", 1, True, 0, id="the ends"),
        pytest.param(StatisticsWriter, "write_block", 2, True, 1, id="one block"),
        pytest.param(engine, "block_tensors", 2, True, 2, id="two blocks"),
        pytest.param(Probes, "measure", 0, True, 3, id="all blocks"),
        pytest.param(StatisticsWriter, "publish", 0, True, 3, id="before the renaming"),
        pytest.param(shutil, "rmtree", 0, True, 0, id="after the renaming"),
        pytest.param(api, "write_report", 0, True, 0, id="before the report"),
    ],
)  # fmt: skip
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(
    holder: Any, name: str, calls: int, gradients: bool, blocks: int,
    kit: Kit, whole: Statistics, tmp_path: Path,
) -> None:  # fmt: skip
    out, watch = tmp_path / "out", Watch()
    killed(lambda: kit.run(out), holder, name, calls)
    assert not (out / "report.json").exists()
    if not out.exists() and name != "publish":  # there only the name is missing
        with pytest.raises(StatisticsError, match="no statistics"):
            Statistics.open(partial_directory(out) / "artifact")
    same_run(kit.run(out, progress=watch), whole)
    assert ("importance by gradients" not in watch.phases) == gradients
    assert watch.resumed == blocks
    assert os.listdir(tmp_path) == ["out"]


class Stop(Watch):
    """An interrupt after the first block."""

    def step(self, amount: int = 1, note: str = "") -> None:
        if self.phases[-1] == "analyzing":
            raise KeyboardInterrupt


@pytest.mark.parametrize("importance", ["kl", "probes", "none"])
def test_an_interrupt_keeps_finished_blocks(importance: str, kit: Kit, tmp_path: Path) -> None:
    run, watch = partial(kit.run, importance=importance, keep_hessians=True), Watch()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", progress=Stop())
    same_run(run(tmp_path / "out", progress=watch), run(tmp_path / "whole"))
    assert watch.resumed == 1


def test_the_same_command_on_finished_statistics_measures_nothing(
    kit: Kit, whole: Statistics
) -> None:
    before, watch = listing(whole.path), Watch()
    again = kit.run(whole.path, progress=watch)
    assert again.header == whole.header and watch.phases == ["checking weights"]
    written = {p.name for p, time in listing(whole.path).items() if before[p] != time}
    assert written <= {"report.json", "report.html"}


@pytest.fixture(scope="module")
def begun(kit: Kit) -> Path:
    """What a run killed after the ends and its first block left."""
    out = kit.root / "partial"
    killed(lambda: kit.run(out), StatisticsWriter, "write_block", 2)
    return partial_directory(out)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "calibration, seed"),
    ({"samples": 6}, "calibration, labels"),
    ({"formats": ("int4-g32",)}, "options"),
    ({"importance": "loss"}, "options"),
    ({"hessian": "diagonal"}, "options"),
    ({"min_tokens": 7}, "options"),
    ({"memory": 8 << 30}, "memory"),
    ({"data": "other labels"}, "labels"),
    ({"model": "other weights"}, "source"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[str(c) for c, _ in CHANGES])
def test_other_inputs_do_not_resume_and_are_named(
    change: dict[str, Any], named: str, kit: Kit, begun: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(begun, partial_directory(out))
    special: dict[str, dict[str, Any]] = {
        "labels": {"data": [item.replace("books=", "novels=") for item in kit.data]},
        "source": {"model": changed(kit.three, tmp_path / "model")},
    }
    before = listing(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        kit.run(out, **special.get(named, change))
    assert caught.value.what.endswith(f"different: {named}") and "--fresh" in caught.value.hint
    assert listing(tmp_path) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_damaged_block_is_measured_again(
    fresh: bool, kit: Kit, whole: Statistics, begun: Path, tmp_path: Path
) -> None:
    out, watch = tmp_path / "out", Watch()
    flip(shutil.copytree(begun, partial_directory(out)) / "artifact" / "block-00001.safetensors")
    same_run(kit.run(out, fresh=fresh, progress=watch), whole)
    assert watch.resumed == 0
    assert ("importance by gradients" in watch.phases) == fresh


@pytest.mark.parametrize("importance", ["kl", "loss", "probes", "none"])
@pytest.mark.parametrize("family", [*MIXTURES, "llama", "gpt2"])
def test_every_family_gives_whole_statistics_and_a_report(
    family: str, importance: str, kit: Kit
) -> None:
    found = kit(family, importance=importance)
    for name, tensor in tensors(found).items():
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
    report = load(found)
    layers = [layer for layer in found.layers if layer["experts"]]
    assert [layer["layer"] for layer in report["layers"]] == [layer["layer"] for layer in layers]
    assert bool(layers) == (family in MIXTURES)
    for layer, section in zip(layers, report["layers"], strict=True):
        tokens = 4 * 32 * layer["experts"][0]["top_k"]
        assert [sum(own) for own in section["tokens"]] == [tokens, tokens]
        trace = found.read(layer["layer"], "experts.0.trace")
        counts = [torch.bincount(part.flatten().long(), minlength=4) for part in trace.chunk(2)]
        assert torch.stack(counts).tolist() == section["tokens"]
    assert found.has(0, "sites.loss") == (importance in {"kl", "loss"})
    assert (report["prediction"] is None) == (importance == "none")
    random = [probe for probe in found.header["probes"] if not probe["group"]]
    assert len(random) == (0 if importance == "none" else 2)
    for probe in found.header["probes"]:
        assert [(m["label"], m["kl"] >= 0) for m in probe["measured"]] == [(0, True), (1, True)]
    html = (found.path / "report.html").read_text("utf-8")
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|(src|href)=[\"']?//", html)


def test_diagonals_change_nothing_but_what_is_solved(kit: Kit) -> None:
    full, diagonal = kit(), kit(hessian="diagonal")
    assert (full.header["hessian"], full.header["method"]) == ("full", "gptq")
    assert (diagonal.header["hessian"], diagonal.header["method"]) == ("diagonal", "rtn")
    names = {name for name in differing(full, diagonal) if not name.startswith("sites.")}
    assert names <= {"experts.0.weight", "experts.0.fitted"}  # of full Hessians
    assert {"sites.error", "sites.loss"} <= differing(full, diagonal)


def test_little_memory_counts_the_same(kit: Kit) -> None:
    plain, tight = tensors(kit()), tensors(kit(memory=resident_bytes() + (64 << 20)))
    assert plain.keys() == tight.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(tight[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("limit", "hessian", "kept"),
    [(70_000, "auto", "full"), (20_000, "auto", "diagonal"), (20_000, "full", "full")],
)
def test_hessians_that_do_not_fit_are_summed_in_passes_or_left_out(
    limit: int, hessian: str, kept: str, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.tiny("mixtral")
    expected = kit(hessian="diagonal") if kept == "diagonal" else kit()
    monkeypatch.setattr(engine, "HESSIAN_BYTES", limit)  # a layer has 364 kB
    found = kit.run(tmp_path / "out", model, hessian=hessian)
    assert found.header["hessian"] == kept and not differing(found, expected)
    if kept == "diagonal":
        with pytest.raises(BitnestError, match="memory does not allow") as caught:
            kit.run(tmp_path / "kept", model, keep_hessians=True)
        assert "--hessian full" in caught.value.hint and os.listdir(tmp_path) == ["out"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command in this process: status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitnest", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


MADE: dict[str, dict[str, Any]] = {
    "STATS": {}, "KEPT": {"keep_hessians": True}, "USAGE": {"importance": "none", "formats": ()}
}  # fmt: skip
REUSE, COMPRESS = "reuse mixtral --reuse", "compress mixtral --statistics STATS --format"
REFUSED = {
    "analyze nowhere": "no such model directory",
    "analyze mixtral --format int99": "unknown format 'int99'",
    "analyze mixtral --importance size": "unknown importance 'size'",
    "analyze mixtral --hessian diagonal --keep-hessians": "diagonal",
    "analyze mixtral --hessian full --memory 1MB": "is too little",
    "analyze mixtral --length 1000": "context of 128",
    "analyze mixtral --data empty.txt": "the text is empty",
    "analyze mixtral --data missing.txt": "no such text",
    "analyze mixtral --data cover=more.txt": "label 'cover'",
    "analyze mixtral --data books=TEXT": "copy of one in an earlier source",
    "analyze mixtral --cover some": "unknown way to cover experts 'some'",
    "analyze llama --cover data": "no routed experts",
    "analyze mixtral -o precious": "in the way: it exists",
    "analyze mixtral -o precious/kept.txt/below": "cannot write",
    "analyze mixtral --probes -1": "'--probes'",
    "analyze mixtral --min-tokens 0": "'--min-tokens'",
    "analyze mixtral --cover-limit 0": "'--cover-limit'",
    f"{REUSE} STATS --format nvfp4": "did not keep their Hessians",
    f"{REUSE} KEPT --format int4-g32": "'int4-g32' is a candidate already",
    f"{REUSE} KEPT": "everything but formats",
    f"{REUSE} KEPT --format nvfp4 --data more.txt": "everything but formats",
    f"{REUSE} KEPT --format nvfp4 -o KEPT": "in the way",
    f"{REUSE} USAGE --format nvfp4": "usage only",
    "reuse qwen3_moe --reuse KEPT --format nvfp4": "of another model",
    "compress changed --statistics STATS --format int4-g32": "of another model",
    "compress llama --statistics STATS --format int4-g32": "another model|not measured",
    f"{COMPRESS} int3-g32": "'int3-g32' is no candidate",
    f"{COMPRESS} int4-g32 --rule kind:expert=nvfp4": "measured: int2-g32, int4-g32",
    f"{COMPRESS} int4-g32 --method rtn": "measured with --method gptq, not rtn",
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=REFUSED)
def test_bad_input_is_one_error_that_says_what_to_do_and_nothing_is_written(
    line: str, message: str, command: Command, kit: Kit, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("precious").mkdir()
    for name in ("precious/kept.txt", "empty.txt", "more.txt"):
        Path(name).write_text(words(500, seed=8) if name == "more.txt" else "")
    for name, options in MADE.items():
        line = line.replace(name, str(kit(**options).path)) if name in line else line
    verb, family, *more = line.replace("TEXT", str(kit.text)).split()
    model = kit.tiny(family) if family in FAMILIES else tmp_path / family
    if family == "changed":
        changed(kit.tiny("mixtral"), model)
    text = {"analyze": SHORT, "compress": SHORT[:4], "reuse": []}[verb]
    text = ["--data", str(kit.text), *text] if text else []
    before = listing(tmp_path), listing(kit.root)
    code, out, err = command(verb.replace("reuse", "analyze"), model, "-o", "out", *text, *more)
    assert (code, out) == (2, "") and re.search(message, err)
    assert (err.count("error: ") == 1 and "  hint: " in err) or "Usage: " in err
    assert "Traceback" not in err and (listing(tmp_path), listing(kit.root)) == before


@pytest.mark.parametrize("quiet", [False, True])
def test_json_is_one_document_and_quiet_says_nothing(
    quiet: bool, command: Command, kit: Kit, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    start = ["analyze", kit.tiny("mixtral"), "-o", out, "--data", f"a={kit.text}", *SHORT]
    code, printed, err = command(*start, "--json", *(["--quiet"] if quiet else []))
    assert code == 0 and (err == "") == quiet
    report = load(Statistics.open(out))
    assert json.loads(printed, parse_constant=pytest.fail) == {"path": str(out), **report}
    for file in out.glob("report.*"):
        file.unlink()
    code, printed, err = command("report", out)
    assert code == 0 and "loss alone" in printed and "predicted KL" in printed
    assert f"next: open {out / 'report.html'}" in err and (out / "report.html").exists()
    assert load(Statistics.open(out)) == report


def test_inspect_shows_what_was_measured(command: Command, kit: Kit) -> None:
    found = kit()
    assert [s["fitted"] for s in found.header["samples"]] == [True, True, True, False] * 2
    code, out, err = command("inspect", found.path, "--verify")
    assert (code, err) == (0, "")
    shown = ["MixtralForCausalLM", "checksums: 3 files match", "books: 4 windows, 128 tokens",
             "kl; Hessians: full; probes: 2", "int2-g32, int4-g32", "16 x expert"]  # fmt: skip
    assert [part for part in shown if part not in out] == []
    content = json.loads(command("inspect", found.path, "--json")[1], parse_constant=pytest.fail)
    assert content["kind"] == "statistics" and content["probes"] == 2
    assert len(content["sites"]) == len(found.sites) == 34


@pytest.mark.parametrize("options", [{}, {"hessian": "diagonal"}, {"importance": "loss"}], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
def test_formats_added_later_are_as_if_measured_at_once(
    family: str, options: dict[str, Any], kit: Kit, tmp_path: Path
) -> None:
    kept = {**options, "keep_hessians": "hessian" not in options, "probes": 0}
    more = ("nvfp4", "int8-tensor")  # one is solved with its neighbours, one is not
    first, watch = kit(family, **kept), Watch()
    before = listing(first.path)
    run = partial(kit.run, reuse=first.path, formats=more, progress=watch)
    added = run(tmp_path / "b", kit.tiny(family))
    direct = kit(family, **kept, formats=(*FORMATS, *more))
    assert added.formats == direct.formats == [*FORMATS, *more]
    assert not differing(added, direct)
    for key in ("options", "importance", "labels", "samples", "hessian", "method", "data"):
        assert added.header[key] == direct.header[key], key
    assert load(added)["sensitivity"] == load(direct)["sensitivity"]
    assert "analyzing" not in watch.phases and listing(first.path) == before


def test_a_compression_keeps_what_statistics_predicted_of_it(kit: Kit, tmp_path: Path) -> None:
    found, rules = kit(), ["kind:expert=int2-g32", "*.o_proj=dense"]
    result = api.compress(
        kit.tiny("mixtral"), tmp_path / "a", format="int4-g32", rules=rules, statistics=found.path,
        data=[str(kit.text)], samples=4, length=32,
    )  # fmt: skip
    predictor = Predictor(found)
    expected = predictor.predict({
        site.name: "int2-g32" if site.kind == "expert" else "int4-g32"
        for site in predictor.sites if not site.name.endswith("o_proj") and site.layer < 2
    })  # fmt: skip
    predicted = Artifact.open(tmp_path / "a").manifest["predicted"]
    assert predicted == result.predicted == api.inspect(tmp_path / "a")["predicted"]
    assert predicted["kl"] == pytest.approx(expected.kl, rel=1e-5)  # six digits are kept
    assert predicted["mean"] == pytest.approx(expected.mean, rel=1e-5)
    assert 0 < predicted["low"] < predicted["mean"] < predicted["high"]


@pytest.mark.parametrize("way", ["data", "self"])
def test_windows_for_coverage_feed_hessians_and_no_figure_of_use(way: str, kit: Kit) -> None:
    plain, covered = kit(min_tokens=400), kit(min_tokens=400, cover=way, cover_limit=8)
    drawn = covered.header["drawn"]
    assert drawn["way"] == way and 0 < drawn["windows"] <= 8
    assert covered.labels == ["books", "code", "cover"]
    assert covered.header["importance"]["predictions"][2] == 0
    for layer in range(2):
        before, after = (s.read(layer, "experts.0.up.tokens") for s in (plain, covered))
        assert torch.equal(after[:2], before)
        starved = before.sum(0) < 400
        assert starved.any() and (after[2][starved] > 0).all()
        less, more = (s.read(layer, "experts.0.weight") for s in (plain, covered))
        torch.testing.assert_close(more[:2], less)
        assert (more[2][starved] > 0).all()
    ours, theirs = load(plain), load(covered)
    assert theirs["coverage"]["drawn"]["windows"] == drawn["windows"]
    for key in ("labels", "domains", "offloading", "tiers"):
        assert ours[key] == theirs[key], key

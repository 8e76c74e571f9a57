"""Statistics on disk: halves add up to the whole, and what does not fit together is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnest import api, statistics
from bitnest.calibrate.predict import Predictor, site_losses
from bitnest.errors import ArtifactError, BitnestError, StatisticsError
from bitnest.safetensors_io import entry, write_file
from bitnest.statistics import Statistics
from bitnest.statistics.header import HEADER
from bitnest.statistics.merging import merge
from bitnest.workdir import partial_directory
from tests.tiny import Builder, words

FORMATS = ("int2-g32", "int4-g32")
# All windows are differentiated, and labels do not depend on a draw: Fishers can be compared.
OPTIONS: dict[str, Any] = {
    "length": 32, "formats": FORMATS, "probes": 3, "probe_windows": 2, "fisher_windows": 99,
    "importance": "loss", "keep_hessians": True,
}  # fmt: skip
ALL_FITTED: dict[str, Any] = {"probes": 0}  # nothing is held out: every window is in its Hessian
SAMPLED = ("ranks", "ranked")  # of the first rows of every batch: which those are, batches say
APPROXIMATE = ("sites.error", "sites.loss", "sites.output")

Texts = dict[str, Path]
Analyse = Callable[..., Statistics]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    root, found = tmp_path_factory.mktemp("texts"), {}
    for seed, name in enumerate(("books", "code", "wiki", "more")):
        found[name] = root / f"{name}.txt"
        found[name].write_text(words(1500, seed=seed), encoding="utf-8")
    found["short"] = root / "short.txt"
    found["short"].write_text(words(150, seed=9), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def analyse(tiny: Builder, texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Analyse:
    """Statistics of the sources named, 4 windows of each; made once."""
    made: dict[str, Statistics] = {}

    def run(*data: str, family: str = "mixtral", **options: Any) -> Statistics:
        key = repr((data, family, options))
        if key not in made:
            spelt = [
                f"{label}={texts[name or label]}"
                for label, _, name in (item.partition(":") for item in data)
            ]
            out = tmp_path_factory.mktemp("part") / "statistics"
            samples = {"samples": 4 * len(data)}
            made[key] = api.analyze(
                tiny(family), out, data=spelt, **{**OPTIONS, **samples, **options}
            )
        return made[key]

    return run


def same(
    merged: Statistics, whole: Statistics, skip: tuple[str, ...] = (), rtol: float = 1e-5
) -> set[str]:
    """Every tensor that adds up exactly is the same, label by label; gives the names compared."""
    order = [merged.labels.index(label) for label in whole.labels]
    assert sorted(merged.labels) == sorted(whole.labels)
    compared = set()
    for layer in range(len(whole.layers)):
        assert set(merged.names(layer)) == set(whole.names(layer))
        for name in whole.names(layer):
            if name in APPROXIMATE or name.rpartition(".")[2] in skip:
                continue
            a, b = merged.read(layer, name), whole.read(layer, name)
            plain = name.startswith(("columns", "sites")) or name.endswith((".trace", ".rows"))
            if not plain:
                a = a[order]
            assert a.shape == b.shape and a.dtype == b.dtype, name
            if b.dtype.is_floating_point and not name.endswith((".absmax", ".rows")):
                near = {"rtol": rtol, "atol": rtol * float(b.abs().max())}
                torch.testing.assert_close(a, b, **near, msg=lambda m, n=name: f"{n}: {m}")
            else:
                assert torch.equal(a, b), name
            compared.add(name)
    return compared


# halves and the whole


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
def test_a_part_per_label_adds_up_to_the_whole(
    family: str, analyse: Analyse, tmp_path: Path
) -> None:
    """Books on one machine, code on another. The second source of a run is drawn by seed + 1."""
    whole = analyse("books", "code", family=family)
    parts = [analyse("books", family=family), analyse("code", family=family, seed=1)]
    merged = api.merge_statistics([part.path for part in parts], tmp_path / "merged")
    assert merged.labels == ["books", "code"]
    compared = same(merged, whole)
    endings = {name.rpartition(".")[2] for name in compared}
    assert {"hessian", "absmax", "square", "tokens", "ranks", "peaks"} <= endings
    assert any(name.startswith("fisher.") for name in compared)
    if family != "gpt2":
        assert {"trace", "rows", "norms", "output2", "weight", "logits", "margins"} <= endings
        assert {"experts.0.hessian.up", "experts.0.hessian.down"} <= compared
    for key in ("tokens", "samples", "labels", "formats", "source", "length", "hessian", "method"):
        assert merged.header[key] == whole.header[key], key
    assert merged.header["importance"] == whole.header["importance"]
    assert [d["sha256"] for d in merged.header["data"]] == [
        d["sha256"] for d in whole.header["data"]
    ]


def test_two_parts_of_one_label_add_up_to_the_whole(analyse: Analyse, tmp_path: Path) -> None:
    whole = analyse("text:books", "text:code", **ALL_FITTED)
    parts = [analyse("text:books", **ALL_FITTED), analyse("text:code", seed=1, **ALL_FITTED)]
    merged = api.merge_statistics([part.path for part in parts], tmp_path / "merged")
    assert merged.labels == ["text"]
    assert "experts.0.absmax" not in same(merged, whole, SAMPLED)
    assert merged.header["importance"] == whole.header["importance"]
    for layer in range(2):  # rows of a batch are sampled, so two batches give two samples
        for name in (n for n in whole.names(layer) if n.endswith(".ranks")):
            ranked = merged.read(layer, name.replace("ranks", "ranked"))
            assert (merged.read(layer, name).sum(-1) == ranked).all()


def test_labels_that_some_parts_share_are_added_where_they_meet(
    analyse: Analyse, tmp_path: Path
) -> None:
    whole = analyse("books", "code", "wiki", "code:more", **ALL_FITTED)
    parts = [
        analyse("books", "code", **ALL_FITTED),
        analyse("wiki", "code:more", seed=2, **ALL_FITTED),
    ]
    merged = api.merge_statistics([part.path for part in parts], tmp_path / "merged")
    assert merged.labels == ["books", "code", "wiki"]
    same(merged, whole, (*SAMPLED, "rows"))
    assert merged.header["importance"]["predictions"] == [4 * 31, 8 * 31, 4 * 31]


def test_the_order_of_parts_changes_nothing_but_the_order_of_labels(
    analyse: Analyse, tmp_path: Path
) -> None:
    a, b = analyse("books", "code"), analyse("wiki", "code:more", seed=2)
    one = merge([a, b], tmp_path / "one")
    other = merge([b, a], tmp_path / "other")
    assert other.labels == ["wiki", "code", "books"]
    same(one, other, ("trace", "rows"))
    for layer in range(2):
        first, last = (s.read(layer, "experts.0.trace") for s in (one, other))
        half = len(first) // 2
        assert torch.equal(first[:half], last[half:]) and torch.equal(first[half:], last[:half])
        for name in ("sites.error", "sites.output"):
            torch.testing.assert_close(one.read(layer, name), other.read(layer, name))
    ones, others = (Predictor(s) for s in (one, other))
    plan = {site.name: "int2-g32" for site in ones.sites}
    left, right = ones.predict(plan), others.predict(plan)
    assert left.kl == pytest.approx(right.kl, rel=1e-3)
    assert left.error == pytest.approx(right.error, rel=1e-3)


def test_a_merger_can_be_merged(analyse: Analyse, tmp_path: Path) -> None:
    a, b, c = analyse("books"), analyse("code", seed=1), analyse("wiki", seed=2)
    at_once = merge([a, b, c], tmp_path / "at-once")
    nested = merge([merge([a, b], tmp_path / "ab"), c], tmp_path / "nested")
    same(nested, at_once, rtol=1e-12)
    for layer in range(2):
        for name in APPROXIMATE:
            torch.testing.assert_close(nested.read(layer, name), at_once.read(layer, name))
    assert nested.header["probes"] == at_once.header["probes"]
    assert nested.header["merged"] == at_once.header["merged"] == 3
    assert Predictor(nested).fit.error == pytest.approx(Predictor(at_once).fit.error, rel=1e-6)


def test_fisher_of_a_merger_is_the_mean_over_predictions(analyse: Analyse, tmp_path: Path) -> None:
    """Three windows of one part weigh three times as much as one of the other."""
    few, many = analyse("text:books", samples=1), analyse("text:code", samples=3, seed=1)
    merged = merge([few, many], tmp_path / "merged")
    for layer in range(2):
        for name in (n for n in merged.names(layer) if n.startswith("fisher.")):
            expected = (few.read(layer, name) + 3 * many.read(layer, name)) / 4
            torch.testing.assert_close(merged.read(layer, name), expected)


def test_errors_of_a_merger_lie_between_those_of_its_parts_and_are_called_approximate(
    analyse: Analyse, tmp_path: Path
) -> None:
    parts = [analyse("text:books"), analyse("text:code", seed=1)]
    merged = merge(parts, tmp_path / "merged")
    for layer in range(2):
        for name in APPROXIMATE:
            a, b = (part.read(layer, name) for part in parts)
            found, slack = merged.read(layer, name), 1e-6 * a.abs()
            assert (found >= torch.minimum(a, b) - slack).all(), name
            assert (found <= torch.maximum(a, b) + slack).all(), name
    assert set(merged.header["approximate"]) >= {"sites.error", "sites.loss"}


def test_usage_alone_is_merged(analyse: Analyse, tmp_path: Path) -> None:
    options = {"importance": "none", "probes": 0, "formats": (), "keep_hessians": False}
    parts = [analyse("books", **options), analyse("code", seed=1, **options)]
    merged = api.merge_statistics([p.path for p in parts], tmp_path / "merged")
    same(merged, analyse("books", "code", **options))
    assert merged.header["importance"] is None


def test_importance_by_probes_of_a_merger_is_each_parts_own(
    analyse: Analyse, tmp_path: Path
) -> None:
    options = {"importance": "probes", "keep_hessians": False}
    a = analyse("books", "wiki", **options)
    b = analyse("code", "wiki:more", seed=2, **options)
    merged = api.merge_statistics([a.path, b.path], tmp_path / "merged")
    losses = site_losses(merged).sum(0)
    assert merged.labels == ["books", "wiki", "code"]
    for part, label in ((a, "books"), (b, "code")):
        groups = [p for p in part.header["probes"] if p["group"]]
        d = part.labels.index(label)
        total = sum(m["kl"] for p in groups for m in p["measured"] if m["label"] == d)
        assert losses[1, merged.labels.index(label)] == pytest.approx(total, rel=0.5)
    groups = [p for p in merged.header["probes"] if p["group"]]
    for plan in {tuple(p["plan"]) for p in groups}:
        own = [(i, f) for i, f in enumerate(plan) if f is not None]
        for d, label in enumerate(merged.labels):
            kls = [
                m["kl"] for p in groups if tuple(p["plan"]) == plan
                for m in p["measured"] if p["labels"][m["label"]] == label
            ]  # fmt: skip
            assert len(kls) == (2 if label == "wiki" else 1)
            found = sum(site_losses(merged)[i, f, d] for i, f in own)
            assert found == pytest.approx(np.mean(kls), rel=1e-6)


def test_twin_probes_of_parts_of_one_seed_are_left_out_together(
    analyse: Analyse, texts: Texts, tmp_path: Path
) -> None:
    a, b = analyse("books"), analyse("code")  # one seed: the same plans
    assert [p["plan"] for p in a.header["probes"]] == [p["plan"] for p in b.header["probes"]]
    predictor = Predictor(merge([a, b], tmp_path / "merged"))
    assert predictor.fit.probes == Predictor(a).fit.probes
    assert {p.label for p in predictor.points} == {"books", "code"}


def test_a_merger_reopens_reports_and_predicts(analyse: Analyse, tmp_path: Path) -> None:
    parts = [analyse("books"), analyse("code", seed=1)]
    merged = api.merge_statistics([p.path for p in parts], tmp_path / "merged")
    again = Statistics.open(merged.path)
    again.verify()
    assert again.header == merged.header
    first = (merged.path / "report.json").read_text("utf-8")
    analysis = json.loads(first, parse_constant=pytest.fail)
    assert analysis["labels"] == ["books", "code"]
    assert {p["label"] for p in analysis["prediction"]["points"]} == {"books", "code"}
    (merged.path / "report.html").unlink()
    (merged.path / "report.json").unlink()
    api.write_report(merged.path)
    assert (merged.path / "report.json").read_text("utf-8") == first
    assert (merged.path / "report.html").read_text("utf-8").startswith("<!doctype html>")
    predictor = Predictor(again)
    found = predictor.predict({site.name: "int4-g32" for site in predictor.sites})
    assert set(found.kl) == {"books", "code"} and 0 < found.mean < 10


def test_the_report_of_a_merger_is_that_of_the_whole(analyse: Analyse, tmp_path: Path) -> None:
    """All that describes use; losses and probes are approximate."""
    parts = [analyse("books"), analyse("code", seed=1)]
    merged = api.merge_statistics([p.path for p in parts], tmp_path / "merged")
    ours, theirs = (
        json.loads((s.path / "report.json").read_text("utf-8"))
        for s in (merged, analyse("books", "code"))
    )
    for key in ("layers", "domains", "tiers", "dynamic_channels", "offloading", "coverage",
                "inputs", "crest", "rankings", "data", "labels"):  # fmt: skip
        close(ours[key], theirs[key], key)


def close(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{where}[{i}]")
    else:
        assert a == (pytest.approx(b, rel=1e-3, abs=1e-9) if isinstance(b, float) else b), where


def test_windows_drawn_for_coverage_are_added_too(analyse: Analyse, tmp_path: Path) -> None:
    options = {"cover": "data", "min_tokens": 200, "cover_limit": 8}
    a, b = analyse("books", **options), analyse("code", seed=1, **options)
    merged = api.merge_statistics([a.path, b.path], tmp_path / "merged")
    drawn = [part.header["drawn"]["windows"] for part in (a, b)]
    assert min(drawn) > 0 and merged.header["drawn"]["windows"] == sum(drawn)
    analysis = json.loads((merged.path / "report.json").read_text("utf-8"))
    assert analysis["labels"] == ["books", "code"]
    assert analysis["coverage"]["drawn"]["windows"] == sum(drawn)
    plain = api.merge_statistics(
        [analyse("books", min_tokens=200).path, analyse("code", seed=1, min_tokens=200).path],
        tmp_path / "plain",
    )
    without = json.loads((plain.path / "report.json").read_text("utf-8"))
    for key in ("layers", "offloading", "domains"):
        close(analysis[key], without[key], key)


# refused


def refuse(parts: list[Statistics], out: Path, match: str) -> BitnestError:
    with pytest.raises(BitnestError, match=match) as caught:
        api.merge_statistics([part.path for part in parts], out)
    assert caught.value.hint
    assert not out.exists() and not partial_directory(out).exists()
    return caught.value


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"family": "qwen3_moe"}, "models"),
        ({"formats": ("int2-g32",)}, "candidate formats"),
        ({"formats": FORMATS[::-1]}, "candidate formats"),
        ({"importance": "kl"}, "options"),
        ({"keep_hessians": False}, "options"),
        ({"weighting": "none"}, "options"),
        ({"method": "rtn"}, "options"),
        ({"probes": 2}, "options"),
        ({"min_tokens": 7}, "options"),
        ({"compute": "bfloat16"}, "compute types"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    options: dict[str, Any], named: str, analyse: Analyse, tmp_path: Path
) -> None:
    parts = [analyse("books"), analyse("code", **options)]
    error = refuse(parts, tmp_path / "out", named)
    assert all(str(part.path) in error.where for part in parts)


def test_diagonals_that_memory_forced_are_not_mixed_with_full_hessians(
    analyse: Analyse, tmp_path: Path
) -> None:
    """Both parts were asked for `auto`; what came of it may differ from machine to machine."""
    a = analyse("books")
    copy = shutil.copytree(analyse("code").path, tmp_path / "copy")
    edit(copy, hessian="diagonal", method="rtn")
    refuse([a, Statistics.open(copy)], tmp_path / "out", "Hessian")


def test_the_same_directory_twice_is_refused(analyse: Analyse, tmp_path: Path) -> None:
    part = analyse("books")
    refuse([part, part], tmp_path / "out", "twice")
    (tmp_path / "link").symlink_to(part.path)
    refuse([part, Statistics.open(tmp_path / "link")], tmp_path / "out", "twice")


def test_what_would_count_double_under_another_name_is_refused(
    analyse: Analyse, tmp_path: Path
) -> None:
    a, b = analyse("books"), analyse("code", seed=1)
    copy = Statistics.open(shutil.copytree(a.path, tmp_path / "copy"))
    refuse([a, copy], tmp_path / "out", "4 of 4 windows .* under books")
    both = merge([a, b], tmp_path / "both")
    error = refuse([both, a], tmp_path / "out", "4 of 8 windows .* under books")
    assert str(both.path) in error.where and str(a.path) in error.where


def test_another_seed_over_the_same_text_draws_windows_again(
    analyse: Analyse, tmp_path: Path
) -> None:
    """The draws differ, some of their windows do not; parts without one in common are not named."""
    a, b = (analyse("short", samples=6, seed=seed) for seed in (0, 1))
    own = [{item["sha256"] for item in part.header["samples"]} for part in (a, b)]
    assert 6 < len(own[0] | own[1]) < 12
    assert a.header["data"][0]["sha256"] != b.header["data"][0]["sha256"]
    named = f"{len(own[0] & own[1])} of {4 + len(own[0] | own[1])} windows .* under short\n"
    other = analyse("code")
    error = refuse([a, other, b], tmp_path / "out", named)
    assert str(a.path) in error.where and str(other.path) not in error.where
    assert "another text" in error.hint


def test_windows_drawn_for_coverage_count_double_too(analyse: Analyse, tmp_path: Path) -> None:
    options = {"cover": "data", "min_tokens": 200, "cover_limit": 8}
    a, b = analyse("books", **options), analyse("code", seed=1, **options)
    copy = shutil.copytree(b.path, tmp_path / "copy")
    drawn = next(item for item in a.header["samples"] if item["label"] == "cover")
    edit(copy, samples=[*b.header["samples"][:-1], drawn])
    refuse([a, Statistics.open(copy)], tmp_path / "out", "1 of .* windows .* under cover")


def test_a_window_that_repeats_within_one_part_is_no_overlap(
    analyse: Analyse, copy: Path, tmp_path: Path
) -> None:
    """`analyze` counts it under `repeated`, and the part holds it that often."""
    samples = Statistics.open(copy).header["samples"]
    edit(copy, samples=[samples[0]] * len(samples))
    merged = merge([Statistics.open(copy), analyse("code")], tmp_path / "merged")
    assert merged.header["tokens"] == 8 * 32


@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_part_is_not_summed_and_sealed(
    place: int, analyse: Analyse, tmp_path: Path
) -> None:
    parts = [analyse("books"), analyse("code", seed=1)]
    copy = shutil.copytree(parts[place].path, tmp_path / "copy")
    flip(copy / "block-00002.safetensors")
    parts[place] = Statistics.open(copy)
    assert str(copy) in refuse(parts, tmp_path / "out", "block-00002").where


@pytest.mark.parametrize("name", ["sites.loss", "experts.0.up.square"])
def test_values_that_are_not_finite_are_not_summed(
    name: str, analyse: Analyse, tmp_path: Path
) -> None:
    parts = [analyse("books"), analyse("code", seed=1)]
    copy = shutil.copytree(parts[1].path, tmp_path / "copy")
    replace(copy, 1, name, torch.full_like(parts[1].read(1, name), torch.nan))
    parts[1] = Statistics.open(copy)
    parts[1].verify()
    assert str(copy) in refuse(parts, tmp_path / "out", f"'{name}' of block 1 .* not finite").where


def test_a_merger_whose_report_fails_is_not_published(
    analyse: Analyse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        assert Statistics.open(path).labels == ["books", "code"]
        raise StatisticsError("no report of this", hint="none")

    parts = [analyse("books"), analyse("code", seed=1)]
    monkeypatch.setattr(api, "write_report", fail)
    refuse(parts, tmp_path / "new" / "out", "no report of this")
    assert not (tmp_path / "new").exists()


def test_length_and_seed_of_a_merger_are_those_of_all_parts_or_null(
    analyse: Analyse, tmp_path: Path
) -> None:
    short, long, other = analyse("books"), analyse("code", length=48), analyse("wiki", seed=1)
    alike = api.merge_statistics([short.path, analyse("code").path], tmp_path / "alike")
    assert alike.header["length"] == 32 and alike.header["seed"] == 0
    lengths = api.merge_statistics([short.path, long.path], tmp_path / "lengths")
    assert lengths.header["length"] is None and lengths.header["seed"] == 0
    assert lengths.header["tokens"] == 4 * 32 + 4 * 48
    seeds = api.merge_statistics([short.path, other.path], tmp_path / "seeds")
    assert seeds.header["length"] == 32 and seeds.header["seed"] is None
    all_of_them = merge([lengths, other], tmp_path / "all")
    assert all_of_them.header["length"] is None and all_of_them.header["seed"] is None
    content = api.inspect(all_of_them.path, verify=True)
    assert content["length"] is None and content["verified"] == 3


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_parts_are_refused(count: int, analyse: Analyse, tmp_path: Path) -> None:
    refuse([analyse("books")] * count, tmp_path / "out", "nothing to merge")


@pytest.mark.parametrize("kind", ["directory", "file", "part", "below a file"])
def test_an_output_in_the_way_is_left_alone(kind: str, analyse: Analyse, tmp_path: Path) -> None:
    parts = [analyse("books"), analyse("code", seed=1)]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("kept")
    out = {"directory": kept, "file": kept / "precious", "part": parts[0].path,
           "below a file": kept / "precious" / "out"}[kind]  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in (*parts[0].path.iterdir(), *kept.iterdir())}
    with pytest.raises(ArtifactError) as caught:
        api.merge_statistics([part.path for part in parts], out)
    assert caught.value.hint and str(out) in caught.value.where
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert os.listdir(kept) == ["precious"]


def test_an_unfinished_analysis_of_the_same_name_is_left_alone(
    analyse: Analyse, tmp_path: Path
) -> None:
    parts = [analyse("books"), analyse("code", seed=1)]
    state = partial_directory(tmp_path / "out") / "state"
    state.mkdir(parents=True)
    (state / "inputs.json").write_text('{"source": "another run"}')
    (state / "block-00000.json").write_text("{}")
    with pytest.raises(ArtifactError, match="unfinished") as caught:
        api.merge_statistics([part.path for part in parts], tmp_path / "out")
    assert caught.value.hint and not (tmp_path / "out").exists()
    assert sorted(os.listdir(state)) == ["block-00000.json", "inputs.json"]


def test_a_merger_that_was_cut_short_starts_again(
    analyse: Analyse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [analyse("books"), analyse("code", seed=1)]
    write = statistics.StatisticsWriter.write_block

    def full(self: Any, layer: int, *rest: Any) -> None:
        if layer:
            raise OSError(28, "No space left on device")
        write(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(statistics.StatisticsWriter, "write_block", full)
        with pytest.raises(ArtifactError, match="No space left"):
            merge(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StatisticsError):
        Statistics.open(partial_directory(tmp_path / "out") / "artifact")
    same(merge(parts, tmp_path / "out"), analyse("books", "code"))
    assert os.listdir(tmp_path) == ["out"]


# opening


def edit(path: Path, **values: Any) -> None:
    """Change the header."""
    header = {**json.loads((path / HEADER).read_text("utf-8")), **values}
    (path / HEADER).write_text(json.dumps(header))


def flip(file: Path) -> None:
    """One bit of the last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def replace(path: Path, layer: int, name: str, tensor: torch.Tensor) -> None:
    """Another tensor in a block, with the checksum that goes with it."""
    found = Statistics.open(path)
    file = found.layers[layer]["file"]
    tensors = {key: found.read(layer, key) for key in found.names(layer)} | {name: tensor}
    size, digest = write_file(path / file, [entry(key, value) for key, value in tensors.items()])
    edit(path, files={**found.header["files"], file: {"bytes": size, "sha256": digest}})


@pytest.fixture
def copy(analyse: Analyse, tmp_path: Path) -> Path:
    return shutil.copytree(analyse("books").path, tmp_path / "copy")


def test_what_was_read_is_what_the_header_says(analyse: Analyse) -> None:
    found = analyse("books")
    assert [site.layer for site in found.sites] == sorted(site.layer for site in found.sites)
    assert len(found.sites) == 8 + 24 + 2 and len(found.sites_of(1)) == 16
    assert found.has(0, "sites.error") and not found.has(0, "sites.nothing")
    with pytest.raises(KeyError):
        found.read(0, "sites.nothing")
    assert found.read(0, "sites.error").shape == (16, len(FORMATS))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"version": 1}', "\xff"])
def test_a_damaged_header_is_said_to_be_damaged(content: str, copy: Path) -> None:
    (copy / HEADER).write_bytes(content.encode("latin-1"))
    with pytest.raises(StatisticsError, match="damaged") as caught:
        Statistics.open(copy)
    assert caught.value.hint


REQUIRED = (
    "bitnest", "model", "architecture", "source", "labels", "data", "samples", "tokens", "length",
    "formats", "hessian", "importance", "options", "method", "min_tokens", "compute", "probes",
    "drawn", "seed", "seconds", "fingerprint", "layers", "files",
)  # fmt: skip


def test_every_key_of_the_header_is_required(analyse: Analyse) -> None:
    assert {"version", *REQUIRED} == set(analyse("books").header)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_header_that_lacks_a_part_is_damaged(key: str, copy: Path) -> None:
    header = json.loads((copy / HEADER).read_text("utf-8"))
    del header[key]
    (copy / HEADER).write_text(json.dumps(header))
    damaged(copy, key)


def set_at(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the header: the value, the last argument, at the keys before it."""
    *path, last, value = keys

    def change(header: Any) -> None:
        for key in path:
            header = header[key]
        header[last] = value

    return change


def drop_last(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: Any) -> None:
        for key in keys:
            header = header[key]
        header.pop()

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_at("labels", "books"), "labels"),
        (set_at("labels", []), "labels"),
        (set_at("labels", ["books", "code"]), "labels|samples"),
        (set_at("labels", ["books", "books"]), "labels"),
        (set_at("labels", 0, ["books"]), r"labels\[0\]"),
        (set_at("samples", []), "samples"),
        (set_at("samples", 0, {}), r"samples\[0\]"),
        (set_at("samples", 0, "length", "32"), r"samples\[0\].length"),
        (set_at("samples", 0, "length", -32), "tokens"),
        (set_at("samples", 0, "label", "code"), "samples"),
        (drop_last("samples"), "tokens"),
        (set_at("tokens", "x"), "tokens"),
        (set_at("tokens", True), "tokens"),
        (set_at("tokens", 1), "tokens"),
        (set_at("length", "32"), "length"),
        (set_at("formats", list(FORMATS[:1])), "formats"),
        (set_at("formats", []), "formats"),
        (set_at("options", {}), "options"),
        (set_at("options", "damp", None), "options.damp"),
        (set_at("hessian", "none"), "hessian"),
        (set_at("importance", {}), "importance"),
        (set_at("importance", None), "importance"),
        (set_at("importance", "kind", "probes"), "importance"),
        (set_at("importance", "predictions", []), "importance"),
        (set_at("probes", {}), "probes"),
        (drop_last("probes", 0, "plan"), "probes"),
        (set_at("probes", 0, "plan", 0, len(FORMATS)), "probes"),
        (set_at("probes", 0, "plan", 0, -1), "probes"),
        (set_at("probes", 0, "measured", 0, "label", 1), "probes"),
        (set_at("probes", 0, "labels", ["code"]), "probes"),
        (set_at("probes", 0, "labels", 1), "not iterable"),
        (set_at("source", {}), "source"),
        (set_at("data", ["books"]), "data"),
        (set_at("seconds", None), "seconds"),
        (set_at("files", {}), "files"),
        (set_at("files", []), "files"),
        (set_at("files", "block-00001.safetensors", {}), "block-00001"),
        (set_at("layers", []), "probes"),
        (drop_last("layers"), "probes"),
        (set_at("layers", 0, "layer", 1), "layers"),
        (set_at("layers", 0, "file", "../copy/block-00001.safetensors"), "files"),
        (set_at("layers", 0, "file", "block-00002.safetensors"), "files"),
        (set_at("layers", 0, "sites", 0, "shape", [64]), "layers"),
        (set_at("layers", 0, "sites", 0, "rows", [0]), "layers"),
        (set_at("layers", 0, "sites", 0, "rows", []), "layers"),
        (set_at("layers", 0, "sites", -1, "expert", 4), "layers"),
        (set_at("layers", 0, "sites", -1, "expert", None), "layers"),
        (set_at("layers", 0, "sites", 0, "name", "x"), "columns.x"),
        (set_at("layers", 0, "experts", []), "experts.0.trace"),
        (drop_last("layers", 0, "inputs"), "inputs.*tokens"),
        (set_at("layers", 0, "sites", 0, {}), r"layers\[0\].sites\[0\]"),
        (set_at("layers", 0, "experts", 0, "experts", 9), "experts.0.up.tokens"),
        (set_at("layers", 0, "experts", 0, "top_k", 3), "experts.0.trace"),
        (set_at("layers", 0, "inputs", 0, "name", 0), r"inputs\[0\]"),
    ],
)  # fmt: skip
def test_a_header_of_wrong_types_or_at_odds_with_itself_is_damaged(
    change: Callable[[dict[str, Any]], None], named: str, copy: Path
) -> None:
    header = json.loads((copy / HEADER).read_text("utf-8"))
    change(header)
    (copy / HEADER).write_text(json.dumps(header))
    damaged(copy, named)


def damaged(path: Path, named: str) -> None:
    with pytest.raises(StatisticsError, match=f"damaged.*({named})") as caught:
        Statistics.open(path)
    assert str(path) in caught.value.where and caught.value.hint


def test_no_file_outside_the_directory_is_read(copy: Path, analyse: Analyse) -> None:
    """Even if the header lists it, with the right size and checksum."""
    header = json.loads((copy / HEADER).read_text("utf-8"))
    name = f"../{copy.name}/block-00001.safetensors"
    header["files"][name] = header["files"].pop("block-00001.safetensors")
    header["layers"][0]["file"] = name
    (copy / HEADER).write_text(json.dumps(header))
    damaged(copy, "files")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("sites.error", (16, 3)), ("sites.loss", (16, 2, 2)), ("sites.loss", (15, 2, 1)),
     ("inputs.0.tokens", (2,)), ("experts.0.trace", (4, 2))],
)  # fmt: skip
def test_tensors_of_other_axes_than_the_header_says_are_damage(
    name: str, shape: tuple[int, ...], copy: Path
) -> None:
    replace(copy, 1, name, torch.zeros(shape))
    damaged(copy, name)


def test_a_block_whose_own_header_is_damaged_is_told_as_the_rest(copy: Path) -> None:
    victim = copy / "block-00002.safetensors"
    victim.write_bytes(b"\xff" * victim.stat().st_size)
    with pytest.raises(StatisticsError, match="damaged") as caught:
        Statistics.open(copy)
    assert victim.name in caught.value.where and caught.value.hint


def test_another_version_is_named(copy: Path) -> None:
    edit(copy, version=99)
    with pytest.raises(StatisticsError, match="version 99"):
        Statistics.open(copy)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_missing_or_short_block_never_opens(damage: str, copy: Path) -> None:
    victim = copy / "block-00002.safetensors"
    if damage == "missing":
        victim.unlink()
    else:
        os.truncate(victim, victim.stat().st_size // 2)
    with pytest.raises(StatisticsError, match=victim.name):
        Statistics.open(copy)


def test_a_flipped_bit_is_found_by_verify(copy: Path) -> None:
    victim = copy / "block-00001.safetensors"
    flip(victim)
    with pytest.raises(StatisticsError, match=victim.name):
        Statistics.open(copy).verify()
    before = (copy / "report.json").stat().st_mtime_ns
    with pytest.raises(StatisticsError, match=victim.name):
        api.write_report(copy, verify=True)
    assert (copy / "report.json").stat().st_mtime_ns == before


def test_damaged_statistics_neither_predict_nor_take_another_format(
    copy: Path, tiny: Builder, tmp_path: Path
) -> None:
    flip(copy / "block-00002.safetensors")
    model, out = tiny("mixtral"), tmp_path / "out"
    with pytest.raises(StatisticsError, match="block-00002"):
        api.compress(model, out, format=FORMATS[0], statistics=copy)
    with pytest.raises(StatisticsError, match="block-00002"):
        api.analyze(model, out, reuse=copy, formats=("int3-g32",))
    assert not out.exists() and not partial_directory(out).exists()


@pytest.mark.parametrize("place", ["nothing", "empty", "file"])
def test_what_is_no_statistics_says_how_to_make_some(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(StatisticsError, match="no statistics") as caught:
        api.write_report(tmp_path / place)
    assert "bitnest analyze" in caught.value.hint

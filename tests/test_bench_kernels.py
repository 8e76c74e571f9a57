"""`bitnest bench kernels`, on sizes that say nothing of speed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitnest.cli import main
from bitnest.kernels.bench import cpu
from bitnest.kernels.cpu.library import library
from bitnest.kernels.gpu import paths as on_gpu

Run = Callable[..., tuple[int, str, str]]

needs_library = pytest.mark.skipif(library() is None, reason="no C compiler")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`bitnest bench kernels` with these options on tiny weights: status, stdout and stderr."""
    for name, value in (
        ("COLD", 1), ("STREAM", 1 << 12), ("WARM", 0.0), ("CALLS", 1), ("QUICK_SECONDS", 0.0),
        ("QUICK_SHAPES", [(64, 256)]), ("TOKENS", (1, 3)), ("BITS", (4,)),
        ("FORMATS", ("nf4-g64", "nest248-g128")),
    ):  # fmt: skip
        monkeypatch.setattr(cpu, name, value)

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitnest", "bench", "kernels", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return command


def check(report: dict[str, Any]) -> None:
    assert report["device"] == "cpu" and report["threads"] >= 1 and report["isa"]
    assert [(row["N"], row["K"], row["M"]) for row in report["rows"]] == [
        (64, 256, 1),
        (64, 256, 3),
    ]
    for row in report["rows"]:
        table = row["table"]
        assert {"stream", "torch bf16", "int4-g128", "nf4-g64", "nest 2", "nest 8"} <= table.keys()
        stream, ours = table["stream"], table["int4-g128"]
        assert stream["share"] == 1 and ours["bytes"] >= 64 * 256 // 2
        assert ours["us_p20"] <= ours["us"] <= ours["us_p80"]
        assert ours["share"] == pytest.approx(ours["bytes"] / ours["us"] / 1e3 / stream["gb_s"])
        assert ours["to_bf16"] == pytest.approx(table["torch bf16"]["us"] / ours["us"])


@needs_library
def test_a_table_for_people_and_json_for_programs(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    code, out, err = run("--quick", "--device", "cpu", "--json", str(file))
    assert code == 0 and "measuring" in err
    check(json.loads(file.read_text()))
    assert "64 x 256, 1 token\n" in out and "64 x 256, 3 tokens\n" in out
    assert any(line.split()[:1] == ["int4-g128"] and "%" in line for line in out.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]
    assert not out.rstrip().endswith("}")


@needs_library
def test_a_dash_ends_stdout_with_one_line_of_json(run: Run) -> None:
    code, out, _ = run("--quick", "--device", "cpu", "--json", "-")
    assert code == 0
    check(json.loads(out.splitlines()[-1]))


def test_what_cannot_be_is_refused_before_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(on_gpu, "missing", lambda: "no triton")
    code, out, err = run("--device", "cuda")
    assert code == 2 and not out and "Triton kernels do not run here: no triton" in err
    assert run("--device", "tpu")[0] == 2
    for file in (tmp_path, tmp_path / "no" / "such.json"):
        code, out, err = run("--device", "cpu", "--json", str(file))
        assert code == 2 and not out and "--json" in err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(cpu, "library", lambda: None)
    code, _, err = run("--quick", "--device", "cpu")
    assert code == 2 and "bitnest doctor says why" in err


@pytest.mark.parametrize(("share", "warned"), [(0.9, False), (28.5, True)])
def test_shares_that_cannot_be_are_remarked_on(
    share: float, warned: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"us": 1.0, "us_p20": 1.0, "us_p80": 1.0, "gb_s": 1.0, "to_bf16": 1.0, "to_int4": None}
    row = {"N": 1, "K": 1, "M": 1, "table": {"int4": {**own, "share": share}}}
    report = {"device": "cpu", "isa": "x", "threads": 1, "rows": [row]}
    monkeypatch.setattr(cpu, "usual", lambda quick, done: report)
    assert ("other work ran meanwhile" in run("--device", "cpu")[2]) == warned


def test_rows_of_a_gpu_become_a_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnest.kernels.bench import gpu

    base = {"op": "linear", "format": "int4-g128", "bits": None, "shape": [64, 256], "m": 1}
    rows = [
        {**base, "us": 12.5, "share": 0.83, "speedup": 3.1, "beside": "cublas", "error": 1e-3},
        {**base, "m": 16, "wrong": True, "error": 0.5},
    ]
    report = {"device": "cuda", "machine": {"device": "H"}, "copy_bytes_per_s": 4e12, "rows": rows}
    monkeypatch.setattr(on_gpu, "missing", lambda: "")
    monkeypatch.setattr(gpu, "usual", lambda quick: report)
    code, out, _ = run("--json", "-")
    lines = out.splitlines()
    assert code == 0 and "of a copy, 4000 GB/s" in lines[0] and json.loads(lines[-1]) == report
    assert any("83%" in line and "3.10" in line and "cublas" in line for line in lines)
    assert any("WRONG" in line and "0.5" in line for line in lines)


@needs_library
def test_the_bench_of_the_repository_has_the_same_code(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import kernels_cpu

    assert kernels_cpu.main is cpu.main

"""The bench of GPU kernels, run whole on tiny sizes in the interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu_mode import INTERPRETED

pytest.importorskip("triton")

from bitnest.formats import parse_format
from bitnest.kernels.bench import gpu as kernels_gpu
from bitnest.kernels.bench import gpu_cases, gpu_timing
from bitnest.kernels.bench.weights import copies, random_tensors
from bitnest.kernels.decode import decode

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="with a GPU the bench itself is run")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = kernels_gpu.main(["--interpret", *arguments])
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return code, report


def test_every_operation_is_checked_timed_and_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    names = ("attention", "rounding", "sparse", "lowrank")
    code, report = run(capsys, "--only", *names, "--out", str(out))
    assert code == 0, report["failed"]
    assert {row["op"] for row in report["rows"]} == set(names)
    for row in report["rows"]:
        assert row["us"] > 0 and row["error"] < 0.02 and row["bytes"] > 0
        assert row.get("block") or row["peer_us"] > 0
        assert row["us_p20"] <= row["us"] <= row["us_p80"]
    assert report["copy_bytes_per_s"] > 0 and report["left_out"] == []
    assert json.loads(out.read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_what_the_time_does_not_allow_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(capsys, "--seconds", "-1")
    assert code == 0 and report["rows"] == []
    assert "linear int4-g128 (96, 256)" in report["left_out"]


def test_wrong_answers_are_not_timed() -> None:
    bench = gpu_timing.Bench(torch.device("cpu"), 1e9, True)
    case = gpu_cases.Case({"op": "x", "format": "y", "m": 1}, [lambda: None], 8, lambda: 0.5)
    row = kernels_gpu.row(bench, case, 1.0, 1.0)
    assert row["wrong"] and "us" not in row and "WRONG" in kernels_gpu.line(row)
    nothing = gpu_cases.relative(torch.full((2,), float("nan")), torch.ones(2))
    assert nothing == float("inf")


def test_a_failing_operation_leaves_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_cases, "sparse_cases", fails)
    code, report = run(capsys, "--only", "sparse", "rounding")
    assert code == 1 and "no such kernel" in next(iter(report["failed"].values()))
    assert {row["op"] for row in report["rows"]} == {"rounding"}


def test_tiles_are_tuned_in_the_form_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(capsys, "--tune", "--seconds", "60")
    assert code == 0
    row = report["rows"][0]
    assert row["op"] == "vector" and row["tried"] == 2 and row["us"] <= row["default_us"]
    assert set(row["where"]) == {"bits", "m", "n", "k"} and row["tile"]["bn"] > 0


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "--interpret" in said.err


@pytest.mark.parametrize("name", [*kernels_gpu.FORMATS, "int4-g128%2:4", "dense%50"])
def test_random_weights_are_numbers(name: str) -> None:
    fmt = parse_format(name)
    tensors = random_tensors(fmt, (32, 256), torch.device("cpu"))
    weight = decode(tensors, fmt, (32, 256))
    assert weight.isfinite().all() and 0 < float(weight.abs().max()) < 1e4


def test_copies_lie_elsewhere() -> None:
    one = {"a": torch.ones(3), "b": 2}
    first, second = copies(one, 2)
    assert first is one and torch.equal(second["a"], one["a"])
    assert second["a"].data_ptr() != one["a"].data_ptr()

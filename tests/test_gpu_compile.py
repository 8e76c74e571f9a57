"""GPU kernels compile for targets that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bitnest.kernels.gpu.compile import Compiled, table
from bitnest.kernels.gpu.registry import Variant, variants

ROOT = Path(__file__).parent.parent
MOST_SHARED = {80: 166912, 90: 232448}  # bytes a block can have: 163 and 227 KiB


def compiled(*arguments: str) -> dict[str, Any]:
    # in a process of its own: this one's kernels may be the interpreter's
    done = subprocess.run(
        [sys.executable, "-m", "bitnest.kernels.gpu.compile", "--json", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def check(row: dict[str, Any]) -> None:
    assert 16 <= row["registers"] <= 255, row
    assert row["shared"] <= MOST_SHARED[row["target"]], row
    assert row["ptx"] > 500 and row["cubin"] > 500, row


def test_a_kernel_of_every_op_compiles_for_ampere_and_hopper() -> None:
    rows = [row for name in FEW for row in compiled("--only", name)["rows"]]
    assert {row["target"] for row in rows} == {80, 90}
    assert len(rows) >= 2 * len(FEW)
    for row in rows:
        check(row)


FEW = ("attention-int4-d128-bf16", "rotate-int8-b128-bf16", "lowrank-add-bf16", "sparse-int4-2:4")


@pytest.mark.slow
def test_every_variant_compiles_without_much_spilling() -> None:
    answer = compiled()
    assert answer["failed"] == {}
    assert {row["name"] for row in answer["rows"]} == {variant.name for variant in variants()}
    for row in answer["rows"]:
        check(row)
        assert row["spill"] <= 64, row


def test_names_are_unique_and_types_cover_all_arguments() -> None:
    found = variants()
    assert found
    for variant in found:
        names = set(variant.function.arg_names)
        assert set(variant.signature) | set(variant.constexprs) == names, variant.name
        assert not set(variant.signature) & set(variant.constexprs), variant.name


def test_table_has_a_line_for_each() -> None:
    text = table(
        [Compiled("a", 80, 40, 0, 1024, 4, 2, 1, 1), Compiled("b", 90, 8, 4, 0, 4, 2, 1, 1)]
    )
    assert text.splitlines()[2:] == [
        "| a | sm_80 | 40 | 0 | 1024 | 4 | 2 |", "| b | sm_90 | 8 | 4 | 0 | 4 | 2 |",
    ]  # fmt: skip


def test_variant_without_a_value_for_an_argument_is_seen() -> None:
    one = Variant("x", None, {"a": "*fp32"}, {"B": 1})
    assert one.num_warps == 4 and one.aligned == ()

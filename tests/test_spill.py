"""Tensors beyond a limit in a file, and analysis with nothing left in memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

from bitnest import api
from bitnest.calibrate.spill import Spill, forget
from bitnest.quantize.memory import WORK, Budget
from tests.tiny import Builder


@pytest.mark.parametrize("limit", [None, 0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_was_put_comes_back(limit: int | None, dtype: torch.dtype) -> None:
    spill, random = Spill(limit), torch.Generator().manual_seed(0)
    shapes = [(3, 4), (7,), (2, 3, 5), (1, 1)]
    values = [torch.randn(s, generator=random).mul(99).to(dtype) for s in shapes]
    for i, value in enumerate(values):
        spill.put(i, value.clone())
    spill.put("transposed", values[0].T)
    for i, value in enumerate(values):
        out = torch.empty_like(value)
        spill.copy_to(i, out)
        assert torch.equal(out, value) and i in spill
    out = torch.empty(4, 3, dtype=dtype)
    spill.copy_to("transposed", out)
    assert torch.equal(out, values[0].T)


def test_a_limit_is_of_all_together() -> None:
    spill = Spill(100)
    for i in range(4):
        spill.put(i, torch.full((10,), float(i)))
    assert list(spill._kept) == [0, 1] and list(spill._places) == [2, 3]


def test_what_was_cleared_is_gone_and_its_room_is_used_again() -> None:
    spill = Spill(0)
    spill.put("a", torch.ones(1000))
    assert spill._file is not None
    spill.clear()
    assert "a" not in spill and os.fstat(spill._file.fileno()).st_size == 0
    with pytest.raises(KeyError):
        spill.copy_to("a", torch.empty(1000))
    spill.put("a", torch.zeros(10))
    out = torch.ones(10)
    spill.copy_to("a", out)
    assert out.eq(0).all()


def test_what_was_put_is_a_copy() -> None:
    spill, value = Spill(None), torch.ones(3)
    spill.put("a", value)
    value.zero_()
    out = torch.empty(3)
    spill.copy_to("a", out)
    assert out.eq(1).all()


def test_forgotten_pages_keep_their_values(tmp_path: Path) -> None:
    file, count = tmp_path / "states", 1 << 22
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 4 * count)
    mapped = torch.from_file(str(file), shared=True, size=count)
    mapped.copy_(torch.arange(count))
    before = resident()
    forget(mapped)
    assert before - resident() > 3 * count  # of 4 * count bytes
    assert torch.equal(mapped, torch.arange(count, dtype=torch.float32))


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_an_analysis_that_spills_everything_measures_the_same(
    family: str, tiny: Builder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "data": [f"books={text}"], "samples": 8, "length": 32, "probes": 3, "probe_windows": 2,
        "formats": ("int2-g32", "int4-g32"), "fisher_windows": 2,
    }  # fmt: skip
    plain = api.analyze(tiny(family), tmp_path / "plain", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "plan", lambda *_: Budget(0, WORK, None))
        spilt = api.analyze(tiny(family), tmp_path / "spilt", **options)
    assert spilt.header["probes"] == plain.header["probes"]
    for layer in range(len(plain.layers)):
        for name in plain.names(layer):
            assert torch.equal(plain.read(layer, name), spilt.read(layer, name)), name


@pytest.mark.parametrize(("limit", "kind"), [(1 << 30, "full"), (1 << 10, "diagonal")])
def test_memory_decides_between_hessians_and_their_diagonals(
    limit: int, kind: str, tiny: Builder, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Budget, "plan", lambda *_: Budget(1 << 20, WORK, limit))
    found = api.analyze(
        tiny("llama"), tmp_path / "s", data=[f"books={text}"], samples=4, length=32,
        formats=("int4-g32",), importance="none",
    )  # fmt: skip
    assert found.header["hessian"] == kind

"""What `bitnest doctor` says runs is what `laid.lay_out` and the KV cache's attention run."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
import torch

import bitnest.kernels.cpu.paths
from bitnest.formats import TransformedFormat, parse_format
from bitnest.formats.catalogue import CATALOGUE
from bitnest.formats.inputs import parse_inputs
from bitnest.kernels.cpu import attention
from bitnest.kernels.cpu.library import library
from bitnest.kernels.decode import decode
from bitnest.kernels.gpu import paths as on_gpu
from bitnest.kernels.gpu.layout import lay_out as lay_out_on_gpu
from bitnest.kernels.inputs import code_inputs
from bitnest.kernels.laid import lay_out, turn
from bitnest.kernels.paths import path
from bitnest.quantize.solve import Options, solve

SHAPE = (128, 256)
NAMES = [
    *(entry.name for entry in CATALOGUE if entry.family != "dropped"),
    "nest248-g128@had32", "mat248-g128@perm", "mwq248-g128@had32", "128xint8-g128~int4-g128",
    "mwq4-g128",
]  # fmt: skip
INPUTS = ("int8-token", "int6-g32", "int8-token-t2", "64xint8-token~int4-g128", "fp8-token",
          "mxint8")  # fmt: skip

needs_library = pytest.mark.skipif(library() is None, reason="no C compiler")


@cache
def stored(name: str) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(1, *SHAPE, generator=rng), torch.randn(300, SHAPE[1], generator=rng)
    if name == "dense":
        return {"weight": w[0].bfloat16()}
    found = solve(w, (x.T @ x / 300)[None], parse_format(name), Options(method="rtn", clip=False))
    return found.store(0, slice(0, SHAPE[0]))


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_the_way_that_is_said(name: str) -> None:
    fmt, way = parse_format(name), path(name, "cpu", SHAPE)
    laid = lay_out(stored(name), fmt, SHAPE)
    assert way.name == ("reference" if laid is None else laid.path), way.reason
    assert bool(way.reason) == (laid is None)
    if laid is None:
        return
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(2))
    want = x.double() @ decode(stored(name), fmt, SHAPE).double().T
    for kind, limit in ((torch.float32, 4e-3), (torch.bfloat16, 1e-2)):
        y = laid.product(x.to(kind)).double()
        assert (y - want).norm() < limit * want.norm(), kind


@needs_library
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", NAMES)
def test_rounded_inputs_go_the_way_that_is_said(name: str, inputs: str) -> None:
    """Some channels are loud, so that those of `-t2` have to be kept."""
    fmt, given = parse_format(name), parse_inputs(inputs)
    laid = lay_out(stored(name), fmt, SHAPE)
    way = path(f"{name}/{inputs}", "cpu", SHAPE)
    y = None
    if laid is not None and given.integer:
        x = 4 * torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(2))
        coded = code_inputs(turn(laid, x), given)
        kept = any(part.kept is not None and len(part.kept[0]) for part in coded)
        y = None if kept else laid.product_coded(coded)
    assert way.name == ("reference" if y is None else "cpu"), way.reason
    if y is not None and not isinstance(fmt, TransformedFormat):
        want = coded[0].decoded().double() @ decode(stored(name), fmt, SHAPE).double().T
        assert (y - want).norm() < 1e-5 * want.norm()


@needs_library
@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "fp8_e5m2"])
def test_caches_go_the_way_that_is_said(name: str) -> None:
    assert path(f"kv:{name}", "cpu").name == "cpu"
    assert path(f"kv:{name}", "cpu", (64, attention.MAX_WIDTH)).name == "cpu"
    wide = path(f"kv:{name}", "cpu", (64, attention.MAX_WIDTH + 1))
    assert wide.name == "reference" and f"{attention.MAX_WIDTH + 1} channels" in wide.reason


def test_without_the_library_all_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnest.kernels.cpu.layout.library", lambda: None)
    monkeypatch.setattr("bitnest.kernels.cpu.team.library", lambda: None)
    for name in ("int4-g128", "int8-channel/int8-token", "kv:int8"):
        way = path(name, "cpu")
        assert way.name == "reference" and way.reason.startswith("cpu: ")
    assert lay_out(stored("int4-g128"), parse_format("int4-g128"), SHAPE) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_the_gpu_lays_out_is_what_is_said_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout needs no GPU; wrappers are taken off by `laid`, before it is asked."""
    monkeypatch.setattr(on_gpu, "missing", lambda: "")
    fmt = parse_format(name)
    plain = all(mark not in name for mark in "@+~")
    laid = lay_out_on_gpu(stored(name), fmt, SHAPE) if plain else None
    if plain:
        assert (path(name, "cuda", SHAPE).name == "triton") == (laid is not None)
    if laid is not None:
        takes = pytest.importorskip("bitnest.kernels.gpu.rounded").takes
        assert (path(f"{name}/int8-token", "cuda", SHAPE).name == "triton") == takes(laid)
    assert path(f"{name}/mxfp8", "cuda", SHAPE).name == "reference"


def test_kernels_that_packed_models_do_not_call_are_said_not_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_gpu, "missing", lambda: "")
    for name in ("int4-g128%2:4", "kv:int8"):
        way = path(name, "cuda")
        assert way.name == "reference" and "packed models do not call" in way.reason


@pytest.mark.parametrize(
    ("version", "fits"), [("3.6.0", True), ("3.10.1", True), ("4.0", True), ("3.2.0", False),
                          ("3.5.1+git1", False), ("", True), ("main", True)],
)  # fmt: skip
def test_old_releases_of_triton_do_not_do(version: str, fits: bool) -> None:
    assert (on_gpu.old_triton(version) == "") == fits


def test_a_machine_that_triton_cannot_use_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None)
    assert path("int4-g128", "cuda").reason == "triton: no triton"
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(on_gpu, "triton_version", lambda: "3.2.0")
    assert path("int4-g128", "cuda").reason == "triton: triton 3.2.0: kernels need 3.6"
    monkeypatch.setattr(on_gpu, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert path("int4-g128", "cuda").reason == "triton: torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 7.5: kernels need 8.0" in path("int4-g128", "cuda").reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert path("int4-g128", "cuda").name == "triton"


def test_providers_import_neither_torch_nor_triton() -> None:
    modules = (bitnest.kernels.cpu.paths.__name__, on_gpu.__name__)
    code = f"import sys, {', '.join(modules)}; print(*({{'torch', 'triton'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

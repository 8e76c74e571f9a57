"""What runs where: kernels that register, and `bitnest doctor` on machines that lack things."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitnest.api import doctoring
from bitnest.cli import main
from bitnest.errors import FormatError
from bitnest.formats import parse_format
from bitnest.formats.catalogue import CATALOGUE
from bitnest.formats.inputs import parse_inputs
from bitnest.formats.kv import KVFormat
from bitnest.kernels import native, paths
from bitnest.kernels.paths import Asked, Provider, Rounded, path, register
from bitnest.kernels.paths import Path as Way

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels but those that a test registers."""
    monkeypatch.setattr(paths, "MODULES", ())
    monkeypatch.setattr(paths, "_registered", [])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`bitnest doctor` with these options, which ends with 0: stdout and stderr."""

    def command(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["bitnest", "doctor", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        said = capsys.readouterr()
        return said.out, said.err

    return command


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def refusing(*names: str) -> Callable[[Asked, tuple[int, int]], str]:
    """Runs all formats but these, and weights of an even number of rows only."""
    refused = {parse_format(name) for name in names}

    def why_not(asked: Asked, shape: tuple[int, int]) -> str:
        if shape[0] % 2:
            return "an odd number of rows"
        return "not built" if asked in refused else ""

    return why_not


# ---------------------------------------------------------------- paths


def test_without_kernels_the_reference_runs(alone: None) -> None:
    assert path("int4-g128", "cpu") == Way("reference", "no kernels for cpu")
    assert path(parse_format("nvfp4"), "cuda:1") == Way("reference", "no kernels for cuda")


def test_the_first_that_runs_it_is_taken_and_all_reasons_are_said(alone: None) -> None:
    register(Provider("one", "cpu", refusing("int4-g128", "mxfp4")))
    register(Provider("two", "cpu", refusing("mxfp4")))
    register(Provider("triton", "cuda", refusing()))
    assert path("int8-channel", "cpu") == Way("one", "")
    assert path("int4-g128", "cpu") == Way("two", "")
    assert path("mxfp4", "cpu") == Way("reference", "one: not built; two: not built")
    assert path("mxfp4", "cuda:3") == Way("triton", "")
    odd = path("int8-channel", "cpu", (7, 64))
    assert odd.reason == "one: an odd number of rows; two: an odd number of rows"


def test_a_provider_registered_again_takes_its_own_place(alone: None) -> None:
    register(Provider("one", "cpu", refusing("mxfp4")))
    register(Provider("one", "cpu", refusing()))
    assert path("mxfp4", "cpu") == Way("one", "") and len(paths.providers("cpu")) == 1


def test_weights_with_inputs_and_caches_are_asked_as_such(alone: None) -> None:
    seen: list[Asked] = []
    register(Provider("one", "cpu", lambda asked, shape: seen.append(asked) or "no"))  # type: ignore[func-returns-value]
    for name in ("int4-g128/int8-token", "int4-g128/dense", "kv:int8"):
        path(name, "cpu")
    rounded, plain, cache = seen
    assert rounded == Rounded(parse_format("int4-g128"), parse_inputs("int8-token"))
    assert plain == parse_format("int4-g128")
    assert isinstance(cache, KVFormat) and cache.bits == 8


def test_cores_of_wrapped_and_parts_of_split_weights_are_asked_for(alone: None) -> None:
    seen: list[tuple[Asked, tuple[int, int]]] = []
    register(Provider("one", "cpu", lambda *asked: seen.append(asked) or ""))  # type: ignore[func-returns-value]
    fmt, inputs = parse_format("int4-g128"), parse_inputs("int8-token")
    assert path("int4-g128@had32+lqer16", "cpu", (8, 256)) == Way("one", "")
    assert path("int4-g128@had32/int8-token", "cpu", (8, 256)) == Way("one", "")
    assert seen == [(fmt, (8, 256)), (Rounded(fmt, inputs), (8, 256))]
    seen.clear()
    path("128xint8-g128~int4-g128@perm", "cpu", (8, 384))
    assert seen == [(parse_format("int8-g128"), (8, 128)), (fmt, (8, 256))]
    register(Provider("one", "cpu", refusing("int8-g128")))
    assert path("128xint8-g128~int4-g128", "cpu").reason == "one: not built"


@pytest.mark.parametrize("weights", ["int4-g128@had32+lqer16", "128xint8-g128~int4-g128@perm"])
def test_sums_of_several_products_leave_rounded_inputs_to_the_reference(
    weights: str, alone: None
) -> None:
    register(Provider("one", "cpu", refusing()))
    assert path(weights, "cpu").name == "one"
    assert path(f"{weights}/int8-token", "cpu").name == "reference"


@pytest.mark.parametrize("name", ["int9-g128", "int4-g128/int9-token", "kv:int3"])
def test_names_of_nothing_are_refused(name: str, alone: None) -> None:
    with pytest.raises(FormatError):
        path(name, "cpu")


def test_kernels_register_as_their_module_is_imported(
    alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fine_kernels.py").write_text(
        "from bitnest.kernels.paths import Provider, register\n"
        "register(Provider('fine', 'cpu', lambda asked, shape: ''))\n"
    )
    (tmp_path / "broken_kernels.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(paths, "MODULES", ("absent_kernels.paths", "fine_kernels"))
    assert path("int4-g128", "cpu") == Way("fine", "")
    monkeypatch.setattr(paths, "MODULES", ("broken_kernels",))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        path("int4-g128", "cpu")


# ---------------------------------------------------------------- the command


def test_every_family_has_a_row_and_json_has_every_format(alone: None, run: Run) -> None:
    register(Provider("simd", "cpu", refusing("int3-g128", "nf4-g64")))
    out, err = run("--json")
    found = json.loads(out)
    rows = {row["format"]: row for row in found["paths"]["cpu"]}
    assert {e.name for e in CATALOGUE if e.family != "dropped"} < rows.keys()
    assert {*doctoring.PAIRS, *doctoring.CACHED} < rows.keys()
    assert rows["int4-g128"]["path"] == "simd" and not rows["int4-g128"]["reason"]
    assert rows["int3-g128"] == {
        "family": "integer", "format": "int3-g128", "path": "reference", "reason": "simd: not built"
    }  # fmt: skip
    assert found["cpu"]["cores"] >= 1 and found["versions"]["torch"] and not err
    assert {lib["name"] for lib in found["libraries"]} >= {"encode", "moments", "nested"}
    out, _ = run()
    lines = out.splitlines()
    assert any(line.split()[:3] == ["integer", "int3-g128", "reference"] for line in lines)
    assert any(line.split() == ["mx", "all", "simd"] for line in lines)
    assert any(line.startswith("KV cache") for line in lines)


def test_a_machine_without_a_compiler_gets_a_hint(alone: None, run: Run, no_compiler: None) -> None:
    out, _ = run()
    assert "compiler: none: $CC is '/nonexistent/cc', which is not there" in out
    assert "kernels/encode: not built: $CC is" in out and "none came with the package" in out
    assert "hint: install gcc or clang" in out


def test_a_machine_about_which_nothing_is_known(
    alone: None, run: Run, no_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CACHES", "MEMORY", "DRIVER"):
        monkeypatch.setattr(doctoring, name, tmp_path / "absent")
    monkeypatch.setattr(doctoring, "features", frozenset)
    monkeypatch.setattr(doctoring, "PACKAGES", ("bitnest", "no-such-package"))
    monkeypatch.setattr(doctoring, "EXTRAS", {"extra": "no_such_module"})
    out, _ = run()
    for said in ("features: not known", "caches: not known", "memory: not known",
                 "no-such-package not installed", "pip install 'bitnest[extra]'"):  # fmt: skip
        assert said in out
    found = json.loads(run("--json")[0])
    assert found["memory"] == {"total": None, "available": None} and found["driver"] is None


def test_gpus_have_a_table_of_their_own(
    alone: None, run: Run, no_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    about = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 << 30, 4 << 30))
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar\nGCC\n")
    monkeypatch.setattr(doctoring, "DRIVER", driver)
    monkeypatch.setattr(doctoring, "_version", lambda package: None)
    register(Provider("triton", "cuda", lambda asked, shape: ""))
    out, _ = run()
    assert "gpus: 1, driver 550.54.15" in out
    assert "cuda:0: A GPU, capability 9.0, 3.00 GiB free of 4.00 GiB, 132 multi" in out
    assert "hint: pip install 'triton>=3.6': GPU kernels need it" in out
    assert "on cuda" in out and "on cpu" in out
    monkeypatch.setattr(doctoring, "_version", lambda package: "3.5.1")
    out, _ = run()
    assert "hint: pip install 'triton>=3.6': triton 3.5.1: kernels need 3.6" in out


def test_a_driver_that_torch_does_not_use_is_a_hint(
    alone: None, run: Run, no_compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module  570.86  Release\n")
    monkeypatch.setattr(doctoring, "DRIVER", driver)
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out, _ = run()
    assert "this torch sees no GPU" in out and "gpus: none, driver 570.86" in out

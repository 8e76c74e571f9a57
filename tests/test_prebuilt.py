"""Libraries that come in the wheel: for which CPU, when they are taken, and that they are built."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from bitnest.kernels import cpu_features, csource, native, prebuilt
from bitnest.kernels.cpu_features import LEVELS, features, levels, usable

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A library `one`, of this machine's kind; no cache and no libraries yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(csource, "SOURCES", tmp_path)
    monkeypatch.setattr(prebuilt, "DIRECTORY", tmp_path / "prebuilt")
    (tmp_path / "one.c").write_text("int one(void) { return 1; }\n")
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be asked for once libraries are built."""
    monkeypatch.setenv("CC", "/nonexistent")


def test_the_least_level_needs_nothing_and_none_needs_the_builders_cpu() -> None:
    for machine in LEVELS.values():
        assert machine[0].needs == frozenset() and len({level.name for level in machine}) > 1
        for less, more in combinations(machine, 2):
            assert not more.needs <= less.needs  # it would never be taken
        for level in machine:
            assert level.flags and not any("native" in flag for flag in level.flags)


@x86
@pytest.mark.parametrize(
    ("known", "best"),
    [
        ("", "x86-64"),
        ("avx2 fma", "x86-64"),  # not all of v3
        ("avx2 fma bmi1 bmi2 f16c abm movbe avx512f", "x86-64-v3"),
        ("avx2 fma bmi1 bmi2 f16c abm movbe avx512f avx512bw avx512cd avx512dq avx512vl",
         "x86-64-v4"),
        ("avx2 fma bmi1 bmi2 f16c abm movbe avx512f avx512bw avx512cd avx512dq avx512vl "
         "avx512_vnni avx512vbmi avx512_bf16", "x86-64-v4-vnni"),
        ("avx2 fma bmi1 bmi2 f16c abm movbe avx_vnni", "x86-64-v3-vnni"),
    ],
)  # fmt: skip
def test_the_best_level_is_one_that_the_cpu_runs(known: str, best: str) -> None:
    assert usable(frozenset(known.split()))[0].name == best


def test_a_machine_of_another_kind_has_one_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert [(level.name, level.flags) for level in levels()] == [("riscv64", ())]


def test_features_are_read_as_linux_lists_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu_features, "CPUINFO", info)
    for text, found, name in (
        ("model name\t: A CPU\nflags\t\t: fpu avx2\n\nflags\t: other\n", {"fpu", "avx2"}, "A CPU"),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", {"fp", "asimd", "asimddp"}, None),
        ("", set(), None),
    ):
        features.cache_clear()
        info.write_text(text)
        assert features() == found
        assert name is None or cpu_features.model_name() == name
    info.unlink()
    features.cache_clear()
    assert features() == frozenset() and cpu_features.model_name()
    features.cache_clear()


@needs_compiler
def test_without_a_compiler_the_packages_library_runs_and_says_so_once(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = prebuilt.build_prebuilt(prebuilt.DIRECTORY)
    assert len(built) == len(levels()) and not any(built.values())
    monkeypatch.setenv("CC", "/nonexistent")
    with caplog.at_level("INFO"):
        library = native.load("one")
        native.load("one")
    assert library is not None and library.one() == 1
    best = usable(features())[0].name
    assert best in str(library._name)
    (said,) = caplog.messages
    assert f"built for {best} with the package" in said and "/nonexistent" in said


@needs_compiler
def test_with_a_compiler_its_own_build_is_preferred(sources: Path) -> None:
    prebuilt.build_prebuilt(prebuilt.DIRECTORY)
    library = native.load("one")
    assert library is not None and str(native.cache_directory()) in str(library._name)


@needs_compiler
@pytest.mark.parametrize("how", ["other source", "other flags", "damaged", "empty", "absent"])
def test_a_library_that_does_not_fit_is_not_loaded(
    how: str, sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prebuilt.build_prebuilt(prebuilt.DIRECTORY)
    monkeypatch.setenv("CC", "/nonexistent")
    flags = ("-DX",) if how == "other flags" else ()
    if how == "other source":
        (sources / "one.c").write_text("int one(void) { return 2; }\n")
    for file in prebuilt.DIRECTORY.iterdir():
        data = file.read_bytes()
        if how == "damaged":
            file.write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])
        elif how == "empty":
            file.write_bytes(b"")
        elif how == "absent":
            file.unlink()
    with caplog.at_level("INFO"):
        assert native.load("one", flags) is None
    assert "the reference in torch runs" in caplog.text
    assert ("is damaged" in caplog.text) == (how in ("damaged", "empty"))


@needs_compiler
def test_what_does_not_compile_is_left_out_and_said(sources: Path) -> None:
    (sources / "two.c").write_text("int two(void) { return nothing; }\n")
    built = prebuilt.build_prebuilt(prebuilt.DIRECTORY)
    failed = {name for name, why in built.items() if why}
    assert failed == {name for name in built if name.startswith("two-")} and failed
    found = {file.name for file in prebuilt.DIRECTORY.iterdir()}
    assert found == set(built) - failed


def test_no_compiler_is_no_error(sources: Path, no_compiler: None) -> None:
    (why,) = prebuilt.build_prebuilt(prebuilt.DIRECTORY).values()
    assert "/nonexistent" in why and not prebuilt.DIRECTORY.exists()


# ---------------------------------------------------------------- the wheel


def pip(*words: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PIP_NO_INDEX": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What wheels are built from, without the demo's model and the kernels that take longest."""
    there = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    if "pip" not in there or int(there.get("setuptools", "0").split(".")[0]) < 77:
        pytest.skip("no pip, or no setuptools as pyproject.toml asks for")
    made = tmp_path / "package"
    made.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, made / name)
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors", "encode.c", "cpu", "gpu")
    shutil.copytree(ROOT / "bitnest", made / "bitnest", ignore=skip)
    return made


def installed(package: Path, tmp_path: Path, **environment: str) -> tuple[str, Path]:
    """The wheel's name, and where it is installed."""
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(package),
        cwd=tmp_path, **environment)  # fmt: skip
    (wheel,) = wheels.iterdir()
    pip("install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    return wheel.name, target


LOADS = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from bitnest.kernels import native
print(native.__file__)
library = native.load("nested")
print("none" if library is None else library._name)
"""


def loaded(target: Path, tmp_path: Path, code: str = LOADS) -> list[str]:
    """What a machine without a compiler prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(target), "CC": "/nonexistent", "PATH": "/nonexistent",
             "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    return done.stdout.splitlines()


@needs_compiler
def test_a_wheel_brings_libraries_that_need_no_compiler(package: Path, tmp_path: Path) -> None:
    wheel, target = installed(package, tmp_path)
    assert "-py3-none-" in wheel and not wheel.endswith("-any.whl")
    module, said, library = loaded(target, tmp_path)
    assert module.startswith(str(target)) and library.startswith(str(target / "bitnest"))
    assert f"built for {usable(features())[0].name} with the package" in said
    assert not (tmp_path / "cache").exists()
    for level in levels():
        assert list(target.glob(f"bitnest/kernels/prebuilt/nested-*-{level.name}.so"))


def test_a_wheel_is_built_without_a_compiler(package: Path, tmp_path: Path) -> None:
    wheel, target = installed(package, tmp_path, CC="/nonexistent")
    assert wheel.endswith("-py3-none-any.whl") and not list(target.rglob("*.so"))
    _, said, library = loaded(target, tmp_path)
    assert library == "none" and "none came with the package" in said

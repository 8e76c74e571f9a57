"""Native libraries: of one file or a folder, of which flags, found again when nothing changed.

What keeps other users' files from being loaded is tested in test_encode.py.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitnest.kernels import csource, native

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A library `pair` of two files and a header, an empty cache. glibc has a `step` too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(csource, "SOURCES", tmp_path)
    made = tmp_path / "pair"
    made.mkdir()
    (made / "pair.h").write_text("#ifndef STEP\n#define STEP 1\n#endif\nint step(int x);\n")
    (made / "one.c").write_text(
        '#include "pair.h"\n#include <pthread.h>\n'
        "static void *run(void *x) { *(int *)x = step(*(int *)x); return 0; }\n"
        "int twice(int x) {\n"
        "    pthread_t t;\n"
        "    for (int i = 0; i < 2; i++) {\n"
        "        if (pthread_create(&t, 0, run, &x)) return -1;\n"
        "        pthread_join(t, 0);\n"
        "    }\n"
        "    return x;\n"
        "}\n"
    )
    (made / "two.c").write_text('#include "pair.h"\nint step(int x) { return x + STEP; }\n')
    (made / "notes.txt").write_text("not C")
    forget()
    yield made
    forget()


def forget() -> None:
    native.load.cache_clear()
    native.build_variant.cache_clear()


def twice(library: ctypes.CDLL | None, x: int) -> int:
    assert library is not None
    return int(library.twice(x))


def libraries() -> set[Path]:
    return set(native.cache_directory().glob("*.so"))


@needs_compiler
def test_files_of_a_folder_are_one_library_with_threads(folder: Path) -> None:
    assert twice(native.load("pair"), 5) == 7
    assert len(libraries()) == 1


@needs_compiler
@pytest.mark.parametrize("change", ["source", "header", "new file", "renamed"])
def test_change_of_any_file_builds_again(change: str, folder: Path) -> None:
    assert twice(native.load("pair"), 5) == 7
    before, hashed = libraries(), native.source_hash("pair")
    if change == "source":
        (folder / "two.c").write_text('#include "pair.h"\nint step(int x) { return x + 4; }\n')
    elif change == "header":
        (folder / "pair.h").write_text("#define STEP 4\nint step(int x);\n")
    elif change == "new file":
        (folder / "three.c").write_text("int three(void) { return 3; }\n")
    else:
        (folder / "two.c").rename(folder / "zwei.c")
    forget()
    assert twice(native.load("pair"), 5) == (13 if change in ("source", "header") else 7)
    assert len(libraries() - before) == 1 and native.source_hash("pair") != hashed


@needs_compiler
def test_other_files_of_the_folder_do_not_count(folder: Path) -> None:
    native.load("pair")
    before = libraries()
    (folder / "notes.txt").write_text("still not C")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.c").write_text("int broken(")
    forget()
    assert native.load("pair") is not None and libraries() == before


@needs_compiler
def test_flags_of_a_library_tell_it_from_the_same_with_others(folder: Path) -> None:
    assert twice(native.load("pair", ("-DSTEP=10",)), 5) == 25
    assert twice(native.load("pair"), 5) == 7
    assert twice(native.build_variant("pair", ("-DSTEP=100",)), 5) == 205
    assert len(libraries()) == 3


@x86
@needs_compiler
def test_variant_for_another_machine_is_not_for_this_one(folder: Path) -> None:
    """A plain x86-64 has neither AVX nor FMA, whatever -march=native has here."""
    (folder / "two.c").write_text(
        '#include "pair.h"\n#ifdef __SSE3__\n#error "too new"\n#endif\n'
        "int step(int x) { return x + STEP; }\n"
    )
    assert twice(native.build_variant("pair", ("-march=x86-64",)), 1) == 3


@needs_compiler
def test_source_that_does_not_compile_gives_the_reference(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "two.c").write_text("int step(int x) { return y; }\n")
    with caplog.at_level("INFO"):
        assert native.load("pair") is None
        assert native.build_variant("pair", ("-DSTEP=2",)) is None
    assert "error" in caplog.text and "pair -DSTEP=2: not built" in caplog.text
    assert not list(native.cache_directory().iterdir())


@pytest.mark.parametrize("name", ["absent", "hollow"])
def test_library_without_sources_gives_the_reference(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder.parent / "hollow").mkdir()
    (folder.parent / "hollow" / "only.h").write_text("")
    with caplog.at_level("INFO"):
        assert native.load(name) is None
    assert name in caplog.text

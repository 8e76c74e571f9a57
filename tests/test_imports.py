"""Who may import whom, and what a command may not load before it has work to do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitnest
from bitnest import errors

PACKAGE = Path(bitnest.__file__).parent
VERBS = "api and cli"
# From the bottom up. A module may import from its own rank and from those before it.
RANKS: list[set[str]] = [
    # the files beside api.py: errors, formats, checkpoint, sites, recipe, artifact ...
    {"nouns", "html"},
    {"kernels"},
    {"packed"},
    {"calibrate", "quantize", "prune"},
    {"repair"},
    {"eval"},
    {"export"},
    {"serve"},
    {VERBS},
]
# Paths of the embedded model and texts, which a noun may ask for when somebody types `demo`.
LAZY_DEMO = {"checkpoint"}


def group(module: str) -> str:
    """Rank name of a module given by its dotted name below `bitnest`, "" for the package itself."""
    head = module.partition(".")[0]
    if head in {"api", "cli", "__main__"}:
        return VERBS
    if head in {"formats", "statistics"}:  # nouns that outgrew their files
        return "nouns"
    return head if (PACKAGE / head).is_dir() and head else "nouns"


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix("__init__").rstrip("."), ast.parse(file.read_text("utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names below `bitnest` that a module imports anywhere, except for type checking."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            base = node.module or ""
            names = [f"bitnest.{a.name}" for a in node.names] if base == "bitnest" else [base]
        else:
            continue
        for name in names:
            if name.startswith("bitnest."):
                yield name.removeprefix("bitnest.")


def rank(name: str) -> int:
    return next(i for i, names in enumerate(RANKS) if name in names)


def test_imports_point_downwards() -> None:
    wrong = []
    for name, tree in modules():
        own = group(name)
        if own == "demo" or not name:  # the root package hands out the verbs lazily
            continue
        for target in imports(tree):
            if target == "__version__":
                continue
            if target.partition(".")[0] == "demo":
                if own == "nouns" and name not in LAZY_DEMO:
                    wrong.append(f"{name} imports {target}")
            elif rank(group(target)) > rank(own):
                wrong.append(f"{name} ({own}) imports {target} ({group(target)})")
    assert not wrong, "\n".join(wrong)


def test_every_folder_has_a_rank() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    ranked = {name for names in RANKS for name in names} & folders
    assert folders - {"api", "demo", "cli", "formats", "statistics"} == ranked


def test_demo_needs_nothing_of_the_package_to_say_where_it_lies() -> None:
    tree = ast.parse((PACKAGE / "demo" / "__init__.py").read_text("utf-8"))
    assert list(imports(tree)) == []


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["--version"], []])
def test_help_loads_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "sys.argv[0] = 'bitnest'\n"
        "from bitnest.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "bitnest" in done.stdout.lower()


def test_importing_bitnest_first_still_registers_the_quantizer() -> None:
    code = (
        "import sys, bitnest\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "assert 'bitnest' in known\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_transformers_first_still_registers_the_quantizer() -> None:
    code = (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "import bitnest\n"
        "assert 'bitnest' in known\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_extra_names_the_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingExtra) as caught:
        errors.require("fastapi", "serve")
    assert "fastapi" in caught.value.what
    assert caught.value.hint == "pip install 'bitnest[serve]'"


def test_extras_that_errors_name_exist() -> None:
    import tomllib

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    asked = set()
    for _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("require"):
                values = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if len(values) == 2:
                    asked.add(values[1])
    assert asked and asked <= set(extras)

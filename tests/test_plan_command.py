"""`bitnest plan` as it is typed: what says nothing is refused, and results are on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from bitnest import api
from bitnest.cli import app
from bitnest.errors import BitnestError
from tests.tiny import Builder


@pytest.fixture(scope="module")
def place(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model `m` and the statistics that commands find there."""
    folder = tmp_path_factory.mktemp("plans")
    (folder / "m").symlink_to(tiny("llama"))
    api.analyze(
        folder / "m", folder / f"{(folder / 'm').resolve().name}-statistics",
        data=[f"text={text}"], formats=("int2-g32", "int4-g32", "int8-g32"), probes=2,
        probe_windows=2, fisher_windows=2, samples=8, length=32,
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def plan(*options: str) -> Result:
    return CliRunner().invoke(app, ["plan", "m", *options])


@pytest.mark.parametrize(
    "options, word",
    [
        (["--frontier", "--context", "100"], "--context"),
        (["--frontier", "--machine", "h100"], "--machine"),
        (["--compare", "--machine", "h100"], "--machine"),
        (["--frontier", "--policy", "none-such"], "none-such"),
        (["--data", "nowhere.txt"], "--data"),
        (["--statistics", "elsewhere", "--data", "nowhere.txt"], "--data"),
        (["--latency", "times.json"], "--latency"),
        (["--points", "3"], "--points"),
        (["--check", "p.yaml", "--context", "100"], "--context"),
        (["--check", "p.yaml", "--exact"], "--exact"),
        (["--explain", "nonsense", "--explain", "kind:attention"], "nonsense"),
        (["--explain", "kind:attention", "--explain", "nonsense", "--json"], "nonsense"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_options_that_would_say_nothing_are_refused(options: list[str], word: str) -> None:
    done = plan(*options)
    assert isinstance(done.exception, BitnestError), done.output
    assert word in done.exception.what and done.exception.hint and not done.stdout


def test_a_frontier_of_another_policy() -> None:
    done = plan("--frontier", "--policy", "uniform", "--points", "4", "--json")
    points = json.loads(done.stdout)["points"]
    assert len(points) >= 2 and {point["policy"] for point in points} == {"uniform"}

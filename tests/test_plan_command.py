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
from bitnest.plan import Plan
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


def test_what_a_check_found_is_on_stdout(place: Path) -> None:
    assert plan("--bits", "4", "-o", "p.yaml").exit_code == 0
    done = plan("--check", "p.yaml", "-q")
    assert "predicted KL" in done.stdout and "as it was made" in done.stdout
    assert not done.stderr
    text = (place / "p.yaml").read_text("utf-8") + "- '*.0.self_attn.*': int2-g32\n"
    (place / "e.yaml").write_text(text, "utf-8")
    done = plan("--check", "e.yaml", "-q")
    assert "was edited since it was made" in done.stdout
    assert json.loads(plan("--check", "e.yaml", "--json").stdout)["state"] == "edited"
    plan("--check", "e.yaml", "-o", "again.yaml")
    old, new = Plan.read("e.yaml"), Plan.read("again.yaml")
    assert new.expected != old.expected and new.digest != old.digest  # both of the rules as edited
    assert new.rules == old.rules and not new.edited
    bare = "".join(line for line in text.splitlines(True) if not line.startswith("digest"))
    (place / "bare.yaml").write_text(bare, "utf-8")
    assert "not known" in plan("--check", "bare.yaml", "-q").stdout


def test_outputs_that_cannot_be_written_are_refused_before_work(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "d").mkdir()
    (place / "f").write_text("")
    monkeypatch.setattr(api, "plan", lambda *_a, **_k: pytest.fail("work began"))
    monkeypatch.setattr(api, "frontier", lambda *_a, **_k: pytest.fail("work began"))
    for options in (["-o", "d"], ["-o", "f/p.yaml"], ["--frontier", "--plot", "f/p.svg"]):
        done = plan(*options)
        assert isinstance(done.exception, BitnestError), options
        assert done.exception.hint and options[-2] in done.exception.what


@pytest.mark.parametrize(
    "target, rule, word",
    [
        ("native", "model.embed_tokens: zero", "says nothing"),
        ("native", "kind:attention: int5-g32", "was not measured"),
        ("vllm-cuda", "model.layers.0.self_attn.q_proj: int2-g32", "one format"),
        ("vllm-cuda", "kind:attention: int2-g32@had32", "vllm-cuda"),
    ],
)
def test_what_a_plan_may_not_have_is_found_with_its_line(
    target: str, rule: str, word: str, place: Path, text: Path
) -> None:
    content = f"plan: 1\ntarget: {target}\nrules:\n- kind:mlp: dense\n- {rule}\n"
    (place / "wrong.yaml").write_text(content, "utf-8")
    statistics = next(place.glob("*-statistics"))
    for options in (
        ["plan", "m", "--check", "wrong.yaml"],
        ["compress", "m", "--plan", "wrong.yaml", "--statistics", str(statistics), "-o", "a"],
    ):
        done = CliRunner().invoke(app, options)
        assert isinstance(done.exception, BitnestError), (options, done.output)
        assert done.exception.where == "wrong.yaml:5" and word in str(done.exception)

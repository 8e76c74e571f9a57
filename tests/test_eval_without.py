"""Experts switched off: the figures against a model computed token by token, and bad requests."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bitnest import api
from bitnest.calibrate.data import load_texts, token_windows
from bitnest.cli import main
from bitnest.errors import BitnestError, UnsupportedModel
from bitnest.eval import without as without_module
from bitnest.eval.evaluate import evaluate
from bitnest.eval.render import table
from bitnest.eval.report import EvalReport
from bitnest.eval.without import Off, Switch, find_switches, parse_without, silence, switched_off
from bitnest.packed.loading import load_model, load_tokenizer
from bitnest.sites import Site
from tests.tiny import VOCAB, Builder

WINDOW, WINDOWS = 24, 4
MOE = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v2")
"""Gates that sum to 1, gates that do not beside a shared expert, biases, a first dense block."""
TOKENS = torch.arange(24).mul(13).remainder(VOCAB).view(2, 12)


def run(models: Sequence[Path], text: Path, *without: str, **options: Any) -> EvalReport:
    return evaluate(
        models, data=[str(text)], without=without, window=WINDOW, windows=WINDOWS, **options
    )


def one_by_one(module: Any, off: Sequence[int]) -> Callable[..., torch.Tensor]:
    """The definition written down per token: each kept expert alone with gate 1, then the sum."""
    original = module.forward

    def forward(hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            chosen = list(zip(index[t].tolist(), gates[t].tolist(), strict=True))
            kept = [(e, g) for e, g in chosen if e not in off]
            if not kept:
                continue
            scale = sum(g for _, g in chosen) / sum(g for _, g in kept)
            for e, g in kept:
                y = original(hidden[t : t + 1], torch.tensor([[e]]), torch.ones(1, 1))
                output[t] += scale * g * y[0]
        return output

    return forward


def truth(path: Path, text: Path, name: str, off: Sequence[int]) -> tuple[float, float]:
    """Mean nll without the experts, and KL from the whole model, from float64 log-probabilities."""
    tokens = token_windows(
        load_tokenizer(path), load_texts(str(text)), window=WINDOW, count=WINDOWS
    )
    model = load_model(path, dtype="float32")
    with torch.no_grad():
        log_p = model(tokens).logits[:, :-1].double().log_softmax(-1)
        module = model.get_submodule(name)
        module.forward = one_by_one(module, off)  # type: ignore[method-assign]
        log_q = model(tokens).logits[:, :-1].double().log_softmax(-1)
    nll = -log_q.gather(-1, tokens[:, 1:, None]).mean()
    return float(nll), float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def check(path: Path, text: Path) -> None:
    for spec, off in (("1:2", (2,)), ("1:0,3", (0, 3))):
        report = run([path], text, spec)
        name = next(iter(find_switches(parse_without([spec]), "", path)[0].modules))
        nll, kl = truth(path, text, name, off)
        base, row = report.rows
        assert (base.base, base.without, base.scores[0].kl) == (True, (), None)
        assert row.model == f"{path.name} without {spec}"
        assert row.scores[0].kl is not None
        assert row.scores[0].nll == pytest.approx(nll, abs=2e-5)
        assert row.scores[0].kl.mean == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert kl > 1e-4, "the expert does nothing: the test would not see a mistake"


@pytest.fixture(scope="module")
def packed(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "packed"
    api.compress(tiny("mixtral"), out, data=[str(text)], samples=4, length=32, format="int4-g32")
    return out


@pytest.mark.parametrize("family", MOE)
def test_figures_are_those_of_a_model_computed_token_by_token(
    family: str, tiny: Builder, text: Path
) -> None:
    check(tiny(family), text)


def test_packed_experts_are_switched_off_as_dense_ones_are(packed: Path, text: Path) -> None:
    check(packed, text)


def test_only_expert_of_a_token_leaves_zero_as_if_its_down_projection_were_zero(
    tiny: Builder, text: Path, tmp_path: Path
) -> None:
    path = tiny("qwen3_moe", "top1", num_experts_per_tok=1)
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"].zero_()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = run([tmp_path], text).rows[0].scores[0].nll
    whole, without = (row.scores[0].nll for row in run([path], text, "1:2").rows)
    assert without == pytest.approx(expected, abs=1e-6)
    assert abs(whole - expected) > 1e-5


def test_gates_by_hand_and_tokens_without_the_expert_to_the_bit() -> None:
    index = torch.tensor([[0, 1, 2], [3, 1, 0], [3, 2, 1], [1, 3, 2]])
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.1], [0.2, 0.3, 0.7], [0.0, 0.9, 0.0]])
    found = silence(index, gates, [3])
    expected = [[0.5, 0.3, 0.2], [0, 0.6 * 0.8 / 0.7, 0.1 * 0.8 / 0.7], [0, 0.36, 0.84], [0, 0, 0]]
    assert torch.equal(found[0], gates[0])
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(silence(index, gates, [0, 1, 2, 3]), torch.zeros_like(gates))
    half = silence(index, gates.bfloat16(), [3])
    assert half.dtype == torch.bfloat16
    assert torch.equal(half[0], gates[0].bfloat16())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_obeys_and_is_restored(
    implementation: str, tiny: Builder
) -> None:
    path = tiny("mixtral")
    model = load_model(path, dtype="float32")
    model.config._experts_implementation = implementation
    (switch,) = find_switches([Off(1, (2,))], "", path)
    (name,) = switch.modules
    module: Any = model.get_submodule(name)
    with torch.no_grad():
        before = model(TOKENS).logits
        with switched_off(model, switch):
            found = model(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, before)
        assert "forward" not in vars(module)
        module.forward = one_by_one(module, (2,))
        expected = model(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


def test_forward_that_was_replaced_before_comes_back_after_an_error(tiny: Builder) -> None:
    path = tiny("mixtral")
    model = load_model(path)
    (switch,) = find_switches([Off(0, (0,))], "", path)
    module: Any = model.get_submodule(next(iter(switch.modules)))
    module.forward = own = lambda *_: None
    with pytest.raises(ZeroDivisionError), switched_off(model, switch):
        assert module.forward is not own
        raise ZeroDivisionError
    assert module.forward is own


def test_experts_called_without_one_gate_per_choice_are_refused(tiny: Builder) -> None:
    path = tiny("mixtral")
    model = load_model(path, dtype="float32")
    (switch,) = find_switches([Off(0, (0,))], "", path)
    module: Any = model.get_submodule(next(iter(switch.modules)))
    hidden, index = torch.zeros(3, 64), torch.zeros(3, 2, dtype=torch.int64)
    with switched_off(model, switch), pytest.raises(UnsupportedModel, match="one gate") as caught:
        module(hidden, index, torch.ones(3, 4))
    assert "gates (3, 4)" in caught.value.what


def test_each_model_gets_its_rows_and_the_base_of_against_none(
    tiny: Builder, packed: Path, text: Path
) -> None:
    base = tiny("mixtral")
    report = run([packed, base], text, "0:1", "1:2,0", against=base)
    assert report.base == "mixtral"
    assert [row.model for row in report.rows] == [
        "mixtral", "packed", "packed without 0:1", "packed without 1:0,2",
        "mixtral", "mixtral without 0:1", "mixtral without 1:0,2",
    ]  # fmt: skip
    assert [row.base for row in report.rows] == [True] + 6 * [False]
    whole = report.rows[4].scores[0].kl
    assert whole is not None
    assert abs(whole.max) < 1e-6
    assert all(row.scores[0].kl is not None for row in report.rows[1:])
    assert report.rows[6].scores[0].nll == run([base], text, "1:0,2").rows[1].scores[0].nll


def test_several_models_without_a_base_have_perplexity_only(
    tiny: Builder, packed: Path, text: Path
) -> None:
    report = run([tiny("mixtral"), packed], text, "0:1")
    assert report.base is None
    assert len(report.rows) == 4
    assert all(row.scores[0].kl is None for row in report.rows)


def test_one_model_without_switches_is_still_no_base(tiny: Builder, text: Path) -> None:
    report = run([tiny("mixtral")], text)
    assert report.base is None
    assert not report.rows[0].base


def test_json_names_the_experts_and_a_narrow_table_the_models(tiny: Builder, text: Path) -> None:
    report = run([tiny("mixtral")], text, "1:3,1")
    rows = json.loads(json.dumps(report.to_json()))["rows"]
    assert [row["without"] for row in rows] == [[], ["1:1", "1:3"]]
    console = Console(width=70, record=True, file=io.StringIO())
    console.print(table(report))
    shown = console.export_text()
    assert "mixtral without" in shown
    assert "1:1,3" in shown
    assert "other gates scaled" in shown


@pytest.mark.parametrize(
    ("family", "spec", "message", "hint"),
    [
        ("mixtral", "1:4", "has 4 experts, there is no expert 4", "0 to 3"),
        ("mixtral", "0:1,17", "there is no expert 17", "0 to 3"),
        ("mixtral", "2:0", "layer 2 of 'mixtral' has no experts", "0-1"),
        ("deepseek_v2", "0:0", "layer 0 of 'deepseek_v2' has no experts", "experts: 1"),
        ("llama", "0:0", "'llama' has no experts", "Mixture"),
    ],
)
def test_experts_that_are_not_there_are_refused_before_weights_are_read(
    family: str, spec: str, message: str, hint: str, tiny: Builder, text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("bitnest.eval.evaluate.load_model", None)
    with pytest.raises(BitnestError, match=message) as caught:
        run([tiny(family)], text, spec)
    assert caught.value.where == str(tiny(family))
    assert hint in caught.value.hint


def test_expert_that_an_artifact_lacks_is_refused(packed: Path, text: Path) -> None:
    with pytest.raises(BitnestError, match="has 4 experts, there is no expert 9"):
        run([packed], text, "0:9")


@pytest.mark.parametrize(
    "specs",
    [["2"], ["2:"], [":1"], ["2:a"], ["2:1,"], ["-1:0"], ["1: 2"], ["1:2:3"], [""], ["1:\u0662"]],
)
def test_other_spellings_are_refused_before_any_model_is_looked_for(specs: list[str]) -> None:
    with pytest.raises(BitnestError, match="not of the form LAYER:EXPERT") as caught:
        evaluate(["/no/such/model"], data=["x"], without=specs)
    assert "2:15" in caught.value.hint


@pytest.mark.parametrize("specs", [["1:2,2"], ["1:2", "1:2"], ["1:2,3", "1:3,2"]])
def test_what_is_named_twice_is_refused(specs: list[str]) -> None:
    with pytest.raises(BitnestError, match="named twice"):
        parse_without(specs)


def test_experts_in_a_list_of_modules_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [
        Site(f"layers.0.experts.{e}.up", "expert", 0, e, (8, 8), f"layers.0.experts.{e}.up",
             "weight")
        for e in range(3)
    ]  # fmt: skip
    monkeypatch.setattr(without_module, "_sites", lambda *_: sites)
    with pytest.raises(UnsupportedModel, match="not keep the experts of layer 0 in one module"):
        find_switches([Off(0, (1,))], "listed", tmp_path)


def test_nothing_switched_off_changes_no_module(tiny: Builder) -> None:
    model = load_model(tiny("mixtral"))
    with switched_off(model, Switch()):
        assert not any("forward" in vars(module) for module in model.modules())


def test_command_line_adds_rows_and_refuses_with_status_two(
    tiny: Builder, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*more: str) -> tuple[int, str, str]:
        arguments = ["eval", str(tiny("mixtral")), "--data", str(text), "--quiet", *more]
        monkeypatch.setattr(
            sys, "argv", ["bitnest", *arguments, "--window", "24", "--windows", "2"]
        )
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    code, out, _ = call("--without", "0:1", "--without", "1:2", "--json")
    assert code == 0
    assert [row["without"] for row in json.loads(out)["rows"]] == [[], ["0:1"], ["1:2"]]
    monkeypatch.setenv("COLUMNS", "20")
    code, out, _ = call("--without", "0:1")
    assert code == 0
    assert "mixtral (base)" in out
    assert "mixtral without" in out
    for wrong in ("0;1", "0:4", "7:0"):
        code, out, err = call("--without", wrong)
        assert (code, out) == (2, "")
        assert wrong in err
        assert "Traceback" not in err
        assert "hint:" in err

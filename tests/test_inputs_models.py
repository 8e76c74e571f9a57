"""Models whose matrices read rounded inputs: made, stored, loaded, resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.cli import app
from bitnest.errors import FormatError, RecipeError
from bitnest.formats import parse_format
from bitnest.formats.inputs import parse_inputs
from bitnest.manifest import SiteRecord, fold, unfold
from bitnest.packed.decoded import DecodedCheckpoint, open_checkpoint
from bitnest.packed.loading import load_model
from bitnest.packed.modules import PackedWeight, inputs_unrounded
from bitnest.packed.rounding import Rounder, each_input, rounding
from bitnest.plan import Plan
from bitnest.quantize.compress import prepare
from bitnest.quantize.sizing import artifact_sizes
from bitnest.recipe import Recipe, Rule
from bitnest.recipe_file import parse_recipe
from bitnest.sites import is_experts
from tests.test_resume import digests, unfinished
from tests.tiny import Builder

QUICK = {"samples": 4, "length": 32}
TOKENS = torch.arange(5, 45)[None] % 300


def logits(model) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def made(model: Path, text: Path, out: Path, **options) -> Artifact:  # type: ignore[no-untyped-def]
    api.compress(model, out, data=[str(text)], **{**QUICK, **options})
    return Artifact.open(out)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt2", "gpt_oss"])
@pytest.mark.parametrize(
    ("weights", "inputs"),
    [("int8-channel", "int8-token"), ("int4-g32@perm", "32xint8-token~int4-g32")],
)
def test_a_packed_model_is_the_dense_one_with_rounded_inputs(
    family: str, weights: str, inputs: str, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    """Packed weights multiplied as codes, against decoded ones and `each_input`."""
    artifact = made(tiny(family), text, tmp_path / "a", format=weights, inputs=inputs)
    packed = load_model(artifact.path, dtype="float32")
    rounded = logits(packed)
    with inputs_unrounded(packed):
        plain = logits(packed)
    assert not torch.allclose(rounded, plain, atol=1e-4)
    headers = artifact.headers()
    rounders = {
        r.site.name: Rounder(
            parse_inputs(r.inputs), parse_format(r.format), basis(r, headers), r.input_scale
        )
        for r in artifact.packed()
        if r.inputs
    }
    assert rounders
    dense = dense_model(artifact, tmp_path / "dense")
    assert torch.allclose(logits(dense), plain, atol=1e-4)
    sites = [r.site for r in artifact.packed()]
    with each_input(dict(dense.named_modules()), sites, rounding(rounders)):
        again = logits(dense)
    # a rounding of the dense path may fall on the other side where a code is at a half
    assert float((again - rounded).abs().mean()) < 0.05 * float((plain - rounded).abs().mean())
    assert torch.allclose(logits(dense), plain, atol=1e-4)  # nothing is left behind


def basis(record: SiteRecord, headers):  # type: ignore[no-untyped-def]
    from bitnest.artifact import site_tensors
    from bitnest.quantize.compress import basis_tensors

    return basis_tensors(site_tensors(record, headers))


def dense_model(artifact: Artifact, out: Path):  # type: ignore[no-untyped-def]
    """The artifact decoded into a plain model."""
    from safetensors.torch import save_file

    checkpoint = DecodedCheckpoint.of(artifact, whole=True)
    checkpoint = replace(checkpoint, kind=torch.float32)
    out.mkdir()
    tensors = {name: checkpoint.read(name).float().contiguous() for name in checkpoint.tensors}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {**checkpoint.config, "dtype": "float32", "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()


def test_rules_say_inputs(tiny: Builder, text: Path, tmp_path: Path) -> None:
    artifact = made(
        tiny("mixtral"), text, tmp_path / "a", format="int8-channel", inputs="int8-token",
        rules=["*.w2=int6-g32/int6-g32", "kind:attention=int8-g32",
               "*.v_proj=int4-g32/dense", "*.o_proj=dense"],
    )  # fmt: skip
    found = {r.site.name: (r.format, r.inputs) for r in artifact.records}
    for name, (weights, inputs) in found.items():
        if name.endswith(".w2"):
            assert (weights, inputs) == ("int6-g32", "int6-g32")
        elif name.endswith("q_proj"):
            assert (weights, inputs) == ("int8-g32", "int8-token")
        elif name.endswith("v_proj"):
            assert (weights, inputs) == ("int4-g32", "")
        elif name.endswith("o_proj"):
            assert (weights, inputs) == ("dense", "")
        elif "experts" in name:
            assert (weights, inputs) == ("int8-channel", "int8-token")
    said = {(g.kind, g.format) for g in api.compress(
        tiny("mixtral"), tmp_path / "b", format="int8-channel/int8-token", data=[str(text)], **QUICK
    ).groups}  # fmt: skip
    assert ("expert", "int8-channel/int8-token") in said


def test_static_scales_are_the_texts(tiny: Builder, text: Path, tmp_path: Path) -> None:
    one = made(tiny("mixtral"), text, tmp_path / "a", format="int8-channel", inputs="int8-static",
               static="absmax")  # fmt: skip
    scales = {r.site.name: r.input_scale for r in one.records if r.inputs}
    assert all(scales.values())
    model, seen = load_model(one.path, dtype="float32"), {}
    names = {id(m): n for n, m in model.named_modules()}

    def look(module, args):  # type: ignore[no-untyped-def]
        seen[names[id(module)]] = max(seen.get(names[id(module)], 0.0), float(args[0].abs().max()))

    for module in model.modules():
        if type(module).__name__ == "PackedLinear":
            module.register_forward_pre_hook(look)
    from bitnest.api.texts import calibration_set, sources
    from bitnest.packed.loading import load_tokenizer

    tokens = calibration_set(load_tokenizer(one.path), sources([str(text)]), 4, 32, 0).tokens
    with torch.no_grad():
        model(tokens)
    first = {n: v for n, v in seen.items() if ".0.self_attn" in n and "o_proj" not in n}
    for name, peak in first.items():  # the first block's inputs are the same as in calibration
        assert scales[name] * 127 == pytest.approx(peak, rel=1 / 64)
    assert len(first) == 3
    mse = made(tiny("mixtral"), text, tmp_path / "b", format="int8-channel", inputs="int8-static")
    assert {r.site.name: r.input_scale for r in mse.records if r.inputs} != scales
    assert mse.manifest["resolved"]["inputs"] == "int8-static"


def test_static_scales_make_rtn_read_text(tiny: Builder, text: Path, tmp_path: Path) -> None:
    artifact = made(tiny("llama"), text, tmp_path / "a", format="int8-channel", method="rtn",
                    inputs="fp8-static")  # fmt: skip
    assert all(r.input_scale for r in artifact.records if r.inputs)
    plain = made(tiny("llama"), text, tmp_path / "b", format="int8-channel", method="rtn",
                 inputs="fp8-token")  # fmt: skip
    assert plain.manifest["calibration"] is None


def test_a_killed_run_resumes(tiny: Builder, text: Path, tmp_path: Path) -> None:
    """The next block is fitted to what rounded inputs give, replayed or not."""
    model = tiny("mixtral", "deep", num_hidden_layers=6)
    options = {"format": "int4-g32@had32", "inputs": "int8-static"}
    api.compress(model, tmp_path / "whole", data=[str(text)], **QUICK, **options)
    unfinished(model, tmp_path / "b", text, **options)
    api.compress(model, tmp_path / "b", data=[str(text)], **QUICK, **options)
    assert digests(tmp_path / "b") == digests(tmp_path / "whole")
    api.compress(model, tmp_path / "c", data=[str(text)], **QUICK, format="int4-g32@had32")
    one, other = Artifact.open(tmp_path / "b"), Artifact.open(tmp_path / "c")
    last = "packed-00006-of-00006.safetensors"
    assert one.manifest["files"][last] != other.manifest["files"][last]


def test_sizes_are_known_before(tiny: Builder, text: Path, tmp_path: Path) -> None:
    for number, (weights, inputs) in enumerate(
        [("int8-channel", "int8-static"), ("32xint8-g32~int4-g32@perm", "32xint8-g32~int4-g32")]
    ):
        recipe = Recipe(format=weights, inputs=inputs)
        out = tmp_path / str(number)
        artifact = made(tiny("mixtral"), text, out, format=weights, inputs=inputs)
        job = prepare(open_checkpoint(tiny("mixtral")), recipe)
        job = replace(job, asked=artifact.manifest["resolved"])
        from bitnest.api.texts import calibration_set, sources
        from bitnest.packed.loading import load_tokenizer
        from bitnest.quantize.compress import with_calibration

        found = calibration_set(load_tokenizer(out), sources([str(text)]), 4, 32, 0)
        sizes = artifact_sizes(with_calibration(job, found), job.formats)
        real = sum(file.stat().st_size for file in artifact.path.iterdir())
        assert 0 <= sizes.artifact - real < 30 * len(artifact.records)


def test_generation_and_evaluation(tiny: Builder, text: Path, tmp_path: Path) -> None:
    artifact = made(tiny("qwen3_moe"), text, tmp_path / "a", format="int8-channel/int8-token")
    model = load_model(artifact.path)
    out = model.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 12)
    assert sum(w.rounding for w in model.modules() if isinstance(w, PackedWeight)) == len(
        [r for r in artifact.records if r.inputs]
    )
    report = api.evaluate([artifact.path], against=tiny("qwen3_moe"), data=[str(text)], window=32,
                          windows=2)  # fmt: skip
    assert 0 < report.rows[1].scores[0].kl.mean < 0.05  # type: ignore[union-attr]


def test_records_keep_inputs() -> None:
    from bitnest.sites import Site

    site = Site("a.0.b", "attention", 0, None, (4, 16), "a.0.b", "weight")
    records = [
        SiteRecord(site, "int8-channel", 10, 0.5, None, "f", inputs="int8-static", input_scale=0.1),
        SiteRecord(replace(site, name="a.0.c"), "int8-channel", 10, 0.5, 7, "f", (), (1.0, 2.0)),
        SiteRecord(replace(site, name="a.0.d"), "int8-channel", 10, 0.5, 7, "f", (), (1.0, 2.0),
                   "int8-static", 3e-7),
        SiteRecord(replace(site, name="a.0.e"), "int8-channel", 10, 0.5, 7, "f"),
    ]  # fmt: skip
    text = json.dumps(fold(record.to_json() for record in records))
    assert {SiteRecord.from_json(item) for item in unfold(json.loads(text))} == set(records)


def test_plans_and_recipes_say_inputs() -> None:
    text = Plan((Rule("*.up_proj", "int6-g128/int8-g128"),)).to_text()
    assert Plan.from_text(text).rules == (Rule("*.up_proj", "int6-g128/int8-g128"),)
    assert (
        Plan.from_text(text.replace("int8-g128", "fp8-token")).rules[0].inputs == "fp8_e4m3-token"
    )
    found = parse_recipe("format: int8-channel\ninputs: int8-token\nfit: {static: absmax}\n")
    assert found["inputs"] == "int8-token" and found["static"] == "absmax"
    with pytest.raises(Exception, match=":2"):
        parse_recipe("format: int8-channel\ninputs: int9-token\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rules": ["*.down_proj=dense/int8-token"]}, "only inputs of packed"),
        ({"rules": ["lm_head=int8-channel/int8-token"]}, "reads"),
        ({"format": "int8-channel/int8-token", "inputs": "fp8-token"}, "already says"),
        ({"inputs": "int8-channel"}, "inputs"),
        ({"format": "int8-channel", "inputs": "int8-static", "static": "median"}, "static"),
        ({"format": "int8-channel", "inputs": "int8-token", "static": "absmax"}, "says nothing"),
        ({"format": "int8-channel", "static": "percentile"}, "says nothing"),
        ({"format": "dense", "inputs": "int8-token"}, "says nothing"),
    ],
)  # fmt: skip
def test_refusals(options, said: str, tiny: Builder, text: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((RecipeError, FormatError), match=said) as caught:
        made(tiny("qwen3_moe"), text, tmp_path / "a", **options)
    assert caught.value.hint and not (tmp_path / "a").exists()


def test_command(tiny: Builder, text: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app, ["compress", str(tiny("llama")), "--format", "int8-channel/fp8-token", "--data",
              str(text), "--samples", "2", "--length", "32", "-q"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    place = next(Path.cwd().glob("*int8-channel-inputs-fp8-token"))
    shown = CliRunner().invoke(app, ["inspect", str(place)]).output
    assert "int8-channel/fp8_e4m3-token" in shown
    shutil.rmtree(place)


@pytest.mark.parametrize(
    "words",
    [["--format", "int4-g128/dense"], ["--format", "int4-g128", "--inputs", "dense"],
     ["--format", "int4-g128/int4-token"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_typed_of_inputs_wins_over_a_recipe(
    words: list[str], tiny: Builder, tmp_path: Path
) -> None:
    out = tmp_path / "a"
    run = CliRunner().invoke(
        app, ["compress", str(tiny("llama")), "--recipe", "mxfp8", "--method", "rtn", *words, "-o",
              str(out), "-q"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    wanted = "int4-token" if words[-1].endswith("token") else ""
    assert {record.inputs for record in Artifact.open(out).packed()} == {wanted}


def test_routers_read_their_inputs_as_they_are() -> None:
    from bitnest.sites import Site

    sites = [Site(f"a.{kind}", kind, 0, None, (4, 16), "a", "weight") for kind in ("router", "mlp")]
    recipe = Recipe(format="int8-channel", inputs="int8-token")
    formats = recipe.formats(sites, 2) | {"a.router": parse_format("int8-channel")}
    assert set(recipe.input_formats(sites, formats)) == {"a.mlp"}
    named = Recipe(rules=(Rule("kind:router", "int8-channel/int8-token"),))
    with pytest.raises(RecipeError, match=r"reads"):
        named.input_formats(sites, formats)


def test_experts_are_named_as_modules(tiny: Builder) -> None:
    """`each_input` sees every matrix of fused experts, gate and up apart."""
    job = prepare(open_checkpoint(tiny("mixtral")), Recipe())
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype="float32").eval()
    seen: set[str] = set()

    def look(site, x):  # type: ignore[no-untyped-def]
        seen.add(site.name)
        assert x.shape[-1] == site.shape[1]
        return x

    before = logits(model)
    sites = [s for s in job.sites if s.kind in ("attention", "expert")]
    with each_input(dict(model.named_modules()), sites, look):
        assert torch.allclose(logits(model), before, atol=1e-5)
    reached = {s.name for s in sites}
    assert seen <= reached and len(seen) > 0.7 * len(reached)  # experts without tokens read nothing
    assert any(is_experts(m) for m in model.modules())

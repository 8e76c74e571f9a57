"""Embedding and head as sites: solved in slices, looked up by rows, tied, resumed, exported."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitnest import api
from bitnest.artifact import Artifact, site_tensors
from bitnest.errors import RecipeError
from bitnest.formats import parse_format
from bitnest.kernels.decode import decode
from bitnest.kernels.rows import decode_into, decode_rows, row_decodable
from bitnest.packed import modules
from bitnest.packed.modules import PackedHead
from bitnest.quantize.ends import check_ends, cuttable, end_tensors, joined, slice_rows
from bitnest.quantize.memory import ENDS_WORK, FLOAT, WORKING_COPIES, Budget
from bitnest.quantize.solve import Options, solve
from bitnest.sites import Site
from tests.tiny import FAMILIES, VOCAB, Builder, build

EXACT = (
    "int1-g32", "int2-g128", "int3-g32", "int4-g32-asym", "int5-channel-asym", "int7-channel",
    "int8-tensor", "int8-b64x32", "int4-g32-dq", "int4-g32-asym-dq", "int4-g32-e8m0", "dgq4-g32",
    "fp4_e2m1-g32-m1", "fp4_e2m1-g32-m2", "fp6_e3m2-g32", "fp8-channel", "mxfp4", "mxint8", "nvfp4",
    "nf4-g64", "nf4-g64-dq", "lut3-g32", "lut4-channel", "ternary-g32", "dense", "zero",
)  # fmt: skip
ROUNDED = ("int4-g32@had16", "int3-g32@rhad", "int4-g32@awq", "int4-g32@perm@had32",
           "int3-g32+hlr8", "int3-g32@had16+lorc4")  # fmt: skip
TOKENS = torch.arange(60)[None] % 50 * 6
OPTIONS: dict[str, Any] = {"format": "int4-g32", "samples": 4, "length": 32}
UNTIED = ("llama", "gptj", "mixtral")
TIED_RULE, HEAD_RULE = "kind:embedding=int4-g32", "kind:head=int3-g32"


def inputs(width: int) -> torch.Tensor:
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(1))
    return x.T @ x / len(x)


def matrix(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def stored(name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
    fmt = parse_format(name)
    if name == "dense":
        return {"weight": w}
    return solve(w[None], inputs(w.shape[1])[None], fmt, Options()).store(0, slice(0, len(w)))


@pytest.mark.parametrize("name", EXACT + ROUNDED)
def test_looked_up_rows_are_those_of_the_whole_matrix(name: str) -> None:
    w, fmt = matrix(200, 96), parse_format(name)
    tensors = stored(name, w)
    whole = decode(tensors, fmt, (200, 96))
    rows = torch.tensor([199, 0, 64, 63, 7, 7, 130, 31, 32])
    own = decode_rows(tensors, fmt, (200, 96), rows)
    into = decode_into(torch.empty(200, 96), tensors, fmt, step=7 * 96)
    if name in EXACT:
        assert torch.equal(own, whole[rows]) and torch.equal(into, whole)
    else:
        assert torch.allclose(own, whole[rows], atol=1e-5)
        assert torch.allclose(into, whole, atol=1e-5)


def test_entropy_coded_rows_cannot_be_looked_up() -> None:
    assert not row_decodable(parse_format("ternary-g32-dict"))
    assert not row_decodable(parse_format("ternary-g32-dict@had16+lorc4"))


@pytest.mark.parametrize("name", [n for n in EXACT + ROUNDED if n not in {"dense", "zero"}])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_slices_join_to_one_weight_of_the_promised_bytes(name: str, method: str) -> None:
    w, fmt = matrix(333, 96), parse_format(name)
    rows = slice_rows(fmt, (333, 96), 0)
    assert rows == 333 if not cuttable(fmt) else rows < 333 or "b64" in name or "asym" in name
    options, h = Options(method), inputs(96)
    tensors, (error,) = end_tensors(w, h, fmt, options, rows)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == fmt.nbytes((333, 96))
    miss = decode(tensors, fmt, (333, 96)) - w
    assert error == pytest.approx(float((miss @ h * miss).sum() / (w @ h * w).sum()), rel=1e-3)
    if method == "rtn":
        alone = joined([solve(w[None], h[None], fmt, options).store(0, slice(0, 333))])
        assert all(torch.equal(tensors[key], alone[key]) for key in alone)


def test_huge_heads_are_solved_within_a_bound() -> None:
    for name in ("int4-g128", "int4-g32-asym-dq", "mxfp4", "nf4-g64@had"):
        rows = slice_rows(parse_format(name), (150_000, 4096), ENDS_WORK)
        assert 0 < rows * 4096 * FLOAT * WORKING_COPIES <= ENDS_WORK and rows % 64 == 0


def test_memory_refuses_only_what_cannot_be_cut_small_enough() -> None:
    head = Site("lm_head", "head", 2, None, (150_000, 4096), "lm_head", "weight")
    square = WORKING_COPIES * FLOAT * 4096**2
    for spare, name, refused in (
        (square + ENDS_WORK, "int4-g128", False),
        (square, "int4-g128", True),
        (square + ENDS_WORK, "nvfp4", True),
        (None, "nvfp4", False),
        (0, "zero", False),
    ):
        budget = Budget(None, 1, None, ENDS_WORK if spare != square else 0, spare)
        with pytest.raises(RecipeError) if refused else nullcontext():
            check_ends([head], {"lm_head": parse_format(name)}, budget)


def dense_twin(artifact: Path, source: Path, dtype: Any = "auto") -> Any:
    """The source model with every packed weight decoded, and nothing of bitnest in it."""
    opened = Artifact.open(artifact)
    headers = opened.headers()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for record in opened.packed():
        fmt = parse_format(record.format)
        weight = decode(site_tensors(record, headers), fmt, record.site.shape, model.dtype)
        record.site.view(model.get_parameter(record.site.path).data).copy_(weight)
    return model.eval()


@pytest.fixture(scope="module")
def make(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def run(family: str, *rules: str, **options: Any) -> Path:
        key = repr((family, rules, options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("ends") / family
            api.compress(
                tiny(family), made[key], rules=rules, data=[str(text)], **{**OPTIONS, **options}
            )
        return made[key]

    return run


@pytest.mark.parametrize("family", [*UNTIED, "qwen2", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_logits_are_those_of_a_dense_model_with_the_decoded_ends(
    family: str, method: str, make: Any, tiny: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [TIED_RULE, HEAD_RULE] if family in UNTIED else [TIED_RULE]
    artifact = make(family, *rules, method=method)
    twin = dense_twin(artifact, tiny(family), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    assert isinstance(model.get_output_embeddings(), PackedHead)
    assert not any(n.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))
                   for n, _ in model.named_parameters())  # fmt: skip
    if len(rules) == 1:
        assert model.get_output_embeddings().packed is model.get_input_embeddings().packed
    table = twin.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, table)
    with torch.no_grad():
        expected = twin(TOKENS).logits
        own = model(TOKENS).logits
        assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(modules, "SLICE", 64 * 77)  # a head in several slices
        assert torch.allclose(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        model.tie_weights()
        assert torch.equal(model.get_input_embeddings().weight, table)
        half = model.to(torch.float16)
    assert half.get_input_embeddings()(TOKENS).dtype == torch.float16


def test_scaling_embeddings_keep_their_scale(make: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(make("gemma3", TIED_RULE))
    table = model.get_input_embeddings()
    assert "Scaled" in type(table).__name__
    assert torch.equal(table(TOKENS), table.weight[TOKENS] * table.embed_scale)


def test_a_fresh_process_loads_evaluates_and_inspects(make: Any, tiny: Builder) -> None:
    artifact = make("qwen2", TIED_RULE)
    script = (
        "import bitnest, sys, torch, json\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "x = torch.arange(60)[None] % 50 * 6\n"
        "print(json.dumps(model(x).logits.double().flatten().tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact)], capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        expected = dense_twin(artifact, tiny("qwen2"))(TOKENS).logits
    assert json.loads(done.stdout.splitlines()[-1]) == expected.double().flatten().tolist()
    sites = {site["kind"]: site for site in api.inspect(artifact, verify=True)["sites"]}
    assert sites["embedding"]["format"] == "int4-g32" and sites["embedding"]["layer"] == 2
    kinds = api.inspect(tiny("qwen2"))["kinds"]
    assert kinds["embedding"] == 1 and "head" not in kinds


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


def test_dense_ends_change_no_byte_but_their_records(make: Any) -> None:
    plain = make("mixtral")
    names = sorted(f.name for f in plain.glob("packed-*"))
    assert names == [f"packed-0000{i}-of-00002.safetensors" for i in (1, 2)]
    records = [r.to_json() for r in Artifact.open(plain).records][-2:]
    assert [(r["kind"], r["format"], r["layer"], r["file"]) for r in records] == [
        ("embedding", "dense", 2, ""), ("head", "dense", 2, ""),
    ]  # fmt: skip
    packed = make("mixtral", TIED_RULE, HEAD_RULE)
    assert len(list(packed.glob("packed-*"))) == 3
    assert (packed / "packed-00003-of-00003.safetensors").exists()
    for i in (1, 2):  # what the ends are stored in says nothing of the blocks
        own = (packed / f"packed-0000{i}-of-00003.safetensors").read_bytes()
        assert own == (plain / f"packed-0000{i}-of-00002.safetensors").read_bytes()


def test_every_byte_of_the_ends_is_counted(make: Any) -> None:
    result = api.summarise(Artifact.open(make("mixtral", TIED_RULE, HEAD_RULE)))
    groups = {group.kind: group for group in result.groups}
    for kind, name in (("embedding", "int4-g32"), ("head", "int3-g32")):
        assert groups[kind].format == name and groups[kind].parameters == VOCAB * 64
        assert groups[kind].nbytes == parse_format(name).nbytes((VOCAB, 64))
        assert 0 < groups[kind].error < 0.2
    records = {r.site.kind: r for r in Artifact.open(result.path).records}
    assert records["head"].tokens == 4 * 32 and records["embedding"].tokens is None
    tied = {r.site.kind: r for r in Artifact.open(make("qwen2", TIED_RULE)).records}
    assert tied["embedding"].tokens == 4 * 32


class Killed(Exception):
    pass


class StopAfter:
    """A progress that ends the run after some units of the work."""

    def __init__(self, units: int) -> None:
        self.units, self.compressing = units, False

    def phase(self, name: str, total: int) -> None:
        self.compressing = name == "compressing"

    def step(self, amount: int = 1, note: str = "") -> None:
        self.units -= self.compressing
        if self.units < 0 or (self.compressing and not self.units):
            raise Killed


@pytest.mark.parametrize("family", ["mixtral", "qwen2"])
@pytest.mark.parametrize("units", [1, 2, 3])
def test_a_run_killed_around_the_ends_resumes_to_the_same_bytes(
    family: str, units: int, make: Any, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    rules = (TIED_RULE, HEAD_RULE) if family == "mixtral" else (TIED_RULE,)
    options: dict[str, Any] = {"rules": rules, "data": [str(text)], **OPTIONS}
    out = tmp_path / "artifact"
    with pytest.raises(Killed):
        api.compress(tiny(family), out, progress=StopAfter(units), **options)
    assert not out.exists()
    api.compress(tiny(family), out, **options)
    assert digests(out) == digests(make(family, *rules))


def test_what_an_end_cannot_be_stored_in_is_refused_before_work(
    tiny: Builder, tmp_path: Path
) -> None:
    rule = "kind:embedding=ternary-g32-dict"
    with pytest.raises(RecipeError, match="single rows") as refused:
        api.compress(tiny("llama"), tmp_path / "a", rules=[rule], length=32, samples=2)
    assert refused.value.where == "model.embed_tokens"
    with pytest.raises(RecipeError, match="matches no site"):
        api.compress(tiny("qwen2"), tmp_path / "a", rules=["kind:head=int4-g32"])
    assert list(tmp_path.iterdir()) == []


def test_a_head_twice_in_the_checkpoint_is_left_alone(tmp_path: Path, tiny: Builder) -> None:
    from safetensors.torch import load_file, save_file

    from bitnest.checkpoint import Checkpoint
    from bitnest.sites import ENDS, find_sites
    from bitnest.skeleton import Skeleton

    build(FAMILIES["qwen2"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    found = find_sites(Skeleton.build(Checkpoint.open(tmp_path)))
    assert not [site for site in found if site.kind in ENDS]


def test_exports_hold_the_ends_decoded_and_say_so(make: Any, tiny: Builder, tmp_path: Path) -> None:
    artifact = make("qwen3", TIED_RULE, HEAD_RULE)
    result = api.export(artifact, tmp_path / "export")
    assert any("model.embed_tokens" in note and "dense here" in note for note in result.notes)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {"model.embed_tokens", "lm_head"} <= set(config["quantization_config"]["ignore"])
    twin = dense_twin(artifact, tiny("qwen3"))
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    from safetensors import safe_open

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        with safe_open(tmp_path / "export" / index["weight_map"][name], framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), twin.get_parameter(name))

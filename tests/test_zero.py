"""The format `zero`: matrices and experts that are dropped, stored in no bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitnest import api
from bitnest.artifact import Artifact, site_tensors
from bitnest.errors import FormatError, RecipeError, TargetError
from bitnest.formats import ZeroFormat, parse_format
from bitnest.formats.catalogue import bits_per_weight, describe
from bitnest.formats.support import native_encoder
from bitnest.kernels import experts as kernels
from bitnest.kernels.decode import decode
from bitnest.packed.modules import hold_decoded
from bitnest.quantize.solve import Options, needs_statistics, solve
from bitnest.statistics import Statistics
from tests.tiny import Builder

TOKENS = torch.arange(60)[None] % 50 * 6
OPTIONS: dict[str, Any] = {"format": "int4-g32", "samples": 4, "length": 32}
EXPERT = "*.layers.1.*experts.2.*=zero"
BLOCK = "*.layers.0.*=zero"


def test_it_is_a_format_of_no_bits_and_no_bytes() -> None:
    fmt = parse_format("zero")
    assert isinstance(fmt, ZeroFormat) and fmt.name == "zero" and fmt.bits == 0
    assert fmt.parts((7, 5)) == {} and fmt.nbytes((4096, 4096)) == 0
    assert describe("zero").family == "dropped" and bits_per_weight(fmt) == 0
    assert not native_encoder(fmt) and not needs_statistics(fmt)
    for name in ("zero-g32", "zero@had", "zero+lorc4"):
        with pytest.raises(FormatError):
            parse_format(name)


def test_its_error_is_all_of_the_output() -> None:
    w = torch.tensor([[[1.0, 2.0], [0.0, -3.0]]])
    h = torch.tensor([[[2.0, 1.0], [1.0, 4.0]]])
    found = solve(w, h, parse_format("zero"), Options())
    assert found.error.tolist() == [[2 + 2 * 2 + 4 * 4, 9 * 4]]  # w H w^T by hand
    assert solve(w, None, parse_format("zero"), Options()).error.tolist() == [[5, 9]]
    assert not found.weight.any() and found.store(0, slice(0, 2)) == {}
    assert torch.equal(decode({}, parse_format("zero"), (3, 2)), torch.zeros(3, 2))


@pytest.fixture(scope="module")
def make(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def run(family: str, *rules: str, **options: Any) -> Path:
        key = repr((family, rules, options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("zero") / family
            api.compress(
                tiny(family), made[key], rules=rules, data=[str(text)], **{**OPTIONS, **options}
            )
        return made[key]

    return run


def twin(artifact: Path, source: Path) -> Any:
    """The source model in float32 with every packed weight decoded."""
    opened = Artifact.open(artifact)
    headers = opened.headers()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for record in opened.packed():
        weight = decode(
            site_tensors(record, headers), parse_format(record.format), record.site.shape
        )
        record.site.view(model.get_parameter(record.site.path).data).copy_(weight)
    return model.eval()


MIXES = {
    "an expert": ("mixtral", (EXPERT,)),
    "a block": ("mixtral", (BLOCK,)),
    "beside dense experts": ("mixtral", ("kind:expert=dense", EXPERT)),
    "all experts": ("qwen3_moe", ("kind:expert=zero",)),
    "fused on disk, with biases": ("gpt_oss", ("*.layers.1.*experts.2.*=zero",)),
    "linears": ("llama", ("*.o_proj=zero", "*.layers.0.mlp.*=zero")),
    "everything": ("llama", ("*=zero",)),
    "a head": ("llama", ("kind:head=zero", "kind:embedding=zero")),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_models_run_as_if_the_matrices_were_zero(
    mix: str, method: str, make: Any, tiny: Builder
) -> None:
    family, rules = MIXES[mix]
    artifact = make(family, *rules, method=method)
    dropped = [r for r in Artifact.open(artifact).records if r.format == "zero"]
    assert dropped and all(r.nbytes == 0 and r.file == "" for r in dropped)
    lost = [r for r in dropped if r.error]  # what reads a dropped matrix alone has nothing to lose
    assert lost and all(r.error == pytest.approx(1, abs=1e-5) for r in lost)
    copy = twin(artifact, tiny(family))
    assert not any(r.site.view(copy.get_parameter(r.site.path)).any() for r in dropped)
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, copy(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_block_of_zeros_has_no_file_and_every_byte_counts(make: Any) -> None:
    artifact = make("mixtral", BLOCK)
    assert [f.name for f in artifact.glob("packed-*")] == ["packed-00002-of-00002.safetensors"]
    names = set().union(*(json.loads((artifact / "model.safetensors.index.json").read_text())
                          ["weight_map"]))  # fmt: skip
    assert not any("layers.0.mlp.experts" in n or "layers.0.self_attn.q" in n for n in names)
    result = api.summarise(Artifact.open(artifact))
    zero = [group for group in result.groups if group.format == "zero"]
    assert {group.kind for group in zero} == {"attention", "expert"}
    assert all(group.nbytes == 0 for group in zero)
    assert api.inspect(artifact, verify=True)["verified"] > 0


def test_a_fresh_process_loads_dropped_modules(make: Any, tiny: Builder) -> None:
    artifact = make("mixtral", BLOCK)
    script = (
        "import bitnest, sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "print(float(model(torch.arange(60)[None] % 50 * 6).logits.abs().sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact)], capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        expected = float(twin(artifact, tiny("mixtral"))(TOKENS).logits.abs().sum())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-4)


def test_dropped_experts_are_not_computed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    compute = kernels._expert

    def counting(module: Any, weights: Any, expert: int, x: torch.Tensor, *added: Any) -> Any:
        calls.append((type(module).__name__, expert))
        return compute(module, weights, expert, x, *added)

    monkeypatch.setattr(kernels, "_expert", counting)
    for family, skipped in (("mixtral", True), ("gpt_oss", False)):
        model = AutoModelForCausalLM.from_pretrained(
            make(family, EXPERT if skipped else MIXES["fused on disk, with biases"][1][0])
        )
        assert hold_decoded(model)  # so experts run one by one
        calls.clear()
        with torch.no_grad():
            model(TOKENS)
        experts = [expert for _, expert in calls]
        assert experts.count(1) == 2 and experts.count(2) == (1 if skipped else 2)


def test_a_killed_run_resumes_past_a_dropped_block(
    make: Any, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    class Stop:
        on = False

        def phase(self, name: str, total: int) -> None:
            self.on = name == "compressing"

        def step(self, amount: int = 1, note: str = "") -> None:
            if self.on:
                raise KeyboardInterrupt

    out = tmp_path / "artifact"
    options: dict[str, Any] = {"rules": (BLOCK,), "data": [str(text)], **OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("mixtral"), out, progress=Stop(), **options)
    api.compress(tiny("mixtral"), out, **options)
    assert digests(out) == digests(make("mixtral", BLOCK))


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


def test_exports_refuse_it_by_name(make: Any, tmp_path: Path) -> None:
    for family, rules in (("qwen3_moe", (EXPERT,)), ("llama", ("*=zero",))):
        with pytest.raises(TargetError, match="engines have no format") as refused:
            api.export(make(family, *rules), tmp_path / family)
        record = next(r for r in Artifact.open(make(family, *rules)).records if r.format == "zero")
        assert refused.value.where == record.site.name
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_candidate_and_no_width_of_probes(
    tiny: Builder, text: Path, tmp_path: Path
) -> None:
    api.analyze(
        tiny("mixtral"), tmp_path / "an", data=[str(text)], formats=["zero", "int4-g32"],
        samples=8, length=24, probes=6, probe_windows=2, fisher_windows=4,
    )  # fmt: skip
    found = Statistics.open(tmp_path / "an")
    assert found.formats == ["zero", "int4-g32"]
    assert all(number in {None, 1} for p in found.header["probes"] for number in p["plan"])
    for layer in range(3):
        error = found.read(layer, "sites.error")
        assert torch.allclose(error[:, 0], torch.ones(len(error)), atol=1e-5)
        loss = found.read(layer, "sites.loss")
        assert (loss[:, 0] >= loss[:, 1]).all()
    result = api.compress(
        tiny("mixtral"), tmp_path / "small", statistics=tmp_path / "an", rules=(EXPERT,),
        **OPTIONS,
    )  # fmt: skip
    assert result.predicted is not None and result.predicted["mean"] > 0


def test_groups_are_perturbed_by_widths(tiny: Builder, text: Path, tmp_path: Path) -> None:
    api.analyze(
        tiny("llama"), tmp_path / "an", data=[str(text)], formats=["zero", "int2-g32", "int4-g32"],
        samples=4, length=24, probes=0, probe_windows=2, importance="probes",
    )  # fmt: skip
    found = Statistics.open(tmp_path / "an")
    plans = [p["plan"] for p in found.header["probes"]]
    assert len(plans) == 2 * 2 + 2  # attention and mlp of two layers, embedding, head
    assert {n for plan in plans for n in plan} == {None, 2}


def test_an_unknown_spelling_is_refused(tiny: Builder, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, FormatError)):
        api.compress(tiny("llama"), tmp_path / "a", rules=["*=zeros"])

"""Every supported family: the right matrices are found, and the artifact computes what it stores.

The reference never touches bitnest's code: packed tensors are read by the safetensors library and
decoded in numpy from the format's definition, the decoded values are put into a copy of the
original checkpoint under its own tensor names, and transformers loads that.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitnest import api
from bitnest.artifact import Artifact
from bitnest.calibrate import stream
from bitnest.calibrate.data import calibration_windows, parse_source
from bitnest.cli import main
from bitnest.errors import RecipeError, UnsupportedModel
from bitnest.packed.modules import PackedWeight
from bitnest.sites import ENDS, UNNAMED_DENSE
from tests.tiny import FAMILIES, TIED, VOCAB, Builder, build

SAMPLES, LENGTH = 4, 32
GPTQ, RTN = "int4-g32", "int3-g16-asym"
TOKENS = torch.arange(24).mul(13).remainder(VOCAB).view(2, 12)


@pytest.fixture(scope="module")
def packed(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Artifacts by (family, method), each made once: int4-g32 by gptq, int3-g16-asym by rtn."""
    root = tmp_path_factory.mktemp("artifacts")

    def make(family: str, method: str) -> Path:
        out = root / f"{family}-{method}"
        if not out.exists():
            fmt = GPTQ if method == "gptq" else RTN
            compress(tiny(family), out, text, format=fmt, method=method)
        return out

    return make


def compress(model: Path, out: Path, text: Path, **options: Any) -> Path:
    """A small calibration, and whatever `options` say."""
    api.compress(model, out, data=[str(text)], samples=SAMPLES, length=LENGTH, **options)
    return out


def records(artifact: Path) -> list[dict[str, Any]]:
    return [record.to_json() for record in Artifact.open(artifact).records]


def stored(directory: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob(pattern)):
        found.update(load_file(file))
    return found


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Rows of 32-bit words to `count` codes each; bit k of a row is bit k%32 of word k//32."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def decode(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The float32 (out, in) matrix of one record: (code - zero) * scale."""
    name, (rows, columns) = record["name"], record["shape"]
    if record["format"] == "dense":
        return tensors[f"{name}.weight"].float().numpy()
    match = re.fullmatch(r"int(\d)-(?:g(\d+)|channel)(-asym)?", record["format"])
    assert match is not None
    bits, group = int(match[1]), int(match[2] or columns)
    codes = unpack(tensors[f"{name}.codes"].numpy(), bits, columns)
    scales = tensors[f"{name}.scales"].float().numpy()
    if match[3]:
        packed = np.ascontiguousarray(tensors[f"{name}.zeros"].numpy().T)
        zeros = unpack(packed, bits, rows).T
    else:
        zeros = np.full_like(scales, 2 ** (bits - 1))
    place = np.arange(columns) // group
    return (codes - zeros[:, place]).astype(np.float32) * scales[:, place]


def decoded_checkpoint(source: Path, artifact: Path, out: Path, family: str) -> Path:
    """A copy of `source` in float32 with every packed matrix replaced by its decoded values."""
    weights = {name: tensor.float() for name, tensor in stored(source).items()}
    tensors = stored(artifact, "packed-*.safetensors")
    for record in records(artifact):
        if not record["file"]:
            continue
        matrix = torch.from_numpy(decode(record, tensors))
        if record["kind"] in FAMILIES[family].transposed:
            matrix = matrix.T
        key = f"{record['name']}.weight"
        if key in weights:
            assert weights[key].shape == matrix.shape, key
            weights[key] = matrix.contiguous()
        else:  # all experts in one tensor on disk
            head, expert, param = re.fullmatch(r"(.*)\.(\d+)\.(\w+)", record["name"]).groups()
            weights[f"{head}.{param}"][int(expert)] = matrix
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def logits(path: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_all_matrices_and_nothing_else(family: str, tiny: Builder, packed: Any) -> None:
    spec, source = FAMILIES[family], tiny(family)
    found = records(packed(family, "rtn"))
    ends = {"embedding": 1} if family in TIED else {"embedding": 1, "head": 1}
    assert Counter(r["kind"] for r in found) == {**spec.sites, **ends}
    assert len({r["name"] for r in found}) == len(found)
    disk = {n: t.shape for n, t in stored(source).items()}
    for record in found:
        assert record["format"] == ("dense" if record["kind"] in UNNAMED_DENSE else RTN)
        key = f"{record['name']}.weight"
        turned = record["kind"] in spec.transposed
        if record["kind"] == "expert" and spec.fused:
            head, expert, param = re.fullmatch(r"(.*)\.(\d+)\.(\w+)", record["name"]).groups()
            shape = disk[f"{head}.{param}"]
            assert param in spec.fused and 0 <= int(expert) == record["expert"] < shape[0]
            shape = shape[1:]
        else:
            shape = disk[key]
            if record["kind"] == "expert":
                assert f".experts.{record['expert']}." in record["name"]
        assert tuple(shape[::-1] if turned else shape) == tuple(record["shape"])


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_decoded_weights(
    family: str, method: str, tiny: Builder, packed: Any, tmp_path: Path
) -> None:
    artifact = packed(family, method)
    reference = decoded_checkpoint(tiny(family), artifact, tmp_path / "ref", family)
    expected = logits(reference)
    assert not torch.allclose(expected, logits(tiny(family)), atol=1e-3), "nothing was quantised"
    torch.testing.assert_close(logits(artifact), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_stay_packed_in_memory(family: str, packed: Any) -> None:
    artifact = packed(family, "gptq")
    model = AutoModelForCausalLM.from_pretrained(artifact)
    with torch.no_grad():
        model(TOKENS)  # running it must not leave decoded weights behind
    mine = [r for r in records(artifact) if r["file"]]
    parameters = dict(model.named_parameters())
    held = stored = 0
    for module in {r["module"] for r in mine}:
        own = model.get_submodule(module)
        weights = [m for m in own.modules() if isinstance(m, PackedWeight)]
        held += sum(weight.nbytes for weight in weights)
        stored += sum(t.nbytes for weight in weights for t in weight.tensors.values())
        assert all("bias" in name for name, _ in own.named_parameters()), module
    assert stored == sum(r["nbytes"] for r in mine)
    assert held < 1.5 * stored  # a layout pads odd shapes, and its zero points are bytes
    assert not {f"{r['module']}.{r['param']}" for r in mine} & set(parameters)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_plain_transformers_opens_it_in_a_fresh_process(
    family: str, packed: Any, tmp_path: Path
) -> None:
    code = (
        "import sys, torch, bitnest\n"
        "from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        f"with torch.no_grad(): out = m(torch.tensor({TOKENS.tolist()})).logits\n"
        "torch.save(out, sys.argv[2])\n"
    )
    artifact, file = packed(family, "gptq"), tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", code, artifact, file], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(file), logits(artifact))


def test_bfloat16_weights_are_rounded_once(tiny: Builder, packed: Any) -> None:
    artifact = packed("llama", "rtn")
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16)
    tensors = stored(artifact, "packed-*.safetensors")
    for record in records(artifact):
        if not record["file"]:  # embedding and head
            continue
        weight = model.get_submodule(record["module"]).packed.decode(torch.bfloat16)
        exact = torch.from_numpy(decode(record, tensors))
        assert torch.equal(weight, exact.to(torch.bfloat16)), record["name"]


@pytest.mark.parametrize("family", FAMILIES)
def test_manifest_accounts_for_every_byte(family: str, tiny: Builder, packed: Any) -> None:
    for method in ("gptq", "rtn"):
        artifact = packed(family, method)
        sizes: Counter[str] = Counter()
        for file in artifact.glob("packed-*.safetensors"):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  not a dict
                    sizes[name.rpartition(".")[0]] += opened.get_tensor(name).nbytes
        found = records(artifact)
        assert {r["name"]: r["nbytes"] for r in found if r["file"]} == dict(sizes)
        files = json.loads((artifact / "bitnest.json").read_text())["files"]
        on_disk = {f.name: f.stat().st_size for f in artifact.iterdir()}
        assert {n: e["bytes"] for n, e in files.items()} | {"bitnest.json": 0} == on_disk | {
            "bitnest.json": 0
        }
        dense = set(stored(artifact, "model-*.safetensors"))
        assert not dense & {f"{name}.weight" for name in sizes}


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_beats_rtn_where_it_was_measured(
    family: str, tiny: Builder, text: Path, packed: Any, tmp_path: Path
) -> None:
    """Output error of the first block's linears on the calibration tokens, from the weights stored.

    Their inputs are those of the original model; the manifest's own figure must be the same.
    """
    spec, source = FAMILIES[family], tiny(family)
    rounded = compress(source, tmp_path / "rtn", text, format=GPTQ, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found = {
        r["module"]: r
        for r in records(packed(family, "gptq"))
        if r["layer"] == 0 and r["param"] == "weight" and r["file"]
    }
    inputs: dict[str, torch.Tensor] = {}
    for module in found:
        model.get_submodule(module).register_forward_pre_hook(
            lambda _m, args, module=module: inputs.update({module: args[0].flatten(0, -2)})
        )
    tokenizer = api.load_tokenizer(source)
    windows = calibration_windows(
        tokenizer, [parse_source(str(text))], samples=SAMPLES, length=LENGTH, seed=0
    )
    with torch.no_grad():
        model(windows.tokens)
    losses = {}
    for key, artifact in (("gptq", packed(family, "gptq")), ("rtn", rounded)):
        tensors = stored(artifact, "packed-00001*.safetensors")
        for module, record in found.items():
            weight = model.get_submodule(module).weight.detach()
            weight = weight.T if record["kind"] in spec.transposed else weight
            miss = weight - torch.from_numpy(decode(record, tensors))
            lost = (inputs[module] @ miss.T).square().sum() / (
                inputs[module] @ weight.T
            ).square().sum()
            losses[key, module] = float(lost)
            if key == "gptq":
                assert record["error"] == pytest.approx(float(lost), rel=1e-2)
    for module in found:
        assert losses["gptq", module] < losses["rtn", module], module


def starve(tiny: Builder, family: str, tmp_path: Path) -> Path:
    """A checkpoint whose routers never choose expert 3 (nor 2, in mixtral)."""
    if family == "mixtral":
        path = tmp_path / "starved"
        model = build(FAMILIES["mixtral"], num_experts_per_tok=1)
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight.data[1] = -weight.data[0]  # one of the two is always above zero
                weight.data[2:] = 0
    else:
        path = tmp_path / "starved"
        model = build(FAMILIES["gpt_oss"])
        for name, bias in model.named_parameters():
            if name.endswith("router.bias"):
                bias.data[3] = -1e4
    model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_expert_without_tokens_is_quantised_and_finite(
    family: str, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    source = starve(tiny, family, tmp_path)
    artifact = compress(source, tmp_path / "out", text, format=GPTQ)
    tensors = stored(artifact, "packed-*.safetensors")
    original = stored(source)
    tokens = {}
    for record in records(artifact):
        if record["kind"] != "expert":
            continue
        tokens.setdefault(record["expert"], set()).add(record["tokens"])
        assert record["format"] == GPTQ and record["file"]
        weight = decode(record, tensors)
        assert np.isfinite(weight).all(), record["name"]
        if record["expert"] == 3:
            if family == "mixtral":
                want = original[f"{record['name']}.weight"].float().numpy()
            else:
                head, _, param = re.fullmatch(r"(.*)\.(\d+)\.(\w+)", record["name"]).groups()
                want = original[f"{head}.{param}"][3].T.float().numpy()
            lost = np.square(weight - want).sum() / np.square(want).sum()
            assert lost < 0.03, record["name"]
    assert tokens[3] == {0}
    assert 0 not in tokens[0]
    torch.testing.assert_close(
        logits(artifact),
        logits(decoded_checkpoint(source, artifact, tmp_path / "ref", family)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_rule_that_matches_nothing_is_refused(
    tiny: Builder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="matches no site"):
        compress(tiny("llama"), out, text, rules=["*.experts.*=int8-g32"])
    arguments = ["bitnest", "compress", str(tiny("llama")), "-o", str(out), "--keep", "*lm_head*"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_rules_mix_formats_and_dense_experts_in_one_layer(
    family: str, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    """One expert dense, another's down projection in 5 bits, both beside 4-bit ones."""
    artifact = compress(
        tiny(family),
        tmp_path / "out",
        text,
        format=GPTQ,
        rules=[
            "kind:attention=int8-channel",
            "*.experts.2.*=dense",
            "re:experts\\.1\\.(down_proj|w2)=int5-g16-asym",
            "*.0.self_attn.o_proj=dense",
        ],
    )
    for record in records(artifact):
        name = record["name"]
        if ".experts.2." in name:
            assert record["format"] == "dense" and record["file"], name
        elif re.search(r"experts\.1\.(down_proj|w2)", name):
            assert record["format"] == "int5-g16-asym"
        elif name.endswith("0.self_attn.o_proj") or record["kind"] in ENDS:
            assert record["format"] == "dense" and not record["file"]
        else:
            assert record["format"] == (GPTQ if record["kind"] == "expert" else "int8-channel")
    reference = decoded_checkpoint(tiny(family), artifact, tmp_path / "ref", family)
    torch.testing.assert_close(logits(artifact), logits(reference), rtol=1e-5, atol=1e-5)


def _refused(source: Path, out: Path, text: Path) -> UnsupportedModel:
    with pytest.raises(UnsupportedModel) as caught:
        compress(source, out, text)
    assert not any(
        path.name.startswith((out.name, f".{out.name}")) for path in out.parent.iterdir()
    )
    return caught.value


def test_llama4_experts_are_refused_before_work(tiny: Builder, text: Path, tmp_path: Path) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **{**FAMILIES["qwen3_moe"].options, "num_local_experts": 4, "intermediate_size_mlp": 96}
    )
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "llama4")
    tiny.tokenizer.save_pretrained(tmp_path / "llama4")
    error = _refused(tmp_path / "llama4", tmp_path / "out", text)
    assert "experts" in error.what and error.hint


def test_encoder_decoder_is_refused_before_work(tiny: Builder, text: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tiny.tokenizer.save_pretrained(tmp_path / "t5")
    error = _refused(tmp_path / "t5", tmp_path / "out", text)
    assert "t5" in error.what and error.hint


_GEMMA: dict[str, Any] = {
    **FAMILIES["gemma3"].options,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
}


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (
            "Gemma3nTextConfig",
            {"laurel_rank": 8, "num_kv_shared_layers": 0, "intermediate_size": [96, 96]}
            | {"activation_sparsity_pattern": [0.0, 0.0]},
            "hidden states of shape",
        ),
        ("Gemma4TextConfig", {}, "differ from sample to sample"),
    ],
)
def test_blocks_that_see_more_than_hidden_states_are_refused_but_can_be_rounded(
    config: str,
    options: dict[str, Any],
    reason: str,
    tiny: Builder,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**_GEMMA, **options})
    source = tmp_path / "gemma"
    AutoModelForCausalLM.from_config(made).save_pretrained(source)
    tiny.tokenizer.save_pretrained(source)
    monkeypatch.setattr(stream, "BATCH_TOKENS", 2 * LENGTH)  # several batches
    error = _refused(source, tmp_path / "out", text)
    assert reason in error.what and "rtn" in error.hint
    artifact = compress(source, tmp_path / "rounded", text, format=RTN, method="rtn")
    reference = decoded_checkpoint(source, artifact, tmp_path / "ref", "gemma3")
    torch.testing.assert_close(logits(artifact), logits(reference), rtol=1e-5, atol=1e-5)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class PicoConfig(LlamaConfig):
    model_type = "pico_remote"

class PicoForCausalLM(LlamaForCausalLM):
    config_class = PicoConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output
"""


def test_model_with_its_own_code_keeps_it(
    tiny: Builder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = tmp_path / "remote"
    shutil.copytree(tiny("llama"), source)
    (source / "pico.py").write_text(REMOTE)
    config = json.loads((source / "config.json").read_text())
    config["model_type"] = "pico_remote"
    config["auto_map"] = {
        "AutoConfig": "pico.PicoConfig",
        "AutoModelForCausalLM": "pico.PicoForCausalLM",
    }
    (source / "config.json").write_text(json.dumps(config))
    artifact = compress(source, tmp_path / "out", text, format=GPTQ, trust_remote_code=True)
    plain = compress(tiny("llama"), tmp_path / "plain", text, format=GPTQ)
    remote = AutoModelForCausalLM.from_pretrained(
        artifact, dtype=torch.float32, trust_remote_code=True
    )
    with torch.no_grad():
        assert torch.equal(remote(TOKENS).logits, -logits(plain))

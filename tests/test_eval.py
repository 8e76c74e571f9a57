"""Evaluation: every figure against whole logits in float64, and the ways it can go wrong."""

from __future__ import annotations

import io
import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bitnest.calibrate.data import load_texts, token_windows
from bitnest.errors import BitnestError, DataError
from bitnest.eval import logits as logits_module
from bitnest.eval import reference as reference_module
from bitnest.eval.divergence import compare
from bitnest.eval.evaluate import evaluate
from bitnest.eval.logits import Full, Head, Streamed
from bitnest.eval.render import protocol, table
from bitnest.eval.report import EvalReport
from bitnest.eval.size import count_parameters
from bitnest.packed.loading import load_tokenizer

VOCAB = 307  # prime: no slice width divides it
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
)  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=16)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}


def save(path: Path, family: str = "llama", seed: int = 0, words: str = "w") -> Path:
    torch.manual_seed(seed)
    FAMILIES[family]().save_pretrained(path)
    tokenizer = Tokenizer(
        models.WordLevel({f"{words}{i:03d}": i for i in range(VOCAB)}, f"{words}000")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"{words}002").save_pretrained(
        path
    )
    return path


def disturb(source: Path, target: Path, amount: float = 0.02, name: str = "weight") -> Path:
    """A copy whose weights carry noise, relative to their spread."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    torch.manual_seed(99)
    for key, value in tensors.items():
        if value.ndim == 2 and name in key:
            tensors[key] = value + amount * value.std() * torch.randn_like(value)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_text(path: Path, count: int = 2000) -> Path:
    torch.manual_seed(5)
    path.write_text(" ".join(f"w{i:03d}" for i in torch.randint(3, VOCAB, (count,)).tolist()))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"words={write_text(tmp_path_factory.mktemp('text') / 'words.txt')}"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("models")
    made = {}
    for family in FAMILIES:
        base = save(root / f"{family}-base", family)
        made[family] = base, disturb(base, root / f"{family}-noisy")
    return made


def truth(base: Path, model: Path, text: str, window: int, windows: int) -> dict[str, object]:
    """PPL, KL and agreement from whole logits in float64, written down as plainly as possible."""
    tokens = token_windows(
        load_tokenizer(base), load_texts(text.split("=")[1]), window=window, count=windows
    )
    log_p, log_q = (
        torch.log_softmax(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
            .eval()(tokens)
            .logits[:, :-1]
            .double(),
            dim=-1,
        ).detach()
        for path in (base, model)
    )
    nll = -log_q.gather(-1, tokens[:, 1:, None])[..., 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).flatten()
    return {
        "nll": float(nll.mean()),
        "error": float(nll.mean(1).std() / math.sqrt(windows)),
        "kl": kl,
        "same": float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
    }


def run(model: Path, base: Path | None, text: str, **options: object) -> EvalReport:
    settings = {"window": 33, "windows": 7, "batch_size": 3, **options}
    return evaluate([model], against=base, data=[text], **settings)


def check(report: EvalReport, expected: dict[str, object]) -> None:
    score = report.rows[1].scores[0]
    kl = expected["kl"]
    assert isinstance(kl, torch.Tensor)
    assert score.kl is not None
    assert score.nll == pytest.approx(expected["nll"], abs=2e-5)
    assert score.perplexity == pytest.approx(math.exp(score.nll))
    assert score.nll_error == pytest.approx(expected["error"], abs=2e-5)
    assert score.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4, abs=1e-6)
    spread = float(kl.view(-1, 32).mean(1).std()) / math.sqrt(len(kl) / 32)
    assert score.kl.error == pytest.approx(spread, rel=1e-3, abs=1e-6)
    assert score.kl.max == pytest.approx(float(kl.max()), rel=1e-3, abs=1e-5)
    for share, found in ((0.5, score.kl.median), (0.9, score.kl.p90), (0.99, score.kl.p99)):
        assert found == pytest.approx(float(kl.quantile(share)), rel=1e-3, abs=1e-5)
    assert score.kl.same_top == pytest.approx(expected["same"], abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_match_whole_logits_in_float64_for_each_rule_after_the_head(
    family: str, pairs: dict[str, tuple[Path, Path]], text: str
) -> None:
    base, model = pairs[family]
    report = run(model, base, text)
    assert [row.streamed for row in report.rows] == [True, True]
    check(report, truth(base, model, text, 33, 7))


def test_family_with_an_unknown_rule_falls_back_to_its_own_logits(
    pairs: dict[str, tuple[Path, Path]],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, model = pairs["gemma2"]
    monkeypatch.setattr(logits_module, "POST", ())  # the cap is now unknown
    with caplog.at_level(logging.INFO, logger="bitnest"):
        report = run(model, base, text)
    assert [row.streamed for row in report.rows] == [False, False]
    assert "full logits" in caplog.text
    check(report, truth(base, model, text, 33, 7))


def test_field_that_acts_elsewhere_in_its_family_is_not_applied_to_logits(
    pairs: dict[str, tuple[Path, Path]], text: str, tmp_path: Path
) -> None:
    base, model = pairs["llama"]
    named = disturb(base, tmp_path / "named", amount=0)
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps({**config, "logits_scaling": 3.0}))
    report = run(model, named, text)
    assert report.rows[0].streamed
    check(report, truth(base, model, text, 33, 7))


def test_streamed_model_is_compared_with_a_base_that_is_not(
    pairs: dict[str, tuple[Path, Path]], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = pairs["llama"]
    real = logits_module.open_head

    def only_the_model(opened: object, tokens: torch.Tensor, name: str) -> Head | None:
        return None if name == base.name else real(opened, tokens, name)

    monkeypatch.setattr("bitnest.eval.evaluate.open_head", only_the_model)
    report = run(model, base, text)
    assert [row.streamed for row in report.rows] == [False, True]
    check(report, truth(base, model, text, 33, 7))


def test_base_states_on_disk_give_the_same_figures(
    pairs: dict[str, tuple[Path, Path]], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = pairs["llama"]
    in_memory = run(model, base, text)
    monkeypatch.setattr(reference_module, "LIMIT", 100)
    assert run(model, base, text) == in_memory


def test_full_disk_is_reported_before_the_base_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "LIMIT", 0)
    with pytest.raises(BitnestError, match="are free"):
        reference_module.storage(1 << 40, 1 << 10)


def test_base_against_itself_has_no_divergence(
    pairs: dict[str, tuple[Path, Path]], text: str
) -> None:
    base, _ = pairs["llama"]
    report = run(base, base, text)
    kl = report.rows[1].scores[0].kl
    assert report.rows[0].base
    assert report.rows[0].scores[0].kl is None
    assert kl is not None
    assert abs(kl.mean) < 1e-6
    assert abs(kl.max) < 1e-6
    assert kl.same_top == 1.0


def test_closed_form_of_two_entries() -> None:
    """P = (3/4, 1/4), Q = (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2, nll = ln 2."""
    cpu = torch.device("cpu")
    p = Full(torch.tensor([[math.log(3.0), 0.0]]) + 7, cpu)
    q = Full(torch.tensor([[0.0, 0.0]]) - 5, cpu)
    for block in (1, 2, 3):
        found = compare(q, torch.tensor([1]), p, block=block)
        assert found.kl is not None
        assert found.same is not None
        assert float(found.kl) == pytest.approx(
            0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6
        )
        assert float(found.nll) == pytest.approx(math.log(2), abs=1e-6)
        assert bool(found.same)  # of equal entries the first counts


@pytest.mark.parametrize("block", [1, 2, 7, 64, 306, 307, 1000])
def test_slices_that_do_not_divide_the_vocabulary_change_nothing(block: int) -> None:
    torch.manual_seed(1)
    rows, cpu = 600, torch.device("cpu")  # more than one block of rows
    p, q = 30 * torch.randn(rows, VOCAB), 30 * torch.randn(rows, VOCAB)
    labels = torch.randint(0, VOCAB, (rows,))
    labels[:2] = torch.tensor([0, VOCAB - 1])
    found = compare(Full(q, cpu), labels, Full(p, cpu), block=block)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert found.kl is not None
    torch.testing.assert_close(
        found.nll, -log_q.gather(1, labels[:, None])[:, 0], rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(
        found.kl, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-6, atol=1e-5
    )
    assert torch.equal(found.same, p.argmax(-1) == q.argmax(-1))


def test_tiny_divergence_is_not_lost_in_rounding() -> None:
    """Logits near 50 that differ by 1e-3: KL about 1e-7, well below float32's step at 50."""
    torch.manual_seed(2)
    q = torch.randn(64, 5000) + 50
    p = q + 1e-3 * torch.randn(64, 5000)
    cpu = torch.device("cpu")
    kl = compare(Full(q, cpu), torch.zeros(64, dtype=torch.int64), Full(p, cpu)).kl
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kl is not None
    assert float(kl.mean()) == pytest.approx(float(exact.mean()), rel=0.1)


def test_bias_of_the_head_is_streamed_too() -> None:
    torch.manual_seed(3)
    hidden, weight, bias = torch.randn(4, 8), torch.randn(11, 8), torch.randn(11)
    streamed = Streamed(hidden, Head(weight, bias))
    parts = [streamed.slice(slice(1, 3), a, min(a + 4, 11)) for a in range(0, 11, 4)]
    torch.testing.assert_close(torch.cat(parts, 1), (hidden @ weight.T + bias)[1:3])


def test_head_never_computes_the_logits_of_a_window(
    pairs: dict[str, tuple[Path, Path]], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = pairs["llama"]
    largest = 0
    linear = torch.nn.functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        nonlocal largest
        if weight.shape[0] == VOCAB:
            largest = max(largest, x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    monkeypatch.setattr("bitnest.eval.divergence.SLICE", 100)
    run(model, base, text)
    assert largest == logits_module.PROBE


def test_head_works_again_after_recording(pairs: dict[str, tuple[Path, Path]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pairs["llama"][0]).eval()
    tokens = torch.arange(12).view(2, 6)
    before = logits_module.own_logits(model, tokens)
    assert logits_module.record(model, tokens).shape == (2, 6, 32)
    assert torch.equal(logits_module.own_logits(model, tokens), before)


def test_bfloat16_is_streamed_and_close_to_float32(
    pairs: dict[str, tuple[Path, Path]], text: str
) -> None:
    base, model = pairs["gemma2"]
    half, full = run(model, base, text, dtype="bfloat16"), run(model, base, text)
    assert half.rows[1].streamed
    assert half.rows[1].scores[0].nll == pytest.approx(full.rows[1].scores[0].nll, rel=0.03)


def test_other_vocabulary_is_refused(
    pairs: dict[str, tuple[Path, Path]], text: str, tmp_path: Path
) -> None:
    other = save(tmp_path / "other", words="x")
    with pytest.raises(BitnestError, match="another vocabulary") as caught:
        run(other, pairs["llama"][0], text)
    assert "other" in caught.value.what


def test_same_vocabulary_in_another_file_layout_is_accepted(
    pairs: dict[str, tuple[Path, Path]], text: str, tmp_path: Path
) -> None:
    base, _ = pairs["llama"]
    copy = disturb(base, tmp_path / "copy")
    file = copy / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    run(copy, base, text)


def test_nan_in_a_weight_names_the_model(
    pairs: dict[str, tuple[Path, Path]], text: str, tmp_path: Path
) -> None:
    base, _ = pairs["llama"]
    broken = disturb(base, tmp_path / "broken", amount=math.nan, name="up_proj")
    with pytest.raises(BitnestError, match="'broken' computes NaN"):
        run(broken, base, text)


def test_nan_that_the_first_tokens_do_not_meet_names_the_model(
    pairs: dict[str, tuple[Path, Path]], text: str, tmp_path: Path
) -> None:
    base, _ = pairs["llama"]
    broken = disturb(base, tmp_path / "late", amount=0)
    tensors = load_file(broken / "model.safetensors")
    words = Path(text.split("=")[1]).read_text().split()
    early = {int(word[1:]) for word in words[: logits_module.PROBE]}
    late = next(i for word in words[16:32] if (i := int(word[1:])) not in early)
    tensors["model.embed_tokens.weight"][late] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitnestError, match="'late' computes NaN"):
        run(broken, None, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 65}, "more than the context of 'llama-noisy', 64 tokens"),
        ({"window": 1}, "--window 1: must be 2 or more"),
        ({"windows": 0}, "--windows 0: must be 1 or more"),
        ({"dtype": "int4"}, "unknown compute type"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, object],
    message: str,
    pairs: dict[str, tuple[Path, Path]],
    text: str,
) -> None:
    with pytest.raises(BitnestError, match=message):
        run(pairs["llama"][1], None, text, **options)


def test_text_too_short_and_two_texts_of_one_name_are_refused(
    pairs: dict[str, tuple[Path, Path]], text: str
) -> None:
    with pytest.raises(DataError, match="too short"):
        run(pairs["llama"][1], None, text, windows=500)
    with pytest.raises(DataError, match="called 'words'"):
        evaluate([pairs["llama"][1]], data=[text, text], window=8, windows=2)


def test_sizes_count_files_and_parameters_of_the_base(
    pairs: dict[str, tuple[Path, Path]], text: str
) -> None:
    base, model = pairs["llama"]
    row = run(model, base, text).rows[1]
    tensors = load_file(base / "model.safetensors")
    assert row.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert row.nbytes == (model / "model.safetensors").stat().st_size
    assert row.bits_per_weight == 8 * row.nbytes / row.parameters


def test_shared_matrix_stored_twice_is_counted_once(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base = pairs["llama"][0]
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    once = sum(t.numel() for name, t in tensors.items() if name != "lm_head.weight")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for tied, expected in ((True, once), (False, once + tensors["lm_head.weight"].numel())):
        config["tie_word_embeddings"] = tied
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert count_parameters(tmp_path) == expected


def test_report_is_json_and_its_table_fits_a_hundred_columns(
    pairs: dict[str, tuple[Path, Path]], text: str
) -> None:
    from rich.console import Console

    base, model = pairs["llama"]
    report = run(model, base, text)
    assert json.loads(json.dumps(report.to_json()))["rows"][1]["model"] == "llama-noisy"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(report))
    shown = console.export_text()
    assert max(len(line) for line in shown.splitlines()) <= 100
    for part in ("llama-base (base)", "llama-noisy", "7 windows x 33 tokens", "float32", "PPL"):
        assert part in shown


def test_a_vague_kl_is_said_to_be_vague(pairs: dict[str, tuple[Path, Path]], text: str) -> None:
    base, noisy = pairs["llama"]
    report = run(noisy, base, text)
    kl = report.rows[1].scores[0].kl
    assert kl is not None and kl.error is not None

    def said(share: float) -> bool:
        other = replace(kl, error=share * kl.mean)
        row = replace(report.rows[1], scores=(replace(report.rows[1].scores[0], kl=other),))
        return f"{share:.0%} of the mean" in protocol(replace(report, rows=(report.rows[0], row)))

    assert said(0.43) and not said(0.1)


def test_models_without_a_base_have_perplexity_only(
    pairs: dict[str, tuple[Path, Path]], text: str
) -> None:
    report = evaluate(list(pairs["llama"]), data=[text], window=16, windows=1)
    assert report.base is None
    assert [row.scores[0].kl for row in report.rows] == [None, None]
    assert report.rows[0].scores[0].nll_error is None  # one window has no spread
    table(report)

"""The demo model is what its README says: small, trained, and every expert in use.

Risks: a binary that outgrows the repository, a tokenizer that loses bytes, texts that share
passages, a router that starves an expert, a checkpoint that was never trained.
"""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitnest.demo import calibration_text, evaluation_text, model_path
from bitnest.demo.corpus import SLOTS, chunks, mixed_text, synthetic
from bitnest.demo.train import balance_loss, encode, evaluate, expert_shares

TOKENS = 16_384


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path()).eval()


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> torch.Tensor:
    text = evaluation_text().read_text(encoding="utf-8")[: 4 * TOKENS]
    return encode(tokenizer, [text])[:TOKENS]


@pytest.fixture(scope="module")
def measured(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(perplexity, shares over uniform (layers, experts)) on the evaluation text."""
    perplexity, shares = evaluate(model, ids)
    return perplexity, shares * model.config.num_experts


def test_model_directory_stays_below_8_mb() -> None:
    assert sum(f.stat().st_size for f in model_path().iterdir()) < 8_000_000


@pytest.mark.parametrize("path", [calibration_text(), evaluation_text()], ids=["calib", "eval"])
def test_text_is_half_a_megabyte_of_utf8(path: Any) -> None:
    size = len(path.read_text(encoding="utf-8").encode())
    assert 450_000 < size < 600_000


def test_calibration_and_evaluation_share_no_passage() -> None:
    """Table rows and sums may repeat by chance; a line of prose or verse may not."""
    texts = [p.read_text(encoding="utf-8") for p in (calibration_text(), evaluation_text())]
    lines = [{x for x in t.splitlines() if len(x) > 80 and not x.startswith("{")} for t in texts]
    assert len(lines[1]) > 200
    assert not lines[0] & lines[1]


def test_every_linear_divides_into_groups_of_128(model: Any) -> None:
    shapes = [p.shape for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
    assert shapes
    assert all(shape[-1] % 128 == 0 for shape in shapes)


def test_checkpoint_is_bfloat16(model: Any) -> None:
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "text",
    ["Call me Ishmael.", "12 + 35 = 47\n\n| a | b |\n", '{"id": 1}', "naïve 雪 🙂\t\r\n  two"],
    ids=["prose", "digits", "json", "bytes"],
)
def test_tokenizer_gives_back_every_byte(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_ids_fit_the_embedding(tokenizer: Any, model: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0


def test_chat_template_renders_roles_as_text(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "user: Hello\nassistant:"


def test_no_expert_in_any_layer_starves_or_floods(measured: tuple[float, torch.Tensor]) -> None:
    shares = measured[1]
    assert shares.shape == (4, 8)
    assert shares.min() > 1 / 3, shares
    assert shares.max() < 3, shares


def test_perplexity_is_far_below_a_unigram_model(
    measured: tuple[float, torch.Tensor], ids: torch.Tensor
) -> None:
    """The unigram model is even fitted to this very text."""
    counts = torch.bincount(ids.long(), minlength=2048).double()
    p = counts[counts > 0] / counts.sum()
    unigram = math.exp(-(p * p.log()).sum())
    assert unigram > 300
    assert measured[0] < 30, (measured[0], unigram)


def test_perplexity_holds_at_the_full_context(model: Any, ids: torch.Tensor) -> None:
    """Positions past the 256 of most of the training were trained too."""
    assert evaluate(model, ids, length=1023)[0] < 32


def test_shares_count_the_choices_of_a_hand_made_router() -> None:
    logits = torch.full((4, 8), -9.0)
    logits[:, 0], logits[:2, 1], logits[2:, 5] = 2.0, 1.0, 1.0
    expected = torch.tensor([0.5, 0.25, 0, 0, 0, 0.25, 0, 0])
    assert torch.equal(expert_shares(logits), expected)


def test_balance_loss_sees_a_starved_expert_that_pooling_hides() -> None:
    """Layer 1 uses experts 0-3 only and layer 2 experts 4-7 only: pooled, all look equal."""
    first = torch.full((64, 8), -20.0)
    first[:, :4] = 0.01 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    second = first.roll(4, dims=1)
    assert balance_loss((first, second)) == pytest.approx(4.0, rel=0.01)  # least value: 2 layers
    level = 1e-3 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
    assert balance_loss((level, level)) == pytest.approx(2.0, rel=0.01)


def test_synthetic_text_depends_on_the_seed_alone_and_adds_up() -> None:
    text = synthetic(3, 20_000)
    assert text == synthetic(3, 20_000) != synthetic(4, 20_000)
    sums = [x.split() for x in text.splitlines() if len(x.split()) == 5 and x.split()[1] in "+-"]
    assert len(sums) > 20
    for a, sign, b, _, c in sums:
        assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_chunks_end_at_line_ends_and_take_documents_in_turn() -> None:
    documents = ["a1\na2\na3\n", "b1\nb2\n"]
    assert list(chunks(documents, 1)) == ["a1\n\n", "b1\n\n", "a2\n\n", "b2\n\n", "a3\n\n"]


def test_domain_that_runs_dry_is_an_error_not_a_skewed_text() -> None:
    documents = {domain: ["line\n" * 9] for domain in SLOTS}
    with pytest.raises(ValueError, match="too little text"):
        mixed_text(documents)

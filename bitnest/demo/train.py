"""Train the demo: a Qwen3-MoE of 3.6M parameters with load balancing in every layer.

    python -m bitnest.demo.train --corpus DIR --out DIR [--minutes M] [--seed S]

`corpus.py` says what DIR holds and how the domains are mixed. Every batch has the domains in the
proportions of `SLOTS`, so that experts have something to divide.

Loss, per batch of T tokens, with router probabilities p[l,t,e] and top-k choices in layer l:

    L = CE + alpha * sum_l  E * sum_e f[l,e] * P[l,e]
    f[l,e] = share of the T*k choices in layer l that fell on expert e   (no gradient)
    P[l,e] = mean over t of p[l,t,e]

the Switch Transformer balancing loss (Fedus et al. 2021), one term per layer. The loss built into
transformers pools the choices of all layers into one f, which is blind to a layer that starves an
expert as long as another layer feeds the expert of the same number; hence this one. f is taken
over a batch that mixes the domains, so an expert may still prefer a domain.

AdamW, linear warmup, cosine to zero. Without --steps the schedule follows the clock, so that a run
ends when it should on a busy machine; --steps N makes the run repeatable from the seed alone. From
`LONG_FROM` of the run on, sequences have 1024 tokens, so that positions past 256 are trained too.

Left out: dropout, router z-loss, expert capacity, gradient accumulation, several devices.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bitnest.demo.corpus import SLOTS, Documents, mixed_text, read_domains

EOT = "<|endoftext|>"
VOCAB, EXPERTS, TOP_K = 2048, 8, 2
BATCH_TOKENS, SHORT, LONG, LONG_FROM = 4096, 256, 1024, 0.8
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY, ALPHA = 2e-3, 200, 0.1, 0.01
CHECKPOINT_SECONDS = 240

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def log(line: str) -> None:
    """Progress, for people."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def train_tokenizer(documents: Documents) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit stands alone so that numbers have one spelling."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [text[:150_000] for texts in documents.values() for text in texts]
    core.train_from_iterator(sample, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=EOT, eos_token=EOT)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: Any, documents: list[str]) -> Tensor:
    """All documents as one row of ids (N,), an end-of-text id after each."""
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.int16)


def new_model() -> Qwen3MoeForCausalLM:
    """3.6M parameters, 1.2M of them active per token; every matrix divides by 128."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        moe_intermediate_size=256,
        intermediate_size=256,
        max_position_embeddings=LONG,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        router_aux_loss_coef=ALPHA,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def expert_shares(router_logits: Tensor) -> Tensor:
    """(tokens, experts) logits of one layer -> (experts,) share of the choices, sums to 1."""
    chosen = router_logits.float().topk(TOP_K, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=EXPERTS).float() / chosen.numel()


def balance_loss(router_logits: tuple[Tensor, ...]) -> Tensor:
    """sum_l E * sum_e f[l,e] * P[l,e]; its least value is the number of layers."""
    total = torch.zeros(())
    for logits in router_logits:  # (tokens, experts)
        p = logits.float().softmax(dim=-1)
        f = F.one_hot(p.topk(TOP_K, dim=-1).indices, EXPERTS).sum(dim=1).float().mean(dim=0) / TOP_K
        total = total + EXPERTS * (f.detach() * p.mean(dim=0)).sum()
    return total


def losses(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (batch, length + 1) -> (cross entropy in nats per token, balance loss)."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=x[:, :-1], output_router_logits=True, use_cache=False)
    ce = F.cross_entropy(out.logits.float().flatten(0, 1), x[:, 1:].flatten())
    return ce, balance_loss(out.router_logits)


@torch.no_grad()
def evaluate(model: Any, ids: Tensor, length: int = SHORT) -> tuple[float, Tensor]:
    """ids (N,) -> (perplexity over windows of `length`, expert shares (layers, experts))."""
    windows = ids[: len(ids) // (length + 1) * (length + 1)].long().view(-1, length + 1)
    nats, shares = 0.0, torch.zeros(model.config.num_hidden_layers, EXPERTS)
    for x in windows.split(16):
        out = model(input_ids=x[:, :-1], output_router_logits=True, use_cache=False)
        ce = F.cross_entropy(out.logits.float().flatten(0, 1), x[:, 1:].flatten())
        nats += ce.item() * len(x)
        shares += torch.stack([expert_shares(logits) for logits in out.router_logits]) * len(x)
    return math.exp(nats / len(windows)), shares / len(windows)


def draw(ids: dict[str, Tensor], step: int, length: int, rng: torch.Generator) -> Tensor:
    """Random windows (BATCH_TOKENS / length, length + 1), their domains the next of SLOTS."""
    rows = BATCH_TOKENS // length
    out = []
    for slot in range(step * rows, (step + 1) * rows):
        row = ids[SLOTS[slot % len(SLOTS)]]
        start = int(torch.randint(len(row) - length, (1,), generator=rng))
        out.append(row[start : start + length + 1])
    return torch.stack(out).long()


def fit(model: Any, ids: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Run the schedule to its end; resumes from `args.out/checkpoint.pt` where there is one."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    rng = torch.Generator().manual_seed(args.seed)
    checkpoint, step, before = args.out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        step, before = state["step"], state["seconds"]
        log(f"resumed at step {step}, {before:.0f} s")
    began = saved = time.monotonic()
    mean_ce = 0.0  # running mean over about 100 steps
    while True:
        seconds = before + time.monotonic() - began
        done = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if done >= 1:
            return {
                "steps": step,
                "tokens": step * BATCH_TOKENS,
                "seconds": seconds,
                "loss": mean_ce,
            }
        lr = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        ce, balance = losses(model, draw(ids, step, SHORT if done < LONG_FROM else LONG, rng))
        (ce + ALPHA * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        mean_ce += (ce.item() - mean_ce) * max(0.01, 1 / step)
        if step % 50 == 0:
            log(
                f"step {step}  {done:6.1%}  {seconds:.0f} s  loss {mean_ce:.4f}"
                f"  balance {balance.item() / model.config.num_hidden_layers:.3f}  lr {lr:.2e}"
            )
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"rng": rng.get_state(), "step": step, "seconds": before + saved - began}
            torch.save(state, checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model and write its texts.")
    parser.add_argument("--corpus", type=Path, required=True, help="directory of *.txt books")
    parser.add_argument("--out", type=Path, required=True, help="gets model/ and text/")
    parser.add_argument("--minutes", type=float, default=45.0, help="length of the schedule")
    parser.add_argument("--steps", type=int, default=0, help="length in steps instead of minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train, held, calibration = read_domains(args.corpus, args.seed)
    (args.out / "text").mkdir(parents=True, exist_ok=True)
    evaluation = mixed_text(held)
    (args.out / "text" / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    (args.out / "text" / "calibration.txt").write_text(mixed_text(calibration), encoding="utf-8")

    tokenizer = train_tokenizer(train)
    ids = {domain: encode(tokenizer, texts) for domain, texts in train.items()}
    log("tokens: " + ", ".join(f"{domain} {len(row)}" for domain, row in ids.items()))
    model = new_model()
    model.set_experts_implementation("grouped_mm")
    result = fit(model, ids, args)

    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    perplexity, shares = evaluate(model, encode(tokenizer, [evaluation]))
    result["perplexity"] = round(perplexity, 3)
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    result["shares_over_uniform"] = (shares * EXPERTS).round(decimals=3).tolist()
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

"""Trains a small dense Llama, for engines that refuse the odd sizes of other small models.

    python -m benchmarks.train_dense --corpus DIR --tokenizer MODEL --out DIR [--minutes M]

Every .txt file below the corpus is training text; texts to calibrate on and to evaluate on are
others. Heads are 64 wide and every side of a matrix divides by 128: vLLM's CPU attention takes
heads from 32 on, its block formats sides of 128. Cross entropy, AdamW, warmup, cosine on a schedule
that follows the clock, which makes no two models equal: it is for comparing engines on one.

Left out: resuming, a tokenizer of its own, held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.train_shared_moe import new_optimizer
from bitnest.demo.train import encode, log
from bitnest.packed.loading import load_tokenizer

LAYERS, HIDDEN, WIDTH, HEADS, KV_HEADS, LENGTH, ROWS = 4, 256, 768, 4, 2, 128, 4
PEAK_LR, WARMUP_STEPS = 2e-3, 50


def new_model(vocabulary: int) -> LlamaForCausalLM:
    """3.1 M parameters in the blocks; embedding and head are one."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, ids: torch.Tensor, minutes: float) -> dict[str, float]:
    """Run the schedule to its end; ids (N,)."""
    optimizer, began, step, mean = new_optimizer(model), time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        rate = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - LENGTH, (ROWS,)).tolist()
        x = torch.stack([ids[start : start + LENGTH + 1] for start in starts]).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=x[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        mean += (loss.item() - mean) * max(0.01, 1 / step)
        if step % 50 == 0:
            log(f"step {step}  {done:6.1%}  loss {mean:.4f}")
    return {"steps": step, "tokens": step * ROWS * LENGTH, "loss": round(mean, 4)}


def main() -> None:
    """Train and save; the last line is JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="model to take it from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer)
    texts = [path.read_text(encoding="utf-8") for path in sorted(args.corpus.rglob("*.txt"))]
    ids = encode(tokenizer, texts)
    log(f"{len(texts)} texts, {len(ids)} tokens")
    model = new_model(len(tokenizer))
    result = fit(model, ids, args.minutes)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Trains a Qwen2-MoE with shared experts, of 24 M parameters: a second family for benchmarks.

    python -m benchmarks.train_shared_moe --corpus books=DIR --corpus code=DIR \\
        --mix books,books,books,code --out DIR [--minutes M] [--threads N] [--seed S]

What it differs in from the Qwen3-MoE that other benchmarks use: a shared expert beside the routed
ones, behind a sigmoid gate of its own; biases on queries, keys and values; gates that do not sum to
one; an untied head; no norms on queries and keys; four experts a token, evenly used. Every
dimension of a matrix divides by 256 but those of the routers (16) and shared gates (1).

A domain is a directory of .txt and .py files, searched through. A seeded shuffle keeps 4 % of a
domain's documents out for `text/evaluation.txt` and 4 % for `text/calibration.txt`; the model and
its tokenizer see neither. `--exclude FILE` drops documents that FILE quotes, so that it too stays
unseen. Batches, texts and their order have the domains in the proportions of `--mix`.

Loss: as in `bitnest.demo.train`, with top-k of E experts in each of the layers l,

    L = CE + alpha * sum_l  E * sum_e f[l,e] * P[l,e]

f the share of choices, P the mean probability of an expert in one batch and layer. AdamW, linear
warmup, cosine to zero on a schedule that follows the clock, or `--steps`. Run again with the same
arguments it goes on from `checkpoint.pt`.

Left out: everything `bitnest.demo.train` leaves out, and a chat template.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bitnest.demo.corpus import SKIPPED, Documents, chunks
from bitnest.demo.train import EOT, encode, log

VOCAB, LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH = 4096, 6, 16, 4, 256, 256
BATCH_TOKENS, SHORT, LONG, LONG_FROM = 2048, 256, 1024, 0.9
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY, ALPHA = 1.5e-3, 100, 0.1, 0.02
CHECKPOINT_SECONDS = 240
HELD_OUT = 0.04  # of a domain's documents, for each of the two texts
TEXT_BYTES, CHUNK = 600_000, 2500  # of a text; least characters of one piece of it
SAMPLE = 100_000  # characters of a document that the tokenizer sees


def quoted(text: str, others: Sequence[str]) -> bool:
    """Whether one of `others` holds a passage from a quarter, the middle or three of `text`."""
    passages = [text[len(text) * i // 4 :][:160] for i in (1, 2, 3)]
    return any(passage in other for other in others for passage in passages)


def read_domain(place: Path, others: Sequence[str]) -> list[str]:
    """The documents below `place`, sorted by name, without those that `others` quote."""
    paths = sorted(p for p in place.rglob("*") if p.suffix in (".txt", ".py"))
    texts = [p.read_text(encoding="utf-8") for p in paths if p.stem not in SKIPPED]
    kept = [text for text in texts if len(text) > CHUNK and not quoted(text, others)]
    if len(kept) < 3:
        raise SystemExit(f"{place}: {len(kept)} documents to use, at least 3 are needed")
    return kept


def split(documents: list[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """(training, evaluation, calibration) documents of one domain."""
    shuffled = random.Random(seed).sample(documents, len(documents))
    held = max(1, round(HELD_OUT * len(documents)))
    return shuffled[2 * held :], shuffled[:held], shuffled[held : 2 * held]


def mixed_text(documents: Documents, mix: Sequence[str]) -> str:
    """Pieces of the domains in the order of `mix`, TEXT_BYTES or as far as the first of them."""
    sources = {domain: chunks(texts, CHUNK) for domain, texts in documents.items()}
    out, length = [], 0
    while length < TEXT_BYTES:
        pieces = [next(sources[domain], None) for domain in mix]
        if None in pieces:
            break
        out += [piece for piece in pieces if piece is not None]
        length = sum(map(len, out))
    return "".join(out)


def train_tokenizer(documents: Documents) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's splitting."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [text[:SAMPLE] for texts in documents.values() for text in texts]
    core.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=EOT, eos_token=EOT)


def new_model() -> Qwen2MoeForCausalLM:
    """23.8 M parameters; 8.5 M multiply for a token, head included."""
    config = Qwen2MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=WIDTH,
        intermediate_size=WIDTH,
        max_position_embeddings=LONG,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        router_aux_loss_coef=ALPHA,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Qwen2MoeForCausalLM(config)


def shares(logits: Tensor) -> Tensor:
    """(tokens, experts) router logits of one layer -> (experts,) share of the choices, sum 1."""
    chosen = logits.float().topk(TOP_K, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=EXPERTS).float() / chosen.numel()


def losses(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (batch, length + 1) -> (cross entropy, sum over layers of E * sum_e f * P)."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=x[:, :-1], output_router_logits=True, use_cache=False)
    ce = F.cross_entropy(out.logits.float().flatten(0, 1), x[:, 1:].flatten())
    balance = torch.zeros(())
    for logits in out.router_logits:  # (tokens, experts)
        p = logits.float().softmax(dim=-1).mean(dim=0)
        balance = balance + EXPERTS * (shares(logits.detach()) * p).sum()
    return ce, balance


@torch.no_grad()
def evaluate(model: Any, ids: Tensor) -> tuple[float, Tensor]:
    """ids (N,) -> (perplexity over windows of SHORT, expert shares (layers, experts))."""
    windows = ids[: len(ids) // (SHORT + 1) * (SHORT + 1)].long().view(-1, SHORT + 1)
    nats, used = 0.0, torch.zeros(LAYERS, EXPERTS)
    for x in windows.split(16):
        out = model(input_ids=x[:, :-1], output_router_logits=True, use_cache=False)
        ce = F.cross_entropy(out.logits.float().flatten(0, 1), x[:, 1:].flatten())
        nats += ce.item() * len(x)
        used += torch.stack([shares(logits) for logits in out.router_logits]) * len(x)
    return math.exp(nats / len(windows)), used / len(windows)


def draw(
    ids: dict[str, Tensor], mix: Sequence[str], step: int, length: int, rng: torch.Generator
) -> Tensor:
    """Random windows (BATCH_TOKENS / length, length + 1), their domains in turn those of `mix`."""
    rows, out = BATCH_TOKENS // length, []
    for slot in range(step * rows, (step + 1) * rows):
        row = ids[mix[slot % len(mix)]]
        start = int(torch.randint(len(row) - length, (1,), generator=rng))
        out.append(row[start : start + length + 1])
    return torch.stack(out).long()


def new_optimizer(model: Any) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim <= 1]},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def fit(model: Any, ids: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Run the schedule to its end, from `args.out/checkpoint.pt` where there is one."""
    optimizer, rng = new_optimizer(model), torch.Generator().manual_seed(args.seed)
    checkpoint, step, before = args.out / "checkpoint.pt", 0, 0.0
    mean_ce = 0.0  # running mean over about 100 steps
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        step, before, mean_ce = state["step"], state["seconds"], state["loss"]
        log(f"resumed at step {step}, {before:.0f} s")
    began = saved = time.monotonic()
    while True:
        seconds = before + time.monotonic() - began
        done = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if done >= 1:
            counts = {"steps": step, "tokens": step * BATCH_TOKENS, "seconds": round(seconds)}
            return counts | {"loss": round(mean_ce, 4)}
        lr = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        length = SHORT if done < LONG_FROM else LONG
        ce, balance = losses(model, draw(ids, args.mix, step, length, rng))
        (ce + ALPHA * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        mean_ce += (ce.item() - mean_ce) * max(0.01, 1 / step)
        if step % 50 == 0:
            log(
                f"step {step}  {done:6.1%}  {seconds:.0f} s  loss {mean_ce:.4f}"
                f"  balance {balance.item() / LAYERS:.3f}  lr {lr:.2e}"
            )
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"rng": rng.get_state(), "step": step, "seconds": before + saved - began}
            state["loss"] = mean_ce
            partial = checkpoint.with_suffix(".tmp")
            torch.save(state, partial)
            partial.replace(checkpoint)


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, dict[str, Tensor], str]:
    """Split the corpus and write the two texts: (tokenizer, ids of domains, evaluation text)."""
    others = [path.read_text(encoding="utf-8") for path in args.exclude]
    train: Documents = {}
    held: Documents = {}
    calibration: Documents = {}
    for label, place in args.corpus:
        documents = read_domain(place, others)
        train[label], held[label], calibration[label] = split(documents, args.seed)
        log(f"{label}: {len(train[label])} documents to train on, {len(held[label])} held out")
    (args.out / "text").mkdir(parents=True, exist_ok=True)
    evaluation = mixed_text(held, args.mix)
    (args.out / "text" / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    (args.out / "text" / "calibration.txt").write_text(
        mixed_text(calibration, args.mix), encoding="utf-8"
    )
    if (args.out / "checkpoint.pt").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "model")
    else:
        tokenizer = train_tokenizer(train)
        tokenizer.save_pretrained(args.out / "model")
    ids = {domain: encode(tokenizer, texts) for domain, texts in train.items()}
    log("tokens: " + ", ".join(f"{domain} {len(row)}" for domain, row in ids.items()))
    return tokenizer, ids, evaluation


def labelled(spec: str) -> tuple[str, Path]:
    """`LABEL=DIR` -> (label, directory)."""
    label, _, place = spec.partition("=")
    if not place or not Path(place).is_dir():
        raise argparse.ArgumentTypeError(f"'{spec}': LABEL=DIRECTORY is wanted")
    return label, Path(place)


def parse() -> argparse.Namespace:
    """The command line; `mix` becomes a list of labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=labelled, action="append", required=True)
    parser.add_argument("--mix", default="", help="labels in turn; default: each once")
    parser.add_argument("--exclude", type=Path, action="append", default=[], help="keep unseen")
    parser.add_argument("--out", type=Path, required=True, help="gets model/ and text/")
    parser.add_argument("--minutes", type=float, default=35.0, help="length of the schedule")
    parser.add_argument("--steps", type=int, default=0, help="length in steps instead of minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    labels = [label for label, _ in args.corpus]
    args.mix = args.mix.split(",") if args.mix else labels
    if set(args.mix) != set(labels) or len(set(labels)) != len(labels):
        parser.error(f"--mix {','.join(args.mix)}: the labels of --corpus are {','.join(labels)}")
    return args


def main() -> None:
    """Train, save, evaluate; the last line is JSON."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer, ids, evaluation = prepare(args)
    model = new_model()
    model.set_experts_implementation("grouped_mm")
    result = fit(model, ids, args)
    result["parameters"] = sum(p.numel() for p in model.parameters())

    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.out / "model")
    perplexity, used = evaluate(model, encode(tokenizer, [evaluation]))
    result["perplexity"] = round(perplexity, 3)
    result["shares_over_uniform"] = [
        [round(share, 3) for share in layer] for layer in (used * EXPERTS).tolist()
    ]
    result["machine"] = f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}"
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""How much of what a LoRA adapter taught survives four bits, by when it is merged.

    python -m benchmarks.lora_gain MODEL --train FILE --eval LABEL=FILE --calibrate LABEL=FILE ...

peft trains an adapter on attention and experts of MODEL with the text of --train (kept in --work
and reused). Then, by mean NLL in nats per token on --eval, which is in none of the other texts:

    dense                      base, and the adapter merged: their difference is the gain
    merged, then compressed    compress --lora
    beside the packed base     compress, then --lora on the artifact
    compressed, then merged    merged into the decoded codes of the artifact, compressed once more

    gain kept  (NLL(base compressed) - NLL(row)) / (NLL(base) - NLL(base merged))
    net gain   (NLL(base) - NLL(row)) / (NLL(base) - NLL(base merged))

"Gain kept" holds the base's own cost of compression against neither side; "net gain" counts all of
it against the row. Every compression has the same format, method and calibration text. The text
must be of a kind that MODEL has more to learn of, or the gain drowns in the noise of compression.
--steps, --rank, --rate and --seed change the adapter; needs peft. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.predicted_kl import machine

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
AFTER = "compressed, then merged"


def main() -> None:
    """Train, compress three ways, measure, print."""
    from bitnest import api

    args = parse()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-lora-"))
    work.mkdir(parents=True, exist_ok=True)
    adapter = work / f"adapter-r{args.rank}-{args.steps}-{args.rate:g}-{args.seed}"
    if not adapter.exists():
        train(args, adapter)
    lora = [str(adapter)]
    fit = {"data": args.calibrate, "samples": args.samples, "length": args.length}
    base, first, after = (work / f"{args.format}-{name}" for name in ("base", "merged", "after"))
    if not base.exists():
        api.compress(args.model, base, format=args.format, **fit)
    if not first.exists():
        api.compress(args.model, first, format=args.format, lora=lora, **fit)
    if not after.exists():
        merge_after(base, lora, after, args)
    rows = {
        "base": nll(args, args.model),
        "base, adapter merged": nll(args, args.model, lora),
        "base, compressed": nll(args, base),
        "merged, then compressed": nll(args, first),
        "beside the packed base": nll(args, base, lora),
        AFTER: nll(args, after),
    }
    report(rows, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", required=True, help="text that the adapter is trained on")
    parser.add_argument("--eval", required=True, help="LABEL=FILE, in none of the other texts")
    parser.add_argument("--calibrate", action="append", required=True, help="LABEL=FILE")
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128, help="of 256 tokens, measured on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="windows of 256 tokens per step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    return parser.parse_args()


def train(args: argparse.Namespace, out: Path) -> None:
    """A LoRA adapter by AdamW under a cosine, on windows drawn from the text."""
    import peft

    from bitnest.api.loading import load
    from bitnest.calibrate.data import load_texts, token_windows
    from bitnest.packed.loading import load_tokenizer

    torch.manual_seed(args.seed)
    model: Any = load(args.model, dtype=torch.float32)
    fused = any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=ATTENTION,
        target_parameters=EXPERTS if fused else None,
    )  # fmt: skip
    tuned: Any = peft.get_peft_model(model, config)
    tokens = token_windows(
        load_tokenizer(args.model), load_texts(args.train), window=256, count=None, where=args.train
    ).flatten()
    wanted = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=args.rate, weight_decay=0.01)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / args.steps)) / 2,
    )
    tuned.train()
    started = time.monotonic()
    for step in range(args.steps):
        starts = torch.randint(len(tokens) - 256, (args.batch,))
        batch = torch.stack([tokens[start : start + 256] for start in starts.tolist()])
        loss = tuned(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        shape.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == args.steps - 1:
            seconds = time.monotonic() - started
            print(
                f"step {step}: loss {loss.item():.4f}, {seconds:.0f} s", file=sys.stderr, flush=True
            )
    tuned.save_pretrained(out)


def merge_after(base: Path, lora: list[str], out: Path, args: argparse.Namespace) -> None:
    """What comes of an artifact that is decoded, given the adapter and compressed once more."""
    from bitnest.api.texts import calibration_set, sources
    from bitnest.artifact import Artifact
    from bitnest.lora import open_adapters
    from bitnest.merged import MergedCheckpoint
    from bitnest.packed.decoded import DecodedCheckpoint
    from bitnest.packed.loading import load_tokenizer
    from bitnest.quantize.compress import prepare, run, with_calibration
    from bitnest.recipe import Recipe

    decoded = DecodedCheckpoint.of(Artifact.open(base), whole=True)
    job = prepare(MergedCheckpoint.of(decoded, open_adapters(lora)), Recipe(format=args.format))
    tokenizer = load_tokenizer(base)
    texts = calibration_set(tokenizer, sources(args.calibrate), args.samples, args.length, 0)
    run(with_calibration(job, texts), out)


def nll(args: argparse.Namespace, model: Any, lora: list[str] | None = None) -> dict[str, float]:
    """Mean NLL in nats, perplexity, and bytes of weights and adapter."""
    from bitnest import api

    found = api.evaluate([model], data=[args.eval], lora=lora or [], windows=args.windows)
    (score,) = found.rows[0].scores
    return {
        "nll": score.nll, "perplexity": score.perplexity, "bytes": found.rows[0].nbytes,
    }  # fmt: skip


def report(rows: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """The table, and one JSON line."""
    whole, low = rows["base"]["nll"], rows["base, compressed"]["nll"]
    gain = whole - rows["base, adapter merged"]["nll"]
    print(f"{'':26}{'bytes':>12}{'perplexity':>12}{'NLL':>9}{'gain kept':>11}{'net gain':>10}")
    for number, (name, row) in enumerate(rows.items()):
        row["net"] = (whole - row["nll"]) / gain
        row["kept"] = row["net"] if number < 2 else (low - row["nll"]) / gain
        print(f"{name:26}{row['bytes']:>12,.0f}{row['perplexity']:>12.3f}{row['nll']:>9.4f}"
              f"{row['kept']:>10.1%}{row['net']:>10.1%}")  # fmt: skip
    asked = {
        k: str(v) for k, v in vars(args).items() if k in {"format", "rank", "steps", "rate", "seed"}
    }
    print(json.dumps({"model": Path(args.model).name, **asked, "rows": rows, "machine": machine()}))


if __name__ == "__main__":
    main()

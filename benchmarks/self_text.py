"""Text that a model writes itself, for models no corpus at hand fits.

    python -m benchmarks.self_text MODEL --out FILE [--documents 1200] [--length 256] [--seed 0]

Documents are sampled from the model's own distribution (temperature 1, no truncation), each from
the token that begins a text, and parted by blank lines.
"""

from __future__ import annotations

import argparse
from pathlib import Path

BATCH = 100


def main() -> None:
    """Sample, decode, write."""
    import torch
    from transformers import AutoModelForCausalLM

    from bitnest.checkpoint import resolve_model
    from bitnest.packed.loading import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = resolve_model(args.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = load_tokenizer(path)
    first = model.config.bos_token_id
    if first is None:
        parser.error("this model's config names no token that begins a text (bos_token_id)")
    torch.manual_seed(args.seed)
    documents: list[str] = []
    while len(documents) < args.documents:
        start = torch.full((min(BATCH, args.documents - len(documents)), 1), first)
        found = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=args.length - 1,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=first,
            eos_token_id=None,
        )  # fmt: skip
        documents.extend(tokenizer.decode(row, skip_special_tokens=True) for row in found)
    args.out.write_text("\n\n".join(documents), encoding="utf-8")
    print(f"{args.out}: {len(documents)} documents, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

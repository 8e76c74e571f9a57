"""KV cache formats: what they lose, and what memory they really hold.

    python -m benchmarks.kv_table MODEL --eval LABEL=FILE ... [--window 1024] [--windows 16]
    python -m benchmarks.kv_table --memory

The first sends windows of text through a cache of each format, as `bitnest eval --kv` does, and
prints perplexity, its change and KL against the 16-bit cache of the same model. The second fills
caches by running random two-layer Llamas with heads of 64 and 128 channels in bfloat16 over 4,096,
4,223 and 16,384 tokens, and prints the bytes of all storages that the cache holds, beside those of
transformers' own; then the time of one more token's `update` of a layer, which dequantises it. The
last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from benchmarks.predicted_kl import machine

FORMATS = (
    "int8", "int8-w0", "fp8", "fp8-w128", "fp8_e5m2", "int4", "int4-g64", "int4-g32", "int4-w32",
    "int4-w0", "int4-g64-w0", "int4-g32-w0",
)  # fmt: skip
HELD = ("int8", "fp8", "fp8-w128", "int4", "int4-g64", "int4-g32", "int4-w0")
CONTEXTS = (4096, 4223, 16384)  # 4,223 is the worst: a group of 128 but for one token in the window
CHUNK = 1024


def main() -> None:
    """Measure, print."""
    from bitnest import demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--eval", action="append", default=[])
    parser.add_argument("--kv", action="append", default=[])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    table = memory(args.kv or HELD) if args.memory else losses(args, args.kv or FORMATS)
    print(f"\n{machine()}")
    print(json.dumps({"rows": table, "machine": machine()}))


def losses(args: argparse.Namespace, formats: list[str]) -> list[dict[str, Any]]:
    """A row per format and text."""
    from bitnest import api, demo

    data = args.eval or [f"demo={demo.evaluation_text()}"]
    report = api.evaluate(
        [args.model], data=data, kv=formats, window=args.window, windows=args.windows
    )
    print(f"{'format':<18}{'text':<10}{'perplexity':>12}{'change %':>10}{'KL':>12}{'p99':>10}")
    table = []
    for row in report.rows:
        for base, score in zip(report.rows[0].scores, row.scores, strict=True):
            kl = None if score.kl is None else score.kl.mean
            found = {
                "kv": row.kv or "none", "text": score.text, "perplexity": score.perplexity,
                "change": 100 * (score.perplexity / base.perplexity - 1), "kl": kl,
                "kl_error": None if score.kl is None else score.kl.error,
            }  # fmt: skip
            table.append(found)
            rest = "" if score.kl is None else f"{score.kl.mean:12.6f}{score.kl.p99:10.5f}"
            print(f"{found['kv']:<18}{score.text:<10}{score.perplexity:12.4f}"
                  f"{found['change']:10.3f}{rest}")  # fmt: skip
    return table


def memory(formats: list[str]) -> list[dict[str, Any]]:
    """A row per head size, context and format."""
    table = []
    print(f"{'head':>4}{'tokens':>8}  {'format':<18}{'bytes':>12}{'of bf16':>9}{'ms':>9}")
    for width in (64, 128):
        model = random_model(width)
        for tokens in CONTEXTS:
            plain = 0
            for name in ("none", *formats):
                started = time.monotonic()
                nbytes, milliseconds = held(model, name, tokens)
                plain = plain or nbytes
                row = {"head": width, "tokens": tokens, "kv": name, "bytes": nbytes,
                       "ratio": nbytes / plain, "update_ms": milliseconds}  # fmt: skip
                table.append(row)
                print(f"{width:>4}{tokens:>8}  {name:<18}{nbytes:>12,}{row['ratio']:>9.4f}"
                      f"{milliseconds:>9.2f}", flush=True)  # fmt: skip
                sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
    return table


def random_model(width: int) -> Any:
    """Two layers of Llama whose heads have `width` channels: 2 heads of queries, 2 of keys."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=width,
        max_position_embeddings=max(CONTEXTS),
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def held(model: Any, name: str, tokens: int) -> tuple[int, float]:
    """Bytes that a cache holds after `tokens` tokens, and the median milliseconds of an update."""
    import torch
    from transformers import DynamicCache

    from bitnest.packed.kv_cache import open_cache

    plain = name == "none"
    cache: Any = DynamicCache(config=model.config) if plain else open_cache(model, name)
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for start in range(0, tokens, CHUNK):
            part = ids[:, start : start + CHUNK]
            model.model(input_ids=part, past_key_values=cache, use_cache=True)
    if plain:
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        nbytes = sum(t.untyped_storage().nbytes() for t in tensors)
    else:
        nbytes = cache.nbytes
    one = torch.randn(1, 2, 1, model.config.head_dim, dtype=torch.bfloat16)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        cache.update(one, one, 0)
        times.append(time.perf_counter() - started)
    return nbytes, 1000 * statistics.median(times)


if __name__ == "__main__":
    main()

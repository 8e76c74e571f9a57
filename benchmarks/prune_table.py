"""Sparse formats by every method, beside integers of at most their bytes.

    python -m benchmarks.prune_table MODEL --data LABEL=FILE ... --eval LABEL=FILE ... [--work DIR]

Perplexity and mean KL per text of the model, of integers of 2 to 8 bits, and of 50 % unstructured,
2:4, 4:8 and half of the blocks of 16 x 16 and 64 x 32, each by magnitude, Wanda and SparseGPT, with
16-bit and with 4-bit survivors. `KL of int` is the mean over texts of the widest integers that take
no more bytes than the row. Artifacts in --work are made once. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.predicted_kl import machine

PATTERNS = ("50", "2:4", "4:8", "b16x16-50", "b64x32-50")
PRUNERS = ("magnitude", "wanda", "sparsegpt")
WIDTHS = (2, 3, 4, 5, 6, 8)


def main() -> None:
    """Compress, evaluate, print."""
    from bitnest import demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--eval", action="append", default=[])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--pattern", action="append", default=[])
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    data = args.data or [f"demo={demo.calibration_text()}"]
    held_out = args.eval or [f"demo={demo.evaluation_text()}"]
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-prune-"))
    work.mkdir(parents=True, exist_ok=True)
    codes = f"int4-g{args.group}"
    wanted = [(f"int{width}-g{args.group}", "") for width in WIDTHS]
    for base in ("dense", codes):
        for pattern in args.pattern or PATTERNS:
            wanted += [(f"{base}%{pattern}", prune) for prune in PRUNERS]
    made = [make(args, work, name, prune, data) for name, prune in wanted]
    report(rows(args, [("dense", ""), *wanted], made, held_out))


def make(args: argparse.Namespace, work: Path, name: str, prune: str, data: list[str]) -> Path:
    """The artifact of one format and method, made once."""
    from bitnest import api

    out = work / f"{name}-{prune or 'gptq'}".replace("%", "-sparse").replace(":", "of")
    started = time.monotonic()
    if not out.exists():
        options: dict[str, Any] = {"prune": prune} if prune else {}
        api.compress(args.model, out, format=name, data=data, samples=args.samples,
                     length=args.length, **options)  # fmt: skip
        sys.stderr.write(f"{out.name}: {time.monotonic() - started:.0f} s\n")
    return out


def rows(
    args: argparse.Namespace, names: list[tuple[str, str]], made: list[Path], data: list[str]
) -> list[dict[str, Any]]:
    """One per model, the base first."""
    from bitnest import api

    found = api.evaluate(
        made, against=args.model, data=data, window=args.window, windows=args.windows
    )
    return [
        {
            "format": name,
            "prune": prune,
            "bytes": row.nbytes,
            "perplexity": {s.text: s.perplexity for s in row.scores},
            "kl": {s.text: 0.0 if s.kl is None else s.kl.mean for s in row.scores},
        }
        for (name, prune), row in zip(names, found.rows, strict=True)
    ]


def mean(values: dict[str, float]) -> float:
    """Over the texts."""
    return sum(values.values()) / len(values)


def beside(table: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any] | None:
    """The widest integers of no more bytes than a sparse row."""
    plain = [r for r in table if "%" not in r["format"] and r["bytes"] <= row["bytes"]]
    return max(plain, key=lambda r: r["bytes"], default=None)


def report(table: list[dict[str, Any]]) -> None:
    """The table, and as JSON."""
    texts = list(table[0]["kl"])
    heads = "".join(f"{f'ppl {t}':>13}{f'KL {t}':>12}" for t in texts)
    print(f"{'format':<22}{'method':<11}{'bytes':>12}{heads}{'mean KL':>10}  integers of <= bytes")
    for row in table:
        scores = "".join(f"{row['perplexity'][t]:13.3f}{row['kl'][t]:12.5f}" for t in texts)
        line = f"{row['format']:<22}{row['prune'] or '-':<11}{row['bytes']:>12,}{scores}"
        line += f"{mean(row['kl']):10.5f}"
        other = beside(table, row) if "%" in row["format"] else None
        if other is not None:
            line += f"  {other['format']} {mean(other['kl']):.5f}"
        print(line)
    print(f"\n{machine()}")
    print(json.dumps({"rows": table, "machine": machine()}))


if __name__ == "__main__":
    main()

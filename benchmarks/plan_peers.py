"""Plans against llama.cpp's files: KL at equal or fewer bytes, embedding included in both.

    python -m benchmarks.plan_peers MODEL --rows ROWS.json --calibration LABEL=FILE ... \
        --data LABEL=FILE ... [--candidate FORMAT ...] [--work DIR]

ROWS.json is what `benchmarks.llama_cpp` printed last: the peers' file bytes, KL and perplexity on
the same texts, by the same protocol (64 windows of 256 tokens spread over each text, base in
float32). For every row a plan is made for a size of at most the peer's file, everything in it
counted (tokenizer and config too, as GGUF holds them), carried out with GPTQ on the calibration
text, and measured. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.predicted_kl import machine


def main() -> None:
    """Plan, compress, evaluate, print."""
    from bitnest import api
    from bitnest.api.planning import open_planner
    from bitnest.export.plan_targets import NATIVE
    from bitnest.quantize.allocation.budget import Budget

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--candidate", action="append", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-peers-"))
    work.mkdir(parents=True, exist_ok=True)
    peers = json.loads(args.rows.read_text().splitlines()[-1])
    options = {"data": args.calibration, "samples": args.samples, "length": args.length}
    statistics = work / "statistics"
    if not statistics.exists():
        api.analyze(args.model, statistics, formats=args.candidate or NATIVE, **options)
    planner = open_planner(args.model, statistics, candidates=args.candidate)
    outs: dict[str, Path] = {}
    plans = {}
    for row in peers["rows"]:
        plans[row["type"]] = planned = planner.plan(Budget(size=row["file_bytes"]))
        outs[row["type"]] = out = work / f"plan-{planned.plan.digest}"
        if not out.exists():
            api.compress(args.model, out, plan=planned.plan, **options)
        sys.stderr.write(f"{row['type']}: {planned.sizes.artifact:,} bytes\n")
    found = api.evaluate(list(dict.fromkeys(outs.values())), against=args.model, data=args.data)
    rows = []
    sizes = {out: sum(file.stat().st_size for file in out.iterdir()) for out in outs.values()}
    by_path = dict(zip(dict.fromkeys(outs.values()), found.rows[1:], strict=True))
    for row in peers["rows"]:
        planned, out = plans[row["type"]], outs[row["type"]]
        measured = by_path[out]
        rows.append(
            {
                "type": row["type"], "peer": row, "bits": planned.bits,
                "bits_per_weight": planned.bits_per_weight, "predicted": planned.mean,
                "bytes": sizes[out],
                "texts": {
                    s.text: {"kl": s.kl.mean, "perplexity": s.perplexity, "same_top": s.kl.same_top}
                    for s in measured.scores if s.kl
                },
            }
        )  # fmt: skip
        shutil.rmtree(out, ignore_errors=True)
    report(rows)
    print(machine())
    print(json.dumps({"model": Path(args.model).name, "rows": rows, "machine": machine(),
                      "llama_cpp": peers.get("llama_cpp")}))  # fmt: skip


def report(rows: list[dict[str, Any]]) -> None:
    """Each peer's row above ours."""
    texts = list(rows[0]["texts"])
    head = "".join(f"  {t[:14] + ' PPL':>18} {'KL':>8} {'top-1':>6}" for t in texts)
    print(f"{'':<22} {'bytes':>11}{head}")
    for row in rows:
        for name, nbytes, values in (
            (f"llama.cpp {row['type']}", row["peer"]["file_bytes"], row["peer"]["texts"]),
            (f"bitnest {row['bits']:.2f} bits", row["bytes"], row["texts"]),
        ):
            cells = "".join(
                f"  {values[t]['perplexity']:18.2f} {values[t]['kl']:8.5f} "
                f"{values[t]['same_top']:6.1%}" for t in texts
            )  # fmt: skip
            print(f"{name:<22} {nbytes:>11,}{cells}")


if __name__ == "__main__":
    main()

"""Every number format on one model: perplexity and KL at round-to-nearest and GPTQ, in one table.

    python -m benchmarks.format_table MODEL --data books=FILE [--data code=FILE ...] \
        [--calibration LABEL=FILE] [--formats NAME,NAME] [--work DIR] [--json FILE]

Compresses MODEL once per format and method into DIR (kept: a second call only adds what is
missing), then evaluates all against MODEL in one run of 64 windows of 256 tokens a text, float32.
`bits` are bits per quantised weight, scales and tables included. `error` is the share of a site's
output energy that GPTQ loses on the calibration text, weighted by parameters. Without --data and
--calibration: the embedded texts. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMATS = (
    "int8-g128", "int6-g128", "int5-g128", "int4-g128", "int3-g128", "int2-g128", "int1-g128",
    "int4-g128-balanced", "int4-g128-asym", "int3-g128-asym", "int2-g128-asym",
    "int4-g32", "int4-g64", "int4-g64-dq", "int3-g64-dq", "int4-g128-m1", "int4-g128-m2",
    "int4-channel", "int8-channel", "int8-tensor", "int4-b32x64",
    "fp8-channel", "fp8_e5m2-channel", "fp8-tensor", "fp8-b128x128",
    "fp6-g128", "fp6_e2m3-g128", "fp5_e2m2-g128", "fp4-g32", "fp4-g32-m2", "fp3_e1m1-g32",
    "mxfp8", "mxfp8_e5m2", "mxint8", "mxfp6", "mxfp6_e3m2", "mxint6",
    "mxfp4", "mxfp4-ocp", "mxfp4-ceil", "mxint4", "mxfp4@had32", "mxint4@had32",
    "nvfp4", "nvint4", "nvfp4@had16", "nvint4@had16",
    "nf4-g64", "nf4-g64-dq", "lut4-g64", "lut3-g64", "lut2-g64", "lut3-channel",
    "dgq4-g128", "ternary-g128", "ternary-channel-dict",
    "int4-g128@had64", "int3-g128@had64", "int3-g128@rhad64", "int3-g128@awq", "int3-g128@perm",
    "int2-g128@had64",
)  # fmt: skip
METHODS = ("rtn", "gptq")


def main() -> None:
    """Compress, evaluate, print."""
    from bitnest import api, demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--calibration", action="append", default=[])
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        rows = [
            compress(api, args, work, name, method)
            for name in args.formats.split(",")
            for method in args.methods.split(",")
        ]
        started = time.monotonic()
        report = api.evaluate(
            [row["path"] for row in rows], against=args.model, data=args.data, batch_size=32
        ).to_json()
        print(f"evaluated in {time.monotonic() - started:.0f} s", file=sys.stderr)
    table = [
        {**row, "scores": found["scores"]}
        for row, found in zip(rows, report["rows"][1:], strict=True)
    ]
    show(report, table)
    result = {"machine": machine(), "report": report, "rows": table}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    print(json.dumps({"machine": machine(), "rows": [brief(row) for row in table]}))


def compress(
    api: Any, args: argparse.Namespace, work: Path, name: str, method: str
) -> dict[str, Any]:
    """One artifact; its format, method, bits and seconds."""
    out = work / f"{name}-{method}".replace("@", "_at_").replace("+", "_plus_")
    data = args.calibration if method != "rtn" or any(k in name for k in ("@awq", "@perm")) else ()
    result = api.compress(args.model, out, format=name, method=method, data=data)
    weights = sum(g.parameters for g in result.groups if g.format != "dense")
    error = sum(g.error * g.parameters for g in result.groups if g.format != "dense") / weights
    print(f"{name} {method}: {result.seconds:.1f} s", file=sys.stderr)
    return {
        "format": name, "method": method, "path": str(out), "bits": result.bits_per_weight,
        "nbytes": result.nbytes, "error": error, "seconds": result.seconds,
    }  # fmt: skip


def show(report: dict[str, Any], table: list[dict[str, Any]]) -> None:
    """A Markdown table, base perplexities in the head."""
    base = report["rows"][0]["scores"]
    names = [f"{s['text']} PPL ({s['perplexity']:.2f}) | KL" for s in base]
    print("| format | method | bits | " + " | ".join(names) + " | same top |")
    print("|---" * (4 + 2 * len(base)) + "|")
    for row in table:
        cells = [f"{s['perplexity']:.2f} | {s['kl']['mean']:.5f}" for s in row["scores"]]
        same = row["scores"][0]["kl"]["same_top"]
        head = f"| {row['format']} | {row['method']} | {row['bits']:.3f} | "
        print(head + " | ".join(cells) + f" | {same:.3f} |")


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """What the last line says of one row."""
    kl = {s["text"]: s["kl"]["mean"] for s in row["scores"]}
    ppl = {s["text"]: s["perplexity"] for s in row["scores"]}
    kept = {key: row[key] for key in ("format", "method", "bits", "nbytes", "error")}
    return {**kept, "perplexity": ppl, "kl": kl}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()

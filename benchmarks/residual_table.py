"""What a low-rank residual recovers of 3-bit round-to-nearest, and what it costs.

    python -m benchmarks.residual_table MODEL --data books=FILE [--data code=FILE ...] \
        [--calibration LABEL=FILE] [--method gptq] [--work DIR]

Every row is one artifact of MODEL in int3-g128, with a residual on some of its sites. `recovered`
is the share of the KL of the first row that is gone, KL summed over the texts; bytes are those of
all safetensors files, and of packed weights alone. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.format_table import machine

BASE = "int3-g128"
ATTENTION = "kind:attention"
FIRST_DOWN = r"re:layers\.[0-2]\..*down_proj"
MOST_DOWN = r"re:layers\.[0-4]\..*down_proj"
ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("none", (), ""),
    ("attention", (ATTENTION,), "lorc16"),
    ("attention", (ATTENTION,), "lqer16"),
    ("attention", (ATTENTION,), "hlr16"),
    ("attention, down 0-2", (ATTENTION, FIRST_DOWN), "lorc16"),
    ("attention, down 0-2", (ATTENTION, FIRST_DOWN), "lqer16"),
    ("attention, down 0-2", (ATTENTION, FIRST_DOWN), "hlr16"),
    ("attention, down 0-4", (ATTENTION, MOST_DOWN), "lqer16"),
    ("attention, down 0-4", (ATTENTION, MOST_DOWN), "hlr16"),
    ("all", ("*",), "lorc16"),
    ("all", ("*",), "lqer16"),
    ("all", ("*",), "hlr16"),
)


def main() -> None:
    """Compress, evaluate, print."""
    from bitnest import api, demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--calibration", action="append", default=[])
    parser.add_argument("--method", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        rows = [compress(api, args, work, *row) for row in ROWS]
        report = api.evaluate(
            [row["path"] for row in rows], against=args.model, data=args.data, batch_size=32
        ).to_json()
    for row, found in zip(rows, report["rows"][1:], strict=True):
        row["kl"] = {s["text"]: s["kl"]["mean"] for s in found["scores"]}
    show(rows)
    print(json.dumps({"machine": machine(), "method": args.method, "rows": rows}))


def compress(
    api: Any,
    args: argparse.Namespace,
    work: Path,
    where: str,
    patterns: tuple[str, ...],
    kind: str,
) -> dict[str, Any]:
    """One artifact."""
    inspected = api.inspect(args.model)["sites"] if "*" in patterns else []
    chosen = [f"kind:{k}" for k in {s["kind"] for s in inspected} - {"router"}] or list(patterns)
    rules = [f"{pattern}={BASE}+{kind}" for pattern in sorted(chosen)]
    name = f"{where}-{kind}-{args.method}".replace(" ", "").replace(",", "-")
    fitted = args.method != "rtn" or kind in {"lqer16", "hlr16"}
    result = api.compress(
        args.model, work / name, format=BASE, method=args.method, rules=rules,
        data=args.calibration if fitted else (),
    )  # fmt: skip
    print(f"{name}: {result.seconds:.1f} s", file=sys.stderr)
    return {
        "sites": where, "residual": kind or "none", "path": str(work / name),
        "nbytes": result.nbytes, "packed": result.nbytes - result.dense_bytes,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """A Markdown table against the first row."""
    base = rows[0]
    texts = list(base["kl"])
    print("| residual on | kind | + % bytes | + % packed | " + " | ".join(texts) + " | recovered |")
    print("|---" * (5 + len(texts)) + "|")
    for row in rows:
        more = 100 * (row["nbytes"] / base["nbytes"] - 1)
        packed = 100 * (row["packed"] / base["packed"] - 1)
        gone = 1 - sum(row["kl"].values()) / sum(base["kl"].values())
        cells = " | ".join(f"{row['kl'][text]:.5f}" for text in texts)
        head = f"| {row['sites']} | {row['residual']} | {more:.2f} | {packed:.2f} | "
        print(head + cells + f" | {100 * gone:.1f} % |")


if __name__ == "__main__":
    main()

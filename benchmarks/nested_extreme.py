"""Below two bits a weight: nested codes, BitStack's residual blocks and GPTQ at equal bytes.

    python -m benchmarks.nested_extreme MODEL --data LABEL=FILE ... [--work DIR]

Budgets are bits per quantised weight with everything that is stored for it. Rows but the last are
one artifact each, read in that size (widths per weight by `quantize/allocation/fitting`), with
widths of 1 to 4 or 8 bits, or up to 8 blocks of rank 1. `stack` is fitted under H; `BitStack` is
the same as published. `GPTQ` is an artifact of its own for every budget, planned over integers of 1
to 8 bits and ternary ones. Embedding and head stay dense. Every text is cut in half: the first
halves are analysed and calibrate, the second halves are measured on. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.predicted_kl import halves, machine

BUDGETS = (1.3, 1.5, 1.75, 2.0, 2.5)
CANDIDATES = ("int1-g128", "ternary-g128", *(f"int{b}-g128" for b in range(2, 9)))
NESTED = {
    "nest 1-4": "nest1234-g128@had64",
    "nest 1-8": "nest12345678-g128@had64",
    "stack": "stack12345678-r1@had64",
    "BitStack": "stack12345678-r1",
}


def main() -> None:
    """Compress, evaluate, print."""
    from bitnest import api, demo
    from bitnest.artifact import Artifact
    from bitnest.quantize.allocation.fitting import Fitting

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-extreme-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.data or [f"demo={demo.calibration_text()}"], work)
    options = {"data": first, "samples": args.samples, "length": args.length}
    statistics = work / "statistics"
    if not statistics.exists():
        api.analyze(args.model, statistics, formats=CANDIDATES, **options)
    options["statistics"] = statistics
    measure = partial(api.evaluate, against=args.model, data=second)
    rows: list[dict[str, Any]] = []
    for name, fmt in NESTED.items():
        out = nested(args.model, work / name.replace(" ", "-"), name, fmt, options)
        fitting = Fitting(Artifact.open(out))
        sizes = {bits: fitting.resident + weights(fitting) * bits / 8 for bits in BUDGETS}
        sizes = {b: int(size) for b, size in sizes.items() if size >= fitting.smallest}
        found = measure([out], sizes=list(sizes.values()))
        rows += [row(name, b, r) for b, r in zip(sizes, found.rows[1:], strict=True)]
        resident, quantised = fitting.resident, weights(fitting)
    for bits in BUDGETS:
        out = work / f"gptq-{bits:g}"
        if not out.exists():
            planned(args.model, out, int(resident + quantised * bits / 8), options)
        rows.append(row("GPTQ", bits, measure([out]).rows[1]))
    report(rows)
    print(json.dumps({"model": Path(args.model).name, "rows": rows, "machine": machine()}))


def nested(model: str, out: Path, name: str, fmt: str, options: dict[str, Any]) -> Path:
    """The artifact of one nested format, made once."""
    from bitnest import api
    from bitnest.quantize.nested import solution, stack

    if out.exists():
        return out
    started, solver = time.monotonic(), solution.solve_stack
    if name == "BitStack":
        solution.solve_stack = partial(stack.solve_stack, turns=0)
    try:
        api.compress(model, out, format=fmt, **options)
    finally:
        solution.solve_stack = solver
    sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
    return out


def planned(model: str, out: Path, size: int, options: dict[str, Any]) -> None:
    """The artifact of the plan whose weights take `size` bytes, dense ones included."""
    from bitnest import api

    asked = {"ends": False, "candidates": CANDIDATES, "statistics": options["statistics"]}
    plan = api.plan(model, bits=2.0, **asked)
    for _ in range(3):  # what is no weight depends a little on the plan
        rest = plan.sizes.artifact - plan.sizes.packed - plan.sizes.dense
        plan = api.plan(model, size=size + rest, **asked)
    api.compress(model, out, plan=plan.plan, **options)


def weights(fitting: Any) -> int:
    """How many are nested."""
    return int(fitting.menu.numel.sum())


def row(name: str, bits: float, measured: Any) -> dict[str, Any]:
    """One cell of the table."""
    return {
        "name": name, "bits": bits, "bytes": measured.nbytes,
        "kl": {s.text: s.kl.mean for s in measured.scores},
        "perplexity": {s.text: s.perplexity for s in measured.scores},
    }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> None:
    """Mean KL by budget."""
    print(f"{'mean KL':<10}" + "".join(f"{b:>10g}" for b in BUDGETS))
    for name in (*NESTED, "GPTQ"):
        own = {r["bits"]: sum(r["kl"].values()) / len(r["kl"]) for r in rows if r["name"] == name}
        cells = (f"{own[b]:10.4f}" if b in own else f"{'-':>10}" for b in BUDGETS)
        print(f"{name:<10}" + "".join(cells))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()

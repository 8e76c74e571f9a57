"""Experts dropped by every score, merged, replaced; routers tuned afterwards.

    python -m benchmarks.prune_experts MODEL --data LABEL=FILE ... [--keep 75%] [--statistics DIR]

Every text is cut in half: the first halves calibrate, the second halves are measured on. Every row
is the model with that many experts in each layer and everything else as it was, in 16 bit. `merge`
keeps all router rows and leads them to the merged expert, as published; `merge one row` is the
ordinary model. zero, copy, constant and best take the place of the experts that `relative` lets go.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.predicted_kl import halves, machine

SCORES = ("measured", "relative", "reap", "frequency", "gate", "output", "fisher", "naee")


def main() -> None:
    """Choose, evaluate, print."""
    from bitnest import demo
    from bitnest.api.pruning import Pruner
    from bitnest.checkpoint import Checkpoint
    from bitnest.errors import BitnestError

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--keep", action="append", default=[])
    parser.add_argument("--statistics", type=Path, help="for the score fisher")
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-prune-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.data or [f"demo={demo.calibration_text()}"], work)
    pruner = Pruner(
        Checkpoint.open(args.model), data=first, samples=args.samples, length=args.length
    )
    rows: list[dict[str, Any]] = []
    for keep in args.keep or ["75%", "50%"]:
        for name, options in variants(args):
            started = time.monotonic()
            try:
                chosen = pruner.choose(keep, ordinary=name not in {"merge", "merge aligned"},
                                       **options)  # fmt: skip
            except BitnestError as error:  # too many subsets, no gradients
                sys.stderr.write(f"{keep} {name}: {error}\n")
                continue
            rows.append(row(args, work, pruner, chosen, keep, name, started, second))
            if name in {"measured", "constant"}:
                started = time.monotonic()
                tuned = pruner.tuned(chosen)
                rows.append(row(args, work, pruner, tuned, keep, f"{name}, tuned", started, second))
    print(json.dumps({"model": Path(args.model).name, "rows": rows, "machine": machine()}))


def variants(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of the rows."""
    found: list[tuple[str, dict[str, Any]]] = [
        (score, {"score": score, "statistics": args.statistics}) for score in SCORES
    ]
    found += [
        (fate, {"fate": fate, "score": "relative"}) for fate in ("zero", "copy", "constant", "best")
    ]
    for aligned in (False, True):
        name = "merge aligned" if aligned else "merge"
        found += [(name, {"fate": "merge", "align": aligned})]
    found.append(("merge aligned one row", {"fate": "merge", "align": True}))
    only = args.only.split(",") if args.only else [name for name, _ in found]
    return [(name, options) for name, options in found if name in only]


def row(
    args: argparse.Namespace, work: Path, pruner: Any, chosen: Any, keep: str, name: str,
    started: float, second: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Write the reduced model as an artifact of dense tensors, measure it, forget it."""
    from bitnest import api
    from bitnest.quantize.compress import prepare, run
    from bitnest.recipe import Recipe

    seconds = time.monotonic() - started
    out = work / "reduced"
    shutil.rmtree(out, ignore_errors=True)
    job = prepare(pruner.reduced(chosen.reduction), Recipe(format="dense", method="rtn"))
    run(job, out, fresh=True)
    found = api.evaluate([out], against=args.model, data=second, windows=args.windows)
    scores = found.rows[1].scores
    kl = {own.text: own.kl.mean for own in scores}
    result = {
        "keep": keep, "name": name, "kl": kl, "mean": sum(kl.values()) / len(kl),
        "ppl": {own.text: own.perplexity for own in scores}, "seconds": seconds,
    }  # fmt: skip
    cells = " ".join(f"{label} {value:.5f}" for label, value in kl.items())
    print(f"{keep:4} {name:24} mean KL {result['mean']:.5f}  {cells}  {seconds:.0f} s", flush=True)
    return result


if __name__ == "__main__":
    main()

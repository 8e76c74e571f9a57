"""Which matrices read wider inputs: our measured rule against FlexQ's and against thresholds.

    python -m benchmarks.input_rules MODEL --data LABEL=FILE ... [--check LABEL=FILE ...] \
        [--parts flexq,comet] [--share 0.16] [--work DIR] [--samples N] [--length N] [--windows N]

flexq   weights int6-g128, inputs int6-g128 or int8-g128. FlexQ gives all down projections 8 bits;
        ours gives them to whatever loses most by measure, at the same mean width over
        multiply-accumulates, and once more at the same number of matrices.
comet   weights int4-g128@perm, so that loud channels come first; inputs int4-g128, the first 128
        channels in 8 bits, or all. Ours gives 8 bits to `share` of the blocks of 128 channels by
        measured loss, `abs-max` to the blocks in which the largest magnitudes were seen, COMET's
        idea of an outlier block with a threshold that gives the same share.

Rules are held against each other with all inputs narrow and all wide. Every text is cut in half,
the first halves calibrate, the second are measured on; with --check, --data is for calibration and
--check is measured on. KL is to the 16-bit model, weights' error included: `16 bit` is that alone.
Predictions are of the statistics. DIR keeps what was measured. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plan_policies import evaluate
from benchmarks.predicted_kl import halves, machine

NARROW, WIDE = "int6-g128", "int8-g128"
FLEXQ_WEIGHTS = "int6-g128"
COMET_WEIGHTS = "int4-g128@perm"
COMET = ("int4-g128", "128xint8-g128~int4-g128", "int8-g128")
BLOCK = 128


def main() -> None:
    """Analyze, plan, compress, measure, print."""
    from bitnest import api, demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--check", action="append", default=[])
    parser.add_argument("--parts", default="flexq,comet")
    parser.add_argument("--share", type=float, default=0.16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-inputs-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = args.data, args.check
    if not second:
        first, second = halves(first or [f"demo={demo.calibration_text()}"], work)
    statistics = api.analyze(
        args.model, work / "statistics", data=first, samples=args.samples, length=args.length,
        formats=[FLEXQ_WEIGHTS, COMET_WEIGHTS], inputs=[NARROW, *COMET],
    ).path  # fmt: skip
    rows: list[dict[str, Any]] = []
    for part in args.parts.split(","):
        rules = flexq(args, statistics) if part == "flexq" else comet(args, statistics)
        own = measured(args, part, rules, first, second, work, statistics)
        report(part, own)
        rows.extend(own)
    print(f"\n{machine()}")
    print(json.dumps({"model": Path(args.model).name, "rows": rows, "machine": machine()}))


def flexq(args: argparse.Namespace, statistics: Path) -> dict[str, dict[str, str]]:
    """Rule -> site -> inputs."""
    grounds = menu(args, statistics, FLEXQ_WEIGHTS, (NARROW, WIDE))
    items, cost = grounds.menu.items, grounds.menu.bits
    down = [item[0].name.endswith("down_proj") for item in items]
    fixed = np.array([grounds.menu.formats.index(WIDE if d else NARROW) for d in down])
    rows = np.arange(len(items))
    ours = grounds.objective.minimise(cost, int(cost[rows, fixed].sum())).choice
    count = np.zeros_like(cost)
    count[:, grounds.menu.formats.index(WIDE)] = [len(item) for item in items]
    counted = grounds.objective.minimise(count, int(count[rows, fixed].sum())).choice
    return {
        "16 bit": {},
        **{f"all {name}": everywhere(grounds, name) for name in (NARROW, WIDE)},
        "FlexQ: down projections": grounds.menu.plan(fixed),
        "ours, same mean width": grounds.menu.plan(ours),
        "ours, same number of matrices": grounds.menu.plan(counted),
    }


def comet(args: argparse.Namespace, statistics: Path) -> dict[str, dict[str, str]]:
    """Rule -> site -> inputs."""
    grounds = menu(args, statistics, COMET_WEIGHTS, COMET)
    low, high = 4, 8
    budget = round((low + args.share * (high - low)) * int(grounds.menu.numel.sum()))
    ours = grounds.objective.minimise(grounds.menu.bits, budget).choice
    return {
        "16 bit": {},
        "all A4": everywhere(grounds, COMET[0]),
        "abs-max threshold": by_threshold(statistics, grounds, budget),
        "ours": grounds.menu.plan(ours),
        "all A8": everywhere(grounds, COMET[-1]),
    }


def menu(args: argparse.Namespace, statistics: Path, weights: str, inputs: tuple[str, ...]) -> Any:
    """What there is to choose from."""
    from bitnest import api

    planned = api.plan(
        args.model, statistics=statistics, format=weights, inputs=inputs,
        input_bits=8.0,
    )  # fmt: skip
    assert planned.inputs is not None
    return planned.inputs.grounds


def everywhere(grounds: Any, name: str) -> dict[str, str]:
    """One format for all."""
    return {site.name: name for item in grounds.menu.items for site in item}


def by_threshold(statistics: Path, grounds: Any, budget: int) -> dict[str, str]:
    """Blocks of 128 channels in descending order of the largest magnitude seen in them, until the
    budget is used up; channels in descending order of energy, so an item's first block goes
    first."""
    peaks = block_peaks(statistics)
    cost, names = grounds.menu.bits, list(grounds.menu.formats)
    first, whole = names.index(COMET[1]), names.index(COMET[2])
    chosen = np.full(len(cost), names.index(COMET[0]))
    steps = []
    for i, item in enumerate(grounds.menu.items):
        loud, quiet = peaks[item[0].name]
        steps += [(loud, i, first), (min(loud, quiet), i, whole)]
    rows = np.arange(len(cost))
    for _, i, choice in sorted(steps, key=lambda step: -step[0]):
        before = chosen[i]
        chosen[i] = choice
        if int(cost[rows, chosen].sum()) > budget:
            chosen[i] = before
    return dict(grounds.menu.plan(chosen))


def block_peaks(statistics: Path) -> dict[str, tuple[float, float]]:
    """Site -> largest magnitudes among the 128 channels of most energy, and among the others."""
    from bitnest.calibrate.blocks import read_moments
    from bitnest.statistics import Statistics

    opened = Statistics.open(statistics)
    found: dict[str, tuple[float, float]] = {}
    for layer in opened.layers:
        seen: dict[Any, tuple[Any, Any]] = {}
        for i, item in enumerate(layer["inputs"]):
            moments = read_moments(opened, layer["layer"], f"inputs.{i}").pooled()
            seen.update({reader: (moments.square, moments.absmax) for reader in item["readers"]})
        for i, item in enumerate(layer["experts"]):
            for down, key in enumerate(("up", "down")):
                moments = read_moments(opened, layer["layer"], f"experts.{i}.{key}").pooled()
                for e in range(item["experts"]):
                    place = (item["name"], e, bool(down))
                    seen[place] = (moments.square[e], moments.absmax[e])
        for site in opened.sites_of(layer["layer"]):
            key = site.module
            if site.expert is not None and site.param != "weight":
                key = (site.module, site.expert, site.param == "down_proj")  # type: ignore[assignment]
            if key not in seen:
                continue
            square, absmax = seen[key]
            peaks = absmax[square.argsort(descending=True)]
            wide = min(BLOCK, len(peaks) // 2)
            found[site.name] = (float(peaks[:wide].max()), float(peaks[wide:].max()))
    return found


def measured(
    args: argparse.Namespace,
    part: str,
    rules: Mapping[str, Mapping[str, str]],
    first: list[str],
    second: list[str],
    work: Path,
    statistics: Path,
) -> list[dict[str, Any]]:
    """One row per rule."""
    from bitnest import api
    from bitnest.formats.inputs import joined_name
    from bitnest.plan import Plan

    weights = FLEXQ_WEIGHTS if part == "flexq" else COMET_WEIGHTS
    file = work / "measured.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    rows, missing = [], {}
    base = api.plan(args.model, statistics=statistics, format=weights, inputs=[WIDE])
    formats = base.menu.plan(base.choice)
    for rule, inputs in rules.items():
        chosen = {n: joined_name(f, inputs.get(n, "")) for n, f in formats.items()}
        plan = Plan.of(chosen, model=base.plan.model, source=base.plan.source)
        key = hashlib.sha256(json.dumps(sorted(chosen.items())).encode()).hexdigest()[:16]
        key += f"-{args.windows}"
        plan.write(work / f"plan-{key}.yaml")
        found = api.check_plan(args.model, plan, statistics=statistics)
        wide = sum(name == WIDE for name in inputs.values())
        rows.append({
            "part": part, "rule": rule, "key": key, "wide": wide, "predicted": found.mean,
            "bits": None if found.inputs is None else found.inputs.bits,
            "alone": 0.0 if found.inputs is None else found.inputs.alone,
        })  # fmt: skip
        if key in known:
            continue
        out = work / f"made-{key}"
        started = time.monotonic()
        api.compress(
            args.model, out, plan=plan, data=first, samples=args.samples, length=args.length
        )
        sys.stderr.write(f"{part}, {rule}: {time.monotonic() - started:.0f} s\n")
        missing[key] = out
    if missing:
        known |= evaluate(args, missing, second)
        file.write_text(json.dumps(known))
    for row in rows:
        values = known[row["key"]]
        row |= {"kl": values["kl"], "error": values["error"], "perplexity": values["perplexity"]}
        row["mean"] = sum(values["kl"].values()) / len(values["kl"])
    return rows


def report(part: str, rows: list[dict[str, Any]]) -> None:
    """A table."""
    texts = list(rows[0]["kl"])
    head = "  ".join(f"{t + ' KL':>10} {'PPL':>8}" for t in texts)
    print(f"\n{part:<32} bits  A8 matrices  {head}   mean KL      +-  predicted")
    for row in rows:
        cells = "  ".join(f"{row['kl'][t]:10.6f} {row['perplexity'][t]:8.3f}" for t in texts)
        error = math.hypot(*(e or 0.0 for e in row["error"].values())) / len(texts)
        bits = "   -" if row["bits"] is None else f"{row['bits']:4.2f}"
        print(f"{row['rule']:<32} {bits}  {row['wide']:>11}  {cells}  {row['mean']:8.6f} "
              f"{error:7.6f}  {row['predicted']:8.6f}")  # fmt: skip
    sys.stdout.flush()


if __name__ == "__main__":
    main()

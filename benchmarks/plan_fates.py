"""Plans whose experts may be dropped, replaced or merged against plans without, at equal bytes.

    python -m benchmarks.plan_fates MODEL --data LABEL=FILE ... [--bits 2.0,2.25,2.5,3.0] \
        [--fates drop,constant,copy,merge] [--work DIR] [--samples N] [--length N] [--windows N]

Every text is cut in half: the first halves calibrate, the second halves are measured on. Candidates
are int2 to int8 in groups of 128. Both plans get one size, that of a plan without fates at so many
bits (embedding and head stay as they are). DIR keeps what was made. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.plan_policies import available
from benchmarks.predicted_kl import halves, machine

ROOM = 256  # bytes: the manifest says the size that was asked for


def main() -> None:
    """Plan, compress, evaluate, print."""
    from bitnest import api, demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--bits", default="2.0,2.25,2.5,3.0")
    parser.add_argument("--fates", default="drop,constant,copy,merge")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-fates-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.data or [f"demo={demo.calibration_text()}"], work)
    kinds = args.fates.split(",")
    statistics = api.analyze(
        args.model, work / "statistics", data=first, samples=args.samples, length=args.length,
        formats=[*api.CANDIDATES, *kinds],
    ).path  # fmt: skip
    rows: list[dict[str, Any]] = []
    print("bits   fates      bytes       predicted   KL        standard error   gone")
    for bits in (float(text) for text in args.bits.split(",")):
        size = (
            api.plan(
                args.model, statistics=statistics, candidates=api.CANDIDATES, bits=bits, ends=False
            ).sizes.total
            + ROOM
        )
        for fates in ([], kinds):
            rows.append(measure(args, statistics, second, work, bits, size, fates))
        for row in rows[-2:]:
            gone = ", ".join(f"{count} {name}" for name, count in row["gone"].items()) or "-"
            print(
                f"{bits:<6g} {'with' if row['fates'] else 'without':10} {row['bytes']:<11,} "
                f"{row['predicted']:<11.5f} {row['kl']:<9.5f} {row['error']:<16.5f} {gone}",
                flush=True,
            )
    print(machine())
    print(json.dumps({"model": Path(args.model).name, "rows": rows, "machine": machine()}))


def measure(
    args: argparse.Namespace,
    statistics: Path,
    second: list[str],
    work: Path,
    bits: float,
    size: int,
    kinds: list[str],
) -> dict[str, Any]:
    """One plan, carried out and measured. size: of the artifact."""
    from bitnest import api
    from bitnest.formats import FateFormat, parse_format
    from bitnest.packed.decoded import open_checkpoint
    from bitnest.quantize.compress import prepare
    from bitnest.recipe import Recipe

    plan = api.plan(
        args.model, statistics=statistics, candidates=[*api.CANDIDATES, *kinds], size=size,
        ends=False,
    ).plan  # fmt: skip
    out = work / f"{bits:g}-{'with' if kinds else 'without'}"
    shutil.rmtree(out, ignore_errors=True)
    made = api.compress(
        args.model, out, plan=plan, statistics=statistics,
        samples=args.samples, length=args.length,
    )  # fmt: skip
    found = [
        api.evaluate([out], against=args.model, data=[text], windows=available(args, text))
        for text in second
    ]  # fmt: skip
    scores = [part.rows[-1].scores[0].kl for part in found]
    kl, error = [s.mean for s in scores if s], [s.error for s in scores if s]
    sites = prepare(open_checkpoint(args.model), Recipe(format="dense")).sites
    gone: dict[str, int] = {}
    chosen = plan.formats(sites)
    for site in sites:
        fate = parse_format(chosen[site.name])
        if isinstance(fate, FateFormat) and site.name.endswith("down_proj"):
            gone[fate.kind] = gone.get(fate.kind, 0) + 1
    assert made.predicted is not None
    return {
        "bits": bits, "fates": kinds, "bytes": made.artifact_bytes,
        "gone": gone,
        "predicted": made.predicted["mean"], "kl": sum(kl) / len(kl),
        "error": sum(e * e for e in error) ** 0.5 / len(error),
    }  # fmt: skip


if __name__ == "__main__":
    main()
